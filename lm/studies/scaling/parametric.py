"""The parametric law: loss = E + A / N^alpha + B / D^beta, of N parameters that saw D tokens.

Hoffmann et al. 2022, sec. 3.3, arXiv 2203.15556: the Huber loss of the error of log loss, L-BFGS from a grid of starts.
As Besiroglu et al. 2024, arXiv 2404.10102, found, theirs had stopped early, because the Huber losses were averaged and
so fell below the optimizer's tolerance, and their intervals were too narrow for their number of runs. Here the losses
are summed, in units of delta^2, the tolerances are tight, and the intervals are of a bootstrap over runs.

The resampled tables, each begun where the whole one ended, descend by BFGS: with five numbers there is no memory to
limit, and scipy's L-BFGS hands such tiny matrices to BLAS threads, which costs up to 25 times the processor time.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize

from lm.core.statistics import Estimate
from lm.studies.scaling.points import MIN_RUNS, Points

HUBER_DELTA = 1e-3  # of the Huber loss: theirs
LAW_PARAMETERS = ("E", "A", "B", "alpha", "beta")
BEST_STARTS = 8  # starts of the grid that descend; theirs is 4500 descents, mostly into the same valley
LBFGS_OPTIONS = {"maxiter": 3000, "maxfun": 6000, "ftol": 1e-13, "gtol": 1e-9, "maxcor": 20}


class ScalingLaw(NamedTuple):
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters, tokens):
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def optimum(self, flops):
        """(parameters, tokens) of the least loss at `flops` = 6 N D (theirs, eq. 4)."""
        balance = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = balance * (flops / 6) ** self.size_exponent
        return parameters, flops / 6 / parameters

    @property
    def size_exponent(self) -> float:
        """a of N_opt ~ C^a; tokens grow by 1 - a."""
        return self.beta / (self.alpha + self.beta)


class ParametricFit(NamedTuple):
    """A law and the laws of resampled runs."""

    law: ScalingLaw
    resampled: Sequence[ScalingLaw]
    errors: np.ndarray  # f64[P]  log loss less the law's, of each run
    objective: float  # of what was minimised: the sum of Huber losses over delta^2

    def estimate(self, function) -> Estimate:
        """function(law) with its 95 % interval, which is of percentiles."""
        return percentile_estimate(function(self.law), [function(law) for law in self.resampled])

    def estimates(self) -> Mapping[str, Estimate]:
        """By the name of each parameter; "growth" is the exponent of the best size."""
        estimates_by_name = {name: self.estimate(lambda law: getattr(law, name)) for name in LAW_PARAMETERS}
        return {**estimates_by_name, "growth": self.estimate(lambda law: law.size_exponent)}

    def predicted_loss(self, parameters: float, tokens: float, *, seed: int = 0) -> Estimate:
        """The loss of one more run. Its interval includes the uncertainty of the law, and the distance of runs from
        it."""
        n = len(self.errors)
        drawn = (
            np.random.default_rng(seed).choice(self.errors, len(self.resampled))
            * (n / (n - len(LAW_PARAMETERS))) ** 0.5
        )
        losses = [law.loss(parameters, tokens) for law in self.resampled] * np.exp(drawn)
        return percentile_estimate(self.law.loss(parameters, tokens), losses)


def percentile_estimate(value: float, draws: Sequence[float]) -> Estimate:
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(float(value), float(np.std(draws)), float(low), float(high))


def parametric_fit(points: Points, *, draws: int = 1000, seed: int = 0) -> ParametricFit:
    """The law of `points`, with `draws` resamplings of them; each of these starts from what the whole table gave."""
    objective = CenteredObjective(points)
    descents = objective.descents(objective.starting_points())
    law, value = objective.law(descents[0][1]), descents[0][0]
    random, resampled = np.random.default_rng(seed), []
    while len(resampled) < draws:
        runs = random.integers(len(points.loss), size=len(points.loss))
        if len(set(runs)) >= min(MIN_RUNS, len(points.loss)) - 2:
            resampled.append(objective.law(objective.subset(runs).local_minimum(descents[0][1])))
    return ParametricFit(
        law, resampled, np.log(points.loss) - np.log(law.loss(points.parameters, points.tokens)), value
    )


class CenteredObjective:
    """The minimised function, with N and D in units of their geometric means: x = (log E, log A', log B', alpha,
    beta)."""

    def __init__(self, points: Points):
        self._log_parameters, self._log_tokens, self._log_loss = map(np.log, points)
        self._middle = self._log_parameters.mean(), self._log_tokens.mean()
        self._n, self._d = self._log_parameters - self._middle[0], self._log_tokens - self._middle[1]

    def subset(self, runs: np.ndarray) -> "CenteredObjective":
        """Of some runs, in the same units."""
        other = object.__new__(CenteredObjective)
        other._middle = self._middle
        other._n, other._d, other._log_loss = self._n[runs], self._d[runs], self._log_loss[runs]
        return other

    def law(self, x: np.ndarray) -> ScalingLaw:
        e, a, b, alpha, beta = map(float, x)
        n, d = self._middle
        return ScalingLaw(float(np.exp(e)), float(np.exp(a + alpha * n)), float(np.exp(b + beta * d)), alpha, beta)

    def starting_points(self) -> list[np.ndarray]:
        """The best starts of a grid over the exponents and over the shares of E and A' in the least loss."""
        least, grid = self._log_loss.min(), []
        for alpha, beta, floor, part in itertools.product(
            (0.1, 0.2, 0.35, 0.5, 0.8, 1.2), (0.1, 0.2, 0.35, 0.5, 0.8, 1.2), (0.05, 0.3, 0.6, 0.9), (0.2, 0.5, 0.8)
        ):
            rest = np.log(1 - floor)
            grid.append(
                [least + np.log(floor), least + rest + np.log(part), least + rest + np.log(1 - part), alpha, beta]
            )
        values = [self.objective(np.array(x))[0] for x in grid]
        return [np.array(grid[i]) for i in np.argsort(values)[:BEST_STARTS]]

    def descents(self, starts: Sequence[np.ndarray]) -> list[tuple[float, np.ndarray]]:
        """(value, x) where L-BFGS ends from each start, the lowest first."""
        low = self._log_loss.min()
        bounds = [(low - 12, low + 2), (low - 12, low + 6), (low - 12, low + 6), (1e-3, 4), (1e-3, 4)]
        ends = []
        for start in starts:
            end = minimize(self.objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=LBFGS_OPTIONS)
            ends.append((float(end.fun), end.x))
        return sorted(ends, key=lambda pair: pair[0])

    def local_minimum(self, x: np.ndarray) -> np.ndarray:
        """Where BFGS ends from x."""
        with np.errstate(over="ignore"):
            return minimize(self.objective, x, jac=True, method="BFGS", options={"gtol": 1e-6, "maxiter": 1000}).x

    def objective(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """The sum over runs of Huber(log-sum-exp of the terms - log loss) / delta^2, and its gradient."""
        e, a, b, alpha, beta = x
        terms = np.stack([np.full_like(self._n, e), a - alpha * self._n, b - beta * self._d])
        top = terms.max(axis=0)
        shares = np.exp(terms - top)
        total = shares.sum(axis=0)
        error = (top + np.log(total) - self._log_loss) / HUBER_DELTA
        size = np.abs(error)
        slope = np.clip(error, -1, 1) / HUBER_DELTA
        each = shares / total * slope
        gradient = np.array([each[0].sum(), each[1].sum(), each[2].sum(), -each[1] @ self._n, -each[2] @ self._d])
        return float(np.where(size <= 1, error**2 / 2, size - 0.5).sum()), gradient

"""IsoFLOP parabolas: the best size among runs of equal cost, and how it grows with the cost.

Hoffmann et al. 2022, sec. 3.2, arXiv 2203.15556: at each budget the loss is a parabola in log N; its lowest point gives
N_opt, and D_opt with it; log N_opt over log C is a line, whose slope is a of N_opt ~ C^a.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm.core.statistics import Estimate
from lm.studies.scaling.parametric import percentile_estimate

MAX_EXTRAPOLATION = 1.0  # how far beyond the measured sizes, in nats of size, a lowest point still counts


class BudgetRuns(NamedTuple):
    """Runs of one cost, f64[S] each; at least four, as three fix a parabola and leave no error."""

    parameters: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray


class IsoflopMinimum(NamedTuple):
    """Where a budget's parabola is lowest."""

    parameters: float
    tokens: float
    flops: float
    loss: float
    bend: float  # of the parabola; a valley has it above 0
    inside: bool  # whether the lowest point lies within the sizes that were run


class IsoflopFit(NamedTuple):
    """How the best size and the best number of tokens grow with the cost, with 95 % intervals."""

    minima: Sequence[IsoflopMinimum]
    size_exponent: Estimate | None  # a of N_opt ~ C^a; None where fewer than two budgets have a valley
    token_exponent: Estimate | None  # b of D_opt ~ C^b
    lines: Sequence[tuple[float, float]]  # (slope, offset) of log N_opt and of log D_opt over log C
    failed_fraction: float  # the share of redrawn tables in which fewer than two budgets have a valley

    def optimum(self, flops: float) -> tuple[float, float]:
        return tuple(float(np.exp(slope * np.log(flops) + offset)) for slope, offset in self.lines)


def isoflop_fit(budgets: Sequence[BudgetRuns], *, draws: int = 1000, seed: int = 0) -> IsoflopFit:
    """Parabolas and lines, and the same with `draws` times redrawn errors.

    A run's error is its distance from its budget's parabola. The errors of all budgets are drawn with replacement,
    scaled by sqrt(S / (S - 3)) because fitting makes them smaller.
    """
    fits = [IsoflopParabola(budget) for budget in budgets]
    errors = np.concatenate([fit.errors for fit in fits])
    random = np.random.default_rng(seed)
    redrawn = [
        fit.minimum(fit.fitted_loss + random.choice(errors, size=(draws, len(fit.fitted_loss)))) for fit in fits
    ]  # f64[draws] of log N, log D, log C each, nan where there is no valley
    minima = [fit.minimum(budget.loss[None]) for fit, budget in zip(fits, budgets)]
    lines = [line_fits(np.stack([each[i] for each in minima]), np.stack([each[2] for each in minima])) for i in (0, 1)]
    several = [
        line_fits(np.stack([each[i] for each in redrawn]), np.stack([each[2] for each in redrawn])) for i in (0, 1)
    ]
    known = np.isfinite(lines[0][0][0]) and np.isfinite(several[0][0]).any()
    estimates = [
        percentile_estimate(slope[0], many[np.isfinite(many)]) if known else None
        for (slope, _), (many, _) in zip(lines, several)
    ]
    return IsoflopFit(
        [fit.isoflop_minimum(budget) for fit, budget in zip(fits, budgets)],
        *estimates,
        [(float(slope[0]), float(offset[0])) for slope, offset in lines],
        float(np.mean(~np.isfinite(several[0][0]))),
    )


class IsoflopParabola:
    """Least squares of loss over log N at one budget; log D and log C follow log N along it the same way."""

    def __init__(self, budget: BudgetRuns):
        size = np.log(budget.parameters)
        self.middle, self.low, self.high = size.mean(), size.min(), size.max()
        powers = (size - self.middle)[:, None] ** np.arange(3)
        self._solve = np.linalg.pinv(powers)
        self.coefficients = self._solve @ budget.loss
        self.fitted_loss = powers @ self.coefficients
        n = len(size)
        self.errors = (budget.loss - self.fitted_loss) * (n / (n - 3)) ** 0.5
        self._tokens, self._flops = self._solve @ np.log(budget.tokens), self._solve @ np.log(budget.flops)

    def minimum(self, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log N, log D and log C, f64[K] each, at the lowest points for losses f64[K,S]; nan where there is none."""
        _, slope, bend = self._solve @ loss.T
        with np.errstate(divide="ignore", invalid="ignore"):
            x = np.where(bend > 0, -slope / (2 * bend), np.nan)
        reach = (self.low - MAX_EXTRAPOLATION - self.middle, self.high + MAX_EXTRAPOLATION - self.middle)
        x = np.where((x >= reach[0]) & (x <= reach[1]), x, np.nan)
        return x + self.middle, *(np.polyval(c[::-1], x) for c in (self._tokens, self._flops))

    def isoflop_minimum(self, budget: BudgetRuns) -> IsoflopMinimum:
        size, tokens, flops = (float(np.exp(each[0])) for each in self.minimum(budget.loss[None]))
        loss = float(self.loss_at(np.log(size)))
        inside = bool(self.low <= np.log(size) <= self.high)
        return IsoflopMinimum(size, tokens, flops, loss, float(self.coefficients[2]), inside)

    def loss_at(self, size):
        """The parabola's loss at log N."""
        return np.polyval(self.coefficients[::-1], size - self.middle)


def line_fits(y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope and offset, f64[K] each, of lines y over x, f64[G,K] each, through what is finite; nan for under two."""
    known = np.isfinite(y) & np.isfinite(x)
    count = known.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_x, mean_y = (np.where(known, each, 0).sum(axis=0) / count for each in (x, y))
        dx = np.where(known, x - mean_x, 0)
        slope = (dx * np.where(known, y - mean_y, 0)).sum(axis=0) / (dx**2).sum(axis=0)
    slope = np.where(count >= 2, slope, np.nan)
    return slope, mean_y - slope * mean_x

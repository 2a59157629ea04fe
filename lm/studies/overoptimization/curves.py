"""The curves and their fits: best-of-n by its unbiased estimator, alpha and beta by least squares, turning points."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import gammaln

from lm.core.statistics import Estimate, mean_estimate
from lm.feedback.agreement import bootstrap_estimate

BEST_OF_N, PPO = "best of n", "ppo"

# R(d) = alpha * first + beta * second, with d the square root of the KL (Gao et al. 2022, eq. 1 and 2).
CURVE_FORMS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    BEST_OF_N: lambda d: np.stack([d, -d * d]),  # d (alpha - beta d)
    PPO: lambda d: np.stack([d, -d * np.log(d)]),  # d (alpha - beta log d)
}
CURVE_PEAKS: Mapping[str, Callable[[float, float], float]] = {  # the d at which that is largest, for beta > 0
    BEST_OF_N: lambda alpha, beta: alpha / (2 * beta),
    PPO: lambda alpha, beta: float(np.exp(alpha / beta - 1)),
}


class RewardCurve(NamedTuple):
    """One way of optimizing one proxy: K stations, P prompts. Gains are over the start, in deviations of its
    answers."""

    method: str  # BEST_OF_N or PPO
    rankings: int  # that the proxy learned from
    members: int  # 1: a single proxy; more: an ensemble
    amounts: Sequence[int]  # n, or updates
    kl: np.ndarray  # f64[K,P]
    gold: np.ndarray  # f64[K,P]
    proxy: np.ndarray  # f64[K,P]

    @property
    def distance(self) -> np.ndarray:
        """f64[K]: the square root of the KL."""
        return np.sqrt(np.maximum(self.kl.mean(axis=1), 1e-6))

    @property
    def name(self) -> str:
        proxies = "one proxy" if self.members == 1 else f"{self.members} proxies"
        return f"{self.method}, {self.rankings:,} verdicts, {proxies}"


def within_prompt_deviation(scores: np.ndarray) -> float:
    """The standard deviation of scores [P,N] within a prompt, over all prompts."""
    return float(np.sqrt(np.var(scores, axis=1, ddof=1).mean()))


def best_of_n_mean(values: np.ndarray, by: np.ndarray, n: int) -> np.ndarray:
    """f64[P]: the mean of `values` at the answer that is best `by`, over all choices of n of the N answers; both [P,N].

    sum_i C(i - 1, n - 1) / C(N, n) * value_(i), with i the rank by `by`, 1 the lowest: unbiased for n fresh answers.
    Where several are equal `by`, each is as likely to be taken. Nakano et al. 2021, app. I, arXiv 2112.09332; Gao et
    al. 2022, sec. 2.
    """
    N = by.shape[1]
    i = np.arange(n, N + 1)
    weights = np.exp(_log_choose(i - 1, n - 1) - _log_choose(N, n))
    return np.array([_tie_averaged(v, b)[np.argsort(b, kind="stable")][n - 1 :] @ weights for v, b in zip(values, by)])


def _tie_averaged(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Each value replaced by the mean over those that are equal `by`."""
    _, group, counts = np.unique(by, return_inverse=True, return_counts=True)
    return (np.bincount(group, weights=values) / counts)[group]


def _log_choose(n, k):
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


def best_of_n_kl(n):
    """log n - (n - 1) / n: an upper bound, met where no two answers are alike (Beirami et al. 2024, arXiv
    2401.01879)."""
    return np.log(n) - (n - 1) / n


def best_of_n_counts(most: int) -> list[int]:
    """1 and then about four n in each doubling, up to `most`."""
    return sorted({1, *np.unique(np.round(np.geomspace(1, most, int(4 * np.log2(most)) + 1)).astype(int)).tolist()})


def fitted_coefficients(form: str, d: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """(alpha, beta) of the form in CURVE_FORMS that is nearest to gain f64[K] at distances d f64[K], by least
    squares. The station at distance 0 is left out."""
    away = d > 1e-2
    return np.linalg.lstsq(CURVE_FORMS[form](d[away]).T, gain[away], rcond=None)[0]


def coefficient_estimates(curve: RewardCurve, gain: np.ndarray) -> dict[str, Any]:
    """alpha and beta with the intervals of a bootstrap over prompts, and where the form is largest, if beta > 0."""
    both = np.concatenate([curve.kl, gain])

    def statistic(which: int, rows: np.ndarray) -> float:
        kl, score = np.split(rows.mean(axis=-1), 2)
        return float(fitted_coefficients(curve.method, np.sqrt(np.maximum(kl, 0.0)), score)[which])

    alpha, beta = (bootstrap_estimate(functools.partial(statistic, which), both) for which in (0, 1))
    return {
        "alpha": alpha._asdict(),
        "beta": beta._asdict(),
        "peak": CURVE_PEAKS[curve.method](alpha.value, beta.value) if beta.value > 0 else None,
    }


def gold_decline(curve: RewardCurve) -> Estimate:
    """How far the gold score at the last station is below its highest. One half of the prompts chooses the highest
    station and the other half measures the fall, both ways round, so that choosing a lucky station adds no bias."""
    falls = np.empty(curve.gold.shape[1])
    for half in (0, 1):
        best = np.argmax(curve.gold[:, half::2].mean(axis=1))
        falls[1 - half :: 2] = (curve.gold[-1] - curve.gold[best])[1 - half :: 2]
    return mean_estimate(falls)

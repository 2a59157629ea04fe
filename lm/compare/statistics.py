"""Numbers of settings: means over seeds, differences from a reference, and the conclusions that they allow."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import betaincc, gammaln

from lm.compare.settings import Setting
from lm.core.statistics import (
    Estimate,
    p_value,
    student_interval,
    student_mean,
    welch_degrees_of_freedom,
    welch_difference,
)

MAX_SEEDS_UNJUDGED = 2  # with so many seeds or fewer, noise cannot be judged
MIN_POOLED_SETTINGS = 3  # settings, at least, whose spread is worth pooling
UNEQUAL_SPREAD_P = 0.01  # p of Cochran's C below which spreads are considered different
ROUNDING_ERROR = 1e-6  # of a value: no more than the rounding of float32, so no spread
MINIMIZE, MAXIMIZE = "minimize", "maximize"
# Metrics that are better if higher, by their last part, or by their first part with "/". All others: lower is better.
HIGHER_IS_BETTER = ("accuracy", "reward", "margin", "stopped", "score/", "tokens_per_second")
BETTER, WORSE, INSIDE_NOISE, NOT_JUDGED = "better", "worse", "inside the noise", "cannot be judged"
PAIRED, UNPAIRED = "paired", "unpaired"


class SettingResult(NamedTuple):
    """A setting and the metric's last value in each of its runs."""

    setting: Setting
    values: Mapping[int, float]  # by seed
    mean: Estimate

    @property
    def name(self) -> str:
        return self.setting.name


class Contrast(NamedTuple):
    """A setting against the reference."""

    name: str
    reference: str
    test_name: str  # PAIRED over the seeds that both have, UNPAIRED, or by the spread of all settings
    n: int  # pairs, or the seeds of the side that has fewer
    difference: Estimate  # setting less reference, its interval as wide as the correction asks
    p: float | None  # two-sided, corrected for the number of comparisons; None where it cannot be judged
    effect_size: (
        float | None
    )  # difference in standard deviations: the pooled one, d_z of pairs or d of two sides, by Hedges
    conclusion: str  # of the setting: BETTER, WORSE, INSIDE_NOISE or NOT_JUDGED


def setting_result(setting: Setting, metric: str, *, confidence: float) -> SettingResult:
    """The last value that each run logged, and Student's interval of their mean."""
    values = {run.seed: [row[metric] for row in run.rows if metric in row][-1] for run in setting.runs}
    return SettingResult(setting, values, student_mean(list(values.values()), confidence=confidence))


def direction_by_name(metric: str) -> str:
    """Whether a lower or a higher metric is better, by its name."""
    name = metric.removeprefix("held_out/")
    return MAXIMIZE if name in HIGHER_IS_BETTER or f"{name.partition('/')[0]}/" in HIGHER_IS_BETTER else MINIMIZE


def ranked_results(results: Sequence[SettingResult], direction: str) -> list[SettingResult]:
    """The best mean first."""
    return sorted(results, key=lambda one: one.mean.value, reverse=direction == MAXIMIZE)


def best_result(results: Sequence[SettingResult], direction: str) -> SettingResult:
    """The best mean of those whose noise can be judged, or of all if there are none."""
    return ranked_results([one for one in results if len(one.values) > MAX_SEEDS_UNJUDGED] or results, direction)[0]


class PooledSpread(NamedTuple):
    """The standard deviation between runs of one setting, estimated over several settings at once."""

    deviation: float
    degrees_of_freedom: int
    setting_count: int
    is_blocked: bool  # all have the same seeds, and the effect of each seed is removed
    cochran_p: float  # of Cochran's C, if the settings' own spreads are equal

    @property
    def is_equal(self) -> bool:
        """Whether one spread may be used for all settings."""
        return self.cochran_p >= UNEQUAL_SPREAD_P

    @property
    def description(self) -> str:
        return f"pooled over {self.setting_count} settings, {self.degrees_of_freedom} degrees of freedom"


def pooled_spread(results: Sequence[SettingResult]) -> PooledSpread | None:
    """The spread of all k settings of more than MAX_SEEDS_UNJUDGED seeds; None of fewer
    than MIN_POOLED_SETTINGS, or where no seed matters.

    If they have the same n seeds, it is the residual of the two-way layout, x[i, j] - mean[i] - mean[j] + mean, so that
    what a seed makes easier for all cancels out: (k - 1)(n - 1) degrees of freedom. Else it is the spread within
    settings, with N - k.
    """
    values = [one.values for one in results if len(one.values) > MAX_SEEDS_UNJUDGED]
    k = len(values)
    if k < MIN_POOLED_SETTINGS:
        return None
    rows = [np.array([each[seed] for seed in sorted(each)]) for each in values]
    residuals, own = [row - row.mean() for row in rows], np.array([len(row) - 1 for row in rows])
    freedom, left = int(own.sum()), 1.0
    blocked = len({frozenset(each) for each in values}) == 1
    if blocked:
        residuals = np.array(residuals) - np.mean(residuals, axis=0)
        freedom, left = freedom - len(rows[0]) + 1, 1 - 1 / k  # of a row's squares
    squares = np.array([(row**2).sum() for row in residuals])
    deviation = math.sqrt(squares.sum() / freedom)
    if deviation <= ROUNDING_ERROR * max(np.abs(row).max() for row in rows):
        return None
    return PooledSpread(deviation, freedom, k, blocked, cochran_p_value(squares / squares.sum() / left, own, freedom))


def cochran_p_value(shares: np.ndarray, own: np.ndarray, freedom: int) -> float:
    """p of Cochran's C (1941): how often the largest of k equal spreads has as large a share of all squares.

    A share with `own` of the `freedom` degrees is beta distributed; times k, after Bonferroni. With equal numbers this
    is the usual critical value by the F distribution, 1 / (1 + (k - 1) / F).
    """
    return min(1.0, float(len(shares) * betaincc(own / 2, (freedom - own) / 2, np.minimum(shares, 1)).min()))


def contrasts_with_reference(
    results: Sequence[SettingResult],
    reference: SettingResult,
    direction: str,
    *,
    spread: PooledSpread | None,
    reference_is_best: bool,
    confidence: float,
) -> dict[str, Contrast]:
    """Every other setting against the reference, by name.

    By the `spread` of all settings if there is one and it is equal; else each by its own seeds: over common ones
    (paired) where there are more than MAX_SEEDS_UNJUDGED, or by Welch's test. An interval excludes 0 exactly when the
    corrected p is below 1 - confidence: it covers the truth at least as often as it says, and the chance that any of
    them wrongly excludes 0 is at most 1 - confidence, also if the reference is the best mean (`reference_is_best`), as
    every pair counts then. Pooled, that takes equal spreads: where they differ three- to fivefold, of which Cochran's C
    sees little, the chance is 8 to 17 % instead of 5 (simulated: 6 settings of 4 or 5 seeds, 12 of 3).
    """
    shared = spread if spread and spread.is_equal else None
    sides = {one.name: samples_to_compare(one, reference, shared) for one in results if one.name != reference.name}
    judgeable = {name: side for name, side in sides.items() if side.n > MAX_SEEDS_UNJUDGED}
    if shared and reference_is_best:
        corrected = {name: side.tukey_test(confidence) for name, side in judgeable.items()}
    else:
        corrected = holm_contrasts(judgeable, reference_is_best, confidence)
    contrasts = {}
    for name, side in sides.items():
        if name in corrected:
            difference, p = corrected[name]
            verdict = contrast_conclusion(difference, direction)
        else:
            difference, p, verdict = side.test(confidence)[0], None, NOT_JUDGED
            difference = Estimate(difference.value, math.inf, -math.inf, math.inf)
        contrasts[name] = Contrast(
            name, reference.name, side.test_name, side.n, difference, p, side.effect_size(), verdict
        )
    return contrasts


def holm_contrasts(
    sides: Mapping[str, "TwoSamples | PooledTwoSamples"], reference_is_best: bool, confidence: float
) -> dict[str, tuple[Estimate, float]]:
    """Differences and p by Holm's method, each interval widened until it matches its p."""
    plain = {name: p_value(*side.test(confidence)) for name, side in sides.items()}
    factors = dict(zip(plain, holm_factors(list(plain.values()), comparison_count(len(plain), reference_is_best))))
    return {
        name: (side.test(1 - (1 - confidence) / factors[name])[0], min(1.0, factors[name] * plain[name]))
        for name, side in sides.items()
    }


def contrast_conclusion(difference: Estimate, direction: str) -> str:
    """The conclusion that an interval allows."""
    if difference.low <= 0 <= difference.high:
        return INSIDE_NOISE
    return BETTER if (difference.value < 0) == (direction == MINIMIZE) else WORSE


class TwoSamples(NamedTuple):
    """Two samples to compare: a of the setting, b of the reference."""

    a: np.ndarray  # f[n]
    b: np.ndarray  # f[m]; of the same seeds if paired
    paired: bool

    @property
    def n(self) -> int:
        return min(len(self.a), len(self.b))

    @property
    def test_name(self) -> str:
        return PAIRED if self.paired else UNPAIRED

    def test(self, confidence: float) -> tuple[Estimate, float]:
        """a - b, and its degrees of freedom."""
        if self.paired:
            return student_mean(self.a - self.b, confidence=confidence), self.n - 1
        return welch_difference(self.a, self.b, confidence=confidence), welch_degrees_of_freedom(self.a, self.b)

    def effect_size(self) -> float | None:
        """Cohen's d_z of pairs, or d by the pooled deviation, each times Hedges' correction; None without a spread."""
        if self.n <= MAX_SEEDS_UNJUDGED:
            return None
        if self.paired:
            freedom, deviation = self.n - 1, (self.a - self.b).std(ddof=1)
        else:
            freedom = len(self.a) + len(self.b) - 2
            deviation = math.sqrt(sum(((x - x.mean()) ** 2).sum() for x in (self.a, self.b)) / freedom)
        if deviation <= ROUNDING_ERROR * max(np.abs(self.a).max(), np.abs(self.b).max()):
            return None
        return float(hedges_correction(freedom) * (self.a.mean() - self.b.mean()) / deviation)


class PooledTwoSamples(NamedTuple):
    """Two samples to compare by the spread of all settings."""

    a: np.ndarray  # f[n]
    b: np.ndarray  # f[m]
    pooled_spread: PooledSpread

    @property
    def n(self) -> int:
        return min(len(self.a), len(self.b))

    @property
    def test_name(self) -> str:
        return self.pooled_spread.description

    def test(self, confidence: float) -> tuple[Estimate, float]:
        """a - b, and its degrees of freedom."""
        error = self.pooled_spread.deviation * math.sqrt(1 / len(self.a) + 1 / len(self.b))
        return student_interval(
            float(self.a.mean() - self.b.mean()), error, self.pooled_spread.degrees_of_freedom, confidence
        ), self.pooled_spread.degrees_of_freedom

    def tukey_test(self, confidence: float) -> tuple[Estimate, float]:
        """a - b and its p, corrected for all pairs of settings by the studentized range (Tukey 1953; by Kramer 1956
        where the numbers of seeds differ, which errs to the wide side: Hayter 1984)."""
        value, error, *_ = self.test(confidence)[0]
        p = studentized_range_p(
            math.sqrt(2) * abs(value) / error, self.pooled_spread.setting_count, self.pooled_spread.degrees_of_freedom
        )
        reach = (
            studentized_range_quantile(
                confidence, self.pooled_spread.setting_count, self.pooled_spread.degrees_of_freedom
            )
            / math.sqrt(2)
            * error
        )
        return Estimate(value, error, value - reach, value + reach), p

    def effect_size(self) -> float:
        """The difference in pooled deviations, times Hedges' correction."""
        return float(
            hedges_correction(self.pooled_spread.degrees_of_freedom)
            * (self.a.mean() - self.b.mean())
            / self.pooled_spread.deviation
        )


def studentized_range_p(q: float, settings: int, freedom: int) -> float:
    """How often the studentized range of so many equal means is as large."""
    from scipy.stats import studentized_range  # here: half a second that few programs need

    return min(1.0, max(0.0, float(studentized_range.sf(q, settings, freedom))))


@functools.cache  # a root of an integral: 0.2 s
def studentized_range_quantile(confidence: float, settings: int, freedom: int) -> float:
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(confidence, settings, freedom))


def samples_to_compare(
    one: SettingResult, reference: SettingResult, spread: PooledSpread | None
) -> TwoSamples | PooledTwoSamples:
    """The two settings, to be compared by a spread if there is one and both have more than MAX_SEEDS_UNJUDGED seeds."""
    if spread and min(len(one.values), len(reference.values)) > MAX_SEEDS_UNJUDGED:
        return PooledTwoSamples(*(np.array(list(side.values.values())) for side in (one, reference)), spread)
    return seed_samples(one, reference)


def seed_samples(one: SettingResult, reference: SettingResult) -> TwoSamples:
    """Common seeds if they are more than MAX_SEEDS_UNJUDGED, or more than either side could do without them; else all
    seeds."""
    common = [seed for seed in one.values if seed in reference.values]
    everybody = min(len(one.values), len(reference.values))
    if common and (len(common) > MAX_SEEDS_UNJUDGED or everybody <= MAX_SEEDS_UNJUDGED):
        return TwoSamples(*(np.array([side.values[seed] for seed in common]) for side in (one, reference)), paired=True)
    return TwoSamples(*(np.array(list(side.values.values())) for side in (one, reference)), paired=False)


def hedges_correction(freedom: float) -> float:
    """J, which takes the bias out of a standardised difference of few observations (Hedges 1981, eq. 6e)."""
    return math.exp(gammaln(freedom / 2) - gammaln((freedom - 1) / 2)) / math.sqrt(freedom / 2)


def comparison_count(tests: int, reference_is_best: bool) -> int:
    """How many comparisons to correct for: the tests, or every pair of settings where any might have been the best.

    With nine equal settings of three seeds, corrected for 8 only, the best would differ from one of the others in 8 %
    of cases and not in 5; with 20 settings of five seeds, in 14 %.
    """
    return tests * (tests + 1) // 2 if reference_is_best else tests


def holm_factors(p: Sequence[float], comparisons: int) -> list[float]:
    """What each p is multiplied by (Holm 1979): the smallest by `comparisons`, the next by one less, and so on, and by
    more where that would make a larger p smaller than one before it. Not clipped to 1.

    Valid where the p are some of a larger family, too: before the first true one of ours stand only false ones.
    """
    factors, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, (comparisons - rank) * p[i])
        factors[i] = highest / p[i] if p[i] else float(comparisons - rank)
    return factors

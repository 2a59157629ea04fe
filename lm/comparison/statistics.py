"""Settings to numbers: means over seeds, differences from a reference, and what may be concluded from them."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln

from lm.comparison.settings import Setting
from lm.intervals import Estimate, p_value, student, welch, welch_freedom

FEW = 2  # seeds, or fewer, from which noise cannot be judged
ROUNDING = 1e-6  # of a value: no more than the rounding of float32, so no spread
MINIMIZE, MAXIMIZE = "minimize", "maximize"
# Metrics of which more is better, by their last part, or the first where it ends in "/"; of any other, less is.
LARGER = ("accuracy", "reward", "margin", "stopped", "score/", "tokens_per_second")
BETTER, WORSE, NOISE, UNJUDGED = "better", "worse", "inside the noise", "cannot be judged"


class Measured(NamedTuple):
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
    paired: bool  # over the seeds that both have
    n: int  # pairs, or the seeds of the side that has fewer
    difference: Estimate  # setting less reference, its interval as wide as Holm's correction asks
    p: float | None  # two-sided, with Holm's correction; None where it cannot be judged
    effect: float | None  # difference in standard deviations: d_z of pairs, d of independent sides, after Hedges
    verdict: str  # of the setting: BETTER, WORSE, NOISE or UNJUDGED


def measured(setting: Setting, metric: str, *, confidence: float) -> Measured:
    """The last value that each run logged, and Student's interval of their mean."""
    values = {run.seed: [row[metric] for row in run.rows if metric in row][-1] for run in setting.runs}
    return Measured(setting, values, student(list(values.values()), confidence=confidence))


def by_name(metric: str) -> str:
    """Whether less or more of a metric is better, as its name has it."""
    name = metric.removeprefix("held_out/")
    return MAXIMIZE if name in LARGER or f"{name.partition('/')[0]}/" in LARGER else MINIMIZE


def ranked(found: Sequence[Measured], direction: str) -> list[Measured]:
    """The best mean first."""
    return sorted(found, key=lambda one: one.mean.value, reverse=direction == MAXIMIZE)


def best(found: Sequence[Measured], direction: str) -> Measured:
    """The best mean of those whose noise can be judged, or of all if there are none."""
    return ranked([one for one in found if len(one.values) > FEW] or found, direction)[0]


def contrasts(
    found: Sequence[Measured], reference: Measured, direction: str, *, chosen: bool, confidence: float
) -> dict[str, Contrast]:
    """Every other setting against the reference, by name.

    Over common seeds (paired) where there are more than FEW, else Welch's test. The p of all tests are corrected by
    Holm's method, and each interval is widened until it excludes 0 exactly when its corrected p is below
    1 - confidence: so it covers the truth at least as often as it says, and the chance that any of them wrongly
    excludes 0 is at most 1 - confidence. That holds for a reference that was `chosen` by its mean as well, as every
    pair then counts (see `family`).
    """
    sides = {one.name: pairing(one, reference) for one in found if one.name != reference.name}
    tested = {name: side for name, side in sides.items() if side.n > FEW}
    plain = {name: p_value(*side.test(confidence)) for name, side in tested.items()}
    factors = dict(zip(plain, holm(list(plain.values()), family(len(plain), chosen))))
    told = {}
    for name, side in sides.items():
        if name not in tested:
            difference, p, verdict = side.test(confidence)[0], None, UNJUDGED
            difference = Estimate(difference.value, math.inf, -math.inf, math.inf)
        else:
            difference, _ = side.test(1 - (1 - confidence) / factors[name])
            p, verdict = min(1.0, factors[name] * plain[name]), judged(difference, direction)
        told[name] = Contrast(name, reference.name, side.paired, side.n, difference, p, side.effect(), verdict)
    return told


def judged(difference: Estimate, direction: str) -> str:
    """What an interval allows to say."""
    if difference.low <= 0 <= difference.high:
        return NOISE
    return BETTER if (difference.value < 0) == (direction == MINIMIZE) else WORSE


class Sides(NamedTuple):
    """Two samples to compare: a of the setting, b of the reference."""

    a: np.ndarray  # f[n]
    b: np.ndarray  # f[m]; of the same seeds if paired
    paired: bool

    @property
    def n(self) -> int:
        return min(len(self.a), len(self.b))

    def test(self, confidence: float) -> tuple[Estimate, float]:
        """a - b, and its degrees of freedom."""
        if self.paired:
            return student(self.a - self.b, confidence=confidence), self.n - 1
        return welch(self.a, self.b, confidence=confidence), welch_freedom(self.a, self.b)

    def effect(self) -> float | None:
        """Cohen's d_z of pairs, or d by the pooled deviation, each times Hedges' correction; None without a spread."""
        if self.n <= FEW:
            return None
        if self.paired:
            freedom, deviation = self.n - 1, (self.a - self.b).std(ddof=1)
        else:
            freedom = len(self.a) + len(self.b) - 2
            deviation = math.sqrt(sum(((x - x.mean()) ** 2).sum() for x in (self.a, self.b)) / freedom)
        if deviation <= ROUNDING * max(np.abs(self.a).max(), np.abs(self.b).max()):
            return None
        return float(hedges(freedom) * (self.a.mean() - self.b.mean()) / deviation)


def pairing(one: Measured, reference: Measured) -> Sides:
    """Common seeds if they are more than FEW, or more than either side could do without them; else all seeds."""
    common = [seed for seed in one.values if seed in reference.values]
    everybody = min(len(one.values), len(reference.values))
    if common and (len(common) > FEW or everybody <= FEW):
        return Sides(*(np.array([side.values[seed] for seed in common]) for side in (one, reference)), paired=True)
    return Sides(*(np.array(list(side.values.values())) for side in (one, reference)), paired=False)


def hedges(freedom: float) -> float:
    """J, which takes the bias out of a standardised difference of few observations (Hedges 1981, eq. 6e)."""
    return math.exp(gammaln(freedom / 2) - gammaln((freedom - 1) / 2)) / math.sqrt(freedom / 2)


def family(tests: int, chosen: bool) -> int:
    """How many comparisons to correct for: the tests, or every pair of settings where any might have been the best.

    With nine equal settings of three seeds, corrected for 8 only, the best would differ from one of the others in 8 %
    of cases and not in 5; with 20 settings of five seeds, in 14 %.
    """
    return tests * (tests + 1) // 2 if chosen else tests


def holm(p: Sequence[float], family: int) -> list[float]:
    """What each p is multiplied by (Holm 1979): the smallest by `family`, the next by one less, and so on, and by more
    where that would make a larger p smaller than one before it. Not clipped to 1.

    Valid where the p are some of a larger family, too: before the first true one of ours stand only false ones.
    """
    factors, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, (family - rank) * p[i])
        factors[i] = highest / p[i] if p[i] else float(family - rank)
    return factors

"""Numbers with their uncertainty. Every score the programs print carries one of these."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

Z95 = 1.959964  # two-sided 95 % of a normal


class Estimate(NamedTuple):
    value: float
    se: float  # standard error
    low: float  # 95 % interval
    high: float


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Mean of independent observations; normal interval."""
    x = np.asarray(values, np.float64)
    se = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.inf
    return Estimate(float(x.mean()), se, float(x.mean()) - Z95 * se, float(x.mean()) + Z95 * se)


def success_rate(hits: Sequence[bool]) -> Estimate:
    """Fraction of successes with Wilson's interval (Wilson 1927), which stays within 0 and 1."""
    n, p = len(hits), float(np.mean(hits))
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2)) / (1 + Z95**2 / n)
    return Estimate(p, math.sqrt(p * (1 - p) / n), centre - half, centre + half)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Mean of a - b, paired observation by observation."""
    return mean_estimate(np.asarray(a, np.float64) - np.asarray(b, np.float64))


def win_rate(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """How often a beats b on the same prompt, a tie counting half."""
    lead = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return mean_estimate((lead > 0) + 0.5 * (lead == 0))


def crossed_mean(values: np.ndarray) -> Estimate:
    """Mean of f[S,U] over S independent runs and U units, both of them samples: other seeds, other prompts.

    se^2 = var(means of the runs) / S + var(means of the units) / U. The interval's half widths, Student's with S - 1
    and with U - 1 degrees of freedom, add in quadrature: three runs that differ say little about a fourth, and the
    interval is wide. Variation by run *and* unit is counted in both terms, so the interval is conservative: it holds
    the truth in 95 to 99 % of simulated cases (tests/core/test_statistics.py). With a single run only the spread of
    units is known.
    """
    x = np.asarray(values, np.float64)
    sides = [x.mean(axis=1 - axis) for axis, n in enumerate(x.shape) if n > 1]
    if not sides:
        return mean_estimate(x[0])
    errors = [float(side.std(ddof=1) / math.sqrt(len(side))) for side in sides]
    reach = math.hypot(*(stdtrit(len(side) - 1, 0.975) * error for side, error in zip(sides, errors)))
    return Estimate(float(x.mean()), math.hypot(*errors), float(x.mean()) - reach, float(x.mean()) + reach)


def student_mean(values: Sequence[float], *, confidence: float = 0.95) -> Estimate:
    """Mean of a few independent, roughly normal observations, such as runs of several seeds; Student's interval.

    With fewer than two observations the spread is unknown and the interval infinite.
    """
    value, se, *_ = mean_estimate(values)
    return student_interval(value, se, len(values) - 1, confidence)


def welch_difference(a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95) -> Estimate:
    """Difference of the means of two independent samples whose spreads may differ (Welch 1947)."""
    (one, error, *_), (other, other_error, *_) = mean_estimate(a), mean_estimate(b)
    return student_interval(one - other, math.hypot(error, other_error), welch_degrees_of_freedom(a, b), confidence)


def welch_degrees_of_freedom(a: Sequence[float], b: Sequence[float]) -> float:
    """Degrees of freedom by Welch and Satterthwaite; 0 where a side has one observation, the most if neither varies."""
    if min(len(a), len(b)) < 2:
        return 0
    shares = [mean_estimate(side).se ** 2 for side in (a, b)]
    if not any(shares):
        return len(a) + len(b) - 2
    return sum(shares) ** 2 / sum(share**2 / (len(side) - 1) for share, side in zip(shares, (a, b)))


def p_value(estimate: Estimate, freedom: float) -> float:
    """Two-sided: the chance of a value at least as far from 0 if the truth is 0. 1 where nothing is known."""
    if freedom <= 0 or estimate.value == 0:
        return 1.0
    return float(2 * stdtr(freedom, -abs(estimate.value) / estimate.se)) if estimate.se else 0.0


def student_interval(value: float, se: float, freedom: float, confidence: float) -> Estimate:
    """A value and its Student interval, infinite without a degree of freedom."""
    reach = float(stdtrit(freedom, (1 + confidence) / 2)) * se if freedom > 0 else math.inf
    return Estimate(value, se, value - reach, value + reach)


NO_ESTIMATE = Estimate(np.nan, np.nan, np.nan, np.nan)  # of no observation


def success_rate_or_nan(hits: Sequence[bool]) -> Estimate:
    """`success_rate`, or nan where there is nothing to count."""
    return success_rate(hits) if len(hits) else NO_ESTIMATE


def percent_text(fraction: float) -> str:
    """0.5 to "50 %"."""
    return f"{100 * fraction:.0f}\u00a0%"


def signed_number(number: float) -> str:
    """Two decimals and the sign."""
    return f"{number:+z.2f}".replace("-", "−")


NUMBER_FORMATS: Mapping[str, Callable[[float], str]] = {
    "plain": "{:z.2f}".format,
    "tenths": "{:z.1f}".format,
    "signed": signed_number,
    "percent": percent_text,
}


NumberFormat = str | Callable[[float], str]  # a name among NUMBER_FORMATS, or the function itself


def interval_text(estimate: Estimate | Mapping[str, Any], style: NumberFormat = "plain") -> str:
    """ "[4.01, 4.23]": the 95 % interval of an Estimate, or of one that was read from JSON."""
    number = NUMBER_FORMATS[style] if isinstance(style, str) else style
    fields = estimate._asdict() if isinstance(estimate, Estimate) else estimate
    return f"[{number(fields['low'])}, {number(fields['high'])}]"


def estimate_text(estimate: Estimate | Mapping[str, Any], style: NumberFormat = "plain") -> str:
    """ "0.62 [0.51, 0.72]"; a dash where nothing was observed, no interval where its width is unknown."""
    number = NUMBER_FORMATS[style] if isinstance(style, str) else style
    fields = estimate._asdict() if isinstance(estimate, Estimate) else estimate
    if not math.isfinite(fields["value"]):
        return "–"
    is_known = math.isfinite(fields["low"]) and math.isfinite(fields["high"])
    return number(fields["value"]) + (f" {interval_text(estimate, style)}" if is_known else "")

"""Numbers with their uncertainty. Every score the programs print carries one of these."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

Z95 = 1.959964  # two-sided 95 % of a normal


class Estimate(NamedTuple):
    value: float
    se: float  # standard error
    low: float  # 95 % interval
    high: float


def average(values: Sequence[float]) -> Estimate:
    """Mean of independent observations; normal interval."""
    x = np.asarray(values, np.float64)
    se = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.inf
    return Estimate(float(x.mean()), se, float(x.mean()) - Z95 * se, float(x.mean()) + Z95 * se)


def rate(hits: Sequence[bool]) -> Estimate:
    """Fraction of successes with Wilson's interval (Wilson 1927), which stays within 0 and 1."""
    n, p = len(hits), float(np.mean(hits))
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2)) / (1 + Z95**2 / n)
    return Estimate(p, math.sqrt(p * (1 - p) / n), centre - half, centre + half)


def difference(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Mean of a - b, paired observation by observation."""
    return average(np.asarray(a, np.float64) - np.asarray(b, np.float64))


def win_rate(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """How often a beats b on the same prompt, a tie counting half."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return average((a > b) + 0.5 * (a == b))


def crossed(values: np.ndarray) -> Estimate:
    """Mean of f[S,U] over S independent runs and U units, both of them samples: other seeds, other prompts.

    se^2 = var(means of the runs) / S + var(means of the units) / U. The interval's half widths, Student's with S - 1
    and with U - 1 degrees of freedom, add in quadrature: three runs that differ say little of a fourth, and then it is
    wide. What varies with run *and* unit is counted in both terms, so it errs to the wide side: it holds the truth in
    95 to 99 % of simulated cases (tests/test_intervals.py). Of a single run nothing is known but its units.
    """
    x = np.asarray(values, np.float64)
    sides = [x.mean(axis=1 - axis) for axis, n in enumerate(x.shape) if n > 1]
    if not sides:
        return average(x[0])
    errors = [float(side.std(ddof=1) / math.sqrt(len(side))) for side in sides]
    reach = math.hypot(*(stdtrit(len(side) - 1, 0.975) * error for side, error in zip(sides, errors)))
    return Estimate(float(x.mean()), math.hypot(*errors), float(x.mean()) - reach, float(x.mean()) + reach)

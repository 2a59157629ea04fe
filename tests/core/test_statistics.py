"""Intervals, worked by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from lm.core.statistics import (
    NO_ESTIMATE,
    Z95,
    Estimate,
    crossed_mean,
    estimate_text,
    interval_text,
    mean_estimate,
    p_value,
    paired_difference,
    student_mean,
    success_rate,
    welch_degrees_of_freedom,
    welch_difference,
    win_rate,
)


def test_average():
    """Of 1, 2, 3, 4: squared deviations sum to 2.25 + 0.25 + 0.25 + 2.25 = 5, so se = sqrt(5 / 3 / 4) = 0.645497."""
    value, se, low, high = mean_estimate([1, 2, 3, 4])
    assert value == 2.5
    assert se == pytest.approx(math.sqrt(5 / 12))
    assert (low, high) == pytest.approx((2.5 - 1.959964 * 0.645497, 2.5 + 1.959964 * 0.645497), abs=1e-6)


def test_one_observation_says_nothing_of_its_error():
    assert mean_estimate([3.0]) == (3.0, math.inf, -math.inf, math.inf)


def test_wilson():
    """8 of 10: centre (0.8 + z^2 / 20) / (1 + z^2 / 10) = 0.992073 / 1.384146 = 0.716740,
    half z sqrt(0.016 + z^2 / 400) / 1.384146 = 1.959964 * sqrt(0.025604) / 1.384146 = 0.226577."""
    value, se, low, high = success_rate([True] * 8 + [False] * 2)
    assert value == 0.8
    assert se == pytest.approx(math.sqrt(0.016))
    assert (low, high) == pytest.approx((0.716740 - 0.226577, 0.716740 + 0.226577), abs=2e-6)


def test_wilson_at_the_ends():
    """None of 10: centre = half = z^2 / 20 / (1 + z^2 / 10) = 0.138766, where a normal interval has no width."""
    end = 2 * Z95**2 / 20 / (1 + Z95**2 / 10)
    assert end == pytest.approx(0.277533, abs=1e-6)
    none, every = success_rate([False] * 10), success_rate([True] * 10)
    assert none == pytest.approx((0, 0, 0, end)) and none.low >= 0
    assert every == pytest.approx((1, 0, 1 - end, 1)) and every.high <= 1


def test_a_paired_difference_sees_what_an_unpaired_one_cannot():
    """a is b + 1 on every prompt: the difference is exactly 1, however much the prompts differ."""
    assert paired_difference([11, 2, 31], [10, 1, 30]) == (1, 0, 1, 1)


def test_difference():
    """2, 0, -1, 2: mean 0.75; squared deviations 1.5625 + 0.5625 + 3.0625 + 1.5625 = 6.75; sqrt(6.75/3/4) = 0.75."""
    value, se, low, _ = paired_difference([3, 1, 2, 2], [1, 1, 3, 0])
    assert (value, se) == pytest.approx((0.75, 0.75))
    assert low == pytest.approx(0.75 - 1.959964 * 0.75)


def test_a_tie_is_half_a_win():
    """Won, tied, lost, won: 1, 1/2, 0, 1: mean 0.625."""
    assert win_rate([3, 1, 2, 2], [1, 1, 3, 0]).value == 0.625
    assert win_rate([1, 1], [1, 1]) == (0.5, 0, 0.5, 0.5)


def test_crossed():
    """Runs [1, 3], [5, 7] over two units: means of the runs 2 and 6, variance 8, over 2: 4; of the units 3 and 5,
    variance 2, over 2: 1. So se^2 = 5; the quantile of one degree of freedom, 12.7062, is that of both."""
    value, se, low, high = crossed_mean(np.array([[1.0, 3.0], [5.0, 7.0]]))
    assert (value, se) == (4.0, pytest.approx(math.sqrt(5)))
    assert (high - value, value - low) == pytest.approx([12.7062 * math.sqrt(5)] * 2, rel=1e-5)


def test_crossed_of_one_run_knows_its_units_only():
    """The quantile of three degrees of freedom is 3.182446."""
    value, se, _, high = crossed_mean(np.array([[1.0, 2.0, 3.0, 4.0]]))
    assert (value, se) == mean_estimate([1, 2, 3, 4])[:2] and high == pytest.approx(value + 3.182446 * se)
    assert crossed_mean(np.array([[3.0]])) == mean_estimate([3.0])
    assert crossed_mean(np.ones((2, 3))) == (1, 0, 1, 1)


@pytest.mark.parametrize("of_runs, of_units", [(0.0, 1.0), (0.3, 1.0), (1.0, 0.3)])
def test_crossed_covers_the_truth(of_runs, of_units):
    """Three runs and 100 units of mean 0, drawn 2,000 times: at least 95 % hold 0, give or take 1.5."""
    draw = np.random.default_rng(0).normal
    held = 0
    for _ in range(2000):
        x = of_runs * draw(size=(3, 1)) + of_units * draw(size=(1, 100)) + draw(size=(3, 100))
        _, _, low, high = crossed_mean(x)
        held += low < 0 < high
    assert 0.935 < held / 2000 < 0.995


def test_an_average_of_runs_alone_would_not():
    """All prompts of three runs counted as independent where the runs differ: the error `crossed` is there for."""
    draw, held = np.random.default_rng(0).normal, 0
    for _ in range(300):
        _, _, low, high = mean_estimate((draw(size=(3, 1)) + draw(size=(3, 100))).ravel())
        held += low < 0 < high
    assert held / 300 < 0.5


def test_student():
    """1, 2, 3: se = 1 / sqrt(3); the quantiles of two degrees of freedom are 4.302653, and 2.919986 for 90 %."""
    value, se, low, high = student_mean([1, 2, 3])
    assert (value, se) == (2, pytest.approx(1 / math.sqrt(3)))
    assert (2 - low, high - 2) == pytest.approx([4.302653 / math.sqrt(3)] * 2, rel=1e-6)
    assert student_mean([1, 2, 3], confidence=0.9).high == pytest.approx(2 + 2.919986 / math.sqrt(3), rel=1e-6)
    assert student_mean([3.0]) == mean_estimate([3.0])


def test_welch_and_its_p_are_scipys():
    a, b = [1.0, 2.0, 4.0], [0.5, 0.6, 0.4, 0.9, 0.2]
    theirs = stats.ttest_ind(a, b, equal_var=False)
    assert welch_degrees_of_freedom(a, b) == pytest.approx(theirs.df)
    assert (welch_difference(a, b).low, welch_difference(a, b).high) == pytest.approx(
        tuple(theirs.confidence_interval())
    )
    assert p_value(welch_difference(a, b), welch_degrees_of_freedom(a, b)) == pytest.approx(theirs.pvalue)
    assert p_value(student_mean(a), 2) == pytest.approx(stats.ttest_1samp(a, 0).pvalue)


def test_what_is_known_of_too_few():
    assert (
        welch_difference([1.0], [2.0, 3.0])[2:] == (-math.inf, math.inf)
        and p_value(welch_difference([1.0], [2.0, 3.0]), 0) == 1
    )
    assert welch_difference([2, 2], [1, 1]) == (1, 0, 1, 1) and p_value(welch_difference([2, 2], [1, 1]), 2) == 0


@pytest.mark.parametrize("n", [2, 3, 5])
def test_student_covers_the_truth_and_a_normal_interval_would_not(n):
    """4,000 draws of n observations of mean 0: 95 % hold 0, give or take 1; normal intervals of three hold 81 %."""
    draws, held, normal = np.random.default_rng(n).normal(size=(4000, n)), 0, 0
    for x in draws:
        held += student_mean(x).low < 0 < student_mean(x).high
        normal += mean_estimate(x).low < 0 < mean_estimate(x).high
    assert 0.94 < held / 4000 < 0.96 and normal / 4000 < 0.9


def test_welch_covers_the_truth():
    """Three observations against six that vary three times as much, 3,000 times: about 95 % hold 0."""
    draw, held = np.random.default_rng(0).normal, 0
    for _ in range(3000):
        _, _, low, high = welch_difference(draw(size=3), 3 * draw(size=6))
        held += low < 0 < high
    assert 0.935 < held / 3000 < 0.965


def test_estimates_are_written_with_their_interval():
    """Also one read from JSON; a dash where nothing was observed, no interval where a single value gives none."""
    estimate = Estimate(0.624, 0.05, -0.004, 0.722)
    assert interval_text(estimate) == "[0.00, 0.72]", "no minus sign on a rounded zero"
    assert estimate_text(estimate._replace(low=0.5), "percent") == "62\u00a0% [50\u00a0%, 72\u00a0%]"
    assert estimate_text({"value": -0.5, "low": -1.0, "high": 0.25}, "signed") == "−0.50 [−1.00, +0.25]"
    assert estimate_text(estimate, "{:.1f}".format) == "0.6 [-0.0, 0.7]"
    assert estimate_text(mean_estimate([3.0])) == "3.00"
    assert estimate_text(NO_ESTIMATE) == "–"

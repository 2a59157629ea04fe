"""Agreement of raters and strength of models, worked by hand or taken from who published the measure."""

import math

import numpy as np
import pytest

from lm.core.statistics import Z95, mean_estimate
from lm.feedback.agreement import (
    bootstrap_estimate,
    bradley_terry_strengths,
    cohen_kappa,
    krippendorff_alpha,
    rater_reliability,
)

NONE = math.nan
# Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section C: four observers, twelve units, gaps.
PUBLISHED = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
        [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
    ]
)


@pytest.mark.parametrize("level, alpha", [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_as_published(level, alpha):
    assert krippendorff_alpha(PUBLISHED, level=level) == pytest.approx(alpha, abs=5e-4)


def test_alpha_by_hand():
    """Two raters, units (0, 0), (0, 1), (1, 1), (1, 1): of 8 values n_0 = 3 and n_1 = 5, coincidences o_01 = o_10 = 1:
    alpha = 1 - 7 * (1 + 1) / (3 * 5 + 5 * 3) = 1 - 14 / 30."""
    assert krippendorff_alpha([[0, 0, 1, 1], [0, 1, 1, 1]]) == pytest.approx(16 / 30)


def test_alpha_levels():
    """An order knows no distances, an interval no unit and no zero, and names none of these."""
    squares, scaled = PUBLISHED**2, 10 - 3 * PUBLISHED
    for level, same in (("nominal", squares), ("ordinal", squares), ("interval", scaled)):
        alpha = krippendorff_alpha(PUBLISHED, level=level)
        assert krippendorff_alpha(same, level=level) == pytest.approx(alpha)
    assert krippendorff_alpha(squares, level="interval") != pytest.approx(alpha)


def test_alpha_at_the_ends():
    assert krippendorff_alpha([[-1, 0, 1], [-1, 0, 1]]) == 1
    assert math.isnan(krippendorff_alpha([[1, 1], [1, 1]]))  # without variation nothing was put to the test
    assert math.isnan(krippendorff_alpha([[1, NONE], [NONE, 0]]))  # nothing to compare
    chance = np.random.default_rng(0).integers(-1, 2, (2, 20_000))
    assert krippendorff_alpha(chance) == pytest.approx(0, abs=0.03)


def test_kappa():
    """Of 50 units 20 are yes to both, 15 no to both, 5 yes to a alone and 10 yes to b alone: p_o = 35 / 50; a says yes
    to a half, b to 0.6, so p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5; kappa = (0.7 - 0.5) / (1 - 0.5) = 0.4."""
    a = [1] * 25 + [0] * 25 + [NONE, 1]
    b = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15 + [1, NONE]
    assert cohen_kappa(a, b) == pytest.approx(0.4)
    assert cohen_kappa(a, a) == 1
    assert math.isnan(cohen_kappa([1, 1], [1, 1])) and math.isnan(cohen_kappa([1, NONE], [NONE, 0]))


def test_two_players():
    """30 games to 10: s_a - s_b = log 3 with error sqrt(1 / 30 + 1 / 10), and a has half of both."""
    found = bradley_terry_strengths([("a", "b", 1.0)] * 30 + [("b", "a", 1.0)] * 10)
    value, se, low, high = found["a"]
    assert value == pytest.approx(math.log(3) / 2, abs=5e-4)
    assert se == pytest.approx(math.sqrt(1 / 30 + 1 / 10) / 2, abs=5e-4)
    assert (low, high) == pytest.approx((value - Z95 * se, value + Z95 * se))
    assert found["b"].value == pytest.approx(-value) and found["b"].se == pytest.approx(se)


def test_a_tie_is_half_a_win():
    won_and_lost = bradley_terry_strengths([("a", "b", 1.0), ("a", "b", 0.0), ("b", "c", 1.0)])
    tied = bradley_terry_strengths([("a", "b", 0.5), ("b", "a", 0.5), ("b", "c", 1.0)])
    assert np.allclose(list(tied.values()), list(won_and_lost.values()))


def test_an_unbeaten_player_is_finite():
    found = bradley_terry_strengths([("a", "b", 1.0)] * 20 + [("b", "c", 1.0)] * 5 + [("c", "b", 1.0)] * 5)
    assert found["a"].value > 4 and np.isfinite(found["a"]).all()
    assert found["a"].low < found["c"].high  # 20 games do not say how far above
    assert sum(estimate.value for estimate in found.values()) == pytest.approx(0, abs=1e-9)
    assert bradley_terry_strengths([]) == {}


def test_those_who_never_met():
    """(a, b) and (c, d) played: a and c may be far apart, which the intervals say."""
    found = bradley_terry_strengths([(*pair, score) for pair in ("ab", "cd") for score in [1.0] * 30 + [0.0] * 10])
    assert found["a"].value == pytest.approx(found["c"].value) and found["a"].se > 3


def test_known_strengths_are_covered():
    """The 95 % interval holds the strength that made the games in about 95 % of 300 simulations."""
    true = np.array([0.8, 0.1, -0.3, -0.6])
    pairs = [(i, j) for i in range(4) for j in range(i)]
    draw, covered = np.random.default_rng(0), []
    for _ in range(300):
        games = [
            ("abcd"[i], "abcd"[j], float(draw.random() < 1 / (1 + np.exp(true[j] - true[i]))))
            for i, j in pairs
            for _ in range(20)
        ]
        covered += [low <= s <= high for s, (_, _, low, high) in zip(true, bradley_terry_strengths(games).values())]
    assert 0.93 < np.mean(covered) < 0.97


def test_reliability():
    """The majority of the others at each unit; - where they tie, or are none; * where the rater is of that opinion.

    a:  1  1  0 -1  1  .      of b, c:  1*  -  0*  1  0  -
    b:  1  1  0  1  0  1      of a, c:  1*  -  0*  -  1  -
    c:  1 -1  0  1  .  .      of a, b:  1*  1  0*  -  -  -
    """
    a, b, c = [1, 1, 0, -1, 1, NONE], [1, 1, 0, 1, 0, 1], [1, -1, 0, 1, NONE, NONE]
    *found, idle = rater_reliability(np.array([a, b, c, [NONE] * 6]))
    assert [estimate.value for estimate in found] == pytest.approx([2 / 4, 2 / 3, 2 / 3])
    assert 0 < found[0].low < 0.5 < found[0].high < 1
    assert np.isnan(idle).all()


def test_bootstrap():
    """Of a mean it is nearly the normal interval; a resample without an answer is left out."""
    x = np.random.default_rng(1).normal(3, 2, 400)
    assert bootstrap_estimate(np.mean, x) == pytest.approx(mean_estimate(x), abs=0.05)
    assert bootstrap_estimate(np.mean, x) == bootstrap_estimate(np.mean, x) != bootstrap_estimate(np.mean, x, seed=1)
    kappa = bootstrap_estimate(lambda ratings: cohen_kappa(*ratings), [[1, 0, 1], [1, 0, 0]], count=200)
    assert kappa.value == pytest.approx(0.4) and np.isfinite(kappa).all()
    assert np.isnan(bootstrap_estimate(krippendorff_alpha, np.ones((2, 3)))).all()
    assert np.isnan(bootstrap_estimate(np.mean, np.ones(0))).all()


def test_bootstrap_covers():
    """Alpha of 60 units by two raters that flip a coin in 3 of 10: the interval holds its value in about 95 %."""
    draw, covered = np.random.default_rng(0), []

    def ratings(units):
        truth, noise = draw.integers(2, size=units), draw.integers(2, size=(2, units))
        return np.where(draw.random((2, units)) < 0.3, noise, truth).astype(float)

    for _ in range(60):
        _, _, low, high = bootstrap_estimate(krippendorff_alpha, ratings(60), count=200)
        covered.append(low <= 0.7**2 <= high)  # both follow the truth with probability 0.7 each, else agree by chance
    assert 0.85 < np.mean(covered) <= 1

"""How far raters agree, how far each can be trusted, and how strong the models are that they judged.

Ratings are f64[raters, units], nan where a rater gave none. A unit is one rated thing: a pair of responses, where -1, 0
and 1 say which one is better, or a response on a scale.
"""

from collections.abc import Callable, Sequence

import numpy as np

from lm.core.statistics import NO_ESTIMATE, Z95, Estimate, success_rate_or_nan

PRIOR_DEVIATION = 10.0  # standard deviation of a log-strength before any game: wide, so that games outweigh it
DISTANCES = {
    "nominal": lambda values, totals: 1.0 - np.eye(len(values)),
    "ordinal": lambda values, totals: _squared_distances(np.cumsum(totals) - totals / 2),  # of the values' middle ranks
    "interval": lambda values, totals: _squared_distances(values),
}


def krippendorff_alpha(ratings: np.ndarray, *, level: str = "nominal") -> float:
    """Agreement beyond chance: 1 is perfect, 0 is what chance gives, below is systematic disagreement.

    alpha = 1 - observed / expected disagreement = 1 - (n - 1) sum_ck o_ck d_ck / sum_ck n_c n_k d_ck, with o the
    coincidences of values within units, n_c their totals, n their sum and d the squared distance of values at this
    `level` of measurement, one of DISTANCES. A unit with fewer than two ratings does not count. nan where fewer than
    two values are left: without variation agreement cannot be distinguished from habit. Krippendorff 2011, Computing
    Krippendorff's Alpha-Reliability.
    """
    ratings = np.asarray(ratings, np.float64)
    rated = ratings[:, np.sum(~np.isnan(ratings), axis=0) >= 2]
    values = np.unique(rated[~np.isnan(rated)])
    if len(values) < 2:
        return np.nan
    counts = np.sum(rated[:, :, None] == values, axis=0, dtype=np.float64)  # [units, values]
    weights = 1 / (counts.sum(axis=1) - 1)
    coincidences = (counts.T * weights) @ counts - np.diag(weights @ counts)
    totals = coincidences.sum(axis=1)
    distances = DISTANCES[level](values, totals)
    expected = totals @ distances @ totals / (totals.sum() - 1)
    return float(1 - np.sum(coincidences * distances) / expected)


def cohen_kappa(a: np.ndarray, b: np.ndarray) -> float:
    """(p_o - p_e) / (1 - p_e) of two raters: their agreement p_o beyond the p_e of their own habits.

    a, b: f64[units], as names without an order; a unit that one of them did not rate does not count. nan where none is
    left, or where both always gave the same value. Cohen 1960, A Coefficient of Agreement for Nominal Scales.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    both = ~np.isnan(a) & ~np.isnan(b)
    a, b = a[both], b[both]
    values = np.unique([a, b])
    by_chance = sum(np.mean(a == value) * np.mean(b == value) for value in values)
    if len(values) < 2:
        return np.nan
    return float((np.mean(a == b) - by_chance) / (1 - by_chance))


def bradley_terry_strengths(games: Sequence[tuple[str, str, float]]) -> dict[str, Estimate]:
    """Log-strength s of each player, centred on 0, from games (a, b, score of a: 1 won, 0.5 tied, 0 lost).

    P(a beats b) = sigmoid(s_a - s_b), at the maximum of likelihood times prior; the intervals are normal, from the
    inverse of the observed information. A tie is half a win and half a loss, which overstates its variance. The prior,
    normal of deviation PRIOR_DEVIATION, keeps an unbeaten player finite and those that never met comparable, with the
    wide intervals they deserve; it moves s by less than 0.001 once a pair has played 40 games that went 3 to 1. Bradley
    and Terry 1952, Rank Analysis of Incomplete Block Designs.
    """
    if not games:
        return {}
    names = sorted({name for a, b, _ in games for name in (a, b)})
    row = dict(zip(names, np.eye(len(names))))
    sides = np.array([row[a] - row[b] for a, b, _ in games])  # [games, players]
    scores = np.array([score for _, _, score in games], np.float64)
    s, step = np.zeros(len(names)), np.full(len(names), np.inf)
    while np.any(np.abs(step) > 1e-9):
        wins = 1 / (1 + np.exp(-sides @ s))
        information = (sides.T * (wins * (1 - wins))) @ sides + np.eye(len(names)) / PRIOR_DEVIATION**2
        step = np.linalg.solve(information, sides.T @ (scores - wins) - s / PRIOR_DEVIATION**2)
        s += step / max(1.0, np.ptp(step))  # no difference moves by more than 1, so that every step climbs
    covariance = np.linalg.inv(information) - PRIOR_DEVIATION**2 / len(names)  # less that of the mean, known to be 0
    errors = np.sqrt(np.maximum(np.diag(covariance), 0))
    return {
        name: Estimate(float(x), float(se), float(x - Z95 * se), float(x + Z95 * se))
        for name, x, se in zip(names, s, errors)
    }


def rater_reliability(ratings: np.ndarray) -> list[Estimate]:
    """For each rater, on what share of units it agrees with the majority of the others; Wilson's interval.

    The majority is the value that most of the others gave. A unit where they tie, or where there are none, does not
    count; a rater with no unit that does has an estimate of nan.
    """
    ratings = np.asarray(ratings, np.float64)
    values = np.unique(ratings[~np.isnan(ratings)])
    votes = ratings[:, :, None] == values  # [raters, units, values]
    others = votes.sum(axis=0) - votes
    most = others.max(axis=2, keepdims=True, initial=0)
    majority = (others == most) & (most > 0)
    counted = (majority.sum(axis=2) == 1) & ~np.isnan(ratings)
    agree = np.any(votes & majority, axis=2)
    return [success_rate_or_nan(hits[units]) for hits, units in zip(agree, counted)]


def bootstrap_estimate(
    statistic: Callable[[np.ndarray], float], ratings: np.ndarray, *, count: int = 1000, seed: int = 0
) -> Estimate:
    """statistic(ratings) with the percentile interval of `count` resamples of its units, the last axis.

    A resample on which the statistic is nan is left out. Efron and Tibshirani 1993, An Introduction to the Bootstrap.
    """
    ratings = np.asarray(ratings)
    draw, units = np.random.default_rng(seed), ratings.shape[-1]
    resampled = np.array(
        [statistic(ratings[..., draw.integers(units, size=units)]) for _ in range(count if units else 0)]
    )
    resampled = resampled[~np.isnan(resampled)]
    if not len(resampled):
        return NO_ESTIMATE
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(float(statistic(ratings)), float(resampled.std(ddof=1)), float(low), float(high))


def _squared_distances(x: np.ndarray) -> np.ndarray:
    """The squared distance of every two entries."""
    return (x[:, None] - x) ** 2

"""A gauge of over-optimization: the reward that is learned from rises, while a rating that is not learned from falls.

Gao et al. 2023, "Scaling laws for reward model overoptimization", arXiv 2210.10760: beyond some KL a proxy's rise costs
what it stands for. The gauge reads the held-out rows of metrics.jsonl alone, so a resumed run decides as an
uninterrupted one does.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm.core.errors import UserError

HELD_OUT = "held_out/"
REWARD = "held_out/reward"
ERROR_SUFFIX = "_se"

MetricsRow = Mapping[str, Any]  # of metrics.jsonl


class OverOptimization(NamedTuple):
    """What the gauge saw: the step of the best rating, and how reward and rating have moved since."""

    metric: str
    step: int
    best_step: int
    rating: tuple[float, float]  # at the best step, now
    noise: float  # standard error of their difference
    reward: tuple[float, float]

    @property
    def message(self) -> str:
        return (
            f"stopped at step {self.step}: the reward rose from {self.reward[0]:.3g} to {self.reward[1]:.3g} since "
            f"step {self.best_step}, but the rating {self.metric}, from which nothing is learned, fell from "
            f"{self.rating[0]:.3g} to {self.rating[1]:.3g} (standard error of the fall {self.noise:.2g}): "
            f"over-optimization. The policy of step {self.best_step} is the result"
        )


def rated_rows(rows: Sequence[MetricsRow], metric: str) -> list[MetricsRow]:
    """The rows that hold the rating `metric` of the held-out prompts."""
    return [row for row in rows if f"{HELD_OUT}{metric}" in row]


def best_rated_step(rows: Sequence[MetricsRow], metric: str) -> int | None:
    """The step of the highest rating, the first of several; None before the first rating."""
    rated = rated_rows(rows, metric)
    return max(rated, key=lambda row: row[f"{HELD_OUT}{metric}"])["step"] if rated else None


def over_optimization(rows: Sequence[MetricsRow], metric: str, *, errors: float) -> OverOptimization | None:
    """What speaks for stopping at the last of the rated rows: since the best rating the held-out reward rose, and the
    rating fell by more than `errors` standard errors of the difference; None where that is not so.

    The errors of the two ratings count as independent. They are of the same prompts, so the fall is known better than
    that: the gauge is slow to stop rather than quick.
    """
    rated = rated_rows(rows, metric)
    if not rated:
        return None
    name, now = f"{HELD_OUT}{metric}", rated[-1]
    best = max(rated, key=lambda row: row[name])
    noise = math.hypot(best[name + ERROR_SUFFIX], now[name + ERROR_SUFFIX])
    if best[name] - now[name] <= errors * noise or now[REWARD] <= best[REWARD]:
        return None
    return OverOptimization(
        metric, now["step"], best["step"], (best[name], now[name]), noise, (best[REWARD], now[REWARD])
    )


def check_watched_rating(rows: Sequence[MetricsRow], metric: str, stage: str) -> None:
    """UserError unless the first held-out row has the reward, and the rating with its standard error."""
    scored = [row for row in rows if any(name.startswith(HELD_OUT) for name in row)]
    names = [name.removeprefix(HELD_OUT) for name in (scored[0] if scored else {}) if name.startswith(HELD_OUT)]
    known = [name for name in names if f"{name}{ERROR_SUFFIX}" in names and name != "reward"]
    if metric not in known or "reward" not in names:
        ways = f"choose one of {', '.join(known)}, or name another data.rater" if known else "set data.rater, in RL"
        raise UserError(
            f"train.watched_rating is {metric!r}, but {stage} logs no such rating on held-out prompts: {ways}"
        )

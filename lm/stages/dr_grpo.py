"""Dr. GRPO ("done right"): GRPO without its two biases of weighting.

Objective: the mean over answers of the *sum* over an answer's tokens of min(ratio * A, clip(ratio) * A), over the
constant `length`, with A = r - mean of the group: neither a deviation nor the answer's own length divides. At the first
update the expected gradient is that of the expected reward times (group - 1) / (group * length), exactly (`python -m
lm.certify`). Frozen: "ref", for the metrics. A batch is `Rollouts` of `data.group` answers to each prompt. Liu et al.
2025, sec. 3.2, arXiv 2503.20783.
"""

import functools

from lm.metrics import row_sum
from lm.returns import centred
from lm.stages.policy import LIMITS, SHOWN, START, Recipe, clipped, method, summary, within_group
from lm.stages.rollouts import batches

__all__ = ["LIMITS", "SHOWN", "START", "batches", "make", "summary"]


@method
def make(*, clip: float = 0.2, length: int = 32) -> Recipe:
    """Centred within the group, clipped surrogate, mean of row sums over `length` (the longest answer:
    data.max_new)."""
    return Recipe(
        advantages=within_group(centred),
        objective=clipped(clip, clip),
        average=functools.partial(row_sum, length=length),
        band=(clip, clip),
    )

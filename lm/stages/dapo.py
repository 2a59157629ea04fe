"""DAPO: GRPO for long answers: clip higher, sample until groups differ, count tokens, and price overlong answers.

Objective: the sum over all tokens of the batch, over their number, of min(ratio * A, clip(ratio, 1 - low, 1 + high) *
A), with GRPO's A and no KL. Of its four parts two are here, clip-higher and the token mean; two are options of the
data: `data.resample` draws further prompts in place of those whose answers all got the same reward (dynamic sampling),
and `data.overlong_buffer` lowers the reward of answers near the limit. Frozen: "ref", for the metrics. A batch is
`Rollouts` of `data.group` answers to each prompt. Yu et al. 2025, eq. 8 to 13, arXiv 2503.14476.

Biased: by the group's deviation, as GRPO, and by the number of tokens of a batch, which depends on what was sampled.
"""

from lm.metrics import mean
from lm.returns import standardised
from lm.stages.policy import LIMITS, SHOWN, START, Recipe, clipped, method, summary, within_group
from lm.stages.rollouts import batches

__all__ = ["LIMITS", "SHOWN", "START", "batches", "make", "summary"]


@method
def make(*, low: float = 0.2, high: float = 0.28) -> Recipe:
    """Standardised within the group, clipped surrogate with room above, mean over all tokens."""
    return Recipe(advantages=within_group(standardised), objective=clipped(low, high), average=mean, band=(low, high))

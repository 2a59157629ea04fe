"""CISPO: the importance weight of a token is cut, never its gradient.

Objective: the sum over all tokens of the batch, over their number, of stop_gradient(min(ratio, 1 + high)) * A * log p,
with GRPO's A. PPO's clip drops a token that has moved; here the rare words that turn a chain of thought ("however",
"wait") keep teaching. Frozen: "ref", for the metrics. A batch is `Rollouts` of `data.group` answers to each prompt.
MiniMax 2025, eq. 4 and 5, arXiv 2506.13585.

Biased: by the group's deviation and the number of tokens of a batch, as DAPO; and by the cut, once the policy has
moved.
"""

from lm.losses.policy import token_ratio, truncated_reinforce
from lm.metrics import mean
from lm.returns import standardised
from lm.stages.policy import LIMITS, SHOWN, START, Recipe, method, summary, within_group
from lm.stages.rollouts import batches

__all__ = ["LIMITS", "SHOWN", "START", "batches", "make", "summary"]


@method
def make(*, high: float = 4.0) -> Recipe:
    """Standardised within the group, REINFORCE with truncated weights, mean over all tokens."""

    def objective(logprobs, batch):
        ratio = token_ratio(logprobs, batch.old_logprobs)
        return truncated_reinforce(logprobs, ratio, batch.advantages, high=high)

    return Recipe(advantages=within_group(standardised), objective=objective, average=mean, band=(1.0, high))

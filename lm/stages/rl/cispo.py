"""CISPO: the importance weight of a token is cut, never its gradient.

Objective: the sum over all tokens of the batch, over their number, of stop_gradient(min(ratio, 1 + high)) * A * log p,
with GRPO's A. PPO's clip drops a token that has moved; here the rare words that turn a chain of thought ("however",
"wait") keep teaching. Frozen: "ref", for the metrics. A batch is `Rollouts` of `data.group` answers to each prompt.
MiniMax 2025, eq. 4 and 5, arXiv 2506.13585.

Biased: by the group's deviation and the number of tokens of a batch, as DAPO; and by the cut, once the policy has
moved.
"""

from lm.core.metrics import mean
from lm.losses.advantages import group_advantages
from lm.losses.policy import token_ratio, truncated_reinforce_loss
from lm.stages.rl.policy_gradient import (
    METRIC_LIMITS,
    SHOWN_METRICS,
    START_METRICS,
    PolicyGradientMethod,
    advantages_within_group,
    policy_gradient_stage,
    summary,
)
from lm.stages.rl.rollouts import batches
from lm.stages.stage import Stage


@policy_gradient_stage
def make(*, high: float = 4.0) -> PolicyGradientMethod:
    """Standardised within the group, REINFORCE with truncated weights, mean over all tokens."""

    def objective(logprobs, batch):
        ratio = token_ratio(logprobs, batch.old_logprobs)
        return truncated_reinforce_loss(logprobs, ratio, batch.advantages, high=high)

    return PolicyGradientMethod(
        advantages=advantages_within_group(group_advantages), objective=objective, average=mean, band=(1.0, high)
    )


CISPO = Stage(
    __name__,
    make,
    batches,
    summary,
    shown_metrics=SHOWN_METRICS,
    metric_limits=METRIC_LIMITS,
    start_metrics=START_METRICS,
    samples_rollouts=True,
)

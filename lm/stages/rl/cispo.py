"""CISPO: the importance weight of a token is cut, never its gradient.

Objective: the sum over all tokens of the batch, over their number, of stop_gradient(min(ratio, 1 + high)) * A * log p,
with GRPO's A. PPO's clip drops a token that has moved; here the rare words that turn a chain of thought ("however",
"wait") keep teaching. Frozen: "ref", for the metrics. A batch is `Rollouts` of `data.group` answers to each prompt.
MiniMax 2025, eq. 4 and 5, arXiv 2506.13585.

Biased: by the group's deviation and the number of tokens of a batch, as DAPO; and by the cut, once the policy has
moved.
"""

import optax

from lm.core.metrics import mean
from lm.losses.advantages import group_advantages
from lm.losses.policy import token_ratio, truncated_reinforce_loss
from lm.model import Model
from lm.optim.update import Update
from lm.stages.rl.policy_gradient import (
    METRIC_LIMITS,
    SHOWN_METRICS,
    START_METRICS,
    PolicyGradientMethod,
    advantages_within_group,
    policy_gradient_update,
    summary,
)
from lm.stages.rl.rollouts import batches
from lm.stages.stage import Stage


def method(*, clip_high: float) -> PolicyGradientMethod:
    """Standardised within the group, REINFORCE with truncated weights, mean over all tokens."""

    def objective(logprobs, batch):
        ratio = token_ratio(logprobs, batch.old_logprobs)
        return truncated_reinforce_loss(logprobs, ratio, batch.advantages, clip_high=clip_high)

    return PolicyGradientMethod(
        advantages=advantages_within_group(group_advantages),
        token_loss=objective,
        average=mean,
        clip_range=(1.0, clip_high),
    )


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    clip_high: float = 4.0,
    entropy_bonus: float = 0.0,
    importance_ratio_cap: float = 0.0,
    refresh_reference_every: int = 0,
    epochs: int = 1,
    minibatch_count: int = 1,
    microbatches: int = 1,
    temperature: float = 1.0,
) -> Update:
    """policy_gradient_update of `method`."""
    return policy_gradient_update(
        model,
        optimizer,
        method(clip_high=clip_high),
        entropy_bonus=entropy_bonus,
        importance_ratio_cap=importance_ratio_cap,
        refresh_reference_every=refresh_reference_every,
        epochs=epochs,
        minibatch_count=minibatch_count,
        microbatches=microbatches,
        temperature=temperature,
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

"""GSPO: GRPO with the ratio of whole answers, since it is whole answers that are rewarded.

Objective: the mean over answers of min(s * A, clip(s, 1 - low, 1 + high) * A) with s = (p(y) / p_old(y))^(1/|y|) and
GRPO's A. An answer is clipped whole or not at all, and the clip is three orders narrower than a token's, since s is a
mean of |y| log-ratios. Frozen: "ref". A batch is `Rollouts` of `data.group` answers to each prompt. Zheng et al. 2025,
eq. 5 to 7, arXiv 2507.18071.

Biased at the first update as GRPO is: by the group's deviation and the answer's own length.
"""

import optax

from lm.core.metrics import row_mean
from lm.losses.advantages import group_advantages
from lm.losses.policy import clipped_surrogate, sequence_ratio
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


def method(*, beta: float, clip_low: float, clip_high: float) -> PolicyGradientMethod:
    """Standardised within the group, clipped surrogate of sequence ratios, mean of rows, beta * k3."""

    def ratio(logprobs, batch):
        return sequence_ratio(logprobs, batch.old_logprobs, batch.tokens.weights)

    def objective(logprobs, batch):
        return clipped_surrogate(ratio(logprobs, batch), batch.advantages, clip_low=clip_low, clip_high=clip_high)

    return PolicyGradientMethod(
        advantages=advantages_within_group(group_advantages),
        token_loss=objective,
        average=row_mean,
        clip_range=(clip_low, clip_high),
        kl_coefficient=beta,
        clipped_ratio=ratio,
    )


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    beta: float = 0.0,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
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
        method(beta=beta, clip_low=clip_low, clip_high=clip_high),
        entropy_bonus=entropy_bonus,
        importance_ratio_cap=importance_ratio_cap,
        refresh_reference_every=refresh_reference_every,
        epochs=epochs,
        minibatch_count=minibatch_count,
        microbatches=microbatches,
        temperature=temperature,
    )


GSPO = Stage(
    __name__,
    make,
    batches,
    summary,
    shown_metrics=SHOWN_METRICS,
    metric_limits=METRIC_LIMITS,
    start_metrics=START_METRICS,
    samples_rollouts=True,
)

"""DAPO: GRPO for long answers: clip higher, sample until groups differ, count tokens, and price overlong answers.

Objective: the sum over all tokens of the batch, over their number, of min(ratio * A, clip(ratio, 1 - low, 1 + high) *
A), with GRPO's A and no KL. Of its four parts two are here, clip-higher and the token mean; two are options of the
data: `data.resample_rounds` draws further prompts in place of those whose answers all got the same reward (dynamic
sampling), and `data.overlong_buffer` lowers the reward of answers near the limit. Frozen: "ref", for the metrics. A
batch is `Rollouts` of `data.group` answers to each prompt. Yu et al. 2025, eq. 8 to 13, arXiv 2503.14476.

Biased: by the group's deviation, as GRPO, and by the number of tokens of a batch, which depends on what was sampled.
"""

import optax

from lm.core.metrics import mean
from lm.losses.advantages import group_advantages
from lm.model import Model
from lm.optim.update import Update
from lm.stages.rl.policy_gradient import (
    METRIC_LIMITS,
    SHOWN_METRICS,
    START_METRICS,
    PolicyGradientMethod,
    advantages_within_group,
    clipped_objective,
    policy_gradient_update,
    summary,
)
from lm.stages.rl.rollouts import batches
from lm.stages.stage import Stage


def method(*, clip_low: float, clip_high: float) -> PolicyGradientMethod:
    """Standardised within the group, clipped surrogate with room above, mean over all tokens."""
    return PolicyGradientMethod(
        advantages=advantages_within_group(group_advantages),
        token_loss=clipped_objective(clip_low, clip_high),
        average=mean,
        clip_range=(clip_low, clip_high),
    )


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
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
        method(clip_low=clip_low, clip_high=clip_high),
        entropy_bonus=entropy_bonus,
        importance_ratio_cap=importance_ratio_cap,
        refresh_reference_every=refresh_reference_every,
        epochs=epochs,
        minibatch_count=minibatch_count,
        microbatches=microbatches,
        temperature=temperature,
    )


DAPO = Stage(
    __name__,
    make,
    batches,
    summary,
    shown_metrics=SHOWN_METRICS,
    metric_limits=METRIC_LIMITS,
    start_metrics=START_METRICS,
    samples_rollouts=True,
)

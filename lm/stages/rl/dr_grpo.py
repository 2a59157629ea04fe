"""Dr. GRPO ("done right"): GRPO without its two biases of weighting.

Objective: the mean over answers of the *sum* over an answer's tokens of min(ratio * A, clip(ratio) * A), over the
constant `length`, with A = r - mean of the group: neither a deviation nor the answer's own length divides. At the first
update the expected gradient is that of the expected reward times (group - 1) / (group * length), exactly (`python -m
lm certify`). Frozen: "ref", for the metrics. A batch is `Rollouts` of `data.group` answers to each prompt. Liu et al.
2025, sec. 3.2, arXiv 2503.20783.
"""

import functools

import optax

from lm.core.metrics import row_sum
from lm.losses.advantages import centered_group_advantages
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


def method(*, clip: float, max_response_length: int) -> PolicyGradientMethod:
    """Centred within the group, clipped surrogate, mean of row sums over `length`."""
    return PolicyGradientMethod(
        advantages=advantages_within_group(centered_group_advantages),
        token_loss=clipped_objective(clip, clip),
        average=functools.partial(row_sum, length=max_response_length),
        clip_range=(clip, clip),
    )


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    clip: float = 0.2,
    max_response_length: int = 32,  # of the longest answer: data.max_new
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
        method(clip=clip, max_response_length=max_response_length),
        entropy_bonus=entropy_bonus,
        importance_ratio_cap=importance_ratio_cap,
        refresh_reference_every=refresh_reference_every,
        epochs=epochs,
        minibatch_count=minibatch_count,
        microbatches=microbatches,
        temperature=temperature,
    )


DR_GRPO = Stage(
    __name__,
    make,
    batches,
    summary,
    shown_metrics=SHOWN_METRICS,
    metric_limits=METRIC_LIMITS,
    start_metrics=START_METRICS,
    samples_rollouts=True,
)

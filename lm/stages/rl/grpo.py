"""GRPO: answers to one prompt are judged against each other, so no value network is needed.

Objective: the mean over answers of the mean over an answer's tokens of min(ratio * A, clip(ratio) * A) - beta * k3,
with A = (r - mean of the group) / (its standard deviation + 1e-4), the same for every token of the answer. Frozen:
"ref", the policy this run starts from. A batch is `Rollouts` of `data.group` answers to each prompt. Shao et al. 2024,
eq. 3, arXiv 2402.03300.

Three choices of the paper bias its gradient, and `python -m lm certify` prints by how much: the deviation in the
advantage, the mean over each answer's own length, and k3 in the loss, whose gradient is that of the other KL. They are
kept, as this is GRPO as published; stages dr_grpo and rloo have none of them.
"""

import optax

from lm.core.metrics import row_mean
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


def method(*, beta: float, clip: float) -> PolicyGradientMethod:
    """Standardised within the group, clipped surrogate, mean of row means, beta * k3."""
    return PolicyGradientMethod(
        advantages=advantages_within_group(group_advantages),
        token_loss=clipped_objective(clip, clip),
        average=row_mean,
        clip_range=(clip, clip),
        kl_coefficient=beta,
    )


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    beta: float = 0.04,
    clip: float = 0.2,
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
        method(beta=beta, clip=clip),
        entropy_bonus=entropy_bonus,
        importance_ratio_cap=importance_ratio_cap,
        refresh_reference_every=refresh_reference_every,
        epochs=epochs,
        minibatch_count=minibatch_count,
        microbatches=microbatches,
        temperature=temperature,
    )


GRPO = Stage(
    __name__,
    make,
    batches,
    summary,
    shown_metrics=SHOWN_METRICS,
    metric_limits=METRIC_LIMITS,
    start_metrics=START_METRICS,
    samples_rollouts=True,
)

"""RLOO: REINFORCE whose baseline is the mean reward of the *other* answers to the prompt.

Objective: E[reward(x, y)] - beta * KL(policy, reference). The KL is counted in the reward, as the sum of log(p / p_ref)
over the answer, and nowhere else; A = R - mean of the others' R, alike for all tokens of an answer, whose losses are
summed. At the first update the expected gradient is that of the objective, exactly (`python -m lm certify`). Frozen:
"ref". A batch is `Rollouts` of `data.group` answers to each prompt. Ahmadian et al. 2024, arXiv 2402.14740; Kool et al.
2019.

Ours differs: where a batch is learned from more than once the token ratios of PPO weigh it, clipped; at ratio 1 that is
REINFORCE.
"""

import jax.numpy as jnp
import optax

from lm.core.metrics import row_sum
from lm.losses.advantages import leave_one_out_advantages
from lm.losses.policy import kl_k1
from lm.model import Model
from lm.optim.update import Update
from lm.stages.rl.policy_gradient import (
    METRIC_LIMITS,
    SHOWN_METRICS,
    START_METRICS,
    PolicyGradientMethod,
    clipped_objective,
    policy_gradient_update,
    summary,
    token_advantages,
)
from lm.stages.rl.rollouts import batches
from lm.stages.stage import Stage


def method(*, beta: float, clip: float) -> PolicyGradientMethod:
    """Reward less beta * k1, leave-one-out baseline, clipped surrogate, mean of row sums."""

    def advantages(batch):
        kl = jnp.sum(kl_k1(batch.old_logprobs, batch.ref_logprobs), axis=1)
        return token_advantages(leave_one_out_advantages(batch.rewards - beta * kl, batch.group), batch)

    return PolicyGradientMethod(
        advantages=advantages, token_loss=clipped_objective(clip, clip), average=row_sum, clip_range=(clip, clip)
    )


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    beta: float = 0.05,
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


RLOO = Stage(
    __name__,
    make,
    batches,
    summary,
    shown_metrics=SHOWN_METRICS,
    metric_limits=METRIC_LIMITS,
    start_metrics=START_METRICS,
    samples_rollouts=True,
)

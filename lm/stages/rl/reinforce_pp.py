"""REINFORCE++: no value network and no group: the whole batch is the baseline.

Objective: E[reward(x, y)] - beta * KL(policy, reference) through PPO's clipped surrogate, with A_t = r - beta * the sum
of log(p / p_ref) from t to the answer's end (a reward per token counts from t on too), whitened over all tokens of the
batch. Frozen: "ref". A batch is `Rollouts`; answers to one prompt may be several or one. Hu 2025, arXiv 2501.03262.

Biased: the batch's own mean and deviation are part of the advantage, and the number of its tokens depends on what was
sampled.
"""

import optax

from lm.core.metrics import mean
from lm.losses.advantages import kl_rewards, rewards_to_go, whiten
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
)
from lm.stages.rl.rollouts import batches
from lm.stages.stage import Stage


def method(*, beta: float, clip: float) -> PolicyGradientMethod:
    """KL rewards to go, whitened over the batch; clipped surrogate; mean over all tokens."""

    def advantages(batch):
        w = batch.tokens.weights
        kl = kl_k1(batch.old_logprobs, batch.ref_logprobs)
        rewards = kl_rewards(batch.rewards, kl, w, beta=beta, token_rewards=batch.token_rewards)
        return whiten(rewards_to_go(rewards, w), w)

    return PolicyGradientMethod(
        advantages=advantages, token_loss=clipped_objective(clip, clip), average=mean, clip_range=(clip, clip)
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


REINFORCE_PP = Stage(
    __name__,
    make,
    batches,
    summary,
    shown_metrics=SHOWN_METRICS,
    metric_limits=METRIC_LIMITS,
    start_metrics=START_METRICS,
    samples_rollouts=True,
)

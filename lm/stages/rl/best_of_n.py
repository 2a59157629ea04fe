"""Best-of-n fine-tuning (rejection sampling): sample several answers, keep the best, learn to say it.

Objective: the mean of -log p over the tokens of the best of `data.group` answers to each prompt; the best answers are
data, no gradient goes through their choice. So the policy is pulled towards best-of-n sampling from itself, whose KL is
log n - (n - 1) / n (Beirami et al. 2024, arXiv 2401.01879, an upper bound), batch after batch. Prompts whose answers
are all worth the same teach nothing and weigh nothing. Frozen: "ref", for the metrics. A batch is `Rollouts`. Touvron
et al. 2023 (Llama 2), sec. 3.2.3, arXiv 2307.09288; Dong et al. 2023 (RAFT), arXiv 2304.06767.

Biased as the gradient of that objective by the number of tokens of a batch, which depends on what was sampled.
"""

import jax
import jax.numpy as jnp
import optax

from lm.core.metrics import Metrics, mean
from lm.core.types import Rollouts
from lm.losses.advantages import rewards_by_group
from lm.model import Model
from lm.optim.update import Update
from lm.stages.rl.policy_gradient import (
    METRIC_LIMITS,
    SHOWN_METRICS,
    START_METRICS,
    PolicyGradientMethod,
    annotated_advantages,
    annotated_rollouts,
    policy_gradient_loss,
    rollout_update,
    summary,
)
from lm.stages.rl.rollouts import batches
from lm.stages.stage import Stage


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    entropy_bonus: float = 0.0,
    refresh_reference_every: int = 0,
    epochs: int = 1,
    minibatch_count: int = 1,
    microbatches: int = 1,
    temperature: float = 1.0,
) -> Update:
    """refreshed_reference(annotate(best_answers, minibatches(gradient(-log p))))."""
    likelihood = PolicyGradientMethod(
        annotated_advantages, lambda logprobs, batch: -logprobs, mean, clip_range=(1.0, 1.0)
    )

    def annotate_best(state, batch: Rollouts) -> tuple[Rollouts, Metrics]:
        batch, _, metrics = annotated_rollouts(model, state, batch, temperature=temperature)
        return best_answers(batch), metrics

    return rollout_update(
        policy_gradient_loss(model, likelihood, entropy_bonus=entropy_bonus, temperature=temperature),
        optimizer,
        annotate_best,
        refresh_reference_every=refresh_reference_every,
        epochs=epochs,
        minibatch_count=minibatch_count,
        microbatches=microbatches,
    )


def best_answers(batch: Rollouts) -> Rollouts:
    """The best answer of each group, the first of several; it weighs nothing where all are worth the same."""
    rewards = rewards_by_group(batch.rewards, batch.group)
    rows = jnp.arange(len(rewards)) * batch.group + jnp.argmax(rewards, axis=1)
    best = jax.tree.map(lambda x: x[rows], batch).replace(group=1)
    differ = (jnp.max(rewards, axis=1) > jnp.min(rewards, axis=1)).astype(jnp.float32)
    return best.replace(tokens=best.tokens.replace(weights=best.tokens.weights * differ[:, None]))


BEST_OF_N = Stage(
    __name__,
    make,
    batches,
    summary,
    shown_metrics=SHOWN_METRICS,
    metric_limits=METRIC_LIMITS,
    start_metrics=START_METRICS,
    samples_rollouts=True,
)

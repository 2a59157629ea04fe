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

from lm.metrics import Metrics, mean
from lm.model import Model
from lm.returns import grouped
from lm.stages.policy import LIMITS, SHOWN, START, Recipe, check, scored, summary, surrogate
from lm.stages.rollouts import batches
from lm.types import Rollouts
from lm.update import Update, annotate, gradient, minibatches, renewed

__all__ = ["LIMITS", "SHOWN", "START", "batches", "make", "summary"]


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    entropy_bonus: float = 0.0,
    refresh: int = 0,
    epochs: int = 1,
    minibatch_count: int = 1,
    microbatches: int = 1,
    temperature: float = 1.0,
) -> Update:
    """renewed(annotate(scored + best, minibatches(gradient(-log p))))."""
    check(epochs=epochs, minibatch_count=minibatch_count, refresh=refresh, correction=0.0)
    likelihood = Recipe(lambda batch: batch.advantages, lambda logprobs, batch: -logprobs, mean, band=(1.0, 1.0))
    loss = surrogate(model, likelihood, entropy_bonus=entropy_bonus, temperature=temperature)
    inner = minibatches(gradient(loss, optimizer, microbatches=microbatches), epochs=epochs, count=minibatch_count)

    def kept(state, batch: Rollouts) -> tuple[Rollouts, Metrics]:
        batch, _, metrics = scored(model, state, batch, temperature=temperature)
        return best(batch), metrics

    return renewed(annotate(kept, inner), every=refresh * epochs * minibatch_count)


def best(batch: Rollouts) -> Rollouts:
    """The best answer of each group, the first of several; it weighs nothing where all are worth the same."""
    rewards = grouped(batch.rewards, batch.group)
    rows = jnp.arange(len(rewards)) * batch.group + jnp.argmax(rewards, axis=1)
    chosen = jax.tree.map(lambda x: x[rows], batch).replace(group=1)
    differ = (jnp.max(rewards, axis=1) > jnp.min(rewards, axis=1)).astype(jnp.float32)
    return chosen.replace(tokens=chosen.tokens.replace(weights=chosen.tokens.weights * differ[:, None]))

"""Online DPO: the policy answers, a reward says which answer is better, and DPO learns from its own pairs.

Objective: E over answers of the current policy of -log sigmoid(beta * (log p / p_ref of the better - of the worse)); no
gradient goes through the sampling. All pairs of a group are compared, equal rewards are not, and each prompt counts
once. So the pairs stay those that the policy would write today, where offline DPO learns from answers that it left
behind. Frozen: "ref", the policy this run starts from. A batch is `Rollouts` of `data.group` answers to each prompt.
Guo et al. 2024 (OAIF), eq. 2, arXiv 2402.04792; Rafailov et al. 2023, eq. 7, arXiv 2305.18290.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from lm.losses.preference import dpo
from lm.metrics import Metrics
from lm.model import Model
from lm.returns import grouped
from lm.stages.policy import LIMITS, SHOWN, check, scored, summary
from lm.stages.preference import answer_logprobs, measures, over_pairs
from lm.stages.rollouts import batches
from lm.types import Rollouts
from lm.update import Update, annotate, gradient, minibatches, renewed

__all__ = ["LIMITS", "SHOWN", "START", "batches", "make", "summary"]

# Held-out metrics before the first step, (value, tolerance): policy and reference are one, so no answer leads.
START: Mapping[str, tuple[float, float]] = {"margin": (0.0, 1e-3), "kl": (0.0, 0.05)}


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    beta: float = 0.1,
    smoothing: float = 0.0,
    refresh: int = 0,
    epochs: int = 1,
    minibatch_count: int = 1,
    microbatches: int = 1,
    temperature: float = 1.0,
) -> Update:
    """renewed(annotate(scored + by_prompt, minibatches(gradient(dpo))))."""
    check(epochs=epochs, minibatch_count=minibatch_count, refresh=refresh, correction=0.0)

    def loss(params, frozen, batch: Rollouts, key):
        logprobs = answer_logprobs(model, params["lm"], batch.tokens, temperature=temperature)
        rewards = beta * (logprobs - jnp.sum(batch.ref_logprobs, axis=-1))
        each = over_pairs(functools.partial(dpo, smoothing=smoothing), rewards, ranks(batch.rewards))
        return each, measures(each, rewards, logprobs, ranks(batch.rewards))

    def paired(state, batch: Rollouts) -> tuple[Rollouts, Metrics]:
        batch, _, metrics = scored(model, state, batch, temperature=temperature)
        return by_prompt(batch), metrics

    inner = minibatches(gradient(loss, optimizer, microbatches=microbatches), epochs=epochs, count=minibatch_count)
    return renewed(annotate(paired, inner), every=refresh * epochs * minibatch_count)


def by_prompt(batch: Rollouts) -> Rollouts:
    """Leaves [B,...] as [prompts, group, ...]: a cut into minibatches never parts the answers that are compared."""
    prompts, group = grouped(batch.rewards, batch.group).shape
    return jax.tree.map(lambda x: x.reshape(prompts, group, *x.shape[1:]), batch)


def ranks(rewards):
    """i32[P,G,1] from rewards f32[P,G]: 1 is best, equal rewards share a rank."""
    return 1 + jnp.sum(rewards[:, None, :] > rewards[:, :, None], axis=-1, dtype=jnp.int32)[..., None]

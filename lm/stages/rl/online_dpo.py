"""Online DPO: the policy answers, a reward says which answer is better, and DPO learns from its own pairs.

Objective: E over answers of the current policy of -log sigmoid(beta * (log p / p_ref of the better - of the worse)); no
gradient goes through the sampling. All pairs of a group are compared, equal rewards are not, and each prompt counts
once. So the pairs stay those that the policy would write today, where offline DPO learns from answers that it left
behind. Frozen: "ref", the policy this run starts from. A batch is `Rollouts` of `data.group` answers to each prompt.
Guo et al. 2024 (OAIF), eq. 2, arXiv 2402.04792; Rafailov et al. 2023, eq. 7, arXiv 2305.18290.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from lm.core.metrics import Metrics
from lm.core.types import Rollouts
from lm.losses.advantages import rewards_by_group
from lm.losses.preference import dpo_loss
from lm.model import Model
from lm.optim.update import Update
from lm.stages.preference.preference_batches import answer_logprobs, mean_over_pairs, preference_metrics
from lm.stages.rl.policy_gradient import METRIC_LIMITS, SHOWN_METRICS, annotated_rollouts, rollout_update, summary
from lm.stages.rl.rollouts import batches
from lm.stages.stage import Stage


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    refresh_reference_every: int = 0,
    epochs: int = 1,
    minibatch_count: int = 1,
    microbatches: int = 1,
    temperature: float = 1.0,
) -> Update:
    """refreshed_reference(annotate(prompt_groups, minibatches(gradient(dpo))))."""

    def loss(params, frozen, batch: Rollouts, key):
        logprobs = answer_logprobs(model, params["lm"], batch.tokens, temperature=temperature)
        rewards = beta * (logprobs - jnp.sum(batch.ref_logprobs, axis=-1))
        each = mean_over_pairs(
            functools.partial(dpo_loss, label_smoothing=label_smoothing), rewards, reward_ranks(batch.rewards)
        )
        return each, preference_metrics(each, rewards, logprobs, reward_ranks(batch.rewards))

    def annotate_groups(state, batch: Rollouts) -> tuple[Rollouts, Metrics]:
        batch, _, metrics = annotated_rollouts(model, state, batch, temperature=temperature)
        return prompt_groups(batch), metrics

    return rollout_update(
        loss,
        optimizer,
        annotate_groups,
        refresh_reference_every=refresh_reference_every,
        epochs=epochs,
        minibatch_count=minibatch_count,
        microbatches=microbatches,
    )


def prompt_groups(batch: Rollouts) -> Rollouts:
    """Leaves [B,...] as [prompts, group, ...]: a cut into minibatches never parts the answers that are compared."""
    prompts, group = rewards_by_group(batch.rewards, batch.group).shape
    return jax.tree.map(lambda x: x.reshape(prompts, group, *x.shape[1:]), batch)


def reward_ranks(rewards):
    """i32[P,G,1] from rewards f32[P,G]: 1 is best, equal rewards share a rank."""
    return 1 + jnp.sum(rewards[:, None, :] > rewards[:, :, None], axis=-1, dtype=jnp.int32)[..., None]


ONLINE_DPO = Stage(
    __name__,
    make,
    batches,
    summary,
    shown_metrics=SHOWN_METRICS,
    metric_limits=METRIC_LIMITS,
    start_metrics={"margin": (0.0, 1e-3), "kl": (0.0, 0.05)},
    samples_rollouts=True,
)

"""Reward modelling from whole rankings: as stage reward, but with the likelihood of the order of all answers at once.

Objective: the mean over prompts of -log P(ranking) under Plackett-Luce: the best answer is chosen among all, the next
among the rest, and so on; of answers that share a rank each is chosen before the worse ones only. Divided by the number
of choices, so that a prompt counts once. Heads, batches, start and measures are those of stage reward.
Plackett 1975; Luce 1959; for language models: Song et al. 2023, eq. 4, arXiv 2306.17492.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import optax

from lm.data.preferences import OVERALL_ONLY
from lm.losses.ranking import plackett_luce_loss, preference_mask
from lm.model import Model
from lm.optim.update import Update
from lm.stages.reward_model.ranking_batches import batches, reward_model_update, summary
from lm.stages.stage import Stage


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    axes: Mapping[str, float] = OVERALL_ONLY,
    centring_coefficient: float = 0.01,
    microbatches: int = 1,
) -> Update:
    """learner(plackett_luce)."""

    def order(scores, ranks):
        choices = jnp.any(preference_mask(ranks), axis=2)
        return jnp.sum(plackett_luce_loss(scores, ranks), axis=1) / jnp.maximum(jnp.sum(choices, axis=1), 1)

    return reward_model_update(
        model, optimizer, order, axes=axes, centring_coefficient=centring_coefficient, microbatches=microbatches
    )


LISTWISE = Stage(__name__, make, batches, summary, shown_metrics=("loss", "accuracy"), trains_reward_model=True)

"""Reward modelling: learn a scalar taste from ranked answers, pair by pair.

Objective: the mean over pairs of -log sigmoid(r(x, chosen) - r(x, rejected)), the Bradley-Terry likelihood of the
verdicts. r is a linear head, zero at the start, on the state at the last real token of a decoder that starts as the SFT
model; with several axes there is a head for each on one trunk. Nothing is frozen. A batch is `RankedAnswers`: all
answers of a prompt go through one forward pass, all their pairs are compared, and each prompt counts once, however many
pairs its ranking gives. Stiennon et al. 2020, arXiv 2009.01325; Ouyang et al. 2022, sec. 3.5, arXiv 2203.02155.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import optax

from lm.core.errors import UserError
from lm.data.preferences import OVERALL_ONLY
from lm.losses.ranking import bradley_terry_loss, preference_mask
from lm.model import Model
from lm.optim.update import Update
from lm.stages.reward_model.ranking_batches import batches, reward_model_update, summary
from lm.stages.stage import Stage


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    axes: Mapping[str, float] = OVERALL_ONLY,
    margin: float = 0.0,
    flip_probability: float = 0.0,
    centring_coefficient: float = 0.01,
    microbatches: int = 1,
) -> Update:
    """The update of `bradley_terry_loss` over pairs.

    margin: the lead asked for each rank between two answers. flip_probability: the share of preferences expected to be
    wrong. centring_coefficient: the weight of the term that keeps scores near 0.
    """
    if not 0 <= flip_probability < 0.5:
        raise UserError(
            f"stage.flip_probability is {flip_probability}; it must be in [0, 0.5): at one half verdicts say nothing"
        )

    def pairs(scores, ranks):
        better = preference_mask(ranks)
        apart = ranks[:, None, :] - ranks[:, :, None]
        each = bradley_terry_loss(
            scores[:, :, None], scores[:, None, :], margin=margin * apart, flip_probability=flip_probability
        )
        return jnp.sum(jnp.where(better, each, 0.0), (1, 2)) / jnp.maximum(jnp.sum(better, (1, 2)), 1)

    return reward_model_update(
        model, optimizer, pairs, axes=axes, centring_coefficient=centring_coefficient, microbatches=microbatches
    )


REWARD = Stage(__name__, make, batches, summary, shown_metrics=("loss", "accuracy"), trains_reward_model=True)

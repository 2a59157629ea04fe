"""Supervised fine-tuning: pretraining's objective on conversations; it differs only in its data.

Objective: the mean of -log p over the assistant's tokens and their end token; system, user and role markers are context
(weight 0). Nothing is frozen. A batch is rows of packed conversations (`Tokens`), isolated from each other.
Ouyang et al. 2022, sec. 3.5, arXiv 2203.02155.
"""

import optax

from lm.core.metrics import Metrics, metric_values
from lm.model import Model
from lm.optim.update import Update
from lm.stages.pretraining.conversation_batches import batches
from lm.stages.pretraining.next_token import next_token_update
from lm.stages.stage import Stage


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    z_loss: float = 1e-4,
    balance_loss: float = 0.0,
    router_z_loss: float = 0.0,
    microbatches: int = 1,
) -> Update:
    """next_token_update. `balance_loss` and `router_z_loss`: of a mixture of experts (see `next_token_loss`)."""
    return next_token_update(
        model,
        optimizer,
        z_loss=z_loss,
        balance_loss=balance_loss,
        router_z_loss=router_z_loss,
        microbatches=microbatches,
    )


def summary(metrics: Metrics, about) -> dict[str, float]:
    """Held-out nats per trained token."""
    return metric_values(metrics)


SFT = Stage(__name__, make, batches, summary)

"""Supervised fine-tuning: pretraining's objective on conversations; it differs only in its data.

Objective: the mean of -log p over the assistant's tokens and their end token; system, user and role markers are context
(weight 0). Nothing is frozen. A batch is rows of packed conversations (`Tokens`), isolated from each other.
Ouyang et al. 2022, sec. 3.5, arXiv 2203.02155.
"""

from collections.abc import Mapping

import optax

from lm.metrics import Metrics, values
from lm.model import Model
from lm.stages.conversations import batches, rows
from lm.stages.next_token import next_token
from lm.update import Update, gradient

__all__ = ["LIMITS", "SHOWN", "START", "batches", "make", "rows", "summary"]

SHOWN = ("loss",)  # in the live line
LIMITS: Mapping[str, float] = {}  # metrics the loop keeps below a bound
START: Mapping[str, tuple[float, float]] = {}  # held-out metrics before the first step: (value, tolerance)


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    z_loss: float = 1e-4,
    balance: float = 0.0,
    router_z: float = 0.0,
    microbatches: int = 1,
) -> Update:
    """gradient(next_token). `balance` and `router_z`: of a mixture of experts (see `next_token`)."""
    loss = next_token(model, z_loss=z_loss, balance=balance, router_z=router_z)
    return gradient(loss, optimizer, microbatches=microbatches)


def summary(metrics: Metrics, about) -> dict[str, float]:
    """Held-out nats per trained token."""
    return values(metrics)

"""A method of one's own in a run: pretraining with a price on confidence.

    python -m lm train --config=experiments/pretrain.py --workdir=runs/my_method \
        --config.stage.name=experiments/examples/my_method.py:STAGE --config.stage.price=0.2

Objective: the mean next-token loss minus `price` times the mean entropy of the next-token distribution (Pereyra et al.
2017, arXiv 1701.06548), each divided by its own weight. Batches and summary are those of stage pretrain.
"""

import optax

from lm.core.metrics import mean
from lm.model import Model
from lm.optim.combinators import combined_loss
from lm.optim.update import Loss, Update, gradient
from lm.stages.pretraining.next_token import next_token_loss
from lm.stages.pretraining.pretrain import PRETRAIN


def confidence(model: Model) -> Loss:
    """Minus the entropy of the next-token distribution, nats, averaged over the tokens that count."""

    def loss(params, frozen, batch, key):
        x = model.hidden_states(params["lm"], batch.inputs, batch.positions, batch.segments)
        entropy = model.target_stats(params["lm"], x, batch.targets).entropy
        return mean(-entropy, batch.weights), {"entropy": mean(entropy, batch.weights)}

    return loss


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    price: float = 0.2,
    z_loss: float = 1e-4,
    microbatches: int = 1,
) -> Update:
    """gradient(next-token loss + price * confidence)."""
    losses = {"text": (1.0, next_token_loss(model, z_loss=z_loss)), "sure": (price, confidence(model))}
    return gradient(combined_loss(**losses), optimizer, microbatches=microbatches)


STAGE = PRETRAIN._replace(module=__name__, make=make, shown_metrics=("loss", "entropy"))

"""Next-token prediction: the objective that pretraining and supervised fine-tuning share."""

import jax.numpy as jnp

from lm.metrics import mean
from lm.model import Model
from lm.types import Tokens
from lm.update import Loss


def next_token(model: Model, *, z_loss: float = 0.0) -> Loss:
    """Cross entropy -log p(target) in nats, over the weighted targets of the batch.

    `z_loss` * logsumexp(logits)^2 on the same weighted mean keeps the logits from drifting (Chowdhery et al. 2022,
    sec. 5, arXiv 2204.02311); it is logged apart and is no part of `loss`.
    """

    def loss(params, frozen, batch: Tokens, key):
        x = model.hidden(params["lm"], batch.inputs, batch.positions, batch.segments)
        scores = model.scores(params["lm"], x, batch.targets)
        entropy = mean(-scores.logprobs, batch.weights)
        z = mean(jnp.square(scores.log_z), batch.weights)
        return {"loss": entropy, "z_loss": z_loss * z}, {"loss": entropy, "z_loss": z_loss * z}

    return loss

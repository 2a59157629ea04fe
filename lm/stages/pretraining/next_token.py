"""Next-token prediction: the objective that pretraining and supervised fine-tuning share."""

import jax.numpy as jnp
import optax

from lm.core.errors import UserError
from lm.core.metrics import Mean, mean
from lm.core.types import Tokens
from lm.model import Model, moe
from lm.optim.combinators import decoder_gradient
from lm.optim.update import Loss, Update


def next_token_update(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    z_loss: float,
    balance_loss: float,
    router_z_loss: float,
    microbatches: int,
) -> Update:
    """gradient(next_token_loss)."""
    loss = next_token_loss(model, z_loss=z_loss, balance_loss=balance_loss, router_z_loss=router_z_loss)
    return decoder_gradient(loss, optimizer, microbatches=microbatches)


def next_token_loss(
    model: Model, *, z_loss: float = 0.0, balance_loss: float = 0.0, router_z_loss: float = 0.0
) -> Loss:
    """Cross entropy -log p(target) in nats, over the weighted targets of the batch.

    `z_loss` * logsumexp(logits)^2 on the same weighted mean keeps the logits from drifting (Chowdhery et al. 2022,
    sec. 5, arXiv 2204.02311); it is logged apart and is no part of `loss`.

    For a model with experts, over all tokens but padding, logged as they are, without their coefficients: `balance`
    times E / k sum_e f_e P_e, which is 1 where the work is shared evenly (Fedus et al. 2021, eq. 4, arXiv 2101.03961;
    theirs is 0.01), and `router_z` times the square of the router's logsumexp (Zoph et al. 2022, eq. 5,
    arXiv 2202.08906; theirs is 0.001). A microbatch balances its own tokens, those of all its devices.
    """
    mixture = model.config.experts > 0
    if not mixture:
        for name, coefficient in (("balance_loss", balance_loss), ("router_z_loss", router_z_loss)):
            if coefficient:
                raise UserError(
                    f"stage.{name} is {coefficient}, but the model has no experts: leave it out, or set model.experts"
                )

    def loss(params, frozen, batch: Tokens, key):
        given = batch.inputs, batch.positions, batch.segments
        x, routing = (
            model.hidden_and_routing(params["lm"], *given)
            if mixture
            else (model.hidden_states(params["lm"], *given), None)
        )
        scores = model.target_stats(params["lm"], x, batch.targets)
        entropy = mean(-scores.logprobs, batch.weights)
        z = mean(jnp.square(scores.log_z), batch.weights)
        terms = {"loss": entropy, "z_loss": z_loss * z}
        if not mixture:
            return terms, terms
        even, router = router_losses(routing, batch)
        return (
            {**terms, "balance": balance_loss * even, "router_z": router_z_loss * router},
            {**terms, "balance": even, "router_z": router},
        )

    return loss


def router_losses(routing: moe.Routing, batch: Tokens) -> tuple[Mean, Mean]:
    """experts.balance and experts.router_z over the batch's tokens; the first is a number of the whole batch."""
    real = (batch.segments > 0).astype(jnp.float32)
    count = jnp.sum(real)
    return Mean(moe.load_balancing_loss(routing, real) * count, count), mean(moe.router_z_loss(routing), real)

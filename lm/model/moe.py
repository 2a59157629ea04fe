"""Mixture of experts: each token goes through a few of many MLPs, and no token is dropped."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from lm.core.types import Array, Params
from lm.model.config import ModelConfig


@struct.dataclass
class Routing:
    """How tokens were spread over E experts, by layer."""

    probabilities: Array  # f32[L,B,T,E]  softmax of the router
    expert_mask: Array  # f32[L,B,T,E]  1 for the experts that a token took
    log_z: Array  # f32[L,B,T]  logsumexp of the router's logits


def moe_mlp(c: ModelConfig, layer: Params, x: Array, activation: Callable[[Array], Array]) -> tuple[Array, Routing]:
    """The weighted sum of the outputs of each token's experts, f[B,T,D] from f[B,T,D]; Routing without its L.

    Tokens are sorted by expert and multiplied by its matrices in one product over ragged groups (Gale et al. 2022,
    arXiv 2211.15841): no expert has a capacity. Routed in float32.
    """
    B, T, D = x.shape
    k, tokens = c.experts_per_token, x.reshape(-1, D)
    logits = jnp.matmul(tokens, layer["router"].astype(x.dtype), preferred_element_type=jnp.float32)
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights, experts = jax.lax.top_k(probabilities, k)  # [B*T,k]
    if c.experts_normalized:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)

    order = jnp.argsort(experts.reshape(-1))  # stable: rows of one expert are adjacent
    sizes = jnp.bincount(experts.reshape(-1), length=c.experts).astype(jnp.int32)
    rows = tokens[order // k]
    product = lambda rows, name: jax.lax.ragged_dot(rows, layer[name].astype(x.dtype), sizes)
    h = activation(product(rows, "gate")) * product(rows, "up") if c.gated else activation(product(rows, "up"))
    parts = product(h, "down")[jnp.argsort(order)].reshape(B * T, k, D)
    out = jnp.einsum("nkd,nk->nd", parts, weights.astype(x.dtype)).reshape(B, T, D)

    spread = lambda a: a.reshape(B, T, *a.shape[1:])
    counts = jnp.sum(jax.nn.one_hot(experts, c.experts), axis=1)
    return out, Routing(spread(probabilities), spread(counts), spread(jax.nn.logsumexp(logits, axis=-1)))


def load_balancing_loss(routing: Routing, weights: Array) -> Array:
    """f32[]: E / k sum_e f_e P_e, averaged over layers: 1 where experts share the work evenly, more where they do not.

    f_e: the share of tokens that took expert e, not differentiated; P_e: its mean probability; both over the tokens of
    weights f32[B,T]. Fedus et al. 2021, eq. 4, arXiv 2101.03961. A product of means: the mean over microbatches is not
    the whole batch's.
    """
    w = weights / jnp.maximum(jnp.sum(weights), 1)
    share = jnp.einsum("lbte,bt->le", routing.expert_mask, w)
    probability = jnp.einsum("lbte,bt->le", routing.probabilities, w)
    E = share.shape[-1]
    k = jnp.maximum(jnp.sum(share, axis=-1), 1e-9)
    return jnp.mean(E * jnp.sum(jax.lax.stop_gradient(share) * probability, axis=-1) / k)


def router_z_loss(routing: Routing) -> Array:
    """f32[B,T]: log_z^2 averaged over layers (Zoph et al. 2022, eq. 5, arXiv 2202.08906)."""
    return jnp.mean(jnp.square(routing.log_z), axis=0)

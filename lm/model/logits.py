"""The one distribution: what the sampler draws from is what the losses score."""

import math

import jax
import jax.numpy as jnp

Array = jax.Array


def sampling_logits(
    logits: Array, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Array:
    """Logits f32[...,V] of the distribution sampled at these settings; tokens outside its support are -inf.

    logits / temperature; then the `top_k` largest (0 keeps all; ties with the k-th stay); then the smallest set of
    tokens whose probability reaches `top_p`, which keeps the token that crosses it (Holtzman et al. 2020,
    arXiv 1904.09751); then the tokens at least `min_p` times as probable as the likeliest (Nguyen et al. 2024, arXiv
    2407.01082). Temperature 0 leaves only the first largest token.
    """
    if is_static_temperature(temperature, 0):
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
    logits = logits.astype(jnp.float32) / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        probs = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # mass of the strictly more probable tokens
        kept = jnp.sum(before < top_p, axis=-1, keepdims=True)
        threshold = jnp.take_along_axis(descending, jnp.maximum(kept - 1, 0), axis=-1)
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    if min_p > 0:  # a ratio of probabilities is a difference of logits
        least = jnp.max(logits, axis=-1, keepdims=True) + math.log(min_p)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def row_sampling_logits(logits: Array, *, temperature: Array, top_k: Array, top_p: Array, log_min_p: Array) -> Array:
    """`sampling_logits` of f32[B,V] where each row has settings of its own, [B] each; temperatures are above 0.

    log_min_p: the logarithm, -inf keeps all. The sort is skipped where no row has a top_k or top_p.
    """
    V = logits.shape[-1]
    logits = logits.astype(jnp.float32) / temperature[:, None]

    def cut(logits: Array) -> Array:
        at = lambda x, places: jnp.take_along_axis(x, jnp.clip(places, 0, V - 1)[:, None], axis=-1)
        descending = -jnp.sort(-logits, axis=-1)
        kth = jnp.where((0 < top_k) & (top_k < V), at(descending, top_k - 1)[:, 0], -jnp.inf)[:, None]
        logits, descending = (jnp.where(x >= kth, x, -jnp.inf) for x in (logits, descending))
        probs = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        kept = jnp.sum(before < top_p[:, None], axis=-1)
        threshold = jnp.where(top_p < 1, at(descending, kept - 1)[:, 0], -jnp.inf)[:, None]
        return jnp.where(logits >= threshold, logits, -jnp.inf)

    logits = jax.lax.cond(jnp.any((top_k > 0) | (top_p < 1)), cut, lambda x: x, logits)
    least = jnp.max(logits, axis=-1, keepdims=True) + log_min_p[:, None]
    return jnp.where(logits >= least, logits, -jnp.inf)


def repetition_penalized_logits(logits: Array, present: Array, penalty: float | Array) -> Array:
    """Logits f32[...,V]; those of the tokens that are `present` bool[...,V] are divided by the penalty if positive, and
    multiplied by it if negative (Keskar et al. 2019, sec. 4.1, arXiv 1909.05858; the sign as in their code).

    The sampler applies it before `sampling_logits`. The losses do not: they score each token without regard to the rest
    of the row. So no stage that learns from its own samples offers it.
    """
    logits = logits.astype(jnp.float32)
    return jnp.where(present, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def is_static_temperature(temperature: float | Array, value: float) -> bool:
    """Whether a temperature is `value` for certain. A traced one may be anything above 0."""
    return not isinstance(temperature, Array) and temperature == value


def values_at_ids(x: Array, ids: Array) -> Array:
    """x[..., ids]: f32[...] from f32[...,V] and i32[...].

    A comparison with an iota instead of a gather: its gradient is no scatter, and a sharded vocabulary stays sharded.
    """
    return jnp.sum(jnp.where(jnp.arange(x.shape[-1]) == ids[..., None], x, 0.0), axis=-1)

"""What losses need of logits: log-probabilities of targets, entropy, partition function; in chunks of a row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.core.sharding import is_single_device, shard
from lm.core.types import Array
from lm.model.logits import is_static_temperature, sampling_logits, values_at_ids


class TargetStats(NamedTuple):
    """What a loss needs for each target, f32[B,T] each."""

    logprobs: Array  # of the target
    entropy: Array  # of the whole distribution, nats
    log_z: Array  # logsumexp of the unscaled logits


def map_position_chunks(function: Callable[..., Any], *arrays: Array, chunk_size: int) -> Any:
    """function(*arrays), a tree of [B,T,...], for arrays [B,T,...]: `chunk_size` positions of a row at a time, 0: all.

    Intermediate arrays of `function` exist for one chunk only and are computed again in the backward pass, so logits
    f32[B,T,V] never exist. It must treat every position alike: the last chunk is padded with zeros.
    """
    B, T = arrays[0].shape[:2]
    if not 0 < chunk_size < T:
        return function(*arrays)
    count = -(-T // chunk_size)
    pad = count * chunk_size - T

    def pieces(a):
        a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2))
        return a.reshape(B, count, chunk_size, *a.shape[2:]).swapaxes(0, 1)

    parts = jax.lax.map(lambda part: jax.checkpoint(function)(*part), tuple(map(pieces, arrays)))
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(B, count * chunk_size, *a.shape[3:])[:, :T], parts)


def chunked_target_stats(
    logits: Callable[[Array], Array], x: Array, targets: Array, *, temperature: float | Array, chunk_size: int
) -> TargetStats:
    """Scores of targets i32[B,T] under softmax(logits(x) / temperature).

    Logits f32[B,T,V] exist for `chunk_size` positions of a row at a time, see `map_position_chunks`.
    """

    def chunk(x, targets):
        raw = shard(logits(x), "batch", None, "vocab")
        scaled = sampling_logits(raw, temperature=temperature)
        logprobs, log_z = target_logprobs(scaled, targets)
        entropy = log_z - jnp.sum(jnp.exp(scaled - log_z[..., None]) * scaled, axis=-1)
        unscaled = log_z if is_static_temperature(temperature, 1) else jax.nn.logsumexp(raw, axis=-1)
        return TargetStats(logprobs, entropy, unscaled)

    return map_position_chunks(chunk, x, targets, chunk_size=chunk_size)


@jax.custom_vjp
def target_logprobs(logits: Array, targets: Array) -> tuple[Array, Array]:
    """log softmax(logits)[target] and logsumexp(logits), f32[B,T] each, from f32[B,T,V] and i32[B,T].

    The gradient, p (dz - dl) + [v = target] dl for cotangents dl and dz, is made in one pass over the logits; autodiff
    would keep exp(logits - max) from the forward pass, another f32[B,T,V].
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    if is_single_device():
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    else:
        target_logits = values_at_ids(logits, targets)  # so that a sharded vocabulary stays sharded
    return target_logits - log_z, log_z


def _target_logprobs_forward(logits, targets):
    logprobs, log_z = target_logprobs(logits, targets)
    return (logprobs, log_z), (logits, targets, log_z)


def _target_logprobs_backward(residuals, cotangents):
    logits, targets, log_z = residuals
    dl, dz = (cotangent[..., None] for cotangent in cotangents)
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.exp(logits - log_z[..., None]) * (dz - dl) + jnp.where(hit, dl, 0.0), None


target_logprobs.defvjp(_target_logprobs_forward, _target_logprobs_backward)

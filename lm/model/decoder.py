"""The forward pass: tokens to hidden states, hidden states to logits, log-probabilities and values."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm import distribution
from lm.model.attention import Cache, cached_attention, causal_attention, rope_angles, rotated
from lm.model.config import Config
from lm.model.linear import linear
from lm.sharding import shard
from lm.types import Array, Params


def rms_norm(x: Array, scale: Array, *, eps: float) -> Array:
    """x / rms(x) * scale over the last axis, in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps) * scale).astype(x.dtype)


def unstacked(layers: Params, count: int) -> list[Params]:
    """The stacked tree as one tree a layer. A split, whose gradient is one concatenation, not `count` padded sums."""
    split = {name: jax.lax.split(leaf, (1,) * count, axis=0) for name, leaf in layers.items()}
    return [{name: parts[i][0] for name, parts in split.items()} for i in range(count)]


def _block(c: Config, attend, angles, x: Array, layer: Params) -> tuple[Array, Cache | None]:
    """Pre-norm attention and SwiGLU (Shazeer 2020, arXiv 2002.05202), each added to the stream x f[B,T,D].

    `attend` maps q, k, v to f[B,T,N,H] and the cache they went into, or None.
    """
    B, T, _ = x.shape
    matrix = lambda name: layer[name].astype(x.dtype)
    norm = functools.partial(rms_norm, eps=c.norm_eps)

    h = norm(x, layer["attention_norm"])
    q = linear(h, matrix("query")).reshape(B, T, c.heads, c.head_size)
    k = linear(h, matrix("key")).reshape(B, T, c.kv_heads, c.head_size)
    v = linear(h, matrix("value")).reshape(B, T, c.kv_heads, c.head_size)
    if c.qk_norm:
        q, k = norm(q, layer["query_norm"]), norm(k, layer["key_norm"])
    q, k = (shard(rotated(a, angles), "batch", None, n, None) for a, n in ((q, "heads"), (k, "kv_heads")))
    out, cache = attend(q, k, shard(v, "batch", None, "kv_heads", None))
    x = x + shard(linear(out.reshape(B, T, -1), matrix("attention_out")), "batch", None, None)

    h = norm(x, layer["mlp_norm"])
    h = shard(jax.nn.silu(linear(h, matrix("gate"))) * linear(h, matrix("up")), "batch", None, "hidden")
    return x + shard(linear(h, matrix("down")), "batch", None, None), cache


def _embedded(c: Config, params: Params, inputs: Array) -> Array:
    table = shard(params["embedding"].astype(c.dtype), "vocab", None)  # whole rows: a lookup in a table split both ways
    return shard(table[inputs], "batch", None, None)  # would be rematerialised on every device


def hidden(c: Config, params: Params, inputs: Array, positions: Array, segments: Array) -> Array:
    """Final-norm states f[B,T,D] of whole rows; position t has seen inputs[:t+1] of its own segment."""
    angles = rope_angles(positions, c.head_size, c.rope_base)
    blocks = min(int(c.query_blocks), inputs.shape[1])

    def attend(q, k, v):
        return causal_attention(q, k, v, segments, blocks=blocks), None

    def block(x, layer):
        return _block(c, attend, angles, x, layer)

    if c.remat == "block":
        block = jax.checkpoint(block)
    elif c.remat == "dots":
        block = jax.checkpoint(block, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    x = _embedded(c, params, inputs)
    if c.scan == "yes":
        x, _ = jax.lax.scan(block, x, params["layers"])
    else:
        for layer in unstacked(params["layers"], c.layers):
            x, _ = block(x, layer)
    return rms_norm(x, params["final_norm"], eps=c.norm_eps)


def cached_hidden(
    c: Config, params: Params, inputs: Array, positions: Array, segments: Array, cache: Cache
) -> tuple[Array, Cache]:
    """The same for T more positions of rows whose earlier ones are in `cache`; T may be 1. Always unrolled."""
    names = jax.lax.dynamic_update_slice_in_dim(cache.segments, segments, cache.filled, axis=1)
    cache = cache.replace(segments=names)
    angles = rope_angles(positions, c.head_size, c.rope_base)
    x = _embedded(c, params, inputs)
    for i, layer in enumerate(unstacked(params["layers"], c.layers)):
        attend = functools.partial(cached_attention, cache=cache, layer=i)
        x, cache = _block(c, attend, angles, x, layer)
    cache = cache.replace(filled=cache.filled + inputs.shape[1])
    return rms_norm(x, params["final_norm"], eps=c.norm_eps), cache


def logits(c: Config, params: Params, x: Array) -> Array:
    """f32[...,V] from states f[...,D]; under muP times base_width / width."""
    matrix = params["embedding"].T if c.tied else params["head"]
    raw = jnp.matmul(x, matrix.astype(x.dtype), preferred_element_type=jnp.float32)
    return raw * (c.base_width / c.width) if c.base_width else raw


def value(head: Params, x: Array) -> Array:
    """f32[...] from states f[...,D]: a linear score of the prefix each position has seen."""
    return x.astype(jnp.float32) @ head["score"] + head["offset"]


def chunked(function: Callable[..., Any], *arrays: Array, size: int) -> Any:
    """function(*arrays), a tree of [B,T,...], for arrays [B,T,...]: `size` positions a row at a time, or 0 for all.

    What `function` makes on the way exists for so many positions only and is made again in the backward pass, so
    logits f32[B,T,V] never do. It must treat every position alike: the last piece is filled up with zeros.
    """
    B, T = arrays[0].shape[:2]
    if not 0 < size < T:
        return function(*arrays)
    count = -(-T // size)
    pad = count * size - T

    def pieces(a):
        a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2))
        return a.reshape(B, count, size, *a.shape[2:]).swapaxes(0, 1)

    parts = jax.lax.map(lambda part: jax.checkpoint(function)(*part), tuple(map(pieces, arrays)))
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(B, count * size, *a.shape[3:])[:, :T], parts)


class Scores(NamedTuple):
    """What a loss wants to know of each target, f32[B,T] each."""

    logprobs: Array  # of the target
    entropy: Array  # of the whole distribution, nats
    log_z: Array  # logsumexp of the unscaled logits


def scores(c: Config, params: Params, x: Array, targets: Array, *, temperature: float = 1.0) -> Scores:
    """Scores of targets i32[B,T] under softmax(logits / temperature), from states f[B,T,D].

    With `loss_chunk` set, logits exist for that many positions a row at a time (see `chunked`).
    """

    def chunk(x, targets):
        raw = shard(logits(c, params, x), "batch", None, "vocab")
        scaled = distribution.adjusted(raw, temperature=temperature)
        log_z = jax.nn.logsumexp(scaled, axis=-1)
        logprobs = distribution.picked(scaled, targets) - log_z
        entropy = log_z - jnp.sum(jnp.exp(scaled - log_z[..., None]) * scaled, axis=-1)
        unscaled = log_z if distribution.known(temperature, 1) else jax.nn.logsumexp(raw, axis=-1)
        return Scores(logprobs, entropy, unscaled)

    return chunked(chunk, x, targets, size=c.loss_chunk)

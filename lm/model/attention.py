"""Masked grouped-query attention, and the key-value cache."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from lm.model.linear import row_major
from lm.types import Array


@struct.dataclass
class Cache:
    """Keys and values of the S slots filled so far, one array per layer so that a decode step slices nothing.

    A layer with a window of fewer than S slots keeps the last W only, the window and some slack: slot s in place s % W.
    Up to `slack` of the newest slots can be taken back, by a lower `filled`: nobody sees them until they are written
    again, and what they overwrote in a ring of W lies outside every window that is still to come.
    """

    keys: tuple[Array, ...]  # layers x f[B,S,K,H] or f[B,W,K,H]
    values: tuple[Array, ...]  # likewise
    segments: Array  # i32[B,S]; 0: empty or padding, seen by nobody
    filled: Array  # i32[]  slots written: all rows write the same slot (prompts are aligned to the right); or i32[B]


def attention(q: Array, k: Array, v: Array, mask: Array, *, scale: float = 0.0, softcap: float = 0.0) -> Array:
    """softmax(scale q k^T) v under `mask` bool[B,T,S]; a query that may see nothing gives 0.

    q f[B,T,N,H]; k, v f[B,S,K,H]; returns f[B,T,N,H]. Query head n reads kv head n // (N / K). Softmax in float32.
    scale: 0 for 1 / sqrt(H). softcap: c tanh(logits / c) before the mask (Gemma 2, arXiv 2408.00118), 0 for none.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * (scale or H**-0.5)
    logits = softcapped(logits, softcap)
    seen = mask[:, None, None]
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1), 0.0)
    return jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v).reshape(B, T, N, H)


def softcapped(x: Array, cap: float) -> Array:
    """cap tanh(x / cap): near x where it is small, never beyond the cap; x itself where cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def causal_attention(
    q: Array, k: Array, v: Array, segments: Array, *, window: Array | int | None = None, blocks: int = 1, **options
) -> Array:
    """Attention of every position to the earlier ones of its own segment (0 is padding: it sees and is seen by none).

    window: keys that a query sees at most, itself the last of them; None for all. options: of `attention`.

    With `blocks` > 1 the queries are cut into that many static blocks and each meets only the keys up to its end,
    which saves up to half of the work.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    q = row_major(q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4))
    k, v = row_major(k.transpose(0, 2, 1, 3)), row_major(v.transpose(0, 2, 1, 3))
    positions = jnp.arange(T)
    edges = [T * i // blocks for i in range(blocks + 1)]
    outputs = []
    for start, stop in zip(edges, edges[1:]):
        same = segments[:, start:stop, None] == segments[:, None, :stop]
        causal = positions[start:stop, None] >= positions[None, :stop]
        if window is not None:
            causal &= positions[start:stop, None] - positions[None, :stop] < window
        mask = same & causal & (segments[:, None, :stop] > 0)
        outputs.append(head_attention(q[:, :, :, start:stop], k[:, :, :stop], v[:, :, :stop], mask, **options))
    out = outputs[0] if blocks == 1 else jnp.concatenate(outputs, axis=3)
    return row_major(out.transpose(0, 3, 1, 2, 4)).reshape(B, T, N, H)


def head_attention(q, k, v, mask, *, scale=0.0, softcap=0.0):
    """q f[B,K,G,T,H]; k, v f[B,K,S,H]; f[B,K,G,T,H]"""
    B, K, G, T, H = q.shape
    q = q.reshape(B, K, G * T, H)
    logits = dots(q, k).reshape(B, K, G, T, -1) * (scale or H**-0.5)
    weights = masked_softmax(softcapped(logits, softcap), mask[:, None, None]).astype(v.dtype)
    return mixed(weights.reshape(B, K, G * T, -1), v).reshape(B, K, G, T, H)


def masked_softmax(logits, seen):
    return jnp.where(seen, jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1), 0.0)


@jax.custom_vjp
def dots(q, k):
    return jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32)


def _dots_forward(q, k):
    return dots(q, k), (q, k)


def _dots_backward(residuals, g):
    q, k = residuals
    g = jax.lax.optimization_barrier(g.astype(q.dtype))
    return jnp.einsum("bkts,bksh->bkth", g, k), transposed_product(g, q)


dots.defvjp(_dots_forward, _dots_backward)


def transposed_product(a, b):
    """a^T b"""
    if PHYS:
        return jnp.einsum("bkst,bkth->bksh", row_major(a.swapaxes(2, 3)), b)
    return jnp.einsum("bkts,bkth->bksh", a, b)


import os
PHYS = os.environ.get("PHYS") == "1"


@jax.custom_vjp
def mixed(weights, v):
    return jnp.einsum("bkts,bksh->bkth", weights, v)


def _mixed_forward(weights, v):
    return mixed(weights, v), (weights, v)


def _mixed_backward(residuals, g):
    weights, v = residuals
    g = jax.lax.optimization_barrier(g)
    return jnp.einsum("bkth,bksh->bkts", g, v), transposed_product(weights, g)


mixed.defvjp(_mixed_forward, _mixed_backward)


def empty_cache(
    *, windows: Sequence[int], batch: int, capacity: int, slack: int = 0, kv_heads: int, head_size: int, dtype
) -> Cache:
    """A cache of `capacity` slots with nothing in it; windows: that of each layer, 0 for none; slack: see Cache."""
    kept = [min(window + slack if window else capacity, capacity) for window in windows]

    def zeros():
        return tuple(jnp.zeros((batch, slots, kv_heads, head_size), dtype) for slots in kept)

    return Cache(zeros(), zeros(), jnp.zeros((batch, capacity), jnp.int32), jnp.zeros((), jnp.int32))


def written(held: Array, new: Array, start: Array) -> Array:
    """`held` [B,S,...] with `new` [B,T,...] in the T slots from i32[] on, or from i32[B], each row's own."""
    if start.ndim:
        return jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0))(held, new, start)
    return jax.lax.dynamic_update_slice_in_dim(held, new, start, axis=1)


def cached_attention(
    q: Array, k: Array, v: Array, *, cache: Cache, layer: int, window: int | None = None, **options
) -> tuple[Array, Cache]:
    """Writes k, v f[B,T,K,H] into the next T slots of a layer and attends to everything up to each query's own slot.

    `cache.segments` must already name the new slots; `cache.filled` is advanced once per forward pass, by the caller.
    """
    if cache.filled.ndim:  # rows at slots of their own: each as a batch of one
        add, drop = (lambda x: x[None] if x.ndim else x), (lambda x: x[0] if x.ndim else x)

        def alone(*row):
            q, k, v, cache = jax.tree.map(add, row)
            done = cached_attention(q, k, v, cache=cache, layer=layer, window=window, **options)
            return jax.tree.map(drop, done)

        return jax.vmap(alone)(q, k, v, cache)
    start, T, S = cache.filled, q.shape[1], cache.segments.shape[1]
    held, new = (cache.keys[layer], cache.values[layer]), (k, v)
    if held[0].shape[1] == S:
        seen = kept = tuple(written(a, b, start) for a, b in zip(held, new))
        slots, names = jnp.arange(S), cache.segments
    else:
        kept, seen, slots = around(held, new, start)
        names = jnp.where(slots >= 0, cache.segments[:, jnp.maximum(slots, 0)], 0)
    queries = start + jnp.arange(T)
    own = jax.lax.dynamic_slice_in_dim(cache.segments, start, T, axis=1)
    mask = (own[:, :, None] == names[:, None]) & (queries[:, None] >= slots) & (own[:, :, None] > 0)
    if window is not None:
        mask &= queries[:, None] - slots < window
    cache = cache.replace(
        keys=cache.keys[:layer] + (kept[0],) + cache.keys[layer + 1 :],
        values=cache.values[:layer] + (kept[1],) + cache.values[layer + 1 :],
    )
    return attention(q, *seen, mask, **options), cache


Pair = tuple[Array, ...]  # keys and values


def around(held: Pair, new: Pair, start: Array) -> tuple[Pair, Pair, Array]:
    """The last W slots f[B,W,K,H], with T `new` ones f[B,T,K,H] from slot `start` on: what is kept of them, what the
    new queries may see, and the slots of the latter; one that is not written yet is below 0."""
    W, T = held[0].shape[1], new[0].shape[1]
    first = max(T - W, 0)  # of the new ones, to be kept
    places = (start + jnp.arange(first, T)) % W
    kept = tuple(a.at[:, places].set(b[:, first:]) for a, b in zip(held, new))
    if T == 1:  # a single query sees just what is kept
        return kept, kept, start - (start - jnp.arange(W)) % W
    slots = jnp.concatenate([start - 1 - (start - 1 - jnp.arange(W)) % W, start + jnp.arange(T)])
    return kept, tuple(jnp.concatenate(pair, axis=1) for pair in zip(held, new)), slots

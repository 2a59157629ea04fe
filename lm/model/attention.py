"""Masked grouped-query attention, and the key-value cache."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from lm.model.linear import matched, mixed, row_major
from lm.model.quantised import heads_in_int8
from lm.types import Array


@struct.dataclass
class Cache:
    """Keys and values of the S slots filled so far, one array per layer so that a decode step slices nothing.

    A layer with a window of fewer than S slots keeps the last W only, the window and some slack: slot s in place s % W.
    Up to `slack` of the newest slots can be taken back, by a lower `filled`: nobody sees them until they are written
    again, and what they overwrote in a ring of W lies outside every window that is still to come.
    Kept in int8, each head of each slot has a scale (lm.model.quantised); else there are none.
    """

    keys: tuple[Array, ...]  # layers x f[B,K,S,H] or f[B,K,W,H]: what a query reads of a head lies together
    values: tuple[Array, ...]  # likewise
    segments: Array  # i32[B,S]; 0: empty or padding, seen by nobody
    filled: Array  # i32[]  slots written: all rows write the same slot (prompts are aligned to the right); or i32[B]
    key_scales: tuple[Array, ...] = ()  # layers x f32[B,K,S] or f32[B,K,W]
    value_scales: tuple[Array, ...] = ()  # likewise


def attention(
    q: Array, k: Array, v: Array, mask: Array, *scales: Array, scale: float = 0.0, softcap: float = 0.0
) -> Array:
    """softmax(scale q k^T) v under `mask` bool[B,T,S]; a query that may see nothing gives 0. Heads come first.

    q f[B,K,G,T,H], G query heads to each kv head; k, v f[B,K,S,H]; returns f[B,K,G,T,H]. Softmax in float32.
    scale: 0 for 1 / sqrt(H). softcap: c tanh(logits / c) before the mask (Gemma 2, arXiv 2408.00118), 0 for none.

    scales: of k and of v, f32[B,K,S] each, where they are int8. They leave the sums, q (k s) = (q k) s and
    sum w (s v) = sum (w s) v, so that neither is ever expanded.
    """
    B, K, G, T, H = q.shape
    of_keys, of_values = (a[:, :, None, None] for a in scales) if scales else (None, None)
    logits = matched(q.reshape(B, K, G * T, H), k.astype(q.dtype)).reshape(B, K, G, T, -1) * (scale or H**-0.5)
    logits = softcapped(logits * of_keys if scales else logits, softcap)
    seen = mask[:, None, None]
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1), 0.0)
    weights = (weights * of_values if scales else weights).astype(q.dtype)
    return mixed(weights.reshape(B, K, G * T, -1), v.astype(q.dtype)).reshape(B, K, G, T, H)


def grouped(q: Array, kv_heads: int) -> Array:
    """Queries f[B,T,N,H] as f[B,K,G,T,H]: query head n reads kv head n // (N / K)."""
    B, T, N, H = q.shape
    return q.reshape(B, T, kv_heads, N // kv_heads, H).transpose(0, 2, 3, 1, 4)


def by_position(out: Array) -> Array:
    """f[B,T,N,H] from f[B,K,G,T,H]."""
    B, K, G, T, H = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


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
    T = q.shape[1]
    q, k, v = (row_major(x) for x in (grouped(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)))
    positions = jnp.arange(T)
    edges = [T * i // blocks for i in range(blocks + 1)]
    outputs = []
    for start, stop in zip(edges, edges[1:]):
        same = segments[:, start:stop, None] == segments[:, None, :stop]
        causal = positions[start:stop, None] >= positions[None, :stop]
        if window is not None:
            causal &= positions[start:stop, None] - positions[None, :stop] < window
        mask = same & causal & (segments[:, None, :stop] > 0)
        outputs.append(attention(q[:, :, :, start:stop], k[:, :, :stop], v[:, :, :stop], mask, **options))
    return by_position(outputs[0] if blocks == 1 else jnp.concatenate(outputs, axis=3))


def empty_cache(
    *, windows: Sequence[int], batch: int, capacity: int, slack: int = 0, kv_heads: int, head_size: int, dtype
) -> Cache:
    """A cache of `capacity` slots with nothing in it; windows: that of each layer, 0 for none; slack: see Cache."""
    kept = [min(window + slack if window else capacity, capacity) for window in windows]

    def zeros():
        return tuple(jnp.zeros((batch, kv_heads, slots, head_size), dtype) for slots in kept)

    def scales():
        return tuple(jnp.zeros((batch, kv_heads, slots)) for slots in kept) if dtype == jnp.int8 else ()

    segments, filled = jnp.zeros((batch, capacity), jnp.int32), jnp.zeros((), jnp.int32)
    return Cache(zeros(), zeros(), segments, filled, scales(), scales())


def written(held: Array, new: Array, start: Array, *, axis: int = 1) -> Array:
    """`held` with `new` in the slots of that axis from i32[] on, or from i32[B], each row's own."""
    if start.ndim:
        return jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1))(held, new, start)
    return jax.lax.dynamic_update_slice_in_dim(held, new, start, axis=axis)


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
    held, new = held_by(cache, layer), as_held(cache, k, v)
    if held[0].shape[2] == S:
        seen = kept = tuple(written(a, b, start, axis=2) for a, b in zip(held, new))
        slots, names = jnp.arange(S), cache.segments
    else:
        kept, seen, slots = around(held, new, start)
        names = jnp.where(slots >= 0, cache.segments[:, jnp.maximum(slots, 0)], 0)
    queries = start + jnp.arange(T)
    own = jax.lax.dynamic_slice_in_dim(cache.segments, start, T, axis=1)
    mask = (own[:, :, None] == names[:, None]) & (queries[:, None] >= slots) & (own[:, :, None] > 0)
    if window is not None:
        mask &= queries[:, None] - slots < window
    keys, values, *scales = seen
    out = attention(grouped(q, k.shape[2]), keys, values, mask, *scales, **options)
    return by_position(out), holding(cache, layer, kept)


Held = tuple[Array, ...]  # keys and values of a layer, and their scales where these are int8
PARTS = ("keys", "values", "key_scales", "value_scales")  # of a Cache, in that order


def held_by(cache: Cache, layer: int) -> Held:
    return tuple(getattr(cache, name)[layer] for name in PARTS if getattr(cache, name))


def as_held(cache: Cache, k: Array, v: Array) -> Held:
    """Keys and values f[B,T,K,H] as a cache keeps them."""
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if not cache.key_scales:
        return tuple(a.astype(cache.keys[0].dtype) for a in (k, v))
    (k, of_keys), (v, of_values) = heads_in_int8(k), heads_in_int8(v)
    return k, v, of_keys, of_values


def holding(cache: Cache, layer: int, held: Held) -> Cache:
    """The cache with that in place of what a layer held."""
    parts = ((name, getattr(cache, name), new) for name, new in zip(PARTS, held))
    return cache.replace(**{name: part[:layer] + (new,) + part[layer + 1 :] for name, part, new in parts})


def around(held: Held, new: Held, start: Array) -> tuple[Held, Held, Array]:
    """The last W slots [B,K,W,...], with T `new` ones [B,K,T,...] from slot `start` on: what is kept of them, what the
    new queries may see, and the slots of the latter; one that is not written yet is below 0."""
    W, T = held[0].shape[2], new[0].shape[2]
    first = max(T - W, 0)  # of the new ones, to be kept
    places = (start + jnp.arange(first, T)) % W
    kept = tuple(a.at[:, :, places].set(b[:, :, first:]) for a, b in zip(held, new))
    if T == 1:  # a single query sees just what is kept
        return kept, kept, start - (start - jnp.arange(W)) % W
    slots = jnp.concatenate([start - 1 - (start - 1 - jnp.arange(W)) % W, start + jnp.arange(T)])
    return kept, tuple(jnp.concatenate(pair, axis=2) for pair in zip(held, new)), slots

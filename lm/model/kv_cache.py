"""The KV cache: keys and values of the tokens so far, one array a layer; a ring buffer where a layer has a window."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from lm.core.types import Array, Replaceable
from lm.model.quantization import quantize_heads_int8


@struct.dataclass
class KVCache(Replaceable):
    """Keys and values of the S slots filled so far, one array per layer so that a decode step slices nothing.

    A layer with a window of fewer than S slots keeps the last W only, the window and the rollback slots: slot s in
    place s % W. Up to `rollback_slots` of the newest slots can be taken back, by a lower `length`: no query sees them
    until they are written again, and what they overwrote in a ring of W lies outside every later window. Kept in int8,
    each head of each slot has a scale (lm.model.quantization); else there are none.
    """

    keys: tuple[Array, ...]  # layers x f[B,K,S,H] or f[B,K,W,H]: what a query reads of a head lies together
    values: tuple[Array, ...]  # likewise
    segments: Array  # i32[B,S]; 0: empty or padding, which no query sees
    length: Array  # i32[]  slots written: all rows write the same slot (prompts are aligned to the right); or i32[B]
    key_scales: tuple[Array, ...] = ()  # layers x f32[B,K,S] or f32[B,K,W]
    value_scales: tuple[Array, ...] = ()  # likewise


def empty_cache(
    *, windows: Sequence[int], batch: int, capacity: int, rollback_slots: int = 0, kv_heads: int, head_size: int, dtype
) -> KVCache:
    """A cache of `capacity` slots with nothing in it; windows: that of each layer, 0 for none; rollback_slots: see
    KVCache."""
    kept = [min(window + rollback_slots if window else capacity, capacity) for window in windows]

    def zeros():
        return tuple(jnp.zeros((batch, kv_heads, slots, head_size), dtype) for slots in kept)

    def scales():
        return tuple(jnp.zeros((batch, kv_heads, slots)) for slots in kept) if dtype == jnp.int8 else ()

    segments, filled = jnp.zeros((batch, capacity), jnp.int32), jnp.zeros((), jnp.int32)
    return KVCache(zeros(), zeros(), segments, filled, scales(), scales())


def updated_slots(held: Array, new: Array, start: Array, *, axis: int = 1) -> Array:
    """`held` with `new` in the slots of that axis from i32[] on, or from i32[B], each row's own."""
    if start.ndim:
        return jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1))(held, new, start)
    return jax.lax.dynamic_update_slice_in_dim(held, new, start, axis=axis)


LayerCache = tuple[Array, ...]  # keys and values of a layer, and their scales where these are int8


CACHE_ARRAYS = ("keys", "values", "key_scales", "value_scales")  # of a KVCache, in that order


def layer_cache(cache: KVCache, layer: int) -> LayerCache:
    return tuple(getattr(cache, name)[layer] for name in CACHE_ARRAYS if getattr(cache, name))


def new_cache_entries(cache: KVCache, k: Array, v: Array) -> LayerCache:
    """Keys and values f[B,T,K,H] as a cache keeps them."""
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if not cache.key_scales:
        return tuple(a.astype(cache.keys[0].dtype) for a in (k, v))
    (k, of_keys), (v, of_values) = quantize_heads_int8(k), quantize_heads_int8(v)
    return k, v, of_keys, of_values


def with_layer_cache(cache: KVCache, layer: int, held: LayerCache) -> KVCache:
    """The cache with that in place of what a layer held."""
    parts = ((name, getattr(cache, name), new) for name, new in zip(CACHE_ARRAYS, held))
    return cache.replace(**{name: part[:layer] + (new,) + part[layer + 1 :] for name, part, new in parts})


def ring_buffer_update(held: LayerCache, new: LayerCache, start: Array) -> tuple[LayerCache, LayerCache, Array]:
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

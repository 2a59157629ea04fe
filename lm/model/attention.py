"""Masked grouped-query attention, and the key-value cache."""

import jax
import jax.numpy as jnp
from flax import struct

from lm.types import Array


@struct.dataclass
class Cache:
    """Keys and values of the S slots filled so far, one array per layer so that a decode step slices nothing."""

    keys: tuple[Array, ...]  # layers x f[B,S,K,H]
    values: tuple[Array, ...]  # layers x f[B,S,K,H]
    segments: Array  # i32[B,S]; 0: empty or padding, seen by nobody
    filled: Array  # i32[]  slots written; all rows write the same slot (prompts are aligned to the right)


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
    T = q.shape[1]
    positions = jnp.arange(T)
    edges = [T * i // blocks for i in range(blocks + 1)]
    outputs = []
    for start, stop in zip(edges, edges[1:]):
        same = segments[:, start:stop, None] == segments[:, None, :stop]
        causal = positions[start:stop, None] >= positions[None, :stop]
        if window is not None:
            causal &= positions[start:stop, None] - positions[None, :stop] < window
        mask = same & causal & (segments[:, None, :stop] > 0)
        outputs.append(attention(q[:, start:stop], k[:, :stop], v[:, :stop], mask, **options))
    return outputs[0] if blocks == 1 else jnp.concatenate(outputs, axis=1)


def empty_cache(*, layers: int, batch: int, capacity: int, kv_heads: int, head_size: int, dtype) -> Cache:
    """A cache of `capacity` slots with nothing in it."""

    def zeros():
        return tuple(jnp.zeros((batch, capacity, kv_heads, head_size), dtype) for _ in range(layers))

    return Cache(zeros(), zeros(), jnp.zeros((batch, capacity), jnp.int32), jnp.zeros((), jnp.int32))


def cached_attention(
    q: Array, k: Array, v: Array, *, cache: Cache, layer: int, window: int | None = None, **options
) -> tuple[Array, Cache]:
    """Writes k, v f[B,T,K,H] into the next T slots of a layer and attends to everything up to each query's own slot.

    `cache.segments` must already name the new slots; `cache.filled` is advanced once per forward pass, by the caller.
    """
    start = cache.filled
    keys = jax.lax.dynamic_update_slice_in_dim(cache.keys[layer], k, start, axis=1)
    values = jax.lax.dynamic_update_slice_in_dim(cache.values[layer], v, start, axis=1)
    T, S = q.shape[1], keys.shape[1]
    queries = start + jnp.arange(T)
    own = jax.lax.dynamic_slice_in_dim(cache.segments, start, T, axis=1)
    mask = (own[:, :, None] == cache.segments[:, None]) & (queries[:, None] >= jnp.arange(S)) & (own[:, :, None] > 0)
    if window is not None:
        mask &= queries[:, None] - jnp.arange(S) < window
    cache = cache.replace(
        keys=cache.keys[:layer] + (keys,) + cache.keys[layer + 1 :],
        values=cache.values[:layer] + (values,) + cache.values[layer + 1 :],
    )
    return attention(q, keys, values, mask, **options), cache

"""Masked grouped-query attention, and the key-value cache."""

import jax
import jax.numpy as jnp

from lm.core.types import Array
from lm.model.kv_cache import (
    KVCache,
    layer_cache,
    new_cache_entries,
    ring_buffer_update,
    updated_slots,
    with_layer_cache,
)
from lm.model.matmul import attention_output, query_key_scores, row_major


def masked_attention(
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
    logits = query_key_scores(q.reshape(B, K, G * T, H), k.astype(q.dtype)).reshape(B, K, G, T, -1) * (scale or H**-0.5)
    logits = softcapped_logits(logits * of_keys if scales else logits, softcap)
    visible = mask[:, None, None]
    weights = jnp.where(visible, jax.nn.softmax(jnp.where(visible, logits, -1e30), axis=-1), 0.0)
    weights = (weights * of_values if scales else weights).astype(q.dtype)
    return attention_output(weights.reshape(B, K, G * T, -1), v.astype(q.dtype)).reshape(B, K, G, T, H)


def queries_by_kv_head(q: Array, kv_heads: int) -> Array:
    """Queries f[B,T,N,H] as f[B,K,G,T,H]: query head n reads kv head n // (N / K)."""
    B, T, N, H = q.shape
    return q.reshape(B, T, kv_heads, N // kv_heads, H).transpose(0, 2, 3, 1, 4)


def merged_heads(out: Array) -> Array:
    """f[B,T,N,H] from f[B,K,G,T,H]."""
    B, K, G, T, H = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def softcapped_logits(x: Array, cap: float) -> Array:
    """cap tanh(x / cap): near x where it is small, never beyond the cap; x itself where cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def causal_attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    *,
    window: Array | int | None = None,
    query_blocks: int = 1,
    **options,
) -> Array:
    """Attention of every position to the earlier ones of its own segment (0 is padding: it sees and is seen by none).

    window: keys that a query sees at most, itself the last of them; None for all. options: scale and softcap.

    With `query_blocks` > 1 the queries are cut into that many static blocks and each meets only the keys up to its end,
    which saves up to half of the work.
    """
    T = q.shape[1]
    q, k, v = (row_major(x) for x in (queries_by_kv_head(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)))
    positions = jnp.arange(T)
    edges = [T * i // query_blocks for i in range(query_blocks + 1)]
    outputs = []
    for start, stop in zip(edges, edges[1:]):
        same = segments[:, start:stop, None] == segments[:, None, :stop]
        causal = positions[start:stop, None] >= positions[None, :stop]
        if window is not None:
            causal &= positions[start:stop, None] - positions[None, :stop] < window
        mask = same & causal & (segments[:, None, :stop] > 0)
        outputs.append(masked_attention(q[:, :, :, start:stop], k[:, :, :stop], v[:, :, :stop], mask, **options))
    return merged_heads(outputs[0] if query_blocks == 1 else jnp.concatenate(outputs, axis=3))


def cached_attention(
    q: Array, k: Array, v: Array, *, cache: KVCache, layer: int, window: int | None = None, **options
) -> tuple[Array, KVCache]:
    """Writes k, v f[B,T,K,H] into the next T slots of a layer and attends to everything up to each query's own slot.

    `cache.segments` must already name the new slots; `cache.length` is advanced once per forward pass, by the caller.
    """
    if cache.length.ndim:  # rows at slots of their own: each as a batch of one
        add, drop = (lambda x: x[None] if x.ndim else x), (lambda x: x[0] if x.ndim else x)

        def alone(*row):
            q, k, v, cache = jax.tree.map(add, row)
            done = cached_attention(q, k, v, cache=cache, layer=layer, window=window, **options)
            return jax.tree.map(drop, done)

        return jax.vmap(alone)(q, k, v, cache)
    start, T, S = cache.length, q.shape[1], cache.segments.shape[1]
    held, new = layer_cache(cache, layer), new_cache_entries(cache, k, v)
    if held[0].shape[2] == S:
        visible = kept = tuple(updated_slots(a, b, start, axis=2) for a, b in zip(held, new))
        slots, names = jnp.arange(S), cache.segments
    else:
        kept, visible, slots = ring_buffer_update(held, new, start)
        names = jnp.where(slots >= 0, cache.segments[:, jnp.maximum(slots, 0)], 0)
    queries = start + jnp.arange(T)
    own = jax.lax.dynamic_slice_in_dim(cache.segments, start, T, axis=1)
    mask = (own[:, :, None] == names[:, None]) & (queries[:, None] >= slots) & (own[:, :, None] > 0)
    if window is not None:
        mask &= queries[:, None] - slots < window
    keys, values, *scales = visible
    out = masked_attention(queries_by_kv_head(q, k.shape[2]), keys, values, mask, *scales, **options)
    return merged_heads(out), with_layer_cache(cache, layer, kept)

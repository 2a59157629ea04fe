"""The forward pass: tokens to hidden states, hidden states to logits, log-probabilities and values."""

import functools

import jax
import jax.numpy as jnp

from lm.core.sharding import map_row_shards, shard
from lm.core.types import Array, Params
from lm.model import lora, rope
from lm.model.attention import cached_attention, softcapped_logits
from lm.model.config import ModelConfig
from lm.model.kernels import self_attention
from lm.model.kv_cache import KVCache, updated_slots
from lm.model.logprobs import TargetStats, chunked_target_stats
from lm.model.matmul import linear
from lm.model.moe import Routing, moe_mlp
from lm.model.rope import apply_rope


def apply_norm(c: ModelConfig, x: Array, layer: Params, name: str) -> Array:
    """x over its last axis in float32, times its scale: RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467), or LayerNorm
    with its bias (Ba et al. 2016, arXiv 1607.06450)."""
    x32 = x.astype(jnp.float32)
    if c.norm == "layer":
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    scale = layer[name] + 1 if c.norm_unit_offset else layer[name]
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + c.norm_eps) * scale
    return (y + layer[f"{name}_bias"] if c.norm == "layer" else y).astype(x.dtype)


def dequantized_matrix(layer: Params, name: str, dtype) -> Array:
    """The matrix of that name, times its columns' scales where it is kept in 8 bits: for experts, of whose outputs each
    row has another matrix."""
    matrix = layer[name].astype(dtype)
    return matrix * layer[f"{name}_scale"].astype(dtype) if f"{name}_scale" in layer else matrix


def projection(c: ModelConfig, x: Array, layer: Params, name: str) -> Array:
    """f[...,F] from f[...,D]: the matrix of that name, with what the layer has beside it: its columns' scales, if it is
    kept in 8 bits, low-rank adapters, a bias."""
    y = linear(x, layer[name].astype(x.dtype))
    if f"{name}_scale" in layer:
        y = (y.astype(jnp.float32) * layer[f"{name}_scale"]).astype(x.dtype)  # in bfloat16 a scale is 0.4 % off
    if f"{name}_a" in layer:
        low = linear(x, layer[f"{name}_a"].astype(x.dtype))
        y = y + lora.lora_scale(c) * linear(low, layer[f"{name}_b"].astype(x.dtype))
    return y + layer[f"{name}_bias"].astype(x.dtype) if f"{name}_bias" in layer else y


def decoding_params(c: ModelConfig, params: Params) -> Params:
    """The same decoder with a list of its layers, a copy, for callers of `cached_hidden_states` in a loop: the layers
    are cut apart once, before it. Where layers are scanned, on accelerators, the decoder itself, as two of it may not
    fit.
    """
    return params if c.scan == "yes" else {**params, "layers": unstacked_layers(params["layers"], c.layers)}


def unstacked_layers(layers: Params | list[Params], count: int) -> list[Params]:
    """The stacked tree as one tree a layer. A split, whose gradient is one concatenation, not `count` padded sums."""
    if isinstance(layers, list):
        return layers
    split = {name: jax.lax.split(leaf, (1,) * count, axis=0) for name, leaf in layers.items()}
    return [{name: parts[i][0] for name, parts in split.items()} for i in range(count)]


ACTIVATIONS = {"silu": jax.nn.silu, "gelu": functools.partial(jax.nn.gelu, approximate=True)}


def _attention(c: ModelConfig, attend, angles, h: Array, layer: Params) -> tuple[Array, KVCache | None]:
    """`attend` maps q, k, v f[B,T,heads,H] to f[B,T,N,H] and the cache they went into, or None."""
    B, T, _ = h.shape
    q, k, v = (projection(c, h, layer, name) for name in ("query", "key", "value"))
    norm_over_heads = c.qk_norm and c.qk_norm_over == "all"
    if norm_over_heads:
        q, k = apply_norm(c, q, layer, "query_norm"), apply_norm(c, k, layer, "key_norm")
    q = q.reshape(B, T, c.heads, c.head_size)
    k, v = (a.reshape(B, T, c.kv_heads, c.head_size) for a in (k, v))
    if c.qk_norm and not norm_over_heads:
        q, k = apply_norm(c, q, layer, "query_norm"), apply_norm(c, k, layer, "key_norm")
    if angles is not None:
        q, k = apply_rope(q, angles), apply_rope(k, angles)
    q, k, v = (shard(a, "batch", None, n, None) for a, n in ((q, "heads"), (k, "kv_heads"), (v, "kv_heads")))
    out, cache = attend(q, k, v)
    return shard(projection(c, out.reshape(B, T, -1), layer, "attention_out"), "batch", None, None), cache


def _mlp(c: ModelConfig, h: Array, layer: Params) -> tuple[Array, Routing | None]:
    activation, routing = ACTIVATIONS[c.activation], None
    if c.experts:
        matrices = {
            name: dequantized_matrix(layer, name, h.dtype) for name in ("router", "gate", "up", "down") if name in layer
        }
        h, routing = map_row_shards(lambda h, matrices: moe_mlp(c, matrices, h, activation), h, matrices)
    else:
        gate = projection(c, h, layer, "gate") if c.gated else None
        up = projection(c, h, layer, "up")
        h = shard(activation(gate) * up if c.gated else activation(up), "batch", None, "hidden")
        h = projection(c, h, layer, "down")
    return shard(h, "batch", None, None), routing


def _block(c: ModelConfig, attend, angles, x: Array, layer: Params) -> tuple[Array, KVCache | None, Routing | None]:
    """Attention and MLP, each added to the stream x f[B,T,D], with norms before them, behind them or both."""
    before = lambda x, name: x if c.norm_at == "output" else apply_norm(c, x, layer, f"{name}_norm")
    behind = lambda x, name: x if c.norm_at == "input" else apply_norm(c, x, layer, f"{name}_post_norm")
    out, cache = _attention(c, attend, angles, before(x, "attention"), layer)
    x = x + behind(out, "attention")
    out, routing = _mlp(c, before(x, "mlp"), layer)
    return x + behind(out, "mlp"), cache, routing


def _embeddings(c: ModelConfig, params: Params, inputs: Array, positions: Array) -> Array:
    # Whole rows: a lookup in a table split both ways would be rematerialised on every device.
    table = shard(params["embedding"].astype(c.dtype), "vocab", None)
    x = table[inputs]
    if "embedding_scale" in params:  # kept in 8 bits, a scale a row
        x = (x * params["embedding_scale"][inputs]).astype(c.dtype)
    x = x * jnp.asarray(c.embedding_scale, c.dtype)
    if c.positions == "learned":  # an index beyond the table silently takes its last row: callers check context
        x = x + params["position_embedding"].astype(c.dtype)[positions]
    return shard(x, "batch", None, None)


def _rotary_angles(c: ModelConfig, positions: Array):
    """The rotary angles of global and of local layers, or none. Computed once: otherwise XLA fuses them into every
    rotation and computes cosine and sine again for each head and layer."""
    if c.positions != "rope":
        return None, None
    return jax.lax.optimization_barrier(rope.global_and_local_angles(c, positions))


def hidden_states(c: ModelConfig, params: Params, inputs: Array, positions: Array, segments: Array) -> Array:
    """Final-norm states f[B,T,D] of whole rows; position t has seen inputs[:t+1] of its own segment."""
    return hidden_and_routing(c, params, inputs, positions, segments)[0]


def hidden_and_routing(
    c: ModelConfig, params: Params, inputs: Array, positions: Array, segments: Array
) -> tuple[Array, Routing | None]:
    """`hidden_states`, and how its layers spread the tokens over their experts, if they have any."""
    T = inputs.shape[1]
    turns, options = _rotary_angles(c, positions), dict(scale=c.attention_scale, softcap=c.attention_softcap)
    blocks, mixed = min(int(c.query_blocks), T), len(set(c.local_layers)) == 2

    def block(x, xs):
        layer, local = xs
        if not mixed:
            local, angles = c.local_layers[0], turns[c.local_layers[0]]
        else:  # one program for both kinds
            angles = None if turns[0] is None else jax.tree.map(lambda a, b: jnp.where(local, b, a), *turns)

        def attend(q, k, v):
            shape = dict(window=c.window, is_local=local, query_blocks=blocks)
            return self_attention(c.attention, q, k, v, segments, **shape, **options), None

        x, _, routing = _block(c, attend, angles, x, layer)
        return x, routing

    if c.remat == "block":
        block = jax.checkpoint(block)
    elif c.remat == "dots":
        block = jax.checkpoint(block, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    x = _embeddings(c, params, inputs, positions)
    if c.scan == "yes":
        x, routing = jax.lax.scan(block, x, (params["layers"], jnp.asarray(c.local_layers)))
    else:
        routings = []
        for layer, local in zip(unstacked_layers(params["layers"], c.layers), c.local_layers):
            x, routing = block(x, (layer, local))
            routings.append(routing)
        routing = jax.tree.map(lambda *parts: jnp.stack(parts), *routings)
    return apply_norm(c, x, params, "final_norm"), routing


def cached_hidden_states(
    c: ModelConfig, params: Params, inputs: Array, positions: Array, segments: Array, cache: KVCache
) -> tuple[Array, KVCache]:
    """The same for T more positions of rows whose earlier ones are in `cache`; T may be 1. Always unrolled."""
    cache = cache.replace(segments=updated_slots(cache.segments, segments, cache.length))
    turns, options = _rotary_angles(c, positions), dict(scale=c.attention_scale, softcap=c.attention_softcap)
    x = _embeddings(c, params, inputs, positions)
    for i, (layer, local) in enumerate(zip(unstacked_layers(params["layers"], c.layers), c.local_layers)):
        window = c.window if local else None
        attend = functools.partial(cached_attention, cache=cache, layer=i, window=window, **options)
        x, cache, _ = _block(c, attend, turns[local], x, layer)
    cache = cache.replace(length=cache.length + inputs.shape[1])
    return apply_norm(c, x, params, "final_norm"), cache


def logits(c: ModelConfig, params: Params, x: Array) -> Array:
    """f32[...,V] from states f[...,D]; under muP times base_width / width; capped where the model caps, in loss and
    sampling alike."""
    name = "embedding" if c.tie_embeddings else "head"
    oriented = lambda a: a.T if c.tie_embeddings else a
    raw = linear(x, oriented(params[name]).astype(x.dtype), jnp.float32)
    if f"{name}_scale" in params:  # kept in 8 bits, a scale a token
        raw = raw * oriented(params[f"{name}_scale"])
    return softcapped_logits(raw * (c.base_width / c.width) if c.base_width else raw, c.logit_softcap)


def value(head: Params, x: Array) -> Array:
    """f32[...] from states f[...,D]: a linear score of the prefix each position has seen."""
    return x.astype(jnp.float32) @ head["score"] + head["offset"]


def target_stats(c: ModelConfig, params: Params, x: Array, targets: Array, *, temperature: float = 1.0) -> TargetStats:
    """Scores of targets i32[B,T] under softmax(logits / temperature), from states f[B,T,D]."""
    return chunked_target_stats(
        functools.partial(logits, c, params), x, targets, temperature=temperature, chunk_size=c.loss_chunk
    )

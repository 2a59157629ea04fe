"""Causal self-attention of whole rows under one name each: plain XLA, or a fused kernel of an accelerator.

A kernel never holds the logits f32[B,N,T,T], forward or backward; cudnn still reads a mask [B,1,T,T].

    xla     lm.model.attention.causal_attention, anywhere
    cudnn   cuDNN's fused attention (jax.nn.dot_product_attention), on NVIDIA GPUs in bfloat16
    splash  JAX's own Pallas kernel for TPUs (jax.experimental.pallas.ops.tpu.splash_attention)

All compute the same function. Attention to a cache (lm.model.attention.cached_attention) stays plain XLA everywhere: a
decode step has one query a row, reads each key once, and holds T logits only, so there is nothing for a kernel to save.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
)

from lm.core.sharding import map_shards, partition_spec
from lm.core.types import Array
from lm.model.attention import causal_attention

LANES = 128  # what a TPU's vector unit holds in a row: lengths are padded to a multiple of it
BLOCK_SIZES = (
    512,
    256,
    128,
)  # queries or keys that the TPU kernel takes at a time: the largest that divides the length


def self_attention(
    name: str,
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    *,
    window: int,
    is_local: Array | bool,
    query_blocks: int,
    **options,
) -> Array:
    """`causal_attention` as the implementation of that name computes it; options: scale, softcap.

    is_local: whether the window applies, traced where one program serves layers of both kinds. query_blocks: of xla.
    """
    attend = functools.partial(
        ATTENTION_KERNELS[name], **options, **({"query_blocks": query_blocks} if name == "xla" else {})
    )
    if isinstance(is_local, bool):
        return attend(q, k, v, segments, window=window if is_local else None)
    if name == "splash":  # its blocks are chosen when it is compiled, so there are two of it
        both = (functools.partial(attend, window=size) for size in (window, None))
        return jax.lax.cond(is_local, *both, q, k, v, segments)
    return attend(q, k, v, segments, window=jnp.where(is_local, window, q.shape[1]))


def cudnn_attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    *,
    window: Array | int | None = None,
    scale: float = 0.0,
    softcap: float = 0.0,
    implementation: str = "cudnn",
) -> Array:
    """By jax.nn.dot_product_attention, whose other implementation, "xla", runs anywhere: the tests compare by it.

    Segments and window go in as a mask. Padding sees the padding before it, as a row that may see nothing has no
    softmax there; its outputs are cut off behind, and with them their gradients.
    """
    assert not softcap, "Config refuses it"
    T = q.shape[1]
    odd = T % 2  # a mask needs an even length in the backward pass
    q, k, v, named = (jnp.pad(a, ((0, 0), (0, odd)) + ((0, 0),) * (a.ndim - 2)) for a in (q, k, v, segments))
    back = jnp.arange(T + odd)[:, None] - jnp.arange(T + odd)
    mask = (named[:, :, None] == named[:, None, :]) & (back >= 0)
    if window is not None:
        mask &= back < window
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask[:, None], scale=scale or None, is_causal=True, implementation=implementation
    )
    return jnp.where(segments[..., None, None] > 0, out[:, :T], 0)


def splash_attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    *,
    window: int | None = None,
    scale: float = 0.0,
    softcap: float = 0.0,
    interpret: bool = False,
) -> Array:
    """By the TPU's kernel, each device on its own rows and heads; interpret: as plain JAX, for tests without a TPU.

    Padding sees padding and is cut off behind, as in `cudnn_attention`.
    """
    B, T, N, H = q.shape
    K, mesh = k.shape[2], jax.sharding.get_abstract_mesh()
    if partition_spec(("heads",), (N,), mesh) != partition_spec(("kv_heads",), (K,), mesh):
        k, v = (jnp.repeat(a, N // K, axis=2) for a in (k, v))  # too few to split: every query head brings its own
    q = q * jnp.asarray(scale or H**-0.5, q.dtype)
    rows = ("batch", None, "heads", None)
    kernel = functools.partial(_splash, window=window, softcap=softcap, interpret=interpret)
    out = map_shards(kernel, q, k, v, segments, axes=(rows, rows, rows, ("batch", None)))
    return jnp.where(segments[..., None, None] > 0, out, 0)


def _splash(q: Array, k: Array, v: Array, segments: Array, *, window: int | None, softcap: float, interpret: bool):
    """The kernel on one device's rows and heads, filled up with padding to a length that it takes."""
    T, N = q.shape[1:3]
    pad = -T % LANES
    length = T + pad
    size = next(block for block in BLOCK_SIZES if length % block == 0)
    mask = LocalMask((length, length), window_size=(None if window is None else window - 1, 0), offset=0)
    sizes = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel = make_splash_mha_single_device(
        MultiHeadMask([mask] * N),
        block_sizes=BlockSizes(**dict.fromkeys(sizes, size)),
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )
    q, k, v = (jnp.pad(a, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2) for a in (q, k, v))
    segments = jnp.pad(segments, ((0, 0), (0, pad)))
    out = jax.vmap(lambda q, k, v, own: kernel(q, k, v, SegmentIds(own, own)))(q, k, v, segments)
    return out.swapaxes(1, 2)[:, :T]


ATTENTION_KERNELS = {"xla": causal_attention, "cudnn": cudnn_attention, "splash": splash_attention}

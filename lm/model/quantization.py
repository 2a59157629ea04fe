"""A decoder's numbers in fewer bits: its matrices in bfloat16 or int8, and what goes into a key-value cache in int8.

int8 is symmetric and linear: w = q scale with q in -127..127, and a scale for each column of a matrix, each row of the
embedding, or each head of each slot of the cache: the largest of them is 127 (Dettmers et al. 2022, sec. 2,
arXiv 2208.07339, without their outliers in 16 bits). A scale a column leaves the sum of a product:
x (q scale) = (x q) scale, so that no matrix is ever expanded.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.errors import UserError
from lm.core.types import Array, Params

QUANTIZED_MATRICES = ("query", "key", "value", "attention_out", "gate", "up", "down")  # of the layers
STORAGE_DTYPES = ("float32", "bfloat16", "int8")


def quantized_params(dtype: str, lm: Mapping[str, Any], *, include_embeddings: bool = False) -> Params:
    """A decoder in numpy, in one of STORAGE_DTYPES: all in bfloat16, or the layers' matrices in int8 with their scales.

    include_embeddings: embedding and head in int8 too; otherwise they stay as they are, like norms and biases.
    """
    if dtype not in STORAGE_DTYPES:
        raise UserError(f"the weights are to be kept as {dtype!r}; choose one of {', '.join(STORAGE_DTYPES)}")
    if dtype == "float32":
        return lm
    if dtype == "bfloat16":
        return jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), lm)
    quantized = {**lm, "layers": dict(lm["layers"])}
    for name in QUANTIZED_MATRICES:
        if name in lm["layers"]:
            quantized["layers"][name], quantized["layers"][f"{name}_scale"] = quantize_int8(lm["layers"][name])
    for name, axis in (("embedding", -1), ("head", -2)):
        if include_embeddings and name in lm:
            quantized[name], quantized[f"{name}_scale"] = quantize_int8(lm[name], axis=axis)
    return quantized


def quantize_int8(w: Array, *, axis: int = -2) -> tuple[np.ndarray, np.ndarray]:
    """int8[..., D, F] and f32[..., 1, F]: the largest of a column is 127; w is their product within scale / 2.

    axis: what shares a scale: -2 a column, -1 a row.
    """
    w = np.asarray(w, np.float32)
    scale = np.maximum(np.max(np.abs(w), axis=axis, keepdims=True) / np.float32(127), np.float32(1e-12))
    return np.round(w / scale).astype(np.int8), scale


def quantize_heads_int8(x: Array) -> tuple[Array, Array]:
    """int8[...,H] and f32[...]: keys or values f[...,H] of which each head of each position has its scale."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1) / 127, 1e-12)
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale

"""Matrix products with a gradient rule that suits the CPU backend."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from lm.types import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: Array, matrix: Array, dtype=None) -> Array:
    """x @ matrix: f[...,F] from f[...,D] and f[D,F]; the same numbers, another order of work in the backward pass.
    """
    return jnp.matmul(x, matrix, preferred_element_type=dtype)


def _forward(x, matrix, dtype):
    return linear(x, matrix, dtype), (x, matrix)


def _backward(dtype, residuals, cotangent):
    x, matrix = residuals
    bar = jax.lax.optimization_barrier
    cotangent = bar(cotangent.astype(x.dtype))
    rows, columns = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    if x.dtype == jnp.bfloat16:
        return cotangent @ row_major(matrix.T), bar(row_major(rows.T) @ columns)
    return cotangent @ matrix.T, bar(bar(rows).T @ columns)


linear.defvjp(_forward, _backward)


def row_major(x):
    return jax.lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(range(x.ndim)))))

"""Matrix products with gradient rules that are fast on the CPU backend: the same numbers in another order of work."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from lm.core.sharding import is_single_device
from lm.core.types import Array


def row_major(x: Array) -> Array:
    """x, its last axis contiguous in memory. The identity except on a single CPU device.

    XLA uses a transposed operand without a copy, and its CPU backend then multiplies in bfloat16 at a half to a quarter
    of the speed (JAX 0.12, 4096 x 256 x 4096 on 2 cores: 117 and 392 GFLOP/s). The barrier keeps it from being undone.
    """

    def row_major(x):
        return jax.lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(range(x.ndim)))))

    return jax.lax.platform_dependent(x, cpu=row_major, default=lambda x: x) if is_single_device() else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: Array, matrix: Array, dtype=None) -> Array:
    """x @ matrix: f[...,F] from f[...,D] and f[D,F], in `dtype` if one is given; the gradients are in x's.

    XLA's CPU backend forms a weight gradient from a transposed copy of the cotangent, with the elementwise backward
    fused into that strided read, or transposes the product instead, which is as slow. Barriers keep the cotangent
    materialised and the product as it stands: a fifth to a third of the step at width 256.
    """
    return jnp.matmul(x, matrix, preferred_element_type=dtype)


def _linear_forward(x, matrix, dtype):
    # A bare product: a remat policy that saves products must see one.
    return jnp.matmul(x, matrix, preferred_element_type=dtype), (x, matrix)


def _linear_backward(dtype, residuals, cotangent):
    x, matrix = residuals
    cotangent = jax.lax.optimization_barrier(cotangent.astype(x.dtype))
    rows, columns = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    gradient = jax.lax.optimization_barrier(transposed_operand(jax.lax.optimization_barrier(rows)) @ columns)
    return cotangent @ transposed_operand(matrix), gradient


def transposed_operand(x: Array) -> Array:
    """f[...,F,D] from f[...,D,F], to be multiplied: moved in memory where that pays, which in float32 it does not."""
    x = x.swapaxes(-1, -2)
    return row_major(x) if x.dtype == jnp.bfloat16 else x


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def query_key_scores(q: Array, k: Array) -> Array:
    """q k^T of each row and head: f32[B,K,T,S] from queries f[B,K,T,H] and keys f[B,K,S,H]."""
    return jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32)


def _query_key_scores_forward(q, k):
    return query_key_scores(q, k), (q, k)


def _query_key_scores_backward(residuals, cotangent):
    q, k = residuals
    cotangent = jax.lax.optimization_barrier(cotangent.astype(q.dtype))
    return jnp.matmul(cotangent, k), jnp.matmul(transposed_operand(cotangent), q)


query_key_scores.defvjp(_query_key_scores_forward, _query_key_scores_backward)


@jax.custom_vjp
def attention_output(weights: Array, v: Array) -> Array:
    """The values f[B,K,S,H] of each row and head under weights f[B,K,T,S]: f[B,K,T,H]."""
    return jnp.matmul(weights, v)


def _attention_output_forward(weights, v):
    return attention_output(weights, v), (weights, v)


def _attention_output_backward(residuals, cotangent):
    weights, v = residuals
    cotangent = jax.lax.optimization_barrier(cotangent)
    return query_key_scores(cotangent, v).astype(weights.dtype), jnp.matmul(transposed_operand(weights), cotangent)


attention_output.defvjp(_attention_output_forward, _attention_output_backward)

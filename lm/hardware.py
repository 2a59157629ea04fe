"""What this machine can do at best: the measure that speeds are held against."""

import time

import jax
import jax.numpy as jnp


def matmul_ceiling(*, dtype: str = "float32", size: int = 1024, repeats: int = 8) -> float:
    """FLOP/s of the fastest of `repeats` square matrix products on one device.

    Compiled and warm; a product of n x n matrices is 2 n^3 FLOPs.
    """
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best

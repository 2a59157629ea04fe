"""Mean(total, weight): the one way anything is averaged.

A mean of means is wrong whenever the parts have different weights: totals and weights are summed over microbatches,
devices and steps, and divided once, at the very end.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Mean:
    """A weighted mean that has not been divided yet."""

    total: jax.Array  # f32[]
    weight: jax.Array  # f32[]

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    def __rmul__(self, coefficient: float) -> "Mean":
        return Mean(coefficient * self.total, self.weight)

    def value(self) -> jax.Array:
        """total / weight; 0 where nothing was counted, so an empty batch gives no NaN."""
        counted = self.weight > 0
        return jnp.where(counted, self.total / jnp.where(counted, self.weight, 1.0), 0.0)


Metrics = Mapping[str, Mean]


def mean(values: jax.Array, weights: jax.Array) -> Mean:
    """Weighted mean of `values`; `weights` has the same shape. Entries of weight 0 do not count, not even NaN."""
    return Mean(jnp.sum(jnp.where(weights > 0, values * weights, 0.0)), jnp.sum(weights))


def row_mean(values: jax.Array, weights: jax.Array) -> Mean:
    """The mean over rows of each row's own weighted mean, [B,T]: a token of a long row counts less; empty rows do not.

    GRPO as published (Shao et al. 2024, eq. 3, arXiv 2402.03300).
    """
    sizes = jnp.sum(weights, axis=1)
    sums = jnp.sum(jnp.where(weights > 0, values * weights, 0.0), axis=1)
    return mean(sums / jnp.maximum(sizes, 1.0), (sizes > 0).astype(jnp.float32))


def row_sum(values: jax.Array, weights: jax.Array, *, length: float = 1.0) -> Mean:
    """The mean over rows of each row's weighted sum, over a constant `length`: every token counts alike, in any row.

    Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) divides by the longest answer allowed.
    """
    sizes = jnp.sum(weights, axis=1)
    sums = jnp.sum(jnp.where(weights > 0, values * weights, 0.0), axis=1)
    return mean(sums / length, (sizes > 0).astype(jnp.float32))


def scalar_metric(value: jax.Array) -> Mean:
    """One observation of weight 1."""
    return Mean(jnp.asarray(value, jnp.float32), jnp.ones((), jnp.float32))


def metric_sum(a: Metrics, b: Metrics) -> Metrics:
    """Entry by entry; both sides hold the same names."""
    return {name: a[name] + b[name] for name in a}


def metric_values(metrics: Metrics) -> dict[str, float]:
    """Host floats, for logging."""
    return {name: float(m.value()) for name, m in jax.device_get(dict(metrics)).items()}

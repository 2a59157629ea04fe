"""Rotary positions: frequencies, as they are or slowed down for a longer context, and the turning."""

import math

import jax.numpy as jnp
import numpy as np

from lm.core.types import Array
from lm.model.config import ModelConfig

Angles = tuple[Array, Array]  # cos and sin, f32[B,T,1,H/2] each


def rope_frequencies(head_size: int, base: float) -> np.ndarray:
    """f32[H/2] radians a position: base^(-2i / H) (Su et al. 2021, eq. 15, arXiv 2104.09864)."""
    return (base ** (-np.arange(0, head_size, 2, dtype=np.float32) / head_size)).astype(np.float32)


def rope_angles(positions: Array, frequencies: np.ndarray, factor: float = 1.0) -> Angles:
    """cos and sin of positions i32[B,T] at frequencies f32[H/2], times `factor`."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x: Array, angles: Angles) -> Array:
    """x f[B,T,N,H] turned by its positions: component i pairs with i + H/2 ("rotate half")."""
    cos, sin = angles
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def linear_scaling(w: np.ndarray, c: ModelConfig) -> np.ndarray:
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595)."""
    return w / c.rope_factor


def llama3_scaling(w: np.ndarray, c: ModelConfig) -> np.ndarray:
    """Slow frequencies by the factor, fast ones not at all, a line in rotations between (Llama 3.1's own rule)."""
    rotations = c.rope_original * w / (2 * math.pi)
    unscaled_share = np.clip((rotations - c.rope_low) / (c.rope_high - c.rope_low), 0, 1)
    return (1 - unscaled_share) * w / c.rope_factor + unscaled_share * w


def yarn_scaling(w: np.ndarray, c: ModelConfig) -> np.ndarray:
    """The same by a line in dimensions, its ends rounded outwards (Peng et al. 2023, sec. 3.2, arXiv 2309.00071)."""
    last = c.head_size - 1

    def dimension(rotations: float) -> float:  # where a frequency turns so often within the original context
        return c.head_size * math.log(c.rope_original / (rotations * 2 * math.pi)) / (2 * math.log(c.rope_base))

    low, high = max(math.floor(dimension(c.rope_high)), 0), min(math.ceil(dimension(c.rope_low)), last)
    unscaled_share = 1 - np.clip((np.arange(len(w), dtype=np.float32) - low) / max(high - low, 1e-3), 0, 1)
    return (1 - unscaled_share) * w / c.rope_factor + unscaled_share * w


ROPE_SCALINGS = {"none": lambda w, c: w, "linear": linear_scaling, "llama3": llama3_scaling, "yarn": yarn_scaling}


def global_and_local_angles(c: ModelConfig, positions: Array) -> tuple[Angles, Angles]:
    """The angles of positions i32[B,T] in layers that see everything, and in those that see a window."""
    slowed = ROPE_SCALINGS[c.rope_scaling](rope_frequencies(c.head_size, c.rope_base), c).astype(np.float32)
    factor = 1.0
    if c.rope_scaling == "yarn":
        factor = c.rope_attention or (0.1 * math.log(c.rope_factor) + 1 if c.rope_factor > 1 else 1.0)
    everywhere = rope_angles(positions, slowed, factor)
    if not c.rope_local_base:
        return everywhere, everywhere
    return everywhere, rope_angles(positions, rope_frequencies(c.head_size, c.rope_local_base))

"""Unreduced losses: each returns one number per token f32[B,T] or per row f32[B]; only `Mean` reduces."""

import jax
import jax.numpy as jnp

Array = jax.Array


def bradley_terry(chosen: Array, rejected: Array) -> Array:
    """-log P(chosen beats rejected) = -log sigmoid(chosen - rejected), f32[B] each.

    Bradley & Terry 1952; Ouyang et al. 2022, eq. 1, arXiv 2203.02155.
    """
    return -jax.nn.log_sigmoid(chosen - rejected)


def clipped_surrogate(logprobs: Array, old_logprobs: Array, advantages: Array, *, clip: float = 0.2) -> Array:
    """-min(ratio * A, clip(ratio, 1 - clip, 1 + clip) * A) per token, with ratio = exp(logprobs - old_logprobs).

    Schulman et al. 2017, eq. 7, arXiv 1707.06347. The gradient is zero where the clipped branch is the smaller one.
    """
    ratio = jnp.exp(log_ratio(logprobs, old_logprobs))
    return -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages)


def clipped_value(values: Array, old_values: Array, returns: Array, *, clip: float = 0.2) -> Array:
    """0.5 * max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2) per token.

    Huang et al. 2024, detail "value function clipping", arXiv 2403.17031.
    """
    near = jnp.clip(values, old_values - clip, old_values + clip)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(near - returns))


def log_ratio(logprobs: Array, other: Array, *, bound: float = 20.0) -> Array:
    """logprobs - other, clamped to +-bound so that exp stays finite in float32."""
    return jnp.clip(logprobs - other, -bound, bound)


def kl_k1(logprobs: Array, ref_logprobs: Array) -> Array:
    """log p - log q of a token drawn from p: an unbiased estimate of KL(p, q) that may be negative.

    Schulman, "Approximating KL Divergence" (2020). In the *reward* it gives the gradient of the KL
    (Tang & Munos 2025, arXiv 2506.09477); as a loss its expected gradient is zero.
    """
    return logprobs - ref_logprobs


def kl_k3(logprobs: Array, ref_logprobs: Array) -> Array:
    """(q/p - 1) - log(q/p) of a token drawn from p: unbiased for KL(p, q), never negative, of lower variance.

    Schulman (2020). Good for logging; as a loss its gradient is that of another divergence.
    """
    log = log_ratio(ref_logprobs, logprobs)
    return jnp.expm1(log) - log

"""Losses of a policy on its own samples, unreduced f32[B,T]: ratios, surrogates, value loss, KL estimators."""

import jax
import jax.numpy as jnp

Array = jax.Array


def log_ratio(logprobs: Array, other: Array, *, bound: float = 20.0) -> Array:
    """logprobs - other, clamped to +-bound so that exp stays finite in float32."""
    return jnp.clip(logprobs - other, -bound, bound)


def token_ratio(logprobs: Array, old_logprobs: Array) -> Array:
    """p / p_old of each token: how much more probable it is now than when it was drawn."""
    return jnp.exp(log_ratio(logprobs, old_logprobs))


def sequence_ratio(logprobs: Array, old_logprobs: Array, weights: Array) -> Array:
    """(p(y) / p_old(y))^(1/|y|), the geometric mean of a row's token ratios, f32[B,T], equal at all its tokens.

    Zheng et al. 2025 (GSPO), eq. 5, arXiv 2507.18071.
    """
    total = jnp.sum(jnp.where(weights > 0, logprobs - old_logprobs, 0.0), axis=1, keepdims=True)
    log = total / jnp.maximum(jnp.sum(weights > 0, axis=1, keepdims=True), 1)
    return jnp.broadcast_to(jnp.exp(jnp.clip(log, -20.0, 20.0)), logprobs.shape)


def clipped_surrogate(
    ratio: Array, advantages: Array, *, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float = 0.0
) -> Array:
    """-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) per token; its gradient is zero beyond the clip.

    Schulman et al. 2017, eq. 7, arXiv 1707.06347. clip_high > clip_low leaves rare tokens room to rise (Yu et al.
    2025, DAPO, arXiv 2503.14476). dual_clip > 1 bounds the loss of a bad token that became likely by -dual_clip * A (Ye
    et al. 2020, eq. 5, arXiv 1912.09729); 0 does not.
    """
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip > 0:
        gain = jnp.where(advantages < 0, jnp.maximum(gain, dual_clip * advantages), gain)
    return -gain


def truncated_reinforce_loss(logprobs: Array, ratio: Array, advantages: Array, *, clip_high: float) -> Array:
    """-stop_gradient(min(ratio, 1 + high)) * A * log p per token: every token keeps a gradient, only its weight is cut.

    MiniMax 2025 (CISPO), eq. 4 and 5, arXiv 2506.13585.
    """
    return -jax.lax.stop_gradient(jnp.minimum(ratio, 1 + clip_high)) * advantages * logprobs


def clipped_value_loss(values: Array, old_values: Array, returns: Array, *, clip: float = 0.2) -> Array:
    """0.5 * max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2) per token.

    Huang et al. 2024, detail "value function clipping", arXiv 2403.17031.
    """
    near = jnp.clip(values, old_values - clip, old_values + clip)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(near - returns))


def kl_k1(logprobs: Array, ref_logprobs: Array) -> Array:
    """log p - log q of a token drawn from p: an unbiased estimate of KL(p, q) that may be negative.

    Schulman, "Approximating KL Divergence" (2020). In the *reward* it gives the gradient of the KL
    (Tang & Munos 2025, arXiv 2506.09477); as a loss its expected gradient is zero.
    """
    return logprobs - ref_logprobs


def kl_k3(logprobs: Array, ref_logprobs: Array) -> Array:
    """(q/p - 1) - log(q/p) of a token drawn from p: unbiased for KL(p, q), never negative, of lower variance.

    Schulman (2020). Good for logging. As a loss its expected gradient is that of KL(q, p), the other direction:
    lm certify prints by how much that differs.
    """
    log = log_ratio(ref_logprobs, logprobs)
    return jnp.expm1(log) - log

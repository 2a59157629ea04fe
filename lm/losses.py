"""Unreduced losses: each returns one number per token f32[B,T] or per row f32[B]; only `Mean` reduces."""

import math

import jax
import jax.numpy as jnp

Array = jax.Array


def bradley_terry(chosen: Array, rejected: Array, *, margin: Array | float = 0.0, flipped: float = 0.0) -> Array:
    """-log P(the verdict), with d = chosen - rejected - margin and P = (1 - flipped) sigmoid(d) + flipped sigmoid(-d).

    Elementwise. `margin` asks for a lead (Touvron et al. 2023, eq. 2, arXiv 2307.09288); `flipped` is the share of
    verdicts that say the opposite of what the rater thinks: it bounds what one wrong verdict can cost.
    Bradley & Terry 1952; Ouyang et al. 2022, eq. 1, arXiv 2203.02155.
    """
    d = chosen - rejected - margin
    if flipped == 0:
        return -jax.nn.log_sigmoid(d)
    right, wrong = jax.nn.log_sigmoid(d) + math.log1p(-flipped), jax.nn.log_sigmoid(-d) + math.log(flipped)
    return -jnp.logaddexp(right, wrong)


def plackett_luce(scores: Array, ranks: Array) -> Array:
    """-log P(answer i is chosen before all worse ones), f32[P,K] from scores f32[P,K] and ranks i32[P,K].

    log(1 + sum over worse j of exp(s_j - s_i)); 0 where nothing is worse. Summed over i it is the Plackett-Luce
    likelihood of the order; answers of equal rank are not ordered among each other, so a tie says nothing of its
    members. Rank 0 marks an answer that is not there. With two answers it is `bradley_terry`.
    Plackett 1975; Luce 1959; Ouyang et al. 2022, sec. 3.5, arXiv 2203.02155 (all comparisons of a prompt at once).
    """
    worse = preferred(ranks)
    behind = jnp.where(worse, scores[:, None, :] - scores[:, :, None], -jnp.inf)
    return jax.nn.logsumexp(jnp.pad(behind, ((0, 0), (0, 0), (1, 0))), axis=-1)


def preferred(ranks: Array) -> Array:
    """bool[P,K,K] from ranks i32[P,K]: whether answer i is preferred to answer j; rank 0 takes no part."""
    return (ranks[:, :, None] > 0) & (ranks[:, :, None] < ranks[:, None, :])


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

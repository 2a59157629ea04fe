"""From rewards to the learning signal: token rewards, generalised advantage estimation, whitening."""

import jax
import jax.numpy as jnp

Array = jax.Array


def last_token(weights: Array) -> Array:
    """f32[B,T] that is 1 at each row's last position of positive weight; all zero in a row without one."""
    after = jnp.cumsum((weights > 0)[:, ::-1], axis=1)[:, ::-1]  # weighted positions from t on
    return ((after == 1) & (weights > 0)).astype(jnp.float32)


def kl_rewards(rewards: Array, kl: Array, weights: Array, *, beta: float) -> Array:
    """f32[B,T]: -beta * kl on every sampled token, plus the row's reward f32[B] on its last one.

    Ziegler et al. 2019, eq. 2, arXiv 1909.08593; Ouyang et al. 2022, eq. 2, arXiv 2203.02155.
    """
    return last_token(weights) * rewards[:, None] - beta * kl * (weights > 0)


def gae(rewards: Array, values: Array, weights: Array, *, gamma: float = 1.0, lam: float = 0.95) -> tuple[Array, Array]:
    """Advantages and returns f32[B,T] under the mask `weights`; both are 0 where it is 0.

    delta_t = r_t + gamma * V(s_{t+1}) - V(s_t);  A_t = delta_t + gamma * lam * A_{t+1};  R_t = A_t + V(s_t).
    The value after the last sampled token is 0. Positions of weight 0 between sampled ones (a tool's output) are
    stepped over: the next state of a sampled token is the next sampled token.
    Schulman et al. 2015, eq. 16, arXiv 1506.02438.
    """
    real = weights > 0

    def back(carry, now):
        next_value, next_advantage = carry
        reward, value, m = now
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = (jnp.where(m, value, next_value), jnp.where(m, advantage, next_advantage))
        return carry, jnp.where(m, advantage, 0.0)

    start = jnp.zeros_like(values[:, 0])
    _, advantages = jax.lax.scan(back, (start, start), (rewards.T, values.T, real.T), reverse=True)
    advantages = advantages.T
    return advantages, jnp.where(real, advantages + values, 0.0)


def whiten(x: Array, weights: Array, *, eps: float = 1e-8) -> Array:
    """x with weighted mean 0 and standard deviation 1 over the *whole* array; 0 where the weight is 0."""
    count = jnp.maximum(jnp.sum(weights), 1.0)
    centred = x - jnp.sum(x * weights) / count
    variance = jnp.sum(jnp.square(centred) * weights) / count
    return jnp.where(weights > 0, centred * jax.lax.rsqrt(variance + eps), 0.0)

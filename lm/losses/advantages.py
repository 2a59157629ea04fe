"""From rewards to the learning signal: token rewards, advantages by GAE or within a group, whitening, shaping."""

import jax
import jax.numpy as jnp

from lm.core.errors import UserError

Array = jax.Array


def last_token_mask(weights: Array) -> Array:
    """f32[B,T] that is 1 at each row's last position of positive weight; all zero in a row without one."""
    after = jnp.cumsum((weights > 0)[:, ::-1], axis=1)[:, ::-1]  # weighted positions from t on
    return ((after == 1) & (weights > 0)).astype(jnp.float32)


def kl_rewards(rewards: Array, kl: Array, weights: Array, *, beta: float, token_rewards: Array | None = None) -> Array:
    """f32[B,T]: -beta * kl on every sampled token, plus the row's reward f32[B] on its last one.

    token_rewards f32[B,T]: the part of the reward that belongs to single tokens stays with them, and the last token
    gets the rest, so that a row's sum is the same. Ziegler et al. 2019, eq. 2, arXiv 1909.08593; Ouyang et al. 2022,
    eq. 2, arXiv 2203.02155.
    """
    on_tokens = jnp.zeros_like(weights) if token_rewards is None else token_rewards * (weights > 0)
    last = rewards - jnp.sum(on_tokens, axis=1)
    return last_token_mask(weights) * last[:, None] + on_tokens - beta * kl * (weights > 0)


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


def rewards_by_group(rewards: Array, group: int) -> Array:
    """rewards f32[B] as [prompts, group]. UserError for a group of one: it has nothing to be compared with."""
    if group < 2:
        raise UserError(f"data.group is {group}: this stage compares answers to one prompt; give it at least 2")
    return rewards.reshape(-1, group)


def centered_group_advantages(rewards: Array, group: int) -> Array:
    """f32[B]: a reward less the mean of its group (Liu et al. 2025, Dr. GRPO, arXiv 2503.20783).

    Its own reward is part of that mean, which shrinks the expected gradient by (group - 1) / group, and no more.
    """
    r = rewards_by_group(rewards, group)
    alike = jnp.max(r, axis=1, keepdims=True) == jnp.min(r, axis=1, keepdims=True)  # exactly 0, whatever the rounding
    return jnp.where(alike, 0.0, r - jnp.mean(r, axis=1, keepdims=True)).reshape(-1)


def group_advantages(rewards: Array, group: int, *, eps: float = 1e-4) -> Array:
    """f32[B]: a reward less its group's mean, over its group's standard deviation (of a sample, group - 1) plus eps.

    Shao et al. 2024 (GRPO), sec. 4.1.2, arXiv 2402.03300; eps as in TRL. Dividing by a deviation that depends on the
    sample is a bias: prompts that are nearly always or nearly never solved weigh more.
    """
    deviation = jnp.std(rewards_by_group(rewards, group), axis=1, ddof=1)
    return centered_group_advantages(rewards, group) / (jnp.repeat(deviation, group) + eps)


def leave_one_out_advantages(rewards: Array, group: int) -> Array:
    """f32[B]: a reward less the mean of the *others* of its group: a baseline that does not depend on it, so no bias.

    Ahmadian et al. 2024 (RLOO), eq. 8, arXiv 2402.14740.
    """
    return centered_group_advantages(rewards, group) * (group / (group - 1))


def rewards_to_go(rewards: Array, weights: Array) -> Array:
    """f32[B,T]: the sum of a row's rewards from t to its end, where the weight is positive."""
    return jnp.where(weights > 0, jnp.cumsum((rewards * (weights > 0))[:, ::-1], axis=1)[:, ::-1], 0.0)


def overlong_penalty(lengths: Array, *, limit: int, buffer: int) -> Array:
    """f32[B] from 0 to -1: 0 up to limit - buffer tokens, then linear, -1 at `limit`.

    Yu et al. 2025 (DAPO), eq. 13, arXiv 2503.14476.
    """
    return -jnp.clip((lengths - (limit - buffer)) / max(buffer, 1), 0.0, 1.0)

"""Losses of ranked answers, unreduced: scores f32[P,K] of K answers to each of P prompts, and a rater's ranks."""

import math

import jax
import jax.numpy as jnp

Array = jax.Array


def bradley_terry_loss(
    chosen: Array, rejected: Array, *, margin: Array | float = 0.0, flip_probability: float = 0.0
) -> Array:
    """-log P(preference), with d = chosen - rejected - margin and P = (1 - flip) sigmoid(d) + flip sigmoid(-d).

    Elementwise. `margin` asks for a lead (Touvron et al. 2023, eq. 2, arXiv 2307.09288). flip is `flip_probability`,
    the share of preferences that say the opposite of what the rater thinks: it bounds what a wrong one can cost.
    Bradley & Terry 1952; Ouyang et al. 2022, eq. 1, arXiv 2203.02155.
    """
    d = chosen - rejected - margin
    if flip_probability == 0:
        return -jax.nn.log_sigmoid(d)
    right, wrong = (
        jax.nn.log_sigmoid(d) + math.log1p(-flip_probability),
        jax.nn.log_sigmoid(-d) + math.log(flip_probability),
    )
    return -jnp.logaddexp(right, wrong)


def plackett_luce_loss(scores: Array, ranks: Array) -> Array:
    """-log P(answer i is chosen before all worse ones), f32[P,K] from scores f32[P,K] and ranks i32[P,K].

    log(1 + sum over worse j of exp(s_j - s_i)); 0 where nothing is worse. Summed over i it is the Plackett-Luce
    likelihood of the order; answers of equal rank are not ordered among each other, so a tie says nothing of its
    members. Rank 0 marks an answer that is not there. With two answers it is `bradley_terry_loss`.
    Plackett 1975; Luce 1959; Ouyang et al. 2022, sec. 3.5, arXiv 2203.02155 (all comparisons of a prompt at once).
    """
    worse = preference_mask(ranks)
    behind = jnp.where(worse, scores[:, None, :] - scores[:, :, None], -jnp.inf)
    return jax.nn.logsumexp(jnp.pad(behind, ((0, 0), (0, 0), (1, 0))), axis=-1)


def preference_mask(ranks: Array) -> Array:
    """bool[P,K,K] from ranks i32[P,K]: whether answer i is preferred to answer j; rank 0 takes no part."""
    return (ranks[:, :, None] > 0) & (ranks[:, :, None] < ranks[:, None, :])

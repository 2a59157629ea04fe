"""Divergences between a student's and a teacher's distribution: f32[...] from log-probs f32[...,V] of each, in nats."""

import math

import jax
import jax.numpy as jnp

Array = jax.Array
MIN_LOGPROB = -1e30  # stands for a log-prob of -inf where two of them meet: their sum has no gradient


def kl_divergence(logprobs: Array, other: Array) -> Array:
    """KL(p, q) = sum of p * (log p - log q) over the last axis. Tokens of probability 0 under p do not count, whatever
    q is."""
    p = jnp.exp(logprobs)
    return jnp.sum(p * jnp.where(p > 0, logprobs - other, 0.0), axis=-1)


def jensen_shannon(student: Array, teacher: Array, *, beta: float) -> Array:
    """beta * KL(teacher, m) + (1 - beta) * KL(student, m) with m = beta * teacher + (1 - beta) * student.

    0 only where both agree. As beta goes to 0 it behaves like beta * KL(teacher, student), as it goes to 1 like
    (1 - beta) * KL(student, teacher); at the ends themselves, where it would vanish, it is these KLs: 0 gives the
    forward one (the student covers all modes of the teacher), 1 the reverse one (it keeps to a few of them).
    Agarwal et al. 2023 (GKD), eq. 1, arXiv 2306.13649.
    """
    if beta == 0:
        return kl_divergence(teacher, student)
    if beta == 1:
        return kl_divergence(student, teacher)
    middle = jnp.logaddexp(
        jnp.maximum(teacher, MIN_LOGPROB) + math.log(beta), jnp.maximum(student, MIN_LOGPROB) + math.log1p(-beta)
    )
    return beta * kl_divergence(teacher, middle) + (1 - beta) * kl_divergence(student, middle)

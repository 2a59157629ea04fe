"""True objectives, each a loss of the policy's log-probs (see tiny_world), summed over all answers; and their
gradients."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.types import Array, Params
from lm.studies.gradients.tiny_world import (
    MAX_ANSWER_LENGTH,
    PROMPTS,
    TinyWorld,
    answer_logprobs,
    answer_probabilities,
    next_token_logprobs,
    realized_logprobs,
)

PolicyLoss = Callable[[Array], Array]  # f32[X,Y,N,V] -> f32[]


def exact_gradient(w: TinyWorld, loss: PolicyLoss, *, temperature: float = 1.0) -> Params:
    """The gradient of `loss` in the policy's parameters."""
    logprobs, back = jax.vjp(lambda lm: next_token_logprobs(w, lm, temperature=temperature), w.nets.policy)
    return back(jax.grad(loss)(logprobs))[0]


def expected_reward_loss(
    w: TinyWorld, *, beta: float = 0.0, rewards: Array | None = None, temperature: float = 1.0
) -> PolicyLoss:
    """-(E r - beta * KL(p, q))."""
    r = w.rewards if rewards is None else rewards
    log_q = answer_logprobs(w, next_token_logprobs(w, w.nets.reference, temperature=temperature))

    def loss(said):
        log_p = answer_logprobs(w, said)
        return -jnp.mean(jnp.sum(jnp.exp(log_p) * (r - beta * (log_p - log_q)), axis=1))

    return loss


def imitation_loss(w: TinyWorld, target: np.ndarray) -> PolicyLoss:
    """-sum of target * log p, target f64[X,Y]."""
    return lambda said: -jnp.mean(jnp.sum(target * answer_logprobs(w, said), axis=1))


def expected_prefix_loss(w: TinyWorld, writer: Params, each: Callable[[Array], Array]) -> PolicyLoss:
    """E over answers of `writer`, held fixed, of the sum over tokens of each(said) f32[X,Y,N]."""
    fixed = answer_probabilities(w, writer)[:, :, None] * w.answer_mask
    return lambda said: jnp.mean(jnp.sum(jnp.where(w.answer_mask > 0, fixed * each(said), 0.0), axis=(1, 2)))


def kl_divergence(log_p: Array, log_q: Array) -> Array:
    """KL(p, q) over the last axis."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def negative_entropy(w: TinyWorld) -> PolicyLoss:
    """-H(p), of whole answers."""
    return lambda said: jnp.mean(jnp.sum(jnp.exp(answer_logprobs(w, said)) * answer_logprobs(w, said), axis=1))


def best_of_n_probabilities(w: TinyWorld, n: int) -> np.ndarray:
    """P(an answer is the best of n that are not all worth the same), f64[X,Y]; the first of equals is taken."""
    p, r = answer_probabilities(w, w.nets.policy), np.asarray(w.rewards)
    below = np.sum(p[:, None, :] * (r[:, None, :] < r[:, :, None]), axis=2)
    equal = np.sum(p[:, None, :] * (r[:, None, :] == r[:, :, None]), axis=2)
    return p / equal * ((below + equal) ** n - below**n - equal**n)


def self_win_loss(w: TinyWorld) -> PolicyLoss:
    """-E of (r - r') / 2 over its absolute value / sqrt 2, r' the reward of another answer, held fixed.

    The sign of r - r' over sqrt 2, but for the 1e-4 that GRPO adds to the deviation.
    """
    r = np.asarray(w.rewards, np.float64)
    lead = r[:, :, None] - r[:, None, :]
    won = answer_probabilities(w, w.nets.policy)[:, None, :] * (lead / 2) / (np.abs(lead) / np.sqrt(2) + 1e-4)
    return expected_reward_loss(w, rewards=jnp.array(won.sum(axis=2), jnp.float32))


def pairwise_loss(
    w: TinyWorld, weights: np.ndarray, has: Callable[[Array], Array], loss: Callable[[Array], Array]
) -> PolicyLoss:
    """The sum over ordered pairs of weights f64[X,Y,Y] * loss(what the answers have, f32[X,Y]) f32[X,Y,Y]."""
    return lambda said: jnp.sum(weights * loss(has(said)))


def pairwise_differences(x):
    """[X,Y,Y]: by how much the first of two answers is above the second."""
    return x[:, :, None] - x[:, None, :]


def clipped_reward_loss(w: TinyWorld) -> PolicyLoss:
    """-E over the sampler's answers of the sum over tokens of min(ratio * r, clip(ratio, 0.8, 1.2) * r)."""
    old = realized_logprobs(w, next_token_logprobs(w, w.nets.sampler))
    fixed = answer_probabilities(w, w.nets.sampler)[:, :, None] * w.answer_mask
    r = w.rewards[:, :, None]

    def loss(said):
        ratio = jnp.exp(realized_logprobs(w, said) - old)
        gain = jnp.where(r > 0, r * jnp.minimum(ratio, 1.2), r * jnp.maximum(ratio, 0.8))
        return -jnp.mean(jnp.sum(fixed * gain, axis=(1, 2)))

    return loss


def prefix_values(w: TinyWorld, *, beta: float) -> np.ndarray:
    """The rewards that the policy still gets after each prefix of an answer, less the KL cost, f64[X,Y,N]; 0 after
    its end."""
    p = answer_probabilities(w, w.nets.policy)
    paid = np.asarray(
        realized_logprobs(w, next_token_logprobs(w, w.nets.policy))
        - realized_logprobs(w, next_token_logprobs(w, w.nets.reference)),
        np.float64,
    )
    to_come = np.asarray(w.rewards)[:, :, None] - beta * np.cumsum(paid[:, :, ::-1], axis=2)[:, :, ::-1]
    values = np.zeros_like(to_come)
    for y, n in itertools.product(range(len(w.answers)), range(MAX_ANSWER_LENGTH)):
        if w.answer_mask[y, n]:
            same = [answer[:n] == w.answers[y][:n] for answer in w.answers]
            values[:, y, n] = np.sum(same * p * to_come[:, :, n], axis=1) / np.sum(same * p, axis=1)
    return values


def answer_hidden_states(w: TinyWorld) -> Array:
    """The policy's states where it predicts each token of an answer, f32[X,Y,N,D]; 0 after its end."""
    t = w.tokens
    x = w.nets.model.hidden_states(w.nets.policy, t.inputs, t.positions, t.segments)
    x = x.reshape(len(PROMPTS), len(w.answers), *x.shape[1:])
    return (
        jnp.stack([x[i, :, len(p) - 1 :][:, :MAX_ANSWER_LENGTH] for i, p in enumerate(PROMPTS)])
        * w.answer_mask[:, :, None]
    )

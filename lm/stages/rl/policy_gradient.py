"""Learning from one's own samples: what PPO and the methods that compare answers within a group share.

A batch is `Rollouts`. `annotated_rollouts` completes it with old and reference log-probs; `policy_gradient_update`
composes the rest from the three things in which the group methods differ: the advantage of a token, the loss of a token
given its log-prob, and the average that turns token losses into one number.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import optax

from lm.core.errors import check_at_least
from lm.core.metrics import Mean, Metrics, mean, metric_values
from lm.core.types import Array, Rollouts, TrainState
from lm.losses.advantages import rewards_by_group
from lm.losses.policy import clipped_surrogate, clipped_value_loss, kl_k1, kl_k3, token_ratio
from lm.model import Model
from lm.optim.combinators import annotate, decoder_gradient, minibatches, refreshed_reference
from lm.optim.update import Loss, Update

Advantages = Callable[[Rollouts], Array]  # rollouts with old and reference log-probs -> f32[B,T]
TokenLoss = Callable[[Array, Rollouts], Array]  # (log-probs f32[B,T], annotated rollouts) -> loss f32[B,T]
Annotation = Callable[[TrainState, Rollouts], tuple[Rollouts, Metrics]]  # completes a batch before it is learned from
LossAverage = Callable[[Array, Array], Mean]  # (f32[B,T], weights f32[B,T]) -> Mean

SQUARED = "_squared"  # ends the name of a row metric whose mean gives a standard error
SHOWN_METRICS = ("reward", "score/rule", "kl", "entropy")  # in the live line
# Metrics a run must keep below; the loop stops above them. The sampler's and the trainer's log-probs of the same tokens
# differ by rounding only: 1e-5 in float32, about 1e-2 in bfloat16. More means two different distributions.
METRIC_LIMITS: Mapping[str, float] = {"sampler_gap": 0.05}
# Held-out metrics before the first step, (value, tolerance): the policy is still its own reference.
START_METRICS: Mapping[str, tuple[float, float]] = {
    "ratio": (1.0, 0.01),
    "clip_fraction": (0.0, 0.01),
    "kl": (0.0, 0.05),
}


def ratio_to_old_policy(logprobs: Array, batch: Rollouts) -> Array:
    """The ratio of each token to the policy that was sampled."""
    return token_ratio(logprobs, batch.old_logprobs)


class PolicyGradientMethod(NamedTuple):
    """What a method that compares answers within a group is."""

    advantages: Advantages
    token_loss: TokenLoss
    average: LossAverage
    clip_range: tuple[float, float]  # the clip below and above 1, for the metric `clip_fraction`
    kl_coefficient: float | None = None  # coefficient of k3 to the reference, averaged like the objective; None: no k3
    clipped_ratio: TokenLoss = ratio_to_old_policy  # what is clipped


class ValueTerm(NamedTuple):
    """What a value head on the shared trunk adds to the loss: `coefficient` * mean clipped value loss."""

    clip: float
    coefficient: float


def policy_gradient_update(
    model: Model,
    optimizer: optax.GradientTransformation,
    method: PolicyGradientMethod,
    *,
    entropy_bonus: float = 0.0,
    importance_ratio_cap: float = 0.0,
    refresh_reference_every: int = 0,
    epochs: int = 1,
    minibatch_count: int = 1,
    microbatches: int = 1,
    temperature: float = 1.0,
) -> Update:
    """refreshed_reference(annotate(advantages, minibatches(gradient(objective + kl_in_loss * k3 - entropy)))).

    `entropy_bonus` times the entropy of the policy's distribution is added to the objective.
    `importance_ratio_cap` > 0 weighs each token by min(p_old / p_sampler, cap), where sampler and trainer compute the
    same policy with different roundings (truncated importance sampling: Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training"); 0 does not.
    `refresh_reference_every`: the reference becomes the current policy every so many batches; 0: never.
    """
    check_at_least(0, "stage", importance_ratio_cap=importance_ratio_cap)

    def signal(state, batch: Rollouts) -> tuple[Rollouts, Metrics]:
        batch, _, metrics = annotated_rollouts(model, state, batch, temperature=temperature)
        if batch.group > 1:
            rewards = rewards_by_group(batch.rewards, batch.group)
            alike = jnp.max(rewards, axis=1) == jnp.min(rewards, axis=1)
            metrics["equal_groups"] = mean(alike.astype(jnp.float32), jnp.ones(len(rewards)))
        return importance_corrected(batch.replace(advantages=method.advantages(batch)), importance_ratio_cap), metrics

    return rollout_update(
        policy_gradient_loss(model, method, entropy_bonus=entropy_bonus, temperature=temperature),
        optimizer,
        signal,
        refresh_reference_every=refresh_reference_every,
        epochs=epochs,
        minibatch_count=minibatch_count,
        microbatches=microbatches,
    )


def rollout_update(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    annotation: Annotation,
    *,
    refresh_reference_every: int,
    epochs: int,
    minibatch_count: int,
    microbatches: int,
) -> Update:
    """How every method learns from a batch of rollouts: refreshed_reference(annotate(minibatches(gradient(loss))))."""
    check_at_least(1, "stage", epochs=epochs, minibatch_count=minibatch_count)
    check_at_least(0, "stage", refresh_reference_every=refresh_reference_every)
    inner = minibatches(
        decoder_gradient(loss, optimizer, microbatches=microbatches), epochs=epochs, count=minibatch_count
    )
    return refreshed_reference(annotate(annotation, inner), every=refresh_reference_every * epochs * minibatch_count)


def clipped_objective(clip_low: float, clip_high: float, dual: float = 0.0) -> TokenLoss:
    """PPO's surrogate of token ratios, clipped to [1 - clip_low, 1 + clip_high]; `dual`: see `clipped_surrogate`."""

    def objective(logprobs, batch: Rollouts):
        ratio = ratio_to_old_policy(logprobs, batch)
        return clipped_surrogate(ratio, batch.advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual)

    return objective


def annotated_advantages(batch: Rollouts) -> Array:
    """Those that the batch has been given."""
    assert batch.advantages is not None, "annotate the batch first"
    return batch.advantages


def advantages_within_group(advantage: Callable[[Array, int], Array]) -> Advantages:
    """The advantages f32[B] that `advantage` (rewards, group) gives the answers, on all their tokens.

    A reward per token counts as its sum: an answer has one worth among its group's.
    """
    return lambda batch: token_advantages(advantage(batch.rewards, batch.group), batch)


def annotated_rollouts(
    model: Model, state: TrainState, batch: Rollouts, *, temperature: float
) -> tuple[Rollouts, Array, dict[str, Mean]]:
    """The batch with old and reference log-probs, the policy's states f[B,T,D], and what is known before learning."""
    tokens, w = batch.tokens, batch.tokens.weights
    x = model.hidden_states(state.params["lm"], tokens.inputs, tokens.positions, tokens.segments)
    scores = model.target_stats(state.params["lm"], x, tokens.targets, temperature=temperature)
    old = scores.logprobs * w
    ref = model.token_logprobs(state.frozen["ref"], tokens, temperature=temperature) * w
    lengths = jnp.sum(w, axis=1)
    per_row = {
        "reward": batch.rewards,
        "kl": jnp.sum(kl_k1(old, ref), axis=1),
        "response_length": lengths,
        "stopped": batch.stopped.astype(jnp.float32),
        "empty": (lengths <= batch.stopped).astype(jnp.float32),  # the end token alone
        **batch.row_metrics,
    }
    rows = (lengths > 0).astype(jnp.float32)
    metrics = {name: mean(value, rows) for name, value in per_row.items()}
    metrics["kl_k3"] = mean(kl_k3(old, ref), w)
    metrics["entropy"] = mean(scores.entropy, w)
    metrics["sampler_gap"] = mean(jnp.abs(old - batch.sampler_logprobs), w)
    return batch.replace(old_logprobs=old, ref_logprobs=ref), x, metrics


def importance_corrected(batch: Rollouts, importance_ratio_cap: float) -> Rollouts:
    """Advantages weighed by min(p_old / p_sampler, correction); all of them as they are if it is 0."""
    if importance_ratio_cap == 0:
        return batch
    weight = jnp.minimum(token_ratio(batch.old_logprobs, batch.sampler_logprobs), importance_ratio_cap)
    return batch.replace(advantages=batch.advantages * weight)


def policy_gradient_loss(
    model: Model,
    method: PolicyGradientMethod,
    *,
    entropy_bonus: float,
    temperature: float,
    value: ValueTerm | None = None,
) -> Loss:
    """average(objective) + kl_in_loss * average(k3 to the reference) - entropy_bonus * mean entropy (+ value term)."""

    def loss(params, frozen, batch: Rollouts, key):
        tokens, w = batch.tokens, batch.tokens.weights
        x = model.hidden_states(params["lm"], tokens.inputs, tokens.positions, tokens.segments)
        scores = model.target_stats(params["lm"], x, tokens.targets, temperature=temperature)
        terms = {"policy": method.average(method.token_loss(scores.logprobs, batch), w)}
        if method.kl_coefficient is not None:
            terms["kl"] = method.kl_coefficient * method.average(kl_k3(scores.logprobs, batch.ref_logprobs), w)
        if entropy_bonus:
            terms["entropy"] = -entropy_bonus * mean(scores.entropy, w)
        ratio = method.clipped_ratio(scores.logprobs, batch)
        metrics = {"policy_loss": terms["policy"]}
        if value is not None:
            values = model.value(params["value"], x)
            value_loss = clipped_value_loss(values, batch.old_values, batch.returns, clip=value.clip)
            metrics["value_loss"] = mean(value_loss, w)
            terms["value"] = value.coefficient * metrics["value_loss"]
        return terms, {**metrics, **policy_shift_metrics(scores.logprobs, ratio, batch, method.clip_range)}

    return loss


def policy_shift_metrics(logprobs: Array, ratio: Array, batch: Rollouts, band: tuple[float, float]) -> dict[str, Mean]:
    """How far the policy has gone from the one that was sampled."""
    w = batch.tokens.weights
    outside = (ratio < 1 - band[0]) | (ratio > 1 + band[1])
    return {
        "ratio": mean(ratio, w),
        "clip_fraction": mean(outside.astype(jnp.float32), w),
        "update_kl": mean(kl_k3(batch.old_logprobs, logprobs), w),
    }


def token_advantages(advantages: Array, batch: Rollouts) -> Array:
    """Each answer's advantage f32[B] on all of its tokens, f32[B,T]."""
    return advantages[:, None] * (batch.tokens.weights > 0)


def summary(metrics: Metrics, about) -> dict[str, float]:
    """Held-out reward, the rater's own score, KL, entropy, length, fraction that ended by themselves.

    Where the rollouts hold the squares of a number ("reward_squared"), its standard error over the answers, taken as
    independent: "reward_se".
    """
    values = metric_values(metrics)
    squares = {name: values.pop(name) for name in list(values) if name.endswith(SQUARED)}
    for name, square in squares.items():
        plain = name.removesuffix(SQUARED)
        spread = max(square - values[plain] ** 2, 0.0)
        values[f"{plain}_se"] = math.sqrt(spread / max(float(metrics[name].weight) - 1, 1.0))
    return values

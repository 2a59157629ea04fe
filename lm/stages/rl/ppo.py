"""PPO: sample answers, score them, and move the policy towards the better ones without losing the reference.

Objective: E[reward(x, y)] - beta * KL(policy, reference), through the clipped surrogate on advantages from GAE, with a
learned value head on the shared trunk. Reward of token t: -beta * log(p / p_ref), plus the answer's reward on its last
token, or where `data.rewards` has one per token its share on each: the KL is counted here and nowhere else. Frozen:
"ref", the policy this run starts from. A batch is `Rollouts`, drawn by the current policy inside `batches`; `make`
annotates it once, then takes `epochs` x `minibatch_count` updates. Schulman et al. 2017, arXiv 1707.06347; Ziegler et
al. 2019, arXiv 1909.08593; details: Huang et al. 2024, 2403.17031.

Ours differs: old log-probs are the trainer's (the ratio starts at exactly what the trainer computes), and their gap to
the sampler's is measured and gated; old, new and reference log-probs are all of logits / temperature. Whitening, the
mean over a batch's tokens, and a value head that is not yet right bias the gradient: `python -m lm certify`.
"""

import jax.numpy as jnp
import optax

from lm.core.errors import UserError, check_at_least
from lm.core.metrics import Metrics, mean, scalar_metric
from lm.core.types import Rollouts
from lm.losses.advantages import gae, kl_rewards, whiten
from lm.losses.policy import kl_k1
from lm.model import Model
from lm.optim.combinators import combined_loss, with_value_head
from lm.optim.update import Loss, Update
from lm.stages.pretraining.next_token import next_token_loss
from lm.stages.rl.policy_gradient import (
    METRIC_LIMITS,
    SHOWN_METRICS,
    START_METRICS,
    PolicyGradientMethod,
    ValueTerm,
    annotated_advantages,
    annotated_rollouts,
    clipped_objective,
    importance_corrected,
    policy_gradient_loss,
    rollout_update,
    summary,
)
from lm.stages.rl.rollouts import batches
from lm.stages.stage import Stage


def method(*, clip: float, dual_clip: float) -> PolicyGradientMethod:
    """Clipped surrogate of the advantages that `gae_annotation` gives, mean over all tokens."""
    return PolicyGradientMethod(
        advantages=annotated_advantages,
        token_loss=clipped_objective(clip, clip, dual_clip),
        average=mean,
        clip_range=(clip, clip),
    )


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    beta: float = 0.05,
    kl_target: float = 0.0,
    kl_gain: float = 0.1,
    clip: float = 0.2,
    dual_clip: float = 0.0,
    value_clip: float = 0.2,
    value_coefficient: float = 0.1,
    text_coefficient: float = 0.0,
    entropy_bonus: float = 0.0,
    importance_ratio_cap: float = 0.0,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten_advantages: bool = True,
    refresh_reference_every: int = 0,
    epochs: int = 2,
    minibatch_count: int = 4,
    microbatches: int = 1,
    temperature: float = 1.0,
) -> Update:
    """with_value_head(with_adaptive_kl(rollout_update(combined_loss(surrogate + value, text), gae_annotation))).

    `kl_target` > 0 (nats an answer) lets `beta` adapt to hold the KL there (see `with_adaptive_kl`); 0 keeps it fixed.
    `dual_clip` > 1 bounds what a bad answer can cost (losses.policy). `text_coefficient` > 0 adds the next-token loss
    on the batch's rows of text, which `data.corpus` brings: PPO-ptx, against forgetting (Ouyang et al. 2022, eq. 2,
    arXiv 2203.02155). What is not said here is as in `policy_gradient_update`.
    """
    check_at_least(
        0, "stage", importance_ratio_cap=importance_ratio_cap, kl_target=kl_target, text_coefficient=text_coefficient
    )
    loss = policy_gradient_loss(
        model,
        method(clip=clip, dual_clip=dual_clip),
        entropy_bonus=entropy_bonus,
        temperature=temperature,
        value=ValueTerm(value_clip, value_coefficient),
    )
    if text_coefficient:
        loss = combined_loss(ppo=(1.0, loss), text=(text_coefficient, text_loss(model)))
    update = rollout_update(
        loss,
        optimizer,
        gae_annotation(
            model,
            gamma=gamma,
            lam=lam,
            whiten_advantages=whiten_advantages,
            importance_ratio_cap=importance_ratio_cap,
            temperature=temperature,
        ),
        refresh_reference_every=refresh_reference_every,
        epochs=epochs,
        minibatch_count=minibatch_count,
        microbatches=microbatches,
    )
    controlled = with_adaptive_kl(update, beta=beta, target=kl_target, gain=kl_gain if kl_target else 0.0)
    return with_value_head(model.init_value_head, controlled)


def with_adaptive_kl(inner: Update, *, beta: float, target: float, gain: float) -> Update:
    """memory["beta"], the price of a nat of KL: times 1 + gain * clip((KL - target) / target, -0.2, 0.2) after a batch.

    Ziegler et al. 2019, sec. 2.2, arXiv 1909.08593. A gain of 0 keeps it.
    """

    def init(key, params, frozen):
        state = inner.init(key, params, frozen)
        return state.replace(memory={**state.memory, "beta": jnp.float32(beta)})

    def update(state, batch):
        state, metrics = inner.update(state, batch)
        now = state.memory["beta"]
        error = jnp.clip((metrics["kl"].value() - target) / (target or 1.0), -0.2, 0.2)
        return state.replace(memory={**state.memory, "beta": now * (1 + gain * error)}), metrics

    return inner._replace(init=init, update=update)


def gae_annotation(
    model: Model, *, gamma: float, lam: float, whiten_advantages: bool, importance_ratio_cap: float, temperature: float
):
    """Completes rollouts with old and reference log-probs, values, returns and advantages; notes metrics."""

    def annotate_rollouts(state, batch: Rollouts) -> tuple[Rollouts, Metrics]:
        batch, x, metrics = annotated_rollouts(model, state, batch, temperature=temperature)
        w, beta = batch.tokens.weights, state.memory["beta"]
        old_values = model.value(state.params["value"], x) * w
        kl = kl_k1(batch.old_logprobs, batch.ref_logprobs)
        rewards = kl_rewards(batch.rewards, kl, w, beta=beta, token_rewards=batch.token_rewards)
        advantages, returns = gae(rewards, old_values, w, gamma=gamma, lam=lam)
        if whiten_advantages:
            advantages = whiten(advantages, w)
        metrics |= {
            "beta": scalar_metric(beta),
            "explained_variance": scalar_metric(explained_variance(old_values, returns, w)),
        }
        batch = batch.replace(old_values=old_values, returns=returns, advantages=advantages)
        return importance_corrected(batch, importance_ratio_cap), metrics

    return annotate_rollouts


def explained_variance(predicted, returns, weights):
    """1 - Var(returns - predicted) / Var(returns) over the weighted tokens: a constant guess gives 0, the truth 1."""

    def variance(x):
        centre = mean(x, weights).value()
        return mean(jnp.square(x - centre), weights).value()

    return 1 - variance(returns - predicted) / jnp.maximum(variance(returns), 1e-8)


def text_loss(model: Model) -> Loss:
    """Pretraining's loss on the batch's rows of text."""
    objective = next_token_loss(model)

    def loss(params, frozen, batch: Rollouts, key):
        if batch.text_tokens is None:
            raise UserError("stage.text_coefficient needs text to learn from: set data.corpus, e.g. to stdlib")
        terms, metrics = objective(params, frozen, batch.text_tokens, key)
        return terms, {"text_loss": metrics["loss"]}

    return loss


PPO = Stage(
    __name__,
    make,
    batches,
    summary,
    shown_metrics=SHOWN_METRICS,
    metric_limits=METRIC_LIMITS,
    start_metrics=START_METRICS,
    samples_rollouts=True,
)

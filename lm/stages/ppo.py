"""PPO: sample answers, score them, and move the policy towards the better ones without losing the reference.

Objective: E[reward(x, y)] - beta * KL(policy, reference), through the clipped surrogate on advantages from GAE, with a
learned value head on the shared trunk. Reward of token t: -beta * log(p / p_ref), plus the answer's reward on its last
token: the KL is counted here and nowhere else. Frozen: "ref", the policy this run starts from. A batch is `Rollouts`,
drawn by the current policy inside `batches`; `make` annotates it once, then takes `epochs` x `minibatch_count` updates.
Schulman et al. 2017, arXiv 1707.06347; Ziegler et al. 2019, arXiv 1909.08593; details: Huang et al. 2024, 2403.17031.

Ours differs: old log-probs are the trainer's (the ratio starts at exactly what the trainer computes), and their gap to
the sampler's is measured and gated; old, new and reference log-probs are all of logits / temperature.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm.data import batches as rows_to_batches, chats, corpus as corpora
from lm.data.prompts import Prompts, fitting, take
from lm.errors import UserError, at_least
from lm.losses import clipped_surrogate, clipped_value, kl_k1, kl_k3, log_ratio
from lm.metrics import Metrics, mean, scalar, values
from lm.model import Model
from lm.returns import gae, kl_rewards, whiten
from lm.rewards import REWARDS, Reward, weighed
from lm.sample import check, joined, sample
from lm.stages.context import Batches, Context
from lm.types import Rollouts
from lm.update import Loss, Update, annotate, gradient, minibatches, reference, value_head

# Metrics a run must keep below; the loop stops above them. The sampler's and the trainer's log-probs of the same tokens
# differ by rounding only: 1e-5 in float32, about 1e-2 in bfloat16. More means two different distributions.
LIMITS = {"sampler_gap": 0.05}

SHOWN = ("reward", "score/rule", "kl", "entropy")  # in the live line
MODEL = "model"  # the name of the learnt reward among `rewards`
MODEL_ALONE: Mapping[str, float] = {MODEL: 1.0}
# Roles folded into the key, above every step: an update folds its step in, and no two draws may share a key.
ROLLOUT, HELD_OUT = 2**30, 2**30 + 1


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    beta: float = 0.05,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_coefficient: float = 0.1,
    gamma: float = 1.0,
    lam: float = 0.95,
    epochs: int = 2,
    minibatch_count: int = 4,
    microbatches: int = 1,
    temperature: float = 1.0,
) -> Update:
    """value_head(reference(annotate(signal, minibatches(gradient(surrogate + value)))))."""
    at_least(1, "stage", epochs=epochs, minibatch_count=minibatch_count)
    loss = surrogate(
        model, clip=clip, value_clip=value_clip, value_coefficient=value_coefficient, temperature=temperature
    )
    inner = minibatches(gradient(loss, optimizer, microbatches=microbatches), epochs=epochs, count=minibatch_count)
    annotated = annotate(signal(model, beta=beta, gamma=gamma, lam=lam, temperature=temperature), inner)
    return value_head(model.init_value, reference(annotated))


def signal(model: Model, *, beta: float, gamma: float, lam: float, temperature: float):
    """Completes rollouts with old and reference log-probs, values, returns and whitened advantages; notes metrics."""

    def annotate_rollouts(state, batch: Rollouts) -> tuple[Rollouts, Metrics]:
        tokens = batch.tokens
        w = tokens.weights
        x = model.hidden(state.params["lm"], tokens.inputs, tokens.positions, tokens.segments)
        scores = model.scores(state.params["lm"], x, tokens.targets, temperature=temperature)
        old = scores.logprobs * w
        old_values = model.value(state.params["value"], x) * w
        ref = model.token_logprobs(state.frozen["ref"], tokens, temperature=temperature) * w
        rewards = kl_rewards(batch.rewards, kl_k1(old, ref), w, beta=beta)
        advantages, returns = gae(rewards, old_values, w, gamma=gamma, lam=lam)
        batch = batch.replace(
            old_logprobs=old, ref_logprobs=ref, old_values=old_values, returns=returns, advantages=whiten(advantages, w)
        )
        rows = jnp.any(w > 0, axis=1).astype(jnp.float32)
        per_row = {
            "reward": batch.rewards,
            "kl": jnp.sum(kl_k1(old, ref), axis=1),
            "response_length": jnp.sum(w, axis=1),
            "stopped": batch.stopped.astype(jnp.float32),
            **batch.scores,
        }
        metrics = {name: mean(value, rows) for name, value in per_row.items()}
        metrics["kl_k3"] = mean(kl_k3(old, ref), w)
        metrics["entropy"] = mean(scores.entropy, w)
        metrics["explained_variance"] = scalar(explained_variance(old_values, returns, w))
        metrics["sampler_gap"] = mean(jnp.abs(old - batch.sampler_logprobs), w)
        return batch, metrics

    return annotate_rollouts


def explained_variance(predicted, returns, weights):
    """1 - Var(returns - predicted) / Var(returns) over the weighted tokens: a constant guess gives 0, the truth 1."""

    def variance(x):
        centre = mean(x, weights).value()
        return mean(jnp.square(x - centre), weights).value()

    return 1 - variance(returns - predicted) / jnp.maximum(variance(returns), 1e-8)


def surrogate(model: Model, *, clip: float, value_clip: float, value_coefficient: float, temperature: float) -> Loss:
    """Clipped surrogate plus value_coefficient * clipped value loss, both means over the batch's sampled tokens."""

    def loss(params, frozen, batch: Rollouts, key):
        tokens, w = batch.tokens, batch.tokens.weights
        x = model.hidden(params["lm"], tokens.inputs, tokens.positions, tokens.segments)
        logprobs = model.scores(params["lm"], x, tokens.targets, temperature=temperature).logprobs
        predicted = model.value(params["value"], x)
        policy = mean(clipped_surrogate(logprobs, batch.old_logprobs, batch.advantages, clip=clip), w)
        value = mean(clipped_value(predicted, batch.old_values, batch.returns, clip=value_clip), w)
        ratio = jnp.exp(log_ratio(logprobs, batch.old_logprobs))
        metrics = {
            "policy_loss": policy,
            "value_loss": value,
            "ratio": mean(ratio, w),
            "clip_fraction": mean((jnp.abs(ratio - 1) > clip).astype(jnp.float32), w),
            "update_kl": mean(kl_k3(batch.old_logprobs, logprobs), w),
        }
        return {"policy": policy, "value": value_coefficient * value}, metrics

    return loss


def batches(
    context: Context,
    *,
    reward_model: str,
    rewards: Mapping[str, float] = MODEL_ALONE,
    pessimism: float = 0.0,
    rater: str = "",
    sources: str = "chitchat",
    turns: int = 3,
    prompt_length: int = 64,
    max_new: int = 32,
    rollouts: int = 64,
    temperature: float = 1.0,
    cut_penalty: float = 1.0,
    held_out: float = 0.02,
    held_out_rollouts: int = 128,
) -> Batches:
    """Answers sampled by the current policy to prompts from `sources`, and what they are worth.

    The reward is a sum of `rewards`, by name and weight: "model" is the reward model of the workdir `reward_model` (of
    several, with commas between them: their mean less `pessimism` standard deviations), the others are lm.rewards';
    where there are several, each is logged as reward/NAME. `rater` names one that is logged as score/NAME but never
    learned from. An answer that the limit cut off loses `cut_penalty`. Prompts longer than `prompt_length` tokens are
    skipped and counted.
    """
    model, tokenizer = context.model, context.tokenizer
    check(model, prompt_length, max_new=max_new, temperature=temperature, top_k=0, top_p=1.0)
    if temperature == 0:
        raise UserError(
            "data.temperature is 0: greedy answers do not explore, and their log-probs are all 0; use e.g. 1.0"
        )
    if rater and rater not in REWARDS:
        raise UserError(f"data.rater is {rater!r}; choose one of {', '.join(REWARDS)}, or leave it empty")
    at_least(1, "data", turns=turns, rollouts=rollouts, held_out_rollouts=held_out_rollouts)
    worth = weighed(reward_parts(context, rewards, reward_model, pessimism))
    watched = weighed({rater: (0.0, REWARDS[rater])} if rater else {})
    run = context.jit(
        lambda lm, prompts, lengths, key: rollout(
            model, lm, prompts, lengths, key, max_new=max_new, temperature=temperature, stop=tokenizer.stops
        )
    )

    def drawn(state, chosen: Prompts, key) -> Rollouts:
        tokens, logprobs, completions = run(state.params["lm"], chosen.ids, chosen.lengths, key)
        texts = [
            tokenizer.decode(row[:n]) for row, n in zip(np.asarray(completions.tokens), np.asarray(completions.lengths))
        ]
        stopped = np.asarray(completions.stopped)
        total, parts = worth(chosen.contexts, texts)
        _, seen = watched(chosen.contexts, texts)
        scores = {f"reward/{name}": part for name, part in parts.items() if len(parts) > 1}
        scores |= {f"score/{name}": score for name, score in seen.items()}
        return Rollouts(tokens, np.float32(total - cut_penalty * ~stopped), scores, stopped, logprobs)

    train, unseen = corpora.split(chats.prompts(chats.conversations(sources), turns=turns), held_out)
    (train, skipped), (unseen, _) = (fitting(tokenizer, side, prompt_length) for side in (train, unseen))
    order = rows_to_batches.batches(np.arange(len(train.ids)), batch_size=rollouts, seed=context.seed)
    about = {
        "length": prompt_length + max_new - 1,
        "prompts": len(train.ids),
        "held_out_prompts": len(unseen.ids),
        "skipped": skipped,
    }

    def held_out_batches(state):
        for start in range(0, min(held_out_rollouts, len(unseen.ids)) - rollouts + 1, rollouts):
            key = jax.random.fold_in(jax.random.fold_in(state.key, HELD_OUT), start)
            yield drawn(state, take(unseen, np.arange(start, start + rollouts)), key)

    def train_batch(state, i):
        return drawn(state, take(train, order(i)), jax.random.fold_in(jax.random.fold_in(state.key, ROLLOUT), i))

    return Batches(train_batch, held_out_batches, about)


def reward_parts(
    context: Context, rewards: Mapping[str, float], reward_model: str, pessimism: float
) -> dict[str, tuple[float, Reward]]:
    """Weight and function of each reward whose weight is not 0. UserError for a name that is none."""
    for name in rewards:
        if name != MODEL and name not in REWARDS:
            raise UserError(f"data.rewards.{name} is no reward; choose among {MODEL}, {', '.join(REWARDS)}")
    if not any(rewards.values()):
        raise UserError(f"data.rewards gives no reward a weight: there is nothing to learn; set e.g. {MODEL} to 1.0")
    return {
        name: (weight, context.reward_from(reward_model, pessimism) if name == MODEL else REWARDS[name])
        for name, weight in rewards.items()
        if weight
    }


def rollout(model: Model, lm, prompts, lengths, key, **options):
    """Rows of prompt and answer (`Tokens`), the sampler's log-probs on them, and the bare completions."""
    completions = sample(model, lm, prompts, lengths, key, **options)
    return *joined(prompts, lengths, completions), completions


def summary(metrics: Metrics, about) -> dict[str, float]:
    """Held-out reward, the rater's own score, KL, entropy, length, fraction that ended by themselves."""
    return values(metrics)

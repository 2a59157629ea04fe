"""Reward modelling: learn a scalar taste from ranked answers.

Objective: the mean over pairs of -log sigmoid(r(x, chosen) - r(x, rejected)), the Bradley-Terry likelihood of the
verdicts. r is a linear head, zero at the start, on the state at the last real token of a decoder that starts as the SFT
model. Nothing is frozen. A batch is `Preferences`; all pairs of a prompt are in one batch, and each prompt counts once,
however many pairs its ranking gives. Both sides go through one forward pass.
Stiennon et al. 2020, arXiv 2009.01325; Ouyang et al. 2022, sec. 3.5, arXiv 2203.02155.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm.data import batches as rows_to_batches, corpus as corpora, rankings as records
from lm.errors import UserError, at_least
from lm.losses import bradley_terry
from lm.metrics import Metrics, mean, values
from lm.model import Model
from lm.rewards.model import answered, rows, scores
from lm.stages.context import Batches, Context
from lm.types import Preferences
from lm.update import Loss, Update, gradient, value_head

SHOWN = ("loss", "accuracy")  # in the live line
LIMITS: dict[str, float] = {}  # metrics the loop keeps below a bound


def make(model: Model, optimizer: optax.GradientTransformation, *, microbatches: int = 1) -> Update:
    """value_head(gradient(bradley_terry))."""
    return value_head(model.init_value, gradient(pairwise(model), optimizer, microbatches=microbatches))


def pairwise(model: Model) -> Loss:
    def loss(params, frozen, batch: Preferences, key):
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch.chosen, batch.rejected)
        chosen, rejected = jnp.split(scores(model, params, both), 2)
        # A pair's rows carry its weight on their last real token: 1 / pairs of its prompt, 0 where the batch is padded.
        weight = jnp.sum(batch.chosen.weights, axis=1)
        loss = mean(bradley_terry(chosen, rejected), weight)
        each, lengths = jnp.concatenate([chosen, rejected]), jnp.sum(both.segments > 0, axis=1).astype(jnp.float32)
        real = (lengths > 0).astype(jnp.float32)
        metrics = {
            "loss": loss,
            "accuracy": mean((chosen > rejected) + 0.5 * (chosen == rejected), weight),
            "margin": mean(chosen - rejected, weight),
            "pairs": mean(jnp.ones_like(weight), (weight > 0).astype(jnp.float32)),
        }
        moments = {
            "score": each,
            "score_2": each**2,
            "length": lengths,
            "length_2": lengths**2,
            "score_length": each * lengths,
        }
        return loss, metrics | {name: mean(x, real) for name, x in moments.items()}

    return loss


def batches(
    context: Context, *, rankings: str, length: int = 128, prompts_per_batch: int = 32, held_out: float = 0.15
) -> Batches:
    """Pairs from a file of rankings (see data.rankings), split by prompt; ties give no pair.

    Rows hold `length` tokens. The file is what human raters, raters by rule and judges alike write.
    """
    context.admit(length)
    at_least(1, "data", prompts_per_batch=prompts_per_batch)
    ranked = [r for r in records.read(rankings) if records.pairs(r)]
    if not ranked:
        raise UserError(f"{rankings}: no ranking prefers one answer to another; rank more answers, or less alike ones")
    train, unseen = corpora.split(ranked, held_out)
    most = max(len(records.pairs(r)) for r in ranked)
    (train_groups, train_pairs), (unseen_groups, unseen_pairs) = (
        groups(context.tokenizer, side, length, most) for side in (train, unseen)
    )
    batch = rows_to_batches.batches(train_groups, batch_size=prompts_per_batch, seed=context.seed)
    about = {
        "length": length,
        "prompts": len(train),
        "pairs": train_pairs,
        "held_out_prompts": len(unseen),
        "held_out_pairs": unseen_pairs,
    }
    return Batches(
        lambda state, i: flat(batch(i)),
        lambda state: map(flat, rows_to_batches.every(unseen_groups, prompts_per_batch)),
        about,
    )


def groups(tokenizer, ranked, length: int, most: int) -> tuple[Preferences, int]:
    """Preferences of leaves [prompts, most pairs of a prompt, length], short groups padded, and the number of pairs."""
    sides: tuple[list, list] = ([], [])
    slots, weights = [], []
    for g, ranking in enumerate(ranked):
        found = records.pairs(ranking)
        for p, pair in enumerate(found):
            for side, answer in zip(sides, pair):
                side.append(answered(ranking.prompt, ranking.responses[answer]))
            slots.append(g * most + p)
            weights.append(1 / len(found))

    def grouped(side):
        tokens = rows(tokenizer, side, length)
        last = np.maximum((tokens.segments > 0).sum(axis=1) - 1, 0)
        tokens.weights[np.arange(len(side)), last] = weights

        def place(x):
            out = np.zeros((len(ranked) * most, *x.shape[1:]), x.dtype)
            out[slots] = x
            return out.reshape(len(ranked), most, *x.shape[1:])

        return jax.tree.map(place, tokens)

    return Preferences(grouped(sides[0]), grouped(sides[1])), len(slots)


def flat(grouped: Preferences) -> Preferences:
    """Leaves [prompts, pairs, T] as [prompts * pairs, T]."""
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), grouped)


def summary(metrics: Metrics, about) -> dict[str, float]:
    """Held-out accuracy with its standard error, the scores' mean and deviation, their correlation with length.

    The standard error counts prompts, not pairs: pairs of one prompt are not independent.
    """
    found = values(metrics)
    accuracy, prompts = found["accuracy"], about["held_out_prompts"]
    deviation = math.sqrt(max(found["score_2"] - found["score"] ** 2, 1e-12))
    spread = math.sqrt(max(found["length_2"] - found["length"] ** 2, 1e-12))
    return {
        "loss": found["loss"],
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / prompts),
        "margin": found["margin"],
        "score_mean": found["score"],
        "score_deviation": deviation,
        "length_correlation": (found["score_length"] - found["score"] * found["length"]) / (deviation * spread),
        "pairs": float(metrics["pairs"].weight),
    }

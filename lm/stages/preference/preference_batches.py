"""Offline preferences: the batches, log-probs and measures that all ways of learning a policy from verdicts share.

The answers of a verdict are given, not sampled. All of a prompt's go through one forward pass, all their decided pairs
are compared, and each prompt counts once, however many pairs its ranking gives: as in stage reward, and from the same
verdicts, of which the same prompts are held out.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from lm.core.errors import check_at_least
from lm.core.metrics import Mean, Metrics, metric_values
from lm.core.types import Array, Params, RankedAnswers, Tokens
from lm.data import tokenized_rankings
from lm.data.loading import NO_COLUMNS
from lm.data.preferences import OVERALL_AXIS
from lm.data.tokenized_rankings import TokenizedRanking
from lm.losses.ranking import preference_mask
from lm.model import Model
from lm.stages.context import Batches, StageContext
from lm.stages.reward_model.ranking_batches import batches_of_rankings, mean_over_prompts, pair_accuracy


def answer_logprobs(model: Model, lm: Params, tokens: Tokens, *, temperature: float = 1.0) -> Array:
    """f32[...]: log p of each answer, summed over its own tokens and its end token; leaves of `tokens` are [...,T]."""
    *lead, T = tokens.inputs.shape
    rows = jax.tree.map(lambda x: x.reshape(-1, T), tokens)
    logprobs = model.token_logprobs(lm, rows, temperature=temperature)
    return jnp.sum(jnp.where(rows.weights > 0, logprobs * rows.weights, 0.0), axis=1).reshape(lead)


def answer_lengths(tokens: Tokens) -> Array:
    """f32[...]: how many tokens `answer_logprobs` sums up; 1 where there is no answer, so that one may divide by it."""
    return jnp.maximum(jnp.sum(tokens.weights, axis=-1), 1.0)


def mean_over_pairs(loss: Callable[[Array, Array], Array], x: Array, ranks: Array) -> Mean:
    """The mean over prompts of the mean of loss(x_i, x_j) over the pairs in which answer i is preferred to answer j.

    x f32[P,K]; `loss` is elementwise. Its weight is the number of prompts that decide a pair.
    """
    return mean_over_prompts(loss(x[:, :, None], x[:, None, :]), overall_preference_mask(ranks))


def overall_preference_mask(ranks: Array) -> Array:
    """f32[P,K,K] from ranks i32[P,K,A]: 1 where answer i is preferred to answer j overall."""
    return preference_mask(ranks[..., 0]).astype(jnp.float32)


def preference_metrics(loss: Mean, rewards: Array, logprobs: Array, ranks: Array) -> Metrics:
    """What every method here is watched by, over the decided pairs: rewards and logprobs are f32[P,K] of each answer.

    A rising margin with a falling `chosen_logprob` is a policy that leaves both answers (Pal et al. 2024, sec. 3,
    arXiv 2402.13228).
    """
    counted = overall_preference_mask(ranks)
    of_chosen = lambda x: mean_over_prompts(x[:, :, None], counted)
    of_rejected = lambda x: mean_over_prompts(x[:, None, :], counted)
    lead = rewards[:, :, None] - rewards[:, None, :]
    return {
        "loss": loss,
        "accuracy": mean_over_prompts(pair_accuracy(lead), counted),
        "margin": mean_over_prompts(lead, counted),
        "reward_chosen": of_chosen(rewards),
        "reward_rejected": of_rejected(rewards),
        "chosen_logprob": of_chosen(logprobs),
        "rejected_logprob": of_rejected(logprobs),
    }


def batches(
    context: StageContext,
    group: Callable[[Sequence[TokenizedRanking], int, int], RankedAnswers] = tokenized_rankings.ranked_answers_batch,
    axes: Sequence[str] = (OVERALL_AXIS,),
    /,
    *,
    rankings: str,
    columns: Mapping[str, str] = NO_COLUMNS,
    skip_bad_rows: int = 0,
    length: int = 128,
    prompts_per_batch: int = 32,
    held_out: float = 0.15,
    limit: int = 0,
) -> Batches:
    """Ranked answers, split by prompt as in stage reward and laid out by `group`, `length` tokens a row.

    `rankings` is a file of preferences in a format of lm.data.formats, a database of `lm rank`, or "chitchat" (see
    lm.data.loading, also for `columns` and `skip_bad_rows`). A verdict that prefers an answer to one of the same tokens
    is dropped and counted as equal; a prompt loses its beginning where its answer would not fit a row, and an answer
    that is longer than a row is skipped: both are counted; an empty answer, counted too, is its end token. `limit` > 0
    trains on that many verdicts only.
    """
    context.check_length(length)
    check_at_least(1, "data", prompts_per_batch=prompts_per_batch)
    check_at_least(0, "data", limit=limit)
    return batches_of_rankings(
        context,
        lambda side: tokenized_rankings.tokenized_rankings(
            context.tokenizer, side, length + 1, axes=axes, cut="prompt"
        ),
        group,
        axes=axes,
        rankings=rankings,
        columns=columns,
        skip_bad_rows=skip_bad_rows,
        length=length,
        prompts_per_batch=prompts_per_batch,
        held_out=held_out,
        limit=limit,
        truncation=f"of a conversation longer than {length + 1} tokens the prompt loses its beginning, and the "
        "answer is left out if it is longer by itself",
    )


def summary(metrics: Metrics, about) -> dict[str, float]:
    """Held-out metrics, the accuracy with its standard error, which counts prompts: a prompt's pairs are not
    independent."""
    values = metric_values(metrics)
    accuracy = values["accuracy"]
    return {**values, "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / about["held_out_prompts"])}

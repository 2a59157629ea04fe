"""Ranked answers: the batches, the heads and the measures that every way of learning a reward model shares."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm.core.errors import UserError, check_at_least
from lm.core.metrics import Mean, Metrics, mean, metric_values
from lm.core.types import Array, RankedAnswers, Tokens
from lm.data.batches import batch_function, drawn_rows, sequential_batches
from lm.data.loading import NO_COLUMNS, load_counted_rankings
from lm.data.origins import RowOrigin, SegmentOrigin, drawn_origins
from lm.data.preferences import LABEL_AXIS, OVERALL_AXIS, OVERALL_ONLY, Ranking, ordered_axes, preference_pairs
from lm.data.ratings import BUILT_IN_RANKINGS
from lm.data.sources import split_held_out
from lm.data.tokenized_rankings import TokenizedRanking, ranked_answers_batch, tokenized_rankings
from lm.data.truncation import nothing_left_error
from lm.losses.ranking import preference_mask
from lm.model import Model
from lm.optim.combinators import decoder_gradient, with_value_head
from lm.optim.update import Loss, Update
from lm.rewards.reward_model import reward_row, reward_scores
from lm.stages.context import Batches, StageContext
from lm.tokenizer import Tokenizer

MARGIN_BINS = (1, 2, 3)  # ranks between two answers, the last one and more: accuracy by the rater's margin
CONFIDENCE_BINS = (0.5, 0.6, 0.7, 0.8, 0.9)  # of the calibration's bins: what the model gives the answer it prefers

# (scores f32[P,K], ranks i32[P,K]) -> loss f32[P], the mean over what the rater decided there
RankingObjective = Callable[[Array, Array], Array]


def reward_model_update(
    model: Model,
    optimizer: optax.GradientTransformation,
    objective: RankingObjective,
    *,
    axes: Mapping[str, float],
    centring_coefficient: float,
    microbatches: int,
) -> Update:
    """with_value_head(gradient(objective of every axis + centring)), which also measures itself on held-out batches."""
    axes = ordered_axes(axes)
    loss = ranking_loss(model, objective, axes=axes, centring_coefficient=centring_coefficient)
    update = with_value_head(
        lambda key: scalar_heads(model, key, len(axes)), decoder_gradient(loss, optimizer, microbatches=microbatches)
    )

    def evaluate(state, batch: RankedAnswers) -> Metrics:
        total = answer_scores(model, state.params, batch.tokens) @ jnp.array(list(axes.values()))
        return {**update.evaluate(state, batch), **reward_model_metrics(total, batch)}

    return update._replace(evaluate=evaluate)


def scalar_heads(model: Model, key: Array, count: int):
    """The scalar head once for each axis, all zero: score f32[D,A], offset f32[A]."""
    return jax.tree.map(lambda x: jnp.zeros((*x.shape, count)), model.init_value_head(key))


def answer_scores(model: Model, params, tokens: Tokens) -> Array:
    """f32[P,K,A] of answers whose leaves are [P,K,T]."""
    P, K, T = tokens.inputs.shape
    scores = reward_scores(model, params, jax.tree.map(lambda x: x.reshape(P * K, T), tokens))
    return scores.reshape(P, K, -1)


def ranking_loss(
    model: Model, objective: RankingObjective, *, axes: Iterable[str], centring_coefficient: float
) -> Loss:
    """The sum of each axis' objective, a mean over the prompts that it decides, plus `centring_coefficient` times the
    mean of (r_i + r_j)^2 over the compared pairs, which keeps scores near 0 (Eisenstein et al. 2023, arXiv
    2312.09244)."""

    def loss(params, frozen, batch: RankedAnswers, key):
        # A difference cannot see the offset: left in, rounding alone would move it. Centring does see it.
        head = params["value"]
        bare = {**params, "value": {**head, "offset": jnp.zeros_like(head["offset"])}}
        scores = answer_scores(model, bare, batch.tokens)
        terms, metrics = {}, {}
        for a, axis in enumerate(axes):
            s, ranks = scores[..., a], batch.ranks[..., a]
            better = preference_mask(ranks).astype(jnp.float32)
            decided = jnp.any(better > 0, axis=(1, 2)).astype(jnp.float32)
            lead = s[:, :, None] - s[:, None, :]
            both = s[:, :, None] + s[:, None, :] + 2 * head["offset"][a]
            ordered = mean(objective(s, ranks), decided)
            terms[axis] = ordered
            terms[f"{axis} centring"] = centring_coefficient * mean_over_prompts(jnp.square(both), better)
            name = "" if axis == OVERALL_AXIS else f"/{axis}"
            metrics |= {
                f"loss{name}": ordered,
                f"accuracy{name}": mean_over_prompts(pair_accuracy(lead), better),
                f"margin{name}": mean_over_prompts(lead, better),
            }
        return terms, metrics

    return loss


def mean_over_prompts(x: Array, better: Array) -> Mean:
    """The mean over prompts of the mean of x f32[P,K,K] over the pairs that count, f32[P,K,K] 1 or 0."""
    pairs = jnp.sum(better, axis=(1, 2))
    return mean(jnp.sum(x * better, axis=(1, 2)) / jnp.maximum(pairs, 1), (pairs > 0).astype(jnp.float32))


def pair_accuracy(lead: Array) -> Array:
    """1 where the preferred answer leads, one half where neither does."""
    return (lead > 0) + 0.5 * (lead == 0)


def reward_model_metrics(total: Array, batch: RankedAnswers) -> Metrics:
    """What is worth knowing of total scores f32[P,K]: accuracy by the rater's margin, calibration, moments, and how
    often the longer answer is the better one."""
    ranks = batch.ranks[..., 0]
    lead = total[:, :, None] - total[:, None, :]
    better = preference_mask(ranks).astype(jnp.float32)
    apart = jnp.minimum(ranks[:, None, :] - ranks[:, :, None], MARGIN_BINS[-1])
    measured = {f"margin_accuracy/{n}": mean(pair_accuracy(lead), better * (apart == n)) for n in MARGIN_BINS}
    sure = jax.nn.sigmoid(jnp.abs(lead))
    for low, high in zip(CONFIDENCE_BINS, (*CONFIDENCE_BINS[1:], math.inf)):
        inside = better * (sure >= low) * (sure < high)
        measured |= {
            f"confidence/{low}": mean(sure, inside),
            f"confidence_accuracy/{low}": mean(pair_accuracy(lead), inside),
        }
    lengths = jnp.sum(batch.tokens.segments > 0, axis=-1).astype(jnp.float32)
    measured["longer_preferred"] = mean_over_prompts(pair_accuracy(lengths[:, :, None] - lengths[:, None, :]), better)
    has_answer = (lengths > 0).astype(jnp.float32)
    moments = {
        "score": total,
        "score_2": total**2,
        "length": lengths,
        "length_2": lengths**2,
        "score_length": total * lengths,
    }
    return measured | {name: mean(x, has_answer) for name, x in moments.items()}


def batches(
    context: StageContext,
    *,
    rankings: str,
    columns: Mapping[str, str] = NO_COLUMNS,
    skip_bad_rows: int = 0,
    axes: Mapping[str, float] = OVERALL_ONLY,
    length: int = 128,
    prompts_per_batch: int = 32,
    held_out: float = 0.15,
    limit: int = 0,
) -> Batches:
    """Ranked answers, split by prompt (by rater where the data name him), `length` tokens a row.

    `rankings` is a file of preferences in a format of lm.data.formats, a database of `lm rank`, or "chitchat" (see
    lm.data.loading, also for `columns` and `skip_bad_rows`). `axes` names what is learned, "overall" among them, and
    the weight of each in the total score; one of weight 0 still shapes the trunk. All answers of a ranking are in one
    batch. `limit` > 0 trains on that many rankings only. Longer answers are cut as lm.data.truncation says; a ranking
    of answers of the same tokens is left out. Both are counted.
    """
    context.check_length(length)
    check_at_least(1, "data", prompts_per_batch=prompts_per_batch)
    check_at_least(0, "data", limit=limit)
    axes = ordered_axes(axes)
    return batches_of_rankings(
        context,
        lambda side: reward_model_rows(context.tokenizer, side, tuple(axes), length),
        ranked_answers_batch,
        axes=axes,
        rankings=rankings,
        columns=columns,
        skip_bad_rows=skip_bad_rows,
        length=length,
        prompts_per_batch=prompts_per_batch,
        held_out=held_out,
        limit=limit,
        truncation=f"of a conversation longer than {length} tokens the prompt loses its beginning, down to half a row, "
        "then the answer what stands before its end token",
    )


def batches_of_rankings(
    context: StageContext,
    laid_out: Callable[[Sequence[Ranking]], tuple[list[TokenizedRanking], dict[str, int]]],
    group: Callable[[Sequence[TokenizedRanking], int, int], RankedAnswers],
    *,
    axes: Iterable[str],
    rankings: str,
    columns: Mapping[str, str],
    skip_bad_rows: int,
    length: int,
    prompts_per_batch: int,
    held_out: float,
    limit: int,
    truncation: str,
) -> Batches:
    """The batches of all stages that learn from `rankings`, split, laid out and grouped into rows.

    truncation: what `laid_out` does with what does not fit a row, in words.
    """
    ranked, aside, loaded = split_rankings(
        rankings, held_out, columns=columns, skip_bad_rows=skip_bad_rows, labels=LABEL_AXIS in axes
    )
    (train, counts), (unseen, more) = laid_out(ranking_subset(ranked, limit, context.seed)), laid_out(aside)
    counts = {name: count + more[name] for name, count in counts.items()}
    for side, name in ((train, "to learn from"), (unseen, "held out")):
        if not side:
            raise nothing_left_error(
                f"{rankings}: no verdict is left {name}",
                counts,
                things="answers",
                limit=f"data.length {length}",
                way="raise data.length, or rank other answers",
            )
    scored = {OVERALL_AXIS, LABEL_AXIS}.union(*(verdict.ranking.axes for verdict in train))
    missing = [axis for axis in axes if axis not in scored]
    if missing:
        raise UserError(f"{rankings}: no verdict scores the axis {missing[0]!r} of data.axes: leave it out")
    most = max(len(verdict.rows) for verdict in [*train, *unseen])
    train_rows, unseen_rows = (group(side, length, most) for side in (train, unseen))
    batch = batch_function(train_rows, batch_size=prompts_per_batch, seed=context.seed)
    about = {
        "length": length,
        "prompts": len(train),
        "pairs": sum(verdict.pair_count() for verdict in train),
        "held_out_prompts": len(unseen),
        "held_out_pairs": sum(verdict.pair_count() for verdict in unseen),
        **loaded,
        **counts,
        "undecided": loaded["undecided"] + counts["undecided"],
    }
    held_out_batches = lambda state: sequential_batches(unseen_rows, prompts_per_batch)
    drawn = drawn_rows(len(train), batch_size=prompts_per_batch, seed=context.seed)

    def origins(state, batch, i: int) -> list[RowOrigin]:
        segment = lambda k: SegmentOrigin(train[k].ranking.name, rankings, document=k)
        return drawn_origins(drawn(i), [[k] for k in range(len(train))], segment)

    return Batches(
        lambda state, i: batch(i), held_out_batches, about, row_origins=origins, truncation=f"{rankings}: {truncation}"
    )


def split_rankings(
    rankings: str,
    held_out: float,
    *,
    columns: Mapping[str, str] = NO_COLUMNS,
    skip_bad_rows: int = 0,
    labels: bool = False,
) -> tuple[list[Ranking], list[Ranking], dict[str, int]]:
    """The verdicts to learn from, the held-out ones, and counts: "undecided" ones are left out; lm.data.loading's.

    labels: an answer that is labelled good or bad by itself decides, too.
    """
    everything, counts = load_counted_rankings(rankings, columns=columns, skip_bad_rows=skip_bad_rows)
    ranked = [r for r in everything if preference_pairs(r) or labels and LABEL_AXIS in r.axes]
    if not ranked and any(LABEL_AXIS in r.axes for r in everything):
        raise UserError(f"{rankings} holds answers that are good or bad by themselves, and no pairs: take stage kto")
    if not ranked:
        raise UserError(f"{rankings}: no ranking prefers one answer to another; rank more answers, or less alike ones")
    content = "name" if rankings in BUILT_IN_RANKINGS else "content"  # the same opener is given to many raters
    counts = {**counts, "undecided": len(everything) - len(ranked)}
    return *split_held_out(ranked, held_out, attrgetter(content)), counts


def ranking_subset(rankings: Sequence[Ranking], limit: int, seed: int) -> list[Ranking]:
    """`limit` of the verdicts, drawn by the seed and left in their order; 0: all of them."""
    order = np.random.default_rng(seed).permutation(len(rankings))[: limit or None]
    return [rankings[i] for i in sorted(order)]


def reward_model_rows(
    tokenizer: Tokenizer, rankings: Sequence[Ranking], axes: Sequence[str], length: int
) -> tuple[list[TokenizedRanking], dict[str, int]]:
    """The verdicts that can be learned from, their answers as a reward model reads them, and what is left out."""
    tokenized, counts = tokenized_rankings(tokenizer, rankings, length, axes=axes, cut="answer", trained=False)
    rows = [[reward_row(tokenizer, row) for row in verdict.rows] for verdict in tokenized]
    return [verdict._replace(rows=own) for verdict, own in zip(tokenized, rows)], counts


def summary(metrics: Metrics, about) -> dict[str, float]:
    """Held-out accuracy with its standard error, by margin and by axis; calibration; the total score's mean and
    deviation, its correlation with length.

    The standard error counts prompts, not pairs: pairs of one prompt are not independent. What was never seen (a bin
    without pairs) is left out.
    """
    counted = {name: m for name, m in metrics.items() if float(m.weight) > 0}
    values = metric_values(counted)
    moments = {name: values.pop(name) for name in ("score", "score_2", "length", "length_2", "score_length")}
    deviation = math.sqrt(max(moments["score_2"] - moments["score"] ** 2, 1e-12))
    spread = math.sqrt(max(moments["length_2"] - moments["length"] ** 2, 1e-12))
    accuracy, prompts = values["accuracy"], about["held_out_prompts"]
    covariance = moments["score_length"] - moments["score"] * moments["length"]
    return {
        **values,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / prompts),
        "calibration_error": calibration_error(counted),
        "score_mean": moments["score"],
        "score_deviation": deviation,
        "length_correlation": covariance / (deviation * spread),
    }


def calibration_error(metrics: Mapping[str, Mean]) -> float:
    """Mean over pairs of |what was said - how often it was true|, bin by bin (Guo et al. 2017, arXiv 1706.04599)."""
    bins = [low for low in CONFIDENCE_BINS if f"confidence/{low}" in metrics]
    weights = [float(metrics[f"confidence/{low}"].weight) for low in bins]
    gaps = [
        abs(float(metrics[f"confidence/{low}"].value() - metrics[f"confidence_accuracy/{low}"].value())) for low in bins
    ]
    return float(np.average(gaps, weights=weights))

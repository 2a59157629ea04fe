"""KTO: learn a policy from answers that are each good or bad by themselves, as people value gains and losses.

Objective: the mean over labelled answers of lambda_D (1 - sigmoid(beta (r - z))) for a desirable one and lambda_U (1 -
sigmoid(beta (z - r))) for an undesirable one, where r = log(p(y|x) / p_ref(y|x)) is summed over the answer's tokens and
z is the reference point, an estimate of KL(p, p_ref): max(0, the batch's mean of r of answers to other prompts). A gain
or loss far from z saturates: what is hopeless or settled pulls no more. Frozen: "ref", the policy this run starts from.
A batch is `RankedAnswers` with `mismatched_tokens`; z is computed once for a whole batch, without gradient, and stored
with each prompt, so that microbatches do not change it. Ethayarajh et al. 2024, eq. 8, arXiv 2402.01306.

Ours differs: where rows bring no labels, they are read off rankings (desirable: it beats more answers than beat it;
undesirable: the reverse; neither: unlabelled), and the mismatched answers are fixed when data are prepared, where the
paper shifts the answers within each microbatch. While the policy finds those less likely than its reference does, z is
0, as it is after a few steps of experiments/kto.py.
"""

import functools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import optax

from lm.core.errors import UserError
from lm.core.metrics import Metrics, mean, scalar_metric
from lm.core.types import Array, RankedAnswers
from lm.data.conversations import conversation_with_answer
from lm.data.loading import NO_COLUMNS
from lm.data.packing import padded_rows
from lm.data.preferences import LABEL_AXIS, OVERALL_AXIS
from lm.data.tokenized_rankings import TokenizedRanking, ranked_answers_batch
from lm.data.truncation import EMPTY_ROW, truncated_rows
from lm.losses.preference import kto_loss
from lm.losses.ranking import preference_mask
from lm.model import Model
from lm.optim.combinators import annotate, decoder_gradient, refreshed_reference
from lm.optim.update import Update
from lm.stages.context import Batches, StageContext
from lm.stages.preference import preference_batches
from lm.stages.preference.preference_batches import answer_logprobs, preference_metrics, summary
from lm.stages.reward_model.ranking_batches import pair_accuracy
from lm.stages.stage import Stage
from lm.tokenizer import TokenizedExample, Tokenizer, encode_chats


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    refresh_reference_every: int = 0,
    microbatches: int = 1,
) -> Update:
    """refreshed_reference(annotate(baseline, gradient(kto))).

    The weights are lambda_D and lambda_U: where one label is rarer, raise its weight until both count about alike.
    refresh_reference_every: updates after which the reference becomes a copy of the policy; 0: never.
    """
    each = functools.partial(
        kto_loss, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )

    def loss(params, frozen, batch: RankedAnswers, key):
        logprobs = answer_logprobs(model, params["lm"], batch.tokens)
        ratios = logprobs - answer_logprobs(model, frozen["ref"], batch.tokens)
        desirable, undesirable = desirability_labels(batch.ranks)
        labelled = (desirable | undesirable).astype(jnp.float32)
        value = mean(each(ratios, batch.baseline[:, None], desirable), labelled)
        paired = preference_metrics(value, beta * ratios, logprobs, batch.ranks)
        lead = beta * (ratios - batch.baseline[:, None])
        single = single_answer_metrics(beta * ratios, lead, logprobs, batch.ranks)
        return value, {name: paired[name] + single[name] if name in single else paired[name] for name in paired}

    inner = decoder_gradient(loss, optimizer, microbatches=microbatches)
    return refreshed_reference(
        annotate(functools.partial(with_reference_point, model), inner), every=refresh_reference_every
    )


def with_reference_point(model: Model, state, batch: RankedAnswers) -> tuple[RankedAnswers, Metrics]:
    """The batch with z = max(0, mean log(p / p_ref) of its mismatched answers) as the baseline of every prompt."""
    tokens = batch.mismatched_tokens
    ratios = answer_logprobs(model, state.params["lm"], tokens) - answer_logprobs(model, state.frozen["ref"], tokens)
    has_answer = jnp.any(tokens.weights > 0, axis=1).astype(jnp.float32)
    z = jnp.maximum(mean(ratios, has_answer).value(), 0.0)
    return batch.replace(mismatched_tokens=None, baseline=jnp.broadcast_to(z, has_answer.shape)), {
        "baseline": scalar_metric(z)
    }


def desirability_labels(ranks: Array) -> tuple[Array, Array]:
    """bool[P,K] twice, from ranks i32[P,K,A]: which answers are desirable, and which are undesirable.

    The second axis, where there is one, is the label of an answer by itself, 0 where it has none; there, and without
    that axis, the ranks decide.
    """
    better = preference_mask(ranks[..., 0]).astype(jnp.int32)
    wins, losses = jnp.sum(better, axis=2), jnp.sum(better, axis=1)
    if ranks.shape[-1] == 1:
        return wins > losses, wins < losses
    label = ranks[..., 1]
    return jnp.where(label > 0, label == 1, wins > losses), jnp.where(label > 0, label > 1, wins < losses)


def single_answer_metrics(rewards: Array, lead: Array, logprobs: Array, ranks: Array) -> Metrics:
    """What preference_metrics tells of pairs, of labelled answers that no other answer is compared with, f32[P,K] each.

    `lead` is the reward less the reference point's: an answer is told right, accuracy 1, if that is above 0 for a
    desirable one and below for an undesirable one; its margin is how far.
    """
    compared = preference_mask(ranks[..., 0])
    alone = ~jnp.any(compared | jnp.swapaxes(compared, 1, 2), axis=2)
    desirable, undesirable = desirability_labels(ranks)
    good, bad = ((alone & label).astype(jnp.float32) for label in (desirable, undesirable))
    right = jnp.where(desirable, lead, -lead)
    return {
        "accuracy": mean(pair_accuracy(right), good + bad),
        "margin": mean(right, good + bad),
        "reward_chosen": mean(rewards, good),
        "reward_rejected": mean(rewards, bad),
        "chosen_logprob": mean(logprobs, good),
        "rejected_logprob": mean(logprobs, bad),
    }


def batches(
    context: StageContext,
    *,
    rankings: str,
    columns: Mapping[str, str] = NO_COLUMNS,
    skip_bad_rows: int = 0,
    length: int = 128,
    prompts_per_batch: int = 32,
    held_out: float = 0.15,
    limit: int = 0,
) -> Batches:
    """Those of stages.preference, each prompt also with an answer to another prompt."""
    return preference_batches.batches(
        context,
        functools.partial(batch_with_mismatched, context.tokenizer),
        (OVERALL_AXIS, LABEL_AXIS),
        rankings=rankings,
        columns=columns,
        skip_bad_rows=skip_bad_rows,
        length=length,
        prompts_per_batch=prompts_per_batch,
        held_out=held_out,
        limit=limit,
    )


def batch_with_mismatched(
    tokenizer: Tokenizer, verdicts: Sequence[TokenizedRanking], length: int, most: int
) -> RankedAnswers:
    """`ranked_answers_batch`, and for each prompt a row of it with an answer to another one. UserError if there is
    none."""
    rows = [mismatched_example(tokenizer, verdicts, i, length) for i in range(len(verdicts))]
    if all(row is EMPTY_ROW for row in rows):
        raise UserError(
            f"of {len(verdicts)} verdicts no prompt takes an answer to another one within data.length {length}: KTO's "
            "baseline needs some; rank different prompts, or raise data.length or data.held_out"
        )
    batch = ranked_answers_batch(verdicts, length, most)
    ranks = batch.ranks if batch.ranks[..., 1:].any() else batch.ranks[..., :1]  # no axis for labels that are not there
    return batch.replace(ranks=ranks, mismatched_tokens=padded_rows(rows, length))


def mismatched_example(
    tokenizer: Tokenizer, verdicts: Sequence[TokenizedRanking], i: int, length: int
) -> TokenizedExample:
    """Prompt i with an answer of the next verdict, in a circle, that is on another prompt and fits a row with it; if
    none does, of the next that leaves room for an end of prompt i."""
    ranking, cut = verdicts[i].ranking, EMPTY_ROW
    for k in range(1, len(verdicts)):
        other = verdicts[(i + k) % len(verdicts)].ranking
        text = other.responses[i % len(other.responses)]  # the first, the second, ... in turn: good and bad ones
        if other.content != ranking.content:
            encoded = encode_chats(tokenizer, [conversation_with_answer(ranking.prompt, text)], last=True)
            fit = truncated_rows(encoded, length + 1, cut="prompt", start=tokenizer.start_ids)
            if fit.kept and not fit.counts["shortened"]:
                return fit.kept[0]
            cut = fit.kept[0] if fit.kept and cut is EMPTY_ROW else cut
    return cut


KTO = Stage(
    __name__,
    make,
    batches,
    summary,
    shown_metrics=("loss", "accuracy", "baseline"),
    start_metrics={"margin": (0.0, 1e-3)},
)

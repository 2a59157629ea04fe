"""KTO: learn a policy from answers that are each good or bad by themselves, as people value gains and losses.

Objective: the mean over labelled answers of lambda_D (1 - sigmoid(beta (r - z))) for a desirable one and
lambda_U (1 - sigmoid(beta (z - r))) for an undesirable one, where r = log(p(y|x) / p_ref(y|x)) is summed over the
answer's tokens and z is the reference point, an estimate of KL(p, p_ref): max(0, the batch's mean of r of answers to
other prompts). A gain or loss far from z saturates: what is hopeless or settled pulls no more. Frozen: "ref", the
policy this run starts from. A batch is `Ranked` with `mismatched` rows; z is computed once for a whole batch, without
gradient, and stored with each prompt, so that microbatches do not change it.
Ethayarajh et al. 2024, eq. 8, arXiv 2402.01306.

Ours differs: labels are read off rankings (desirable: it beats more answers than beat it; undesirable: the reverse;
neither: unlabelled), and the mismatched answers are fixed when data are prepared, where the paper shifts the answers
within each microbatch. While the policy finds those less likely than its reference does, z is 0, as it is after a few
steps of experiments/kto.py.
"""

import functools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import optax

from lm.data.chats import answered
from lm.data.rows import pad
from lm.data.truncation import NOTHING, fitted
from lm.data.verdicts import Verdict, grouped
from lm.errors import UserError
from lm.losses.preference import kto
from lm.losses.ranking import preferred
from lm.metrics import Metrics, mean, scalar
from lm.model import Model
from lm.stages import preference
from lm.stages.context import Batches, Context
from lm.stages.preference import answer_logprobs, measures, summary
from lm.tokenizer import Example, Tokenizer, chats
from lm.types import Array, Ranked
from lm.update import Update, annotate, gradient, renewed

__all__ = ["LIMITS", "SHOWN", "START", "batches", "make", "summary"]

SHOWN = ("loss", "accuracy", "baseline")  # in the live line
LIMITS: Mapping[str, float] = {}  # metrics the loop keeps below a bound
# Held-out metrics before the first step, (value, tolerance): policy and reference are one, so no answer leads.
START: Mapping[str, tuple[float, float]] = {"margin": (0.0, 1e-3)}


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    refresh: int = 0,
    microbatches: int = 1,
) -> Update:
    """renewed(annotate(baseline, gradient(kto))).

    The weights are lambda_D and lambda_U: where one label is rarer, weigh it up until both count about alike. `refresh`
    is the number of updates after which the reference becomes the policy of that moment (0: it stays).
    """
    each = functools.partial(kto, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)

    def loss(params, frozen, batch: Ranked, key):
        logprobs = answer_logprobs(model, params["lm"], batch.tokens)
        ratios = logprobs - answer_logprobs(model, frozen["ref"], batch.tokens)
        desirable, undesirable = labels(batch.ranks)
        labelled = (desirable | undesirable).astype(jnp.float32)
        value = mean(each(ratios, batch.baseline[:, None], desirable), labelled)
        return value, measures(value, beta * ratios, logprobs, batch.ranks)

    inner = gradient(loss, optimizer, microbatches=microbatches)
    return renewed(annotate(functools.partial(reference_point, model), inner), every=refresh)


def reference_point(model: Model, state, batch: Ranked) -> tuple[Ranked, Metrics]:
    """The batch with z = max(0, mean log(p / p_ref) of its mismatched answers) as the baseline of every prompt."""
    tokens = batch.mismatched
    ratios = answer_logprobs(model, state.params["lm"], tokens) - answer_logprobs(model, state.frozen["ref"], tokens)
    real = jnp.any(tokens.weights > 0, axis=1).astype(jnp.float32)
    z = jnp.maximum(mean(ratios, real).value(), 0.0)
    return batch.replace(mismatched=None, baseline=jnp.broadcast_to(z, real.shape)), {"baseline": scalar(z)}


def labels(ranks: Array) -> tuple[Array, Array]:
    """bool[P,K] twice, from ranks i32[P,K,A]: which answers are desirable, and which are undesirable."""
    better = preferred(ranks[..., 0]).astype(jnp.int32)
    wins, losses = jnp.sum(better, axis=2), jnp.sum(better, axis=1)
    return wins > losses, wins < losses


def batches(
    context: Context,
    *,
    rankings: str,
    length: int = 128,
    prompts_per_batch: int = 32,
    held_out: float = 0.15,
    limit: int = 0,
) -> Batches:
    """Those of stages.preference, each prompt also with an answer to another prompt."""
    return preference.batches(
        context,
        functools.partial(with_mismatched, context.tokenizer),
        rankings=rankings,
        length=length,
        prompts_per_batch=prompts_per_batch,
        held_out=held_out,
        limit=limit,
    )


def with_mismatched(tokenizer: Tokenizer, verdicts: Sequence[Verdict], length: int, most: int) -> Ranked:
    """`grouped`, and for each prompt a row of it with an answer to another. UserError if no prompt has such a row."""
    rows = [mismatched(tokenizer, verdicts, i, length) for i in range(len(verdicts))]
    if all(row is NOTHING for row in rows):
        raise UserError(
            f"of {len(verdicts)} verdicts no prompt takes an answer to another one within data.length {length}: KTO's "
            "baseline needs some; rank different prompts, or raise data.length or data.held_out"
        )
    return grouped(verdicts, length, most).replace(mismatched=pad(rows, length))


def mismatched(tokenizer: Tokenizer, verdicts: Sequence[Verdict], i: int, length: int) -> Example:
    """Prompt i with an answer of the next verdict, in a circle, that is on another prompt and fits a row with it; if
    none does, of the next that leaves room for an end of prompt i."""
    asked, cut = verdicts[i].ranking, NOTHING
    for k in range(1, len(verdicts)):
        other = verdicts[(i + k) % len(verdicts)].ranking
        text = other.responses[i % len(other.responses)]  # the first, the second, ... in turn: good and bad ones
        if other.content != asked.content:
            whole = chats(tokenizer, [answered(asked.prompt, text)], last=True)
            fit = fitted(whole, length + 1, cut="prompt", start=tokenizer.start)
            if fit.kept and not fit.counts["shortened"]:
                return fit.kept[0]
            cut = fit.kept[0] if fit.kept and cut is NOTHING else cut
    return cut

"""SimPO: raise the better answer's mean log-prob above the worse one's by a lead, with no reference.

Objective: the mean over pairs of -log sigmoid(r(x, chosen) - r(x, rejected) - gamma), where the reward is
r = beta * log p(y|x) / |y|, the mean over the answer's tokens and its end token: what greedy and sampled decoding rank
answers by, and it pays no answer for its length. Nothing is frozen, so nothing holds the policy to where it started but
a low learning rate and few steps. A batch is `RankedAnswers`. Meng et al. 2024, eq. 6,
arXiv 2405.14734.

Ours differs: all pairs of a ranking, each prompt counting once.
"""

import functools

import optax

from lm.losses.preference import simpo_loss
from lm.model import Model
from lm.optim.combinators import decoder_gradient
from lm.optim.update import Update
from lm.stages.preference.preference_batches import (
    answer_lengths,
    answer_logprobs,
    batches,
    mean_over_pairs,
    preference_metrics,
    summary,
)
from lm.stages.stage import Stage


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    microbatches: int = 1,
) -> Update:
    """gradient(simpo)."""

    def loss(params, frozen, batch, key):
        logprobs = answer_logprobs(model, params["lm"], batch.tokens)
        means = logprobs / answer_lengths(batch.tokens)
        each = mean_over_pairs(functools.partial(simpo_loss, beta=beta, gamma=gamma), means, batch.ranks)
        return each, preference_metrics(each, beta * means, logprobs, batch.ranks)

    return decoder_gradient(loss, optimizer, microbatches=microbatches)


SIMPO = Stage(__name__, make, batches, summary, shown_metrics=("loss", "accuracy", "margin"))

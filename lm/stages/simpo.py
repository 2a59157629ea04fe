"""SimPO: raise the better answer's mean log-prob above the worse one's by a lead, with no reference.

Objective: the mean over pairs of -log sigmoid(r(x, chosen) - r(x, rejected) - gamma), where the reward is
r = beta * log p(y|x) / |y|, the mean over the answer's tokens and its end token: what greedy and sampled decoding rank
answers by, and it pays no answer for its length. Nothing is frozen, so nothing holds the policy to where it started but
a low learning rate and few steps. A batch is `Ranked` (see stages.preference). Meng et al. 2024, eq. 6,
arXiv 2405.14734.

Ours differs: all pairs of a ranking, each prompt counting once.
"""

import functools
from collections.abc import Mapping

import optax

from lm.losses.preference import simpo
from lm.model import Model
from lm.stages.preference import answer_lengths, answer_logprobs, batches, measures, over_pairs, summary
from lm.update import Update, gradient

__all__ = ["LIMITS", "SHOWN", "START", "batches", "make", "summary"]

SHOWN = ("loss", "accuracy", "margin")  # in the live line
LIMITS: Mapping[str, float] = {}  # metrics the loop keeps below a bound
START: Mapping[str, tuple[float, float]] = {}  # held-out metrics before the first step: (value, tolerance)


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
        each = over_pairs(functools.partial(simpo, beta=beta, gamma=gamma), means, batch.ranks)
        return each, measures(each, beta * means, logprobs, batch.ranks)

    return gradient(loss, optimizer, microbatches=microbatches)

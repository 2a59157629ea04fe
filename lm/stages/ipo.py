"""IPO: DPO's setting with a squared loss, so that an answer which always wins is not pushed away without end.

Objective: the mean over pairs of (d - 1 / (2 beta))^2, where d is the chosen answer's log(p / p_ref), a mean over its
tokens, less the rejected one's. DPO trusts that preferences are Bradley-Terry: a pair that is always decided alike
asks for an infinite lead, whatever beta; here the lead asked for is finite. Frozen: "ref", the policy this run starts
from. A batch is `Ranked` (see stages.preference). Azar et al. 2023, eq. 17, arXiv 2310.12036.

Ours differs: the mean over tokens in the place of the sum (see losses.preference.ipo), all pairs of a ranking, each
prompt counting once. The reward that is reported is beta * mean log(p / p_ref): its margin is asked to be one half.
"""

import functools
from collections.abc import Mapping

import optax

from lm.errors import UserError
from lm.losses.preference import ipo
from lm.model import Model
from lm.stages.preference import answer_lengths, answer_logprobs, batches, measures, over_pairs, summary
from lm.update import Update, gradient, renewed

__all__ = ["LIMITS", "SHOWN", "START", "batches", "make", "summary"]

SHOWN = ("loss", "accuracy", "margin")  # in the live line
LIMITS: Mapping[str, float] = {}  # metrics the loop keeps below a bound
# Held-out metrics before the first step, (value, tolerance): policy and reference are one, so no answer leads.
START: Mapping[str, tuple[float, float]] = {"margin": (0.0, 1e-3)}


def make(
    model: Model, optimizer: optax.GradientTransformation, *, beta: float = 0.5, refresh: int = 0, microbatches: int = 1
) -> Update:
    """renewed(gradient(ipo)): `refresh` is the number of updates after which the reference becomes the policy of
    that moment (0: it stays)."""
    if beta <= 0:
        raise UserError(f"stage.beta is {beta}; it must be above 0: the lead asked for is 1 / (2 beta)")

    def loss(params, frozen, batch, key):
        logprobs = answer_logprobs(model, params["lm"], batch.tokens)
        ratios = (logprobs - answer_logprobs(model, frozen["ref"], batch.tokens)) / answer_lengths(batch.tokens)
        each = over_pairs(functools.partial(ipo, beta=beta), ratios, batch.ranks)
        return each, measures(each, beta * ratios, logprobs, batch.ranks)

    return renewed(gradient(loss, optimizer, microbatches=microbatches), every=refresh)

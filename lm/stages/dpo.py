"""DPO: learn a policy from ranked answers directly, with no reward model and no sampling.

Objective: the mean over pairs of -log sigmoid(r(x, chosen) - r(x, rejected)), the Bradley-Terry likelihood of the
verdicts, where the reward is the policy's own: r = beta * log(p(y|x) / p_ref(y|x)), summed over the answer's tokens and
its end token. What is optimal under a reward and the price beta of each nat of KL is p_ref * exp(r / beta) / Z(x), and
Z cancels in a pair; so the policy learns as if r had been fitted and then followed. Frozen: "ref", the policy this run
starts from. A batch is `Ranked` (see stages.preference). Rafailov et al. 2023, eq. 7, arXiv 2305.18290.

Ours differs: all pairs of a ranking are compared and each prompt counts once; the paper has two answers a prompt.
`smoothing` makes it cDPO (Mitchell 2023), `refresh` TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656).
"""

import functools
import math
from collections.abc import Mapping

import optax

from lm.errors import UserError
from lm.losses.preference import dpo
from lm.model import Model
from lm.stages.preference import answer_logprobs, batches, measures, over_pairs, summary
from lm.update import Update, gradient, renewed

__all__ = ["LIMITS", "SHOWN", "START", "batches", "make", "summary"]

SHOWN = ("loss", "accuracy", "margin")  # in the live line
LIMITS: Mapping[str, float] = {}  # metrics the loop keeps below a bound
# Held-out metrics before the first step, (value, tolerance): policy and reference are one, so no answer leads.
START: Mapping[str, tuple[float, float]] = {"loss": (math.log(2), 1e-3), "margin": (0.0, 1e-3)}


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    beta: float = 0.1,
    smoothing: float = 0.0,
    refresh: int = 0,
    microbatches: int = 1,
) -> Update:
    """renewed(gradient(dpo)): `smoothing` is the share of verdicts expected to be wrong, `refresh` the number of
    updates after which the reference becomes the policy of that moment (0: it stays)."""
    if not 0 <= smoothing < 0.5:
        raise UserError(f"stage.smoothing is {smoothing}; it must be in [0, 0.5): at one half verdicts say nothing")

    def loss(params, frozen, batch, key):
        logprobs = answer_logprobs(model, params["lm"], batch.tokens)
        rewards = beta * (logprobs - answer_logprobs(model, frozen["ref"], batch.tokens))
        each = over_pairs(functools.partial(dpo, smoothing=smoothing), rewards, batch.ranks)
        return each, measures(each, rewards, logprobs, batch.ranks)

    return renewed(gradient(loss, optimizer, microbatches=microbatches), every=refresh)

"""DPO: learn a policy from ranked answers directly, with no reward model and no sampling.

Objective: the mean over pairs of -log sigmoid(r(x, chosen) - r(x, rejected)), the Bradley-Terry likelihood of the
verdicts, where the reward is the policy's own: r = beta * log(p(y|x) / p_ref(y|x)), summed over the answer's tokens and
its end token. What is optimal under a reward and the price beta of each nat of KL is p_ref * exp(r / beta) / Z(x), and
Z cancels in a pair; so the policy learns as if r had been fitted and then followed. Frozen: "ref", the policy this run
starts from. A batch is `RankedAnswers`. Rafailov et al. 2023, eq. 7, arXiv 2305.18290.

Ours differs: all pairs of a ranking are compared and each prompt counts once; the paper has two answers a prompt.
`label_smoothing` makes it cDPO (Mitchell 2023), `refresh_reference_every` TR-DPO (Gorbatovski et al. 2024, arXiv
2404.09656).
"""

import functools
import math

import optax

from lm.core.errors import UserError
from lm.losses.preference import dpo_loss
from lm.model import Model
from lm.optim.combinators import decoder_gradient, refreshed_reference
from lm.optim.update import Update
from lm.stages.preference.preference_batches import (
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
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    refresh_reference_every: int = 0,
    microbatches: int = 1,
) -> Update:
    """refreshed_reference(gradient(dpo)).

    label_smoothing: the share of rankings expected to be wrong. refresh_reference_every: updates after which the
    reference becomes a copy of the policy; 0: never.
    """
    if not 0 <= label_smoothing < 0.5:
        raise UserError(
            f"stage.label_smoothing is {label_smoothing}; it must be in [0, 0.5): at one half verdicts say nothing"
        )

    def loss(params, frozen, batch, key):
        logprobs = answer_logprobs(model, params["lm"], batch.tokens)
        rewards = beta * (logprobs - answer_logprobs(model, frozen["ref"], batch.tokens))
        each = mean_over_pairs(functools.partial(dpo_loss, label_smoothing=label_smoothing), rewards, batch.ranks)
        return each, preference_metrics(each, rewards, logprobs, batch.ranks)

    return refreshed_reference(
        decoder_gradient(loss, optimizer, microbatches=microbatches), every=refresh_reference_every
    )


DPO = Stage(
    __name__,
    make,
    batches,
    summary,
    shown_metrics=("loss", "accuracy", "margin"),
    start_metrics={"loss": (math.log(2), 1e-3), "margin": (0.0, 1e-3)},
)

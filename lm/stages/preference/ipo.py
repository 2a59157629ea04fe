"""IPO: DPO's setting with a squared loss, so that an answer which always wins is not pushed away without end.

Objective: the mean over pairs of (d - 1 / (2 beta))^2, where d is the chosen answer's log(p / p_ref), a mean over its
tokens, less the rejected one's. DPO trusts that preferences are Bradley-Terry: a pair that is always decided alike
asks for an infinite lead, whatever beta; here the lead asked for is finite. Frozen: "ref", the policy this run starts
from. A batch is `RankedAnswers`. Azar et al. 2023, eq. 17, arXiv 2310.12036.

Ours differs: the mean over tokens instead of the sum (see lm.losses.preference.ipo_loss), all pairs of a ranking,
each prompt counting once. The reward that is reported is beta * mean log(p / p_ref): its margin is asked to be one
half.
"""

import functools

import optax

from lm.core.errors import UserError
from lm.losses.preference import ipo_loss
from lm.model import Model
from lm.optim.combinators import decoder_gradient, refreshed_reference
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
    beta: float = 0.5,
    refresh_reference_every: int = 0,
    microbatches: int = 1,
) -> Update:
    """refreshed_reference(gradient(ipo)).

    refresh_reference_every: updates after which the reference becomes a copy of the policy; 0: never.
    """
    if beta <= 0:
        raise UserError(f"stage.beta is {beta}; it must be above 0: the lead asked for is 1 / (2 beta)")

    def loss(params, frozen, batch, key):
        logprobs = answer_logprobs(model, params["lm"], batch.tokens)
        ratios = (logprobs - answer_logprobs(model, frozen["ref"], batch.tokens)) / answer_lengths(batch.tokens)
        each = mean_over_pairs(functools.partial(ipo_loss, beta=beta), ratios, batch.ranks)
        return each, preference_metrics(each, beta * ratios, logprobs, batch.ranks)

    return refreshed_reference(
        decoder_gradient(loss, optimizer, microbatches=microbatches), every=refresh_reference_every
    )


IPO = Stage(
    __name__,
    make,
    batches,
    summary,
    shown_metrics=("loss", "accuracy", "margin"),
    start_metrics={"margin": (0.0, 1e-3)},
)

"""ORPO: fine-tune on the better answers and keep the worse ones unlikely, in one stage, with no reference.

Objective: the mean of -log p over the tokens of preferred answers, plus `odds_coefficient` (the paper's lambda) times
the mean over pairs of -log sigmoid(log odds(chosen) - log odds(rejected)), where an answer's p is exp(mean log-prob of
its tokens) and its odds are p / (1 - p). The first term teaches to answer at all, so the paper starts from a pretrained
model; the second alone would let both answers fall. Each term is divided by its own count, of tokens and of prompts.
Nothing is frozen. A batch is `RankedAnswers`. Hong et al. 2024, eq. 6 and 7, arXiv 2403.07691.

Ours differs: all pairs of a ranking, each prompt counting once; the preferred answers are those that beat some and that
none beats. As in the paper the first term is over the answer; TRL, after the authors' code, counts the prompt's tokens
too. The reward that is reported is the log odds, and `loss` the second term; the first is `nll`.
"""

import jax.numpy as jnp
import optax

from lm.core.metrics import mean
from lm.core.types import Array
from lm.losses.preference import log_odds, odds_ratio_loss
from lm.losses.ranking import preference_mask
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
    model: Model, optimizer: optax.GradientTransformation, *, odds_coefficient: float = 0.1, microbatches: int = 1
) -> Update:
    """gradient(nll of the preferred + odds_coefficient * orpo_odds)."""

    def loss(params, frozen, batch, key):
        logprobs, lengths = answer_logprobs(model, params["lm"], batch.tokens), answer_lengths(batch.tokens)
        means = logprobs / lengths
        nll = mean(-means, lengths * top_ranked_mask(batch.ranks))
        odds = mean_over_pairs(odds_ratio_loss, means, batch.ranks)
        metrics = {**preference_metrics(odds, log_odds(means), logprobs, batch.ranks), "nll": nll}
        return {"nll": nll, "odds": odds_coefficient * odds}, metrics

    return decoder_gradient(loss, optimizer, microbatches=microbatches)


def top_ranked_mask(ranks: Array) -> Array:
    """f32[P,K] from ranks i32[P,K,A]: 1 for an answer that beats some and that none beats."""
    better = preference_mask(ranks[..., 0])
    return (jnp.any(better, axis=2) & ~jnp.any(better, axis=1)).astype(jnp.float32)


ORPO = Stage(__name__, make, batches, summary, shown_metrics=("nll", "loss", "accuracy"))

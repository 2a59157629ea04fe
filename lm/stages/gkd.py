"""On-policy distillation (GKD): the student writes, and the teacher says at each token what it would have said there.

Objective: the mean over trained tokens of D(teacher, student) (see lm.losses.distillation; beta 0: KL(teacher,
student), 1: KL(student, teacher)), where a share `on_policy` of the batches was written by the student as it is now, so
that it learns to go on from its own words, mistakes included; the other batches are people's conversations, as in stage
distill. The drawing of a sample is not differentiated, and there is no reward. Frozen: "teacher", a network of any size
that shares the tokenizer. A batch is `Tokens`; held out, `Lesson`: who wrote it is known, and each kind measured apart.
Agarwal et al. 2023, algorithm 1, arXiv 2306.13649.

Ours differs: each token of a batch counts once (the paper: each answer); student and teacher are compared at the
temperature at which the student writes.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
import optax

from lm.data import batches as rows_to_batches, chats, corpus as corpora
from lm.data.prompts import Prompts, fitting, take
from lm.errors import UserError, at_least
from lm.metrics import Metrics, values
from lm.model import Model
from lm.stages import conversations
from lm.stages.answering import rollout
from lm.stages.context import Batches, Context
from lm.stages.distillation import comparison, taught
from lm.stages.rollouts import HELD_OUT, ROLLOUT, checked, held_out_prompts
from lm.types import Array, Tokens
from lm.update import Update, gradient

SHOWN = ("divergence", "own_divergence", "loss")  # in the live line
LIMITS: Mapping[str, float] = {}  # metrics the loop keeps below a bound
START: Mapping[str, tuple[float, float]] = {}  # held-out metrics before the first step: (value, tolerance)
COIN = 2**30 + 2  # who writes batch i; a role folded into the key beside ROLLOUT and HELD_OUT


class Lesson(NamedTuple):
    """Rows of a held-out batch and who wrote them."""

    tokens: Tokens
    own: Array  # f32[B]  1: the student; 0: people


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    teacher: Model,
    beta: float = 1.0,
    temperature: float = 1.0,
    microbatches: int = 1,
) -> Update:
    """gradient(mean divergence from the teacher); the held-out score tells the student's words from people's."""
    compare = comparison(model, teacher, beta=beta, temperature=temperature)

    def evaluate(state, batch: Lesson) -> Metrics:
        found = compare(state.params["lm"], state.frozen["teacher"], batch.tokens)
        own = batch.tokens.weights * batch.own[:, None]
        on_own = {f"own_{name}": measured for name, measured in found.means(own).items() if name != "loss"}
        return found.means(batch.tokens.weights - own) | on_own

    return gradient(taught(compare), optimizer, microbatches=microbatches)._replace(evaluate=evaluate)


def batches(
    context: Context,
    *,
    sources: str = "chitchat",
    turns: int = 3,
    prompt_length: int = 64,
    max_new: int = 32,
    rollouts: int = 64,
    on_policy: float = 1.0,
    temperature: float = 1.0,
    length: int = 256,
    batch_size: int = 32,
    held_out: float = 0.02,
    held_out_rollouts: int = 128,
) -> Batches:
    """`rollouts` answers of the current student to prompts from `sources`, or `batch_size` rows of conversations.

    A coin of weight `on_policy`, a function of (seed, i), says which of the two batch i is. A prompt holds the last
    `turns` messages; one of more than `prompt_length` tokens, or that came before, is left out and counted. The rows
    are those of stage distill, of `length` tokens and excerpts that have room for a prompt and its reply.
    """
    model, tokenizer = context.model, context.tokenizer
    checked(model, prompt_length, max_new=max_new, temperature=temperature, rollouts=rollouts, group=1)
    at_least(1, "data", turns=turns, held_out_rollouts=held_out_rollouts)
    if not 0 <= on_policy <= 1:
        raise UserError(f"data.on_policy is {on_policy}; it is a share of batches, from 0 to 1")
    even = turns + turns % 2
    people = conversations.batches(
        context, sources=sources, turns=even, length=length, batch_size=batch_size, held_out=held_out
    )
    contexts = chats.contexts(chats.conversations(sources), turns=turns)
    distinct = chats.distinct(contexts)
    (train, skipped), (unseen, more) = (
        fitting(tokenizer, side, prompt_length) for side in corpora.split(distinct, held_out)
    )
    answered = held_out_prompts(len(unseen.ids), held_out_rollouts=held_out_rollouts, rollouts=rollouts)
    order = rows_to_batches.batches(np.arange(len(train.ids)), batch_size=rollouts, seed=context.seed)
    run = context.jit(
        lambda lm, prompts, lengths, key, temperature: rollout(
            model, lm, prompts, lengths, key, max_new=max_new, temperature=temperature, stop=tokenizer.stops
        )[0]
    )

    def drawn(state, prompts: Prompts, role: int, i: int) -> Tokens:
        key = jax.random.fold_in(jax.random.fold_in(state.key, role), i)
        with context.sampling(state):
            return jax.block_until_ready(run(state.params["lm"], prompts.ids, prompts.lengths, key, temperature))

    def train_batch(state, i):
        coin = jax.random.fold_in(jax.random.fold_in(state.key, COIN), i)
        if jax.random.bernoulli(coin, on_policy):
            return drawn(state, take(train, order(i)), ROLLOUT, i)
        return people.train(state, i)

    def held_out_batches(state):
        for start in range(0, answered, rollouts):
            answers = drawn(state, take(unseen, np.arange(start, start + rollouts)), HELD_OUT, start)
            yield Lesson(answers, np.ones(rollouts, np.float32))
        for rows in people.held_out(state):
            yield Lesson(rows, np.zeros(batch_size, np.float32))

    asked = {
        "prompts": len(train.ids),
        "held_out_prompts": len(unseen.ids),
        "skipped_prompts": skipped,
        "held_out_skipped_prompts": more,
        "repeated_prompts": len(contexts) - len(distinct),
    }
    return Batches(train_batch, held_out_batches, people.about | asked)


def summary(metrics: Metrics, about) -> dict[str, float]:
    """Held-out divergence, nats per token and agreement, on people's replies; own_...: on the student's answers."""
    return values(metrics)

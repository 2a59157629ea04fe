"""On-policy distillation (GKD): the student writes, and the teacher says at each token what it would have said there.

Objective: the mean over trained tokens of D(teacher, student) (see lm.losses.distillation; beta 0: KL(teacher,
student), 1: KL(student, teacher)), where a share `on_policy_fraction` of the batches was written by the current
student, so that it learns to continue its own text, mistakes included; the other batches are people's conversations, as
in stage distill. The gradient does not go through the sampling, and there is no reward. Frozen: "teacher", a network of
any size that shares the tokenizer. A batch is `Tokens`; held out, `HeldOutRows`, which knows who wrote it, so each kind
is measured apart. Agarwal et al. 2023, algorithm 1, arXiv 2306.13649.

Ours differs: each token of a batch counts once (the paper: each answer); student and teacher are compared at the
temperature at which the student writes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from lm.core.errors import UserError, check_at_least
from lm.core.metrics import Metrics, metric_values
from lm.core.types import Array, Tokens
from lm.data.loading import NO_COLUMNS
from lm.data.origins import RowOrigin
from lm.data.prompt_sources import prompt_sources
from lm.data.prompts import Prompts, prompts_at
from lm.generate.sampler import SamplingParams
from lm.model import Model
from lm.optim.combinators import decoder_gradient
from lm.optim.update import Update
from lm.stages.context import Batches, HeldOutPart, StageContext
from lm.stages.distillation.teacher_divergence import distillation_loss, divergence_from_teacher
from lm.stages.pretraining import conversation_batches
from lm.stages.rl.multi_turn import rollout_program
from lm.stages.rl.rollouts import (
    HELD_OUT_KEY,
    ROLLOUT_KEY,
    check_rollout_options,
    held_out_prompts,
    prompt_origins,
    prompt_truncation,
)
from lm.stages.stage import Stage

ON_POLICY_KEY = 2**30 + 2  # who writes batch i; a role folded into the key beside ROLLOUT_KEY and HELD_OUT_KEY


class HeldOutRows(NamedTuple):
    """Rows of a held-out batch and who wrote them."""

    tokens: Tokens
    is_student_written: Array  # f32[B]  1: the student; 0: people


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
    compare = divergence_from_teacher(model, teacher, beta=beta, temperature=temperature)

    def evaluate(state, batch: HeldOutRows) -> Metrics:
        divergence = compare(state.params["lm"], state.frozen["teacher"], batch.tokens)
        own = batch.tokens.weights * batch.is_student_written[:, None]
        on_own = {
            f"on_policy_{name}": measured for name, measured in divergence.weighted_means(own).items() if name != "loss"
        }
        return divergence.weighted_means(batch.tokens.weights - own) | on_own

    return decoder_gradient(distillation_loss(compare), optimizer, microbatches=microbatches)._replace(
        evaluate=evaluate
    )


def batches(
    context: StageContext,
    *,
    sources: str | Sequence[Mapping[str, Any]] = "chitchat",
    columns: Mapping[str, str] = NO_COLUMNS,
    skip_bad_rows: int = 0,
    turns: int = 3,
    prompt_length: int = 64,
    max_new: int = 32,
    rollouts: int = 64,
    on_policy_fraction: float = 1.0,
    temperature: float = 1.0,
    length: int = 256,
    batch_size: int = 32,
    source_temperature: float = 1.0,
    held_out: float = 0.02,
    held_out_rollouts: int = 128,
) -> Batches:
    """`rollouts` answers of the current student to prompts from `sources`, or `batch_size` rows of conversations.

    `sources` and `source_temperature`: as in stage sft. Schedules go by the batch's number, whichever of the two it is.
    A coin of weight `on_policy_fraction`, a function of (seed, i), decides which of the two batch i is. A prompt holds
    the last `turns` messages; one of more than `prompt_length` tokens, or that came before, is left out and counted.
    The rows are those of stage distill, of `length` tokens and excerpts that have room for a prompt and its reply.
    """
    sampling = SamplingParams(max_new, temperature)
    check_rollout_options(context.model, prompt_length, sampling, rollouts=rollouts, group=1)
    check_at_least(1, "data", turns=turns, held_out_rollouts=held_out_rollouts)
    if not 0 <= on_policy_fraction <= 1:
        raise UserError(f"data.on_policy_fraction is {on_policy_fraction}; it is a share of batches, from 0 to 1")
    even = turns + turns % 2
    people = conversation_batches.batches(
        context,
        sources=sources,
        columns=columns,
        skip_bad_rows=skip_bad_rows,
        turns=even,
        length=length,
        batch_size=batch_size,
        source_temperature=source_temperature,
        held_out=held_out,
    )
    prompts_by_split = prompt_sources(
        context.tokenizer,
        sources,
        columns=columns,
        skip_bad_rows=skip_bad_rows,
        turns=turns,
        prompt_length=prompt_length,
        held_out=held_out,
        batch_size=rollouts,
        seed=context.seed,
        temperature=source_temperature,
    )
    train, unseen, order = prompts_by_split.train, prompts_by_split.held_out, prompts_by_split.drawn
    answered = held_out_prompts(len(unseen.ids), held_out_rollouts=held_out_rollouts, rollouts=rollouts)
    run = rollout_program(context, sampling)

    def drawn(state, prompts: Prompts, role: int, i: int) -> Tokens:
        key = jax.random.fold_in(jax.random.fold_in(state.key, role), i)
        with context.sampling_phase(state):
            return jax.block_until_ready(run(state.params["lm"], prompts.ids, prompts.lengths, key)[0])

    def is_student_written(state, i: int) -> bool:
        coin = jax.random.fold_in(jax.random.fold_in(state.key, ON_POLICY_KEY), i)
        return bool(jax.random.bernoulli(coin, on_policy_fraction))

    student_origins = prompt_origins(train, prompts_by_split.distinct, prompts_by_split.names, writer="student")

    def row_origins(state, batch, i: int) -> list[RowOrigin]:
        if is_student_written(state, i):
            return student_origins(batch)
        assert people.row_origins is not None, "conversations say where they are from"
        return people.row_origins(state, batch, i)

    def train_batch(state, i):
        if is_student_written(state, i):
            return drawn(state, prompts_at(train, order(i)), ROLLOUT_KEY, i)
        return people.train(state, i)

    def held_out_batches(state):
        for start in range(0, answered, rollouts):
            answers = drawn(state, prompts_at(unseen, np.arange(start, start + rollouts)), HELD_OUT_KEY, start)
            yield HeldOutRows(answers, np.ones(rollouts, np.float32))
        for rows in people.held_out(state):
            yield HeldOutRows(rows, np.zeros(batch_size, np.float32))

    of_prompts = {"skipped", "held_out_skipped", "repeated"}
    prompt_counts = {
        f"{name}_prompts" if name in of_prompts else name: count for name, count in prompts_by_split.counts.items()
    }
    student_part = HeldOutPart("", "", answered // rollouts, {})
    rule = prompt_truncation(
        ",".join(prompts_by_split.names), turns=turns, prompt_length=prompt_length, max_new=max_new
    )
    return Batches(
        train_batch,
        held_out_batches,
        {**people.dataset_info, **prompt_counts},
        row_origins=row_origins,
        held_out_parts=[student_part, *people.held_out_parts] if people.held_out_parts else (),
        truncation=f"{people.truncation}; {rule}",
    )


def summary(metrics: Metrics, about) -> dict[str, float]:
    """Held-out divergence, nats per token and agreement, on people's replies; on_policy_...: on the student's."""
    return metric_values(metrics)


GKD = Stage(
    __name__, make, batches, summary, shown_metrics=("divergence", "on_policy_divergence", "loss"), has_teacher=True
)

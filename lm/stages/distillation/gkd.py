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

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
import optax

from lm.core.errors import UserError, check_at_least
from lm.core.metrics import Metrics, metric_values
from lm.core.types import Array, Tokens, TrainState
from lm.data.origins import RowOrigin
from lm.data.prompt_sources import PromptSourceOptions, prompt_sources
from lm.data.prompts import Prompts
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
        student_weights = batch.tokens.weights * batch.is_student_written[:, None]
        on_policy = {
            f"on_policy_{name}": value
            for name, value in divergence.weighted_means(student_weights).items()
            if name != "loss"
        }
        return divergence.weighted_means(batch.tokens.weights - student_weights) | on_policy

    return decoder_gradient(distillation_loss(compare), optimizer, microbatches=microbatches)._replace(
        evaluate=evaluate
    )


def batches(
    context: StageContext,
    *,
    prompt_options: PromptSourceOptions = PromptSourceOptions(),
    max_new: int = 32,
    rollouts: int = 64,
    on_policy_fraction: float = 1.0,
    temperature: float = 1.0,
    length: int = 256,
    batch_size: int = 32,
    held_out_rollouts: int = 128,
) -> Batches:
    """`rollouts` answers of the current student to prompts, or `batch_size` rows of conversations of the same sources.

    Schedules go by the batch's number, whichever of the two it is. A coin of weight `on_policy_fraction`, a function of
    (seed, i), decides which of the two batch i is. The rows are those of stage distill, of `length` tokens and excerpts
    that have room for a prompt and its reply.
    """
    sampling = SamplingParams(max_new, temperature)
    check_rollout_options(context.model, prompt_options.prompt_length, sampling, rollouts=rollouts, group=1)
    check_at_least(1, "data", turns=prompt_options.turns, held_out_rollouts=held_out_rollouts)
    if not 0 <= on_policy_fraction <= 1:
        raise UserError(f"data.on_policy_fraction is {on_policy_fraction}; it is a share of batches, from 0 to 1")
    people = people_batches(context, prompt_options, length=length, batch_size=batch_size)
    prompts = prompt_sources(context.tokenizer, prompt_options, batch_size=rollouts, seed=context.seed)
    count = held_out_prompts(len(prompts.held_out.ids), held_out_rollouts=held_out_rollouts, rollouts=rollouts)
    student_rows = student_sampler(context, sampling)

    def is_student_written(state: TrainState, i: int) -> bool:
        coin = jax.random.fold_in(jax.random.fold_in(state.key, ON_POLICY_KEY), i)
        return bool(jax.random.bernoulli(coin, on_policy_fraction))

    def train_batch(state: TrainState, i: int) -> Tokens:
        if is_student_written(state, i):
            return student_rows(state, prompts.train_batch(i), ROLLOUT_KEY, i)
        return people.train(state, i)

    def held_out_batches(state: TrainState) -> Iterator[HeldOutRows]:
        for start, part in prompts.held_out_batches(count, rollouts):
            yield HeldOutRows(student_rows(state, part, HELD_OUT_KEY, start), np.ones(rollouts, np.float32))
        for rows in people.held_out(state):
            yield HeldOutRows(rows, np.zeros(batch_size, np.float32))

    student_part = HeldOutPart("", "", count // rollouts, {})
    return Batches(
        train_batch,
        held_out_batches,
        {**people.dataset_info, **prompt_counts(prompts.counts)},
        row_origins=origins_by_writer(is_student_written, prompt_origins(prompts, writer="student"), people),
        held_out_parts=[student_part, *people.held_out_parts] if people.held_out_parts else (),
        truncation=f"{people.truncation}; {prompt_truncation(prompts.names, prompt_options, max_new=max_new)}",
    )


def people_batches(context: StageContext, options: PromptSourceOptions, *, length: int, batch_size: int) -> Batches:
    """Rows of the conversations whose beginnings are the prompts, in excerpts that have room for prompt and reply."""
    return conversation_batches.batches(
        context,
        sources=options.sources,
        columns=options.columns,
        skip_bad_rows=options.skip_bad_rows,
        turns=options.turns + options.turns % 2,
        length=length,
        batch_size=batch_size,
        source_temperature=options.source_temperature,
        held_out=options.held_out,
    )


def student_sampler(
    context: StageContext, sampling: SamplingParams
) -> Callable[[TrainState, Prompts, int, int], Tokens]:
    """(state, prompts, role of the key, number of the draw) -> rows of the prompts and the student's answers."""
    program = rollout_program(context, sampling)

    def rows(state: TrainState, prompts: Prompts, role: int, number: int) -> Tokens:
        key = jax.random.fold_in(jax.random.fold_in(state.key, role), number)
        with context.sampling_phase(state):
            return jax.block_until_ready(program(state.params["lm"], prompts.ids, prompts.lengths, key)[0])

    return rows


def origins_by_writer(
    is_student_written: Callable[[TrainState, int], bool],
    student_origins: Callable[[Tokens], list[RowOrigin]],
    people: Batches,
) -> Callable[[TrainState, Tokens, int], list[RowOrigin]]:
    """(state, batch i, i) -> where each row came from: from a prompt, or from people's conversations."""

    def row_origins(state: TrainState, batch: Tokens, i: int) -> list[RowOrigin]:
        if is_student_written(state, i):
            return student_origins(batch)
        assert people.row_origins is not None, "conversations say where they are from"
        return people.row_origins(state, batch, i)

    return row_origins


def prompt_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """The counts of prompts under names that tell them from those of conversations."""
    shared_names = {"skipped", "held_out_skipped", "repeated"}
    return {f"{name}_prompts" if name in shared_names else name: count for name, count in counts.items()}


def summary(metrics: Metrics, about) -> dict[str, float]:
    """Held-out divergence, nats per token and agreement, on people's replies; on_policy_...: on the student's."""
    return metric_values(metrics)


GKD = Stage(
    __name__, make, batches, summary, shown_metrics=("divergence", "on_policy_divergence", "loss"), has_teacher=True
)

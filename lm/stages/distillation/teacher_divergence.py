"""Learning from a teacher's whole distribution at every token, not only from the token that was written there."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.core.errors import UserError
from lm.core.metrics import Mean, mean
from lm.core.sharding import shard
from lm.core.types import Array, Params, Tokens
from lm.losses.distillation import jensen_shannon
from lm.model import Model
from lm.model.logits import sampling_logits, values_at_ids
from lm.model.logprobs import map_position_chunks
from lm.optim.update import Loss


class TeacherComparison(NamedTuple):
    """Student and teacher at each target, f32[B,T] each."""

    divergence: Array  # between their distributions at the temperature of the distillation, nats
    loss: Array  # -log p(target) of the student at temperature 1, as in stage sft
    agreement: Array  # 1 where both hold the same token for the likeliest

    def weighted_means(self, weights: Array) -> dict[str, Mean]:
        """The weighted mean of each, by its name."""
        return {name: mean(values, weights) for name, values in self._asdict().items()}


def divergence_from_teacher(
    model: Model, teacher: Model, *, beta: float, temperature: float
) -> Callable[[Params, Params, Tokens], TeacherComparison]:
    """(the student's decoder, the teacher's, tokens) -> Comparison. The divergence is jensen_shannon at `beta`.

    Both nets read the same tokens. With model.loss_chunk set, the logits of both exist for that many positions a row at
    a time.
    """
    if not 0 <= beta <= 1:
        raise UserError(f"stage.beta is {beta}; it must be from 0 (forward KL) to 1 (reverse KL)")
    if not temperature > 0:
        raise UserError(f"stage.temperature is {temperature}; it must be above 0: 1 compares the models as they are")
    if model.config.vocab_size != teacher.config.vocab_size:
        raise UserError(
            f"the student has logits for {model.config.vocab_size} tokens and stage.teacher for "
            f"{teacher.config.vocab_size}, a teacher with another vocabulary: set model.vocab_size to the teacher's"
        )

    def compare(student_lm, teacher_lm, tokens):
        length = tokens.inputs.shape[1]
        if length > teacher.config.context:
            raise UserError(
                f"rows of {length} tokens are longer than stage.teacher's context of {teacher.config.context}: "
                "shorten the rows of config.data"
            )

        def piece(x, y, targets):
            ours, theirs = (
                shard(net.logits(lm, states), "batch", None, "vocab")
                for net, lm, states in ((model, student_lm, x), (teacher, teacher_lm, y))
            )
            student, other = (
                jax.nn.log_softmax(sampling_logits(logits, temperature=temperature), axis=-1)
                for logits in (ours, theirs)
            )
            alike = jnp.argmax(ours, axis=-1) == jnp.argmax(theirs, axis=-1)
            return TeacherComparison(
                divergence=jensen_shannon(student, other, beta=beta),
                loss=jax.nn.logsumexp(ours, axis=-1) - values_at_ids(ours, targets),
                agreement=alike.astype(jnp.float32),
            )

        x, y = (
            net.hidden_states(lm, tokens.inputs, tokens.positions, tokens.segments)
            for net, lm in ((model, student_lm), (teacher, teacher_lm))
        )
        return map_position_chunks(piece, x, y, tokens.targets, chunk_size=model.config.loss_chunk)

    return compare


def distillation_loss(compare: Callable[[Params, Params, Tokens], TeacherComparison]) -> Loss:
    """The mean divergence over the weighted targets of the batch; frozen["teacher"] is the teacher's decoder."""

    def loss(params, frozen, batch: Tokens, key):
        metrics = compare(params["lm"], frozen["teacher"], batch).weighted_means(batch.weights)
        return {"divergence": metrics["divergence"]}, metrics

    return loss

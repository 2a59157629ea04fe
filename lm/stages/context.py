"""What a program lends a stage to make its batches from, and what it gets back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import jax

from lm.core.errors import UserError, check_at_least
from lm.core.types import TrainState
from lm.data.origins import RowOrigin
from lm.model import Model
from lm.rewards import Reward
from lm.tokenizer import Tokenizer

Batch = Any


class StageContext(NamedTuple):
    model: Model
    tokenizer: Tokenizer
    seed: int
    jit: Callable[..., Callable]  # jax.jit in a program, the identity where one wants to step through
    # (workdirs, pessimism, tokens of the longest row it must read): a reward model, or an ensemble of several
    load_reward_model: Callable[[str, float, int], Reward]
    # whose seconds they are: "rollout", "reward" or "update"; a program that measures none gives nothing
    timed_phase: Callable[[str], AbstractContextManager] = nullcontext

    @contextmanager
    def sampling_phase(self, state: TrainState) -> Iterator[None]:
        """Phase "rollout", once the update that gives `state` is over: the devices' time until then is the update's."""
        with self.timed_phase("update"):
            jax.block_until_ready(state.params)
        with self.timed_phase("rollout"):
            yield

    def check_length(self, length: int) -> None:
        """UserError for rows of no tokens, or of more than the model's context."""
        check_at_least(1, "data", length=length)
        if length > self.model.config.context:
            raise UserError(f"data.length {length} is longer than model.context {self.model.config.context}; lower it")


class HeldOutPart(NamedTuple):
    """A stretch of the held-out batches whose metrics are reported apart, too: those of one source."""

    source: str  # its short name
    kind: str  # "book", "code", ...; empty where it is not known
    batches: int  # the parts follow one another in Batches.held_out, each so many batches long
    dataset_info: Mapping[str, Any]  # of this part, what the stage's summary reads of it; counts, which add


class Batches(NamedTuple):
    """Batches as functions: the i-th one depends on (seed, i) alone and, where it is sampled, on the state."""

    train: Callable[[TrainState, int], Batch]
    held_out: Callable[[TrainState], Iterator[Batch]]  # every held-out row once
    dataset_info: Mapping[str, Any]  # what was prepared: rows, tokens, bytes, skipped, ...
    # (state, batch, rows) -> the first rows of a sampled batch, for people to read; None where nothing is sampled
    rollout_table: Callable[[TrainState, Batch, int], Iterator[dict[str, Any]]] | None = None
    # (state, batch i, i) -> where each of its rows came from, for people; None where that is not known
    row_origins: Callable[[TrainState, Batch, int], list[RowOrigin]] | None = None
    held_out_parts: Sequence[HeldOutPart] = ()  # where there are several sources
    truncation: str = ""  # the rule for what does not fit a row, for the first line of a run

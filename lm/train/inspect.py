"""Shows batch i of any stage as the training loop gets it: every token trained, context or padding; and checks it.

    python -m lm inspect --config=experiments/sft.py
    python -m lm inspect --config=experiments/grpo.py --workdir=runs/grpo --step=100 --rows=8 --html=batch.html

Batch i is the one that comes after i steps. Where a policy samples it, the state is that of the newest checkpoint in
--workdir that is not later, else the starting state. Nothing in the workdir is changed, and a run in progress may be
looked at. The exit status is 1 if a check finds a fault.

--html writes a page; the pointer on a token shows its id, weight, position and log-probability. --stats draws the
lengths of documents and answers, and what is trained of each source, over --batches batches from that step on:

    python -m lm inspect --config=experiments/pretrain.py --batches=50 --stats=lengths
"""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lm.core.config import flags_and_config, to_dict
from lm.core.errors import UserError, check_at_least
from lm.core.types import Rollouts, Tokens, TrainState
from lm.data.batch_checks import Check, batch_checks, summed_checks, trained_once, trained_tokens
from lm.data.inspect import TokenIds, token_ids, token_parts
from lm.data.length_statistics import SegmentLength, segment_lengths
from lm.data.origins import RowOrigin
from lm.optim.combinators import inference_state
from lm.runs.checkpoint import checkpoint_steps, newest_checkpoint
from lm.runs.console import RED, run_program, say, warn
from lm.runs.timing import PhaseTimer
from lm.runs.workdir import CHECKPOINTS_DIR, config_changes, scratch_workdir, write_text
from lm.train.batch_statistics import write_statistics
from lm.train.batch_view import BatchView, batch_view, html_page, text_lines
from lm.train.config import train_functions
from lm.train.host import SINGLE_RUN_HOST
from lm.train.loop import check_training_config
from lm.train.resume import checkpoint_tree, state_from_checkpoint
from lm.train.setup import TrainingSetup, training_setup

FLAGS = {
    "workdir": dict(default="", metavar="DIR", help="a run whose checkpoint gives the state; it is only read"),
    "step": dict(type=int, default=-1, metavar="I", help="the batch after I steps; else after the newest checkpoint"),
    "rows": dict(type=int, default=4, metavar="N", help="rows to show, or prompts with all their answers; 0: none"),
    "html": dict(default="", metavar="FILE", help="a page to write"),
    "batches": dict(type=int, default=1, metavar="K", help="batches to check and count, from that step on"),
    "stats": dict(default="", metavar="DIR", help="a folder for figures of lengths and shares"),
}
SAMPLING_WRITERS = ("policy", "student")  # who writes a batch that depends on the state
# The counts of Batches.dataset_info that say what is not trained as it came.
LEFT_OUT = (
    "skipped",
    "shortened",
    "untrained",
    "equal",
    "undecided",
    "empty",
    "repeated",
    "skipped_prompts",
    "repeated_prompts",
    "documents_cut",
)


class Inspection(NamedTuple):
    """What there is to say of the batches that were looked at."""

    batch: Any  # the first, on the host
    view: BatchView  # of it
    checks: Sequence[Check]
    notes: Sequence[str]  # what is neither right nor wrong
    lengths: Sequence[SegmentLength]  # of all of them
    padding: float  # share of positions

    @property
    def has_fault(self) -> bool:
        return any(check.faults for check in self.checks)


class BatchCount(NamedTuple):
    """A batch, checked and counted."""

    checks: Sequence[Check]
    lengths: Sequence[SegmentLength]
    positions: int
    padding: int
    trained: np.ndarray | None  # as batch_checks.trained_tokens; None where a token may come twice, or nobody knows
    names: Mapping[int, str]  # of documents


def inspect_batches(
    config: ConfigDict, workdir: str | Path = "", *, step: int = -1, rows: int = 4, batches: int = 1
) -> Inspection:
    """Batch `step` of a config's stage, its first `rows` rows in full; the checks and counts of it and the next ones.

    step: below 0 for that of the newest checkpoint in the workdir, or 0. Nothing is written.
    """
    check_training_config(config)
    if config.stage.name == "tokenizer":
        raise UserError("stage tokenizer has no batches to inspect: name the config of a stage that trains a model")
    check_at_least(1, "inspect", batches=batches)
    check_at_least(0, "inspect", rows=rows)
    with scratch_workdir(workdir) as scratch:
        for change in config_changes(workdir, to_dict(config)) if str(workdir) else ():
            warn(f"{workdir} was made with another config: {change}")
        r = training_setup(config, scratch, PhaseTimer(), SINGLE_RUN_HOST)
        saved = checkpoint_steps(Path(workdir) / CHECKPOINTS_DIR) if str(workdir) else []
        first = step if step >= 0 else (saved[-1] if saved else 0)
        with jax.set_mesh(r.mesh):
            done, state = state_at(r, workdir, first)
            return inspection(r, state, done, range(first, first + batches), rows)


def state_at(r: TrainingSetup, workdir: str | Path, step: int) -> tuple[int, TrainState]:
    """(steps done, state) of the newest checkpoint of a run that is not later than `step`, or the starting state."""
    if not str(workdir):
        return 0, r.initial_state
    folder = Path(workdir) / CHECKPOINTS_DIR
    checkpoint = newest_checkpoint(folder, checkpoint_tree(r.initial_state), until=step, warn=warn)
    return state_from_checkpoint(checkpoint, r, folder)


def inspection(r: TrainingSetup, state: TrainState, done: int, steps: range, rows: int) -> Inspection:
    """Of the batches of these steps, all drawn in this state."""
    ids, sees = token_ids(r.context.tokenizer), inference_state(state)
    drawn = lambda i: jax.device_get(r.batches.train(sees, i))
    origins_of = r.batches.row_origins or (lambda state, batch, i: None)
    first = drawn(steps[0])
    origins = origins_of(sees, first, steps[0])
    if is_sampled(origins) and done != steps[0]:
        warn(f"batch {steps[0]} is sampled in the state after {done} steps; a run samples it in that after {steps[0]}")
    view = batch_view(r, state, first, origins, rows=rows, step=steps[0], done=done)
    counts = [batch_count(r, first, origins, ids)]
    for i in steps[1:]:
        batch = drawn(i)
        counts.append(batch_count(r, batch, origins_of(sees, batch, i), ids))
    checks = summed_checks(count.checks for count in counts)
    trained = [count.trained for count in counts if count.trained is not None]
    if trained:
        checks.append(trained_once(trained, {k: name for count in counts for k, name in count.names.items()}))
    positions, padding = (sum(getattr(count, name) for count in counts) for name in ("positions", "padding"))
    lengths = [length for count in counts for length in count.lengths]
    taught = sum(length.trained for length in lengths)
    notes = [
        f"padding: {padding / positions:.1%} of {positions:,} positions",
        f"trained: {taught / max(positions - padding, 1):.1%} of {positions - padding:,} tokens",
        *data_notes(r),
    ]
    return Inspection(first, view, checks, notes, lengths, padding / positions)


def batch_count(r: TrainingSetup, batch: Any, origins: Sequence[RowOrigin] | None, ids: TokenIds) -> BatchCount:
    """A batch on the host, checked and counted."""
    sampled = isinstance(batch, Rollouts) or is_sampled(origins)
    checks = batch_checks(batch, ids, is_sampled=sampled, trains_reward_model=r.stage.trains_reward_model)
    tokens = next(iter(token_parts(batch).values()))
    of_rows = None
    if origins is not None:  # one a prompt, whose answers are rows
        of_rows = [origin for origin in origins for _ in range(len(tokens.inputs) // len(origins))]
    trained, names = None, {}
    if origins is not None and isinstance(batch, Tokens) and not sampled:
        trained = trained_tokens(tokens, ids, origins)
        names = {segment.document: segment.name for origin in origins for segment in origin.segments}
    padding = int((tokens.segments == 0).sum())
    return BatchCount(checks, segment_lengths(tokens, ids, of_rows), tokens.segments.size, padding, trained, names)


def is_sampled(origins: Sequence[RowOrigin] | None) -> bool:
    """Whether a batch was written by the model that is trained, so that it depends on the state."""
    return origins is not None and any(origin.writer in SAMPLING_WRITERS for origin in origins)


def data_notes(r: TrainingSetup) -> Iterator[str]:
    """What was left out or cut when the data were prepared, by which rule, and how well rows are filled."""
    about = r.batches.dataset_info
    counts = [f"{name.replace('_', ' ')} {about[name]:,}" for name in LEFT_OUT if name in about]
    if counts:
        yield f"left out or cut: {', '.join(counts)}"
    if r.batches.truncation:
        yield f"rule: {r.batches.truncation}"
    if "packing_efficiency" in about:
        yield f"packing: {about['packing_efficiency']:.2%} of all positions of all rows hold a token"


def check_lines(checks: Sequence[Check], *, in_color: bool) -> Iterator[str]:
    """A line for each check: ok or FAULT, and the counts; a dash where there is nothing to look at."""
    for check in checks:
        if check.faults:
            word = f"\033[{RED}mFAULT\033[0m" if in_color else "FAULT"
            yield f"{word}  {check.name}: {check.faults:,} of {check.count:,} {check.unit} not; first: {check.first}"
        elif not check.count:
            yield f"–      {check.name}: no {check.unit}"
        else:
            yield f"ok     {check.name}: {check.count:,} {check.unit}"


def program(argv: list[str]) -> None:
    flags, config = flags_and_config(argv, __doc__, FLAGS, train_functions)
    report = inspect_batches(config, flags.workdir, step=flags.step, rows=flags.rows, batches=flags.batches)
    in_color = sys.stdout.isatty()
    for line in text_lines(report.view, in_color=in_color):
        say(line)
    say("")
    for line in (*check_lines(report.checks, in_color=in_color), *(f"note   {note}" for note in report.notes)):
        say(line)
    if flags.stats:
        write_statistics(report.lengths, flags.stats, padding=report.padding)
    if flags.html:
        command = shlex.join(["python", "-m", "lm", "inspect", *argv])
        write_text(Path(flags.html), html_page(report.view, report.checks, report.notes, command))
        say(f"page: {flags.html}")
    if report.has_fault:
        sys.exit(1)


if __name__ == "__main__":
    run_program(program)

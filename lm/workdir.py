"""A run's own folder: config, tokenizer, metrics, summary and checkpoints. What is in it is all that chat needs.

config.json  tokenizer.model  metrics.jsonl  rollouts.jsonl  summary.json  checkpoints/  tensorboard/
record.json  code-N.diff  report.html; when asked for: profile/  trackers.json
"""

import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from lm.checkpoint import restore_params
from lm.errors import UserError
from lm.model import Config, Model, lora, make
from lm.rewards import Reward
from lm.rewards.model import reward_model
from lm.stages import JUDGES
from lm.stages.ranked import ONE_AXIS, in_order
from lm.textfiles import text_of
from lm.tokenizer import Tokenizer, load as load_tokenizer
from lm.types import Params

CONFIG = "config.json"
TOKENIZER = "tokenizer.model"
METRICS = "metrics.jsonl"
ROLLOUTS = "rollouts.jsonl"  # answers that a policy gave while it learnt, for people to read
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
BASE = "base"  # under adapters (model.lora_rank): the frozen decoder, in a checkpoint of its own
PIPELINE = "pipeline.json"  # of a folder that holds the workdirs of several stages: their names, their seconds
TENSORBOARD = "tensorboard"
RECORD = "record.json"  # where its numbers come from: see lm.record
TRACKERS = "trackers.json"  # the ids that W&B and MLflow gave the run
PROFILE = "profile"
PAGE = "report.html"
LOCK = ".lock"
TEMPORARY = ".tmp"


@dataclasses.dataclass(frozen=True)
class Workdir:
    """An open, locked run folder. Closing it, or leaving it as a context manager, unlocks it."""

    path: Path
    differences: list[str]  # "key: old -> new" of every harmless change since the run was last opened
    lock: TextIO

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        self.lock.close()

    @property
    def tokenizer(self) -> Path:
        return self.path / TOKENIZER

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def base(self) -> Path:
        return self.path / BASE

    def summary(self) -> dict[str, Any] | None:
        """What the finished run wrote, or None if it has not finished."""
        return read_json(self.path / SUMMARY) if (self.path / SUMMARY).exists() else None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_text(self.path / SUMMARY, json.dumps(dict(summary), indent=2) + "\n")

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl, at once."""
        with _writing(self.metrics), self.metrics.open("a") as stream:
            stream.write(json.dumps(dict(row)) + "\n")

    def append_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds sampled answers of one step to rollouts.jsonl."""
        text = "".join(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows)
        path = self.path / ROLLOUTS
        with _writing(path), path.open("a", encoding="utf-8") as stream:
            stream.write(text)

    def truncate(self, step: int) -> None:
        """Drops the rows after `step`, which a run resumed from there writes again, and a last line torn by a kill."""
        for path in (self.metrics, self.path / ROLLOUTS):
            if path.exists():
                rows = [row for row in read_metrics(path) if row["step"] <= step]
                write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def open_workdir(
    path: str | Path, config: Mapping[str, Any], *, harmless: tuple[str, ...] = ("train", "mesh")
) -> Workdir:
    """Creates the folder and writes `config`, or takes up a run that was made with the same config.

    config: plain and resolved, as JSON holds it. harmless: the dotted keys below which it may differ from the one that
    is there; those differences are in the result, and the new config is written. So are any while there is no result.
    Raises UserError for any other difference, for a folder that is not a run's, and for one in use by another process.
    """
    path = Path(path)
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
    try:
        differences = _differences_from(path, json.loads(json.dumps(config)), harmless)
        write_text(path / CONFIG, json.dumps(config, indent=2) + "\n")
    except BaseException:
        lock.close()
        raise
    return Workdir(path, differences, lock)


class Trained(NamedTuple):
    """What a finished or interrupted run has learnt, read from its workdir alone."""

    path: Path
    stage: str
    shape: Config  # as it was trained, every "auto" still open
    model: Model
    params: Params  # numpy: {"lm": ...} or {"lm": ..., "value": ...}; averaged, where optimizer.ema_decay asked for it
    tokenizer: Tokenizer
    summary: Mapping[str, Any]  # empty while the run is not finished


def load(path: str | Path, *, backend: str, step: int | None = None, warn: Callable[[str], None] = print) -> Trained:
    """The newest whole checkpoint of a run, with its model set up for a backend ("cpu", "gpu", "tpu").

    step: the checkpoint of that step instead.

    Raises UserError if the folder holds no checkpoint, or a tokenizer or template other than it was trained with.
    """
    if not str(path):
        raise UserError("a workdir's name is empty: give the folder of a trained stage")
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"there is no workdir {path}: train that stage first, or name another")
    params, meta = restore_params(path / CHECKPOINTS, step=step, warn=warn)
    tokenizer = load_tokenizer(path / TOKENIZER)
    if meta["fingerprint"] != tokenizer.fingerprint:
        raise UserError(
            f"{path}: its checkpoint was trained with tokenizer and template {meta['fingerprint'][:8]}, but "
            f"{path / TOKENIZER} is {tokenizer.fingerprint[:8]}: restore that file, or train the stage again"
        )
    summary = read_json(path / SUMMARY) if (path / SUMMARY).exists() else {}
    shape = Config(**meta["model"])
    if shape.lora_rank:  # whoever loads the run gets one decoder
        base, _ = restore_params(path / BASE, warn=warn)
        params = {**params, "lm": lora.merged(shape, base, params["lm"])}
        shape = lora.plain(shape)
    if not shape.runs_on(backend):  # trained on another platform, with its kernel
        shape = dataclasses.replace(shape, attention="auto")
    return Trained(path, meta["stage"], shape, make(shape.on(backend)), params, tokenizer, summary)


def load_reward(
    path: str | Path, *, backend: str, centred: bool, jit, warn: Callable[[str], None] = print
) -> tuple[Trained, Reward]:
    """A finished reward model, and its total score as a reward: the weighted sum of its axes.

    centred: less the mean and over the deviation of its held-out answers; else as learnt, so that differences of scores
    are the logits of preferring one answer to another. UserError for any other workdir.
    """
    trained = load(path, backend=backend, warn=warn)
    found = trained.summary["held_out"] if "held_out" in trained.summary else {}
    if "value" not in trained.params or "score_mean" not in found:
        raise UserError(f"{path} is no finished reward model (it is {trained.stage}): train stage reward there first")
    reward = reward_model(
        trained.model,
        trained.params,
        trained.tokenizer,
        weights=list(axes_of(trained).values()),
        offset=found["score_mean"] if centred else 0.0,
        scale=found["score_deviation"] if centred else 1.0,
        length=trained.summary["about"]["length"],
        rows_at_once=64,
        jit=jit,
        name=str(path),
        warn=warn,
    )
    return trained, reward


def load_policy(path: str | Path, *, backend: str, warn: Callable[[str], None] = print, name: str = "") -> Trained:
    """As `load`, of a run that writes answers. UserError for a reward model; `name`: where the path was given."""
    trained = load(path, backend=backend, warn=warn)
    if trained.stage in JUDGES:
        raise UserError(f"{name}{path} is a reward model, which scores answers and writes none: name a policy")
    return trained


def axes_of(judge: Trained) -> dict[str, float]:
    """The axes that a reward model has learnt, in the order of its heads, and what each counts in its total score."""
    data = read_json(judge.path / CONFIG)["data"]
    return in_order(data["axes"] if "axes" in data else ONE_AXIS)


def same_axes(judges: Sequence[Trained]) -> None:
    """UserError unless all have learnt the same axes, counted alike: else their scores answer different questions."""
    first, *others = [(judge.path, axes_of(judge)) for judge in judges]
    for path, axes in others:
        if axes != first[1]:
            said = [", ".join(f"{axis} {weight:g}" for axis, weight in each.items()) for each in (first[1], axes)]
            raise UserError(
                f"{first[0]} counts the axes {said[0]}, but {path} counts {said[1]}: an ensemble needs judges of the "
                "same axes, train them with one data.axes"
            )


def same_tokenizer(trained: Trained, other: Trained) -> None:
    """UserError unless both runs learnt with one tokenizer and chat template: their ids mean the same."""
    if other.tokenizer.fingerprint != trained.tokenizer.fingerprint:
        raise UserError(
            f"{other.path} was trained with tokenizer and template {other.tokenizer.fingerprint[:8]}, but "
            f"{trained.path} with {trained.tokenizer.fingerprint[:8]}: take a draft with the same tokenizer"
        )


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, or of the one in a run's folder; none if there is no file yet."""
    file = Path(path) / METRICS if Path(path).is_dir() else Path(path)
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")  # bytes: a kill may tear a character
    lines.pop()  # empty, or torn: a whole row ends in a newline
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{file} is not JSON lines ({error}): move it away") from error


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts in a run's record.json, the oldest first; none if it has not been started."""
    return read_json(path / RECORD) if (path / RECORD).exists() else []


def read_json(path: Path) -> Any:
    """What a JSON file holds that must be there."""
    try:
        return json.loads(text_of(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give the folder of a run") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): restore it, or remove {path.parent}") from error


def write_text(path: Path, text: str) -> None:
    """Replaces a file at once: whoever reads it finds the old text or the new one."""
    temporary = path.with_name(path.name + TEMPORARY)
    with _writing(path), temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
        os.replace(temporary, path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room there or give another --workdir") from error


def free(lock: Path) -> bool:
    """Whether nobody holds this lock file."""
    with lock.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _locked(path: Path) -> TextIO:
    """The lock file, locked as long as it is open: the kernel unlocks it even when the process is killed."""
    lock = (path / LOCK).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip()
        lock.close()
        raise UserError(f"{path} is in use by process {owner}: wait for it, or give another --workdir") from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def _differences_from(path: Path, config: dict[str, Any], harmless: tuple[str, ...]) -> list[str]:
    if not (path / CONFIG).exists():
        foreign = {entry.name for entry in path.iterdir()} - {LOCK, CONFIG + TEMPORARY}
        if foreign:
            raise UserError(
                f"{path} is not a run's folder: it holds {min(foreign)} but no {CONFIG}; give another --workdir"
            )
        return []
    differences = _differences(read_json(path / CONFIG), config)
    harmful = [
        f"{key}: {change}"
        for key, change in differences.items()
        if not any(f"{key}.".startswith(f"{prefix}.") for prefix in harmless)
    ]
    if harmful and _begun(path):
        more = f" and {len(harmful) - 3} more" if len(harmful) > 3 else ""
        raise UserError(
            f"{path} was made with another config ({', '.join(harmful[:3])}{more}): "
            "give another --workdir, or remove this one"
        )
    return [f"{key}: {change}" for key, change in differences.items()]


def _begun(path: Path) -> bool:
    """Whether the folder holds any result; if a bad config stopped the run before, the mended one may use it."""
    made = (
        entry
        for entry in path.iterdir()
        if entry.name not in (LOCK, CONFIG, CONFIG + TEMPORARY, TOKENIZER, TENSORBOARD, RECORD, TRACKERS)
        and entry.suffix != ".diff"
    )
    return any(any(entry.iterdir()) if entry.is_dir() else entry.stat().st_size for entry in made)


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"optimizer.learning_rate": "0.001 -> 0.0003", ...}"""
    changes = {}
    for key in [*new, *(key for key in old if key not in new)]:
        if key in old and key in new and isinstance(old[key], dict) and isinstance(new[key], dict):
            changes |= _differences(old[key], new[key], f"{prefix}{key}.")
        elif key not in old or key not in new or old[key] != new[key]:
            before, after = (json.dumps(side[key]) if key in side else "absent" for side in (old, new))
            changes[f"{prefix}{key}"] = f"{before} -> {after}"
    return changes

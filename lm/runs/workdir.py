"""A run's own folder: config, tokenizer, metrics, summary and checkpoints. It holds all that chat needs.

config.json  tokenizer.model  metrics.jsonl  rollouts.jsonl  summary.json  checkpoints/  tensorboard/
record.json  code-N.diff  report.html; when asked for: profile/  trackers.json
"""

import dataclasses
import fcntl
import json
import os
import readline  # noqa: F401  gives input() its line editing and history
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from lm.core.config import with_added_keys, with_current_names
from lm.core.errors import UserError
from lm.core.textfiles import file_text
from lm.core.types import Params
from lm.model import Model, ModelConfig, lora, make_model
from lm.model.imported import check_same_params, imported_model
from lm.runs.checkpoint import checkpoint_steps, restore_params
from lm.tokenizer import Tokenizer, load_tokenizer

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.model"
METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"  # answers that a policy gave while it learned, for people to read
SUMMARY_FILE = "summary.json"
CHECKPOINTS_DIR = "checkpoints"
BASE_DIR = "base"  # under adapters (model.lora_rank): the frozen decoder, in a checkpoint of its own
PIPELINE_FILE = "pipeline.json"  # of a folder that holds the workdirs of several stages: their names, their seconds
TENSORBOARD_DIR = "tensorboard"
METADATA_FILE = "record.json"  # where its numbers come from: see lm.runs.metadata
TRACKERS_FILE = "trackers.json"  # the ids that W&B and MLflow gave the run
PROFILE_DIR = "profile"
REPORT_FILE = "report.html"
LOCK_FILE = ".lock"
TEMPORARY_SUFFIX = ".tmp"


@dataclasses.dataclass(frozen=True)
class Workdir:
    """An open, locked run folder. Closing it, or leaving it as a context manager, unlocks it."""

    path: Path
    config_changes: list[str]  # "key: old -> new" of every harmless change since the run was last opened
    lock: TextIO

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        self.lock.close()

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER_FILE

    @property
    def metrics_path(self) -> Path:
        return self.path / METRICS_FILE

    @property
    def checkpoints_path(self) -> Path:
        return self.path / CHECKPOINTS_DIR

    @property
    def base_path(self) -> Path:
        return self.path / BASE_DIR

    def read_summary(self) -> dict[str, Any] | None:
        """What the finished run wrote, or None if it has not finished."""
        return read_json(self.path / SUMMARY_FILE) if (self.path / SUMMARY_FILE).exists() else None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_text(self.path / SUMMARY_FILE, json.dumps(dict(summary), indent=2) + "\n")

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl, at once."""
        with _write_errors_explained(self.metrics_path), self.metrics_path.open("a") as stream:
            stream.write(json.dumps(dict(row)) + "\n")

    def append_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds sampled answers of one step to rollouts.jsonl."""
        text = "".join(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows)
        path = self.path / ROLLOUTS_FILE
        with _write_errors_explained(path), path.open("a", encoding="utf-8") as stream:
            stream.write(text)

    def truncate_after(self, step: int) -> None:
        """Drops the rows after `step`, which a run resumed from there writes again, and a last line torn by a kill."""
        for path in (self.metrics_path, self.path / ROLLOUTS_FILE):
            if path.exists():
                rows = [row for row in read_metrics(path) if row["step"] <= step]
                write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def open_workdir(
    path: str | Path, config: Mapping[str, Any], *, changeable_keys: tuple[str, ...] = ("train", "mesh")
) -> Workdir:
    """Creates the folder and writes `config`, or opens a run that was made with the same config.

    config: plain and resolved, as JSON holds it. changeable_keys: the dotted keys below which it may differ from the
    stored one; those differences are in `config_changes`, and the new config is stored. While there is no result, any
    key may differ.
    Raises UserError for any other difference, for a folder that is not a run's, and for one in use by another process.
    """
    path = Path(path)
    with _write_errors_explained(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = _acquire_lock(path)
    try:
        differences = _checked_config_changes(path, json.loads(json.dumps(config)), changeable_keys)
        write_text(path / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    except BaseException:
        lock.close()
        raise
    return Workdir(path, differences, lock)


@contextmanager
def scratch_workdir(path: str | Path = "") -> Iterator[Workdir]:
    """A temporary folder instead of the run's own at `path`: for what sets a run up and must not touch it.

    It has the run's tokenizer, with its date, and the base of its adapters. An empty path: a run that has not begun.
    UserError where there is no such folder.
    """
    run = Path(path)
    if str(path) and not run.is_dir():
        raise UserError(f"there is no workdir {run}: leave --workdir out to look at a run that has not begun")
    with tempfile.TemporaryDirectory(prefix="lm-") as folder, (Path(folder) / LOCK_FILE).open("w") as lock:
        scratch = Workdir(Path(folder), [], lock)
        if str(path) and (run / TOKENIZER_FILE).exists():
            shutil.copy(run / TOKENIZER_FILE, scratch.tokenizer_path)
        if str(path) and checkpoint_steps(run / BASE_DIR):
            scratch.base_path.symlink_to((run / BASE_DIR).absolute())
        yield scratch


def config_changes(path: str | Path, config: Mapping[str, Any]) -> list[str]:
    """ "key: old -> new" of every difference between the config of a run's folder and `config`; none if it has none."""
    if not (Path(path) / CONFIG_FILE).exists():
        return []
    changes = _changes_since_start(Path(path), json.loads(json.dumps(config)))
    return [f"{key}: {change}" for key, change in changes.items()]


class TrainedModel(NamedTuple):
    """What a finished or interrupted run has learned, read from its workdir alone."""

    path: Path
    stage: str
    model_config: ModelConfig  # as it was trained, every "auto" still open
    model: Model
    params: Params  # numpy: {"lm": ...} or {"lm": ..., "value": ...}; averaged, where optimizer.ema_decay asked for it
    tokenizer: Tokenizer
    summary: Mapping[str, Any]  # empty while the run is not finished
    own_model: Mapping[str, Any] = {}  # {"name": "file.py:make", **options}; empty: lm's own decoder


def load_trained_model(
    path: str | Path, *, backend: str, step: int | None = None, warn: Callable[[str], None] = print
) -> TrainedModel:
    """The newest whole checkpoint of a run, with its model set up for a backend ("cpu", "gpu", "tpu").

    step: the checkpoint of that step instead.

    Raises UserError if the folder holds no checkpoint, or a tokenizer or template other than it was trained with, or if
    the file of a custom model is not there, or makes other parameters now.
    """
    if not str(path):
        raise UserError("a workdir's name is empty: give the folder of a trained stage")
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"there is no workdir {path}: train that stage first, or name another{making_command(path)}")
    params, meta = restore_params(path / CHECKPOINTS_DIR, step=step, warn=warn)
    tokenizer = load_tokenizer(path / TOKENIZER_FILE)
    if meta["fingerprint"] != tokenizer.fingerprint:
        raise UserError(
            f"{path}: its checkpoint was trained with tokenizer and template {meta['fingerprint'][:8]}, but "
            f"{path / TOKENIZER_FILE} is {tokenizer.fingerprint[:8]}: restore that file, or train the stage again"
        )
    summary = read_json(path / SUMMARY_FILE) if (path / SUMMARY_FILE).exists() else {}
    if "name" in meta["model"]:
        model = imported_model(meta["model"])
        check_same_params(model, params["lm"], meta["model"]["name"], path)
        return TrainedModel(path, meta["stage"], model.config, model, params, tokenizer, summary, meta["model"])
    shape = ModelConfig(**with_current_names(meta["model"], "model"))
    if shape.lora_rank:  # callers get one decoder
        base, _ = restore_params(path / BASE_DIR, warn=warn)
        params = {**params, "lm": lora.merged_params(shape, base, params["lm"])}
        shape = lora.config_without_lora(shape)
    if not shape.runs_on(backend):  # trained on another platform, with its kernel
        shape = dataclasses.replace(shape, attention="auto")
    return TrainedModel(path, meta["stage"], shape, make_model(shape.for_backend(backend)), params, tokenizer, summary)


def require_decoder(trained: TrainedModel, what: str) -> None:
    """UserError for a custom model, of which `what` knows nothing."""
    if trained.own_model:
        raise UserError(
            f"{trained.path} has a model of your own ({trained.own_model['name']}), but {what} knows lm's decoder only"
        )


def making_command(path: Path) -> str:
    """The command that makes a workdir, as the end of a message, where experiments/ has a config of its name."""
    config = Path("experiments") / f"{path.name}.py"
    return f"; `python -m lm train --config={config} --workdir={path}` makes it" if config.is_file() else ""


def check_same_tokenizer(trained: TrainedModel, other: TrainedModel) -> None:
    """UserError unless both runs use the same tokenizer and chat template, so that their ids mean the same."""
    if other.tokenizer.fingerprint != trained.tokenizer.fingerprint:
        raise UserError(
            f"{other.path} was trained with tokenizer and template {other.tokenizer.fingerprint[:8]}, but "
            f"{trained.path} with {trained.tokenizer.fingerprint[:8]}: take a draft with the same tokenizer"
        )


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, or of the one in a run's folder; none if there is no file yet."""
    file = Path(path) / METRICS_FILE if Path(path).is_dir() else Path(path)
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")  # bytes: a kill may tear a character
    lines.pop()  # empty, or torn: a whole row ends in a newline
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{file} is not JSON lines ({error}): move it away") from error


def read_run_starts(path: Path) -> list[dict[str, Any]]:
    """The starts in a run's record.json, the oldest first; none if it has not been started."""
    return read_json(path / METADATA_FILE) if (path / METADATA_FILE).exists() else []


def read_json(path: Path) -> Any:
    """The contents of a JSON file, which must exist."""
    try:
        return json.loads(file_text(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give the folder of a run") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): restore it, or remove {path.parent}") from error


def write_text(path: Path, text: str) -> None:
    """Replaces a file atomically: a reader finds the old text or the new one."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with _write_errors_explained(path), temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
        os.replace(temporary, path)


@contextmanager
def _write_errors_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room there or give another --workdir") from error


def is_unlocked(lock: Path) -> bool:
    """Whether no process holds this lock file."""
    with lock.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _acquire_lock(path: Path) -> TextIO:
    """The lock file, locked as long as it is open: the kernel unlocks it even when the process is killed."""
    lock = (path / LOCK_FILE).open("a+")
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


def _checked_config_changes(path: Path, config: dict[str, Any], harmless: tuple[str, ...]) -> list[str]:
    if not (path / CONFIG_FILE).exists():
        foreign = {entry.name for entry in path.iterdir()} - {LOCK_FILE, CONFIG_FILE + TEMPORARY_SUFFIX}
        if foreign:
            raise UserError(
                f"{path} is not a run's folder: it holds {min(foreign)} but no {CONFIG_FILE}; give another --workdir"
            )
        return []
    differences = _changes_since_start(path, config)
    harmful = [
        f"{key}: {change}"
        for key, change in differences.items()
        if not any(f"{key}.".startswith(f"{prefix}.") for prefix in harmless)
    ]
    if harmful and _has_results(path):
        more = f" and {len(harmful) - 3} more" if len(harmful) > 3 else ""
        raise UserError(
            f"{path} was made with another config ({', '.join(harmful[:3])}{more}): "
            "give another --workdir, or remove this one"
        )
    return [f"{key}: {change}" for key, change in differences.items()]


def _has_results(path: Path) -> bool:
    """Whether the folder holds any result; if a bad config stopped the run before, the corrected one may use the
    folder."""
    made = (
        entry
        for entry in path.iterdir()
        if entry.name
        not in (
            LOCK_FILE,
            CONFIG_FILE,
            CONFIG_FILE + TEMPORARY_SUFFIX,
            TOKENIZER_FILE,
            TENSORBOARD_DIR,
            METADATA_FILE,
            TRACKERS_FILE,
        )
        and entry.suffix != ".diff"
    )
    return any(any(entry.iterdir()) if entry.is_dir() else entry.stat().st_size for entry in made)


def _changes_since_start(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """What `config` changes in the one that the run's folder keeps, whose keys may have been named otherwise."""
    return _config_changes(with_added_keys(with_current_names(read_json(path / CONFIG_FILE)), config), config)


def _config_changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"optimizer.learning_rate": "0.001 -> 0.0003", ...}"""
    changes = {}
    for key in [*new, *(key for key in old if key not in new)]:
        if key in old and key in new and isinstance(old[key], dict) and isinstance(new[key], dict):
            changes |= _config_changes(old[key], new[key], f"{prefix}{key}.")
        elif key not in old or key not in new or old[key] != new[key]:
            before, after = (json.dumps(side[key]) if key in side else "absent" for side in (old, new))
            changes[f"{prefix}{key}"] = f"{before} -> {after}"
    return changes


def with_run_date(tokenizer: Tokenizer, workdir: Workdir) -> Tokenizer:
    """The tokenizer as this run has it from its first start on, kept in the workdir.

    A template that shows the date shows the same one for all starts of a run, or its ids would change overnight: the
    date that came with the tokenizer, from the run or the converted model that this one starts from, else that of the
    first start. Programs that load the run get that date with it; only lm chat shows today's.
    """
    if tokenizer.shows_date:
        kept = load_tokenizer(workdir.tokenizer_path).date if workdir.tokenizer_path.exists() else ""
        tokenizer = tokenizer.dated(kept or tokenizer.date or date.today().isoformat())
    tokenizer.save(workdir.tokenizer_path)
    return tokenizer

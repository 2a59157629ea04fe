"""Reads folders of runs and sweeps as `Run`s. Runs without a number become `MissingRun`s with the reason."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm.core.config import flatten
from lm.core.errors import UserError
from lm.runs.workdir import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, read_json, read_metrics, read_run_starts

SWEEP_FILE, TRIALS_DIR = "sweep.json", "trials"  # trials/NAME is the workdir of a run, trials/NAME.json its outcome
CODE_NOT_RECORDED = "not recorded"
REQUIRED_KEYS = ("seed", "stage.name", "train.steps")  # in a config
COMPLETE, UNFINISHED, RUNNING = "complete", "unfinished", "running"


class CodeVersion(NamedTuple):
    """What made a run."""

    label: str  # revisions of its starts, each with a digest of uncommitted changes: "1a2b3c4 + changes 9f8e7d"
    versions: Mapping[str, str]  # of packages, at its last start


class Run(NamedTuple):
    """A finished run."""

    path: Path
    config: Mapping[str, Any]  # dotted key to value
    rows: Sequence[Mapping[str, Any]]  # of metrics.jsonl
    overrides: Mapping[str, Any]  # the keys that its sweep set: other differences of its config follow from them
    code: CodeVersion

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def stage(self) -> str:
        return self.config["stage.name"]


class MissingRun(NamedTuple):
    """A run that gives no number. No mean counts it; every page names it."""

    path: Path
    overrides: Mapping[str, Any]
    state: str  # "pruned", "failed", "running" or "unfinished"
    reason: str


class LoadedRuns(NamedTuple):
    runs: Sequence[Run]
    missing: Sequence[MissingRun]
    directions: Mapping[str, str]  # of the sweeps: metric to direction


def read_runs(folders: Iterable[str | Path]) -> LoadedRuns:
    """Every run in the folders, each the workdir of a run or the folder of a sweep.

    Raises UserError for a folder that is neither, for one that is given twice, and where no finished run is left.
    """
    folders = [Path(folder) for folder in folders]
    if not folders:
        raise UserError("no folder is given: name those of runs and sweeps, as in python -m lm compare runs/a runs/b")
    entries, aims = [], {}
    for folder in folders:
        if (folder / SWEEP_FILE).exists():
            sweep = read_json(folder / SWEEP_FILE)
            aims[sweep["metric"]] = sweep["direction"]
            entries += sweep_trials(folder)
        else:
            entries.append(run_in_folder(folder))
    by_path = set()
    for entry in entries:
        if entry.path.resolve() in by_path:
            raise UserError(f"{entry.path} is given twice: name each folder once")
        by_path.add(entry.path.resolve())
    runs = [entry for entry in entries if isinstance(entry, Run)]
    absent = [entry for entry in entries if isinstance(entry, MissingRun)]
    if not runs:
        first = absent[0]
        more = f", and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise UserError(
            f"no finished run is left ({first.path} is {first.state}: {first.reason}{more}): finish or add one"
        )
    return LoadedRuns(runs, absent, aims)


def sweep_trials(folder: Path) -> list[Run | MissingRun]:
    """The trials of a sweep, in their order."""
    inside = sorted((folder / TRIALS_DIR).glob("*"))
    names = dict.fromkeys(path.stem for path in inside if path.is_dir() or path.suffix == ".json")
    if not names:
        raise UserError(
            f"{folder} is a sweep without a trial: start it with python -m lm sweep, or name another folder"
        )
    return [trial_run(folder / TRIALS_DIR / name) for name in names]


def trial_run(path: Path) -> Run | MissingRun:
    """A run of a sweep. Of a pipeline it is the judged stage, with the settings of its other stages."""
    record = path.with_name(f"{path.name}.json")
    if not record.exists():
        return MissingRun(path, {}, RUNNING, f"there is no {record.name} beside it yet")
    outcome = read_json(record)
    workdir = path.parent / outcome["workdir"]
    stage = f"{workdir.name}." if workdir != path else ""
    given = {key.removeprefix(stage): value for key, value in outcome["overrides"].items() if key != "seed"}
    if outcome["state"] != COMPLETE:
        return MissingRun(workdir, given, outcome["state"], outcome["error"] or "stopped early by the sweep")
    return run_in_workdir(workdir, given)


def run_in_folder(folder: Path) -> Run | MissingRun:
    """A run that is named by its own workdir."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name the workdir of a run, or the folder of a sweep")
    if not (folder / CONFIG_FILE).exists() or "stage" not in read_json(folder / CONFIG_FILE):
        inside = sorted(path.parent for path in folder.glob(f"*/{METRICS_FILE}"))
        hint = f"; those in it are {', '.join(map(str, inside[:3]))}{', ...' if len(inside) > 3 else ''}"
        raise UserError(f"{folder} holds no run{hint if inside else f': there is no {CONFIG_FILE} of lm train in it'}")
    of_sweep = folder.parent.name == TRIALS_DIR and (folder.parent.parent / SWEEP_FILE).exists()
    return trial_run(folder) if of_sweep else run_in_workdir(folder, {})


def run_in_workdir(path: Path, given: Mapping[str, Any]) -> Run | MissingRun:
    """A workdir of lm train; a MissingRun unless it has finished. `given`: settings outside its config, added to it."""
    config, rows = {**given, **flatten(read_json(path / CONFIG_FILE))}, read_metrics(path)
    for key in REQUIRED_KEYS:
        if key not in config:
            raise UserError(f"{path} has no {key} in its {CONFIG_FILE}, so it logs no metrics: name runs of lm train")
    if any(not isinstance(row, Mapping) or "step" not in row for row in rows):
        raise UserError(f"{path / METRICS_FILE} has a line without a step: move {path} away, or name another run")
    steps = config["train.steps"]
    done = read_json(path / SUMMARY_FILE)["steps"] if (path / SUMMARY_FILE).exists() else None
    if done is None or done < steps or not rows:
        return MissingRun(path, given, UNFINISHED, f"{rows[-1]['step'] if rows else 0} of {steps} steps are done")
    return Run(path, config, rows, given, code_version(path))


def code_version(path: Path) -> CodeVersion:
    """The code that made a run, from its record if it has one."""
    starts = read_run_starts(path)
    labels = dict.fromkeys(revision_label(path, start) for start in starts)
    return CodeVersion(", then ".join(labels) or CODE_NOT_RECORDED, starts[-1]["versions"] if starts else {})


def revision_label(path: Path, start: Mapping[str, Any]) -> str:
    """ "1a2b3c4", or with uncommitted changes "1a2b3c4 + changes 9f8e7d", where equal changes have equal digests."""
    revision = start["revision"][:7] if start["revision"] else "no revision"
    if not start["dirty"]:
        return revision
    if not start["diff"] or not (path / start["diff"]).exists():
        return f"{revision} + unknown changes"
    return f"{revision} + changes {hashlib.sha256((path / start['diff']).read_bytes()).hexdigest()[:6]}"


def value_text(value: Any, digits: int = 6) -> str:
    """A config's value as people write it; `digits` of a float count."""
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return value if isinstance(value, str) else json.dumps(value)

"""Folders of runs and sweeps to `Run`s; whatever gives no number is an `Absent` with its reason."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm.config import flatten
from lm.errors import UserError
from lm.workdir import CONFIG, METRICS, SUMMARY, read_json, read_metrics, read_starts

SWEEP, TRIALS = "sweep.json", "trials"  # trials/NAME is the workdir of a run, trials/NAME.json what came of it
UNRECORDED = "not recorded"
NEEDED = ("seed", "stage.name", "train.steps")  # in a config
COMPLETE, UNFINISHED, RUNNING = "complete", "unfinished", "running"


class Code(NamedTuple):
    """What made a run."""

    label: str  # revisions of its starts, each with a digest of uncommitted changes: "1a2b3c4 + changes 9f8e7d"
    versions: Mapping[str, str]  # of packages, at its last start


class Run(NamedTuple):
    """A finished run."""

    path: Path
    config: Mapping[str, Any]  # dotted key to value
    rows: Sequence[Mapping[str, Any]]  # of metrics.jsonl
    given: Mapping[str, Any]  # what its sweep set, by dotted key: the cause of whatever else differs in its config
    code: Code

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def stage(self) -> str:
        return self.config["stage.name"]


class Absent(NamedTuple):
    """A run that gives no number, which no mean counts and every page names."""

    path: Path
    given: Mapping[str, Any]
    state: str  # "pruned", "failed", "running" or "unfinished"
    why: str


class Found(NamedTuple):
    runs: Sequence[Run]
    absent: Sequence[Absent]
    aims: Mapping[str, str]  # of the sweeps: metric to direction


def read(folders: Iterable[str | Path]) -> Found:
    """Every run in the folders, each the workdir of a run or the folder of a sweep.

    Raises UserError for a folder that is neither, for one that is given twice, and where no finished run is left.
    """
    folders = [Path(folder) for folder in folders]
    if not folders:
        raise UserError("no folder is given: name those of runs and sweeps, as in python -m lm.compare runs/a runs/b")
    entries, aims = [], {}
    for folder in folders:
        if (folder / SWEEP).exists():
            sweep = read_json(folder / SWEEP)
            aims[sweep["metric"]] = sweep["direction"]
            entries += trials(folder)
        else:
            entries.append(lone(folder))
    seen = set()
    for entry in entries:
        if entry.path.resolve() in seen:
            raise UserError(f"{entry.path} is given twice: name each folder once")
        seen.add(entry.path.resolve())
    runs = [entry for entry in entries if isinstance(entry, Run)]
    absent = [entry for entry in entries if isinstance(entry, Absent)]
    if not runs:
        first = absent[0]
        more = f", and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise UserError(
            f"no finished run is left ({first.path} is {first.state}: {first.why}{more}): finish or add one"
        )
    return Found(runs, absent, aims)


def trials(folder: Path) -> list[Run | Absent]:
    """The trials of a sweep, in their order."""
    inside = sorted((folder / TRIALS).glob("*"))
    names = dict.fromkeys(path.stem for path in inside if path.is_dir() or path.suffix == ".json")
    if not names:
        raise UserError(
            f"{folder} is a sweep without a trial: start it with python -m lm.sweep, or name another folder"
        )
    return [trial(folder / TRIALS / name) for name in names]


def trial(path: Path) -> Run | Absent:
    """A run of a sweep; of a pipeline the stage that is judged, though what other stages were given counts too."""
    record = path.with_name(f"{path.name}.json")
    if not record.exists():
        return Absent(path, {}, RUNNING, f"there is no {record.name} beside it yet")
    told = read_json(record)
    workdir = path.parent / told["workdir"]
    stage = f"{workdir.name}." if workdir != path else ""
    given = {key.removeprefix(stage): value for key, value in told["overrides"].items() if key != "seed"}
    if told["state"] != COMPLETE:
        return Absent(workdir, given, told["state"], told["error"] or "stopped early by the sweep")
    return run(workdir, given)


def lone(folder: Path) -> Run | Absent:
    """A run that is named by its own workdir."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name the workdir of a run, or the folder of a sweep")
    if not (folder / CONFIG).exists() or "stage" not in read_json(folder / CONFIG):
        inside = sorted(path.parent for path in folder.glob(f"*/{METRICS}"))
        hint = f"; those in it are {', '.join(map(str, inside[:3]))}{', ...' if len(inside) > 3 else ''}"
        raise UserError(f"{folder} holds no run{hint if inside else f': there is no {CONFIG} of lm.train in it'}")
    of_sweep = folder.parent.name == TRIALS and (folder.parent.parent / SWEEP).exists()
    return trial(folder) if of_sweep else run(folder, {})


def run(path: Path, given: Mapping[str, Any]) -> Run | Absent:
    """A workdir of lm.train; Absent unless it has come to its end. What was `given` outside its config joins it."""
    config, rows = {**given, **flatten(read_json(path / CONFIG))}, read_metrics(path)
    for key in NEEDED:
        if key not in config:
            raise UserError(f"{path} has no {key} in its {CONFIG}, so it logs no metrics: name runs of lm.train")
    if any(not isinstance(row, Mapping) or "step" not in row for row in rows):
        raise UserError(f"{path / METRICS} has a line without a step: move {path} away, or name another run")
    steps = config["train.steps"]
    done = read_json(path / SUMMARY)["steps"] if (path / SUMMARY).exists() else None
    if done is None or done < steps or not rows:
        return Absent(path, given, UNFINISHED, f"{rows[-1]['step'] if rows else 0} of {steps} steps are done")
    return Run(path, config, rows, given, code(path))


def code(path: Path) -> Code:
    """The code that made a run, from its record if it has one."""
    starts = read_starts(path)
    labels = dict.fromkeys(version(path, start) for start in starts)
    return Code(", then ".join(labels) or UNRECORDED, starts[-1]["versions"] if starts else {})


def version(path: Path, start: Mapping[str, Any]) -> str:
    """ "1a2b3c4", or with uncommitted changes "1a2b3c4 + changes 9f8e7d", where equal changes have equal digests."""
    revision = start["revision"][:7] if start["revision"] else "no revision"
    if not start["dirty"]:
        return revision
    if not start["diff"] or not (path / start["diff"]).exists():
        return f"{revision} + unknown changes"
    return f"{revision} + changes {hashlib.sha256((path / start['diff']).read_bytes()).hexdigest()[:6]}"


def written(value: Any, digits: int = 6) -> str:
    """A config's value as people write it; `digits` of a float count."""
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return value if isinstance(value, str) else json.dumps(value)

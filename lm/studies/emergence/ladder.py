"""The ladder: finished pretraining runs, by the FLOPs that they took."""

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lm.compare.read import SWEEP_FILE, MissingRun, Run, run_in_folder, run_in_workdir
from lm.core.errors import UserError
from lm.data.mixture import parse_sources
from lm.runs.workdir import CONFIG_FILE, SUMMARY_FILE, read_json
from lm.stages.pretraining import pretrain

STAGE_NAME = "pretrain"
MIN_RUNGS = 3  # rungs: two have only one step
SAME_FLOPS_FACTOR = 1.2  # runs whose FLOPs differ by no more than this factor share a rung
MAX_FOLDER_DEPTH = 3  # folders below the one that is named


class LadderRun(NamedTuple):
    path: Path
    flops: float  # model FLOPs of its training
    parameters: int
    tokens: int  # learned from
    loss: float  # held-out bits per byte
    corpora: Sequence[str]  # built-in names, or one path


class ModelLadder(NamedTuple):
    rungs: Sequence[LadderRun]  # the least FLOPs first
    passed_over: Sequence[LadderRun]  # runs of a rung's FLOPs with a higher held-out loss
    missing: Sequence[MissingRun]  # not finished


def read_ladder(folders: Iterable[str | Path]) -> ModelLadder:
    """The ladder of all runs in the folders, each a workdir, a sweep, or a folder that holds such.

    UserError where a folder holds no run, a run is no pretraining, or fewer than MIN_RUNGS rungs are finished.
    """
    folders = [Path(folder) for folder in folders]
    if not folders:
        raise UserError("no folder is given: name that of a ladder, as in python -m lm emergence runs/emergence")
    entries = {entry.path.resolve(): entry for folder in folders for entry in runs_in_folder(folder)}.values()
    rungs, passed = [], []
    for rung in sorted((ladder_run(entry) for entry in entries if isinstance(entry, Run)), key=lambda rung: rung.flops):
        if rungs and rung.flops <= SAME_FLOPS_FACTOR * rungs[-1][0].flops:
            rungs[-1].append(rung)
        else:
            rungs.append([rung])
    absent = [entry for entry in entries if isinstance(entry, MissingRun)]
    if len(rungs) < MIN_RUNGS:
        unfinished = f" ({len(absent)} more are not finished: {absent[0].path}, {absent[0].reason})" if absent else ""
        raise UserError(
            f"a ladder needs finished runs of {MIN_RUNGS} different amounts of compute, and there are {len(rungs)} in "
            f"{', '.join(map(str, folders))}{unfinished}: train more, or name more folders"
        )
    for rung in rungs:
        rung.sort(key=lambda each: each.loss)
        passed += rung[1:]
    return ModelLadder([rung[0] for rung in rungs], passed, absent)


def runs_in_folder(folder: Path) -> list[Run | MissingRun]:
    """The runs in a folder, or the run that it is."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name the workdir of a run, or a folder that holds some")
    if is_pretraining_run(folder):
        return [run_in_folder(folder)]
    below = sorted(
        path.parent for depth in range(1, MAX_FOLDER_DEPTH + 1) for path in folder.glob(f"{'*/' * depth}{CONFIG_FILE}")
    )
    runs = [run_in_workdir(path, {}) for path in below if is_pretraining_run(path)]
    if not runs:
        raise UserError(f"{folder} holds no run of lm train: name the workdir of a run, or a folder that holds some")
    return runs


def is_pretraining_run(path: Path) -> bool:
    """Whether this is the workdir of a stage that takes steps, and not the folder of a sweep."""
    if not (path / CONFIG_FILE).exists() or (path / SWEEP_FILE).exists():
        return False
    config = read_json(path / CONFIG_FILE)
    if "stage" not in config or "train" not in config:
        return False
    if config["stage"]["name"] != STAGE_NAME:
        raise UserError(
            f"{path} is of stage {config['stage']['name']}, and a ladder is of pretraining: name other folders"
        )
    if config["init_from"]:
        raise UserError(f"{path} continued from {config['init_from']}, so its FLOPs are not all: name other folders")
    return True


def ladder_run(run: Run) -> LadderRun:
    summary = read_json(run.path / SUMMARY_FILE)
    default = inspect.signature(pretrain.batches).parameters["corpus"].default
    named = run.config["data.corpus"] if "data.corpus" in run.config else default
    corpora = [name for source in parse_sources(named, {}, option="data.corpus") for name in source.names]
    if summary["model_flops"] is None:
        raise UserError(f"{run.path} has a model of your own, whose FLOPs are not known: name runs of lm's decoder")
    return LadderRun(
        run.path,
        summary["model_flops"],
        summary["parameters"],
        summary["tokens"],
        summary["held_out"]["bits_per_byte"],
        corpora,
    )

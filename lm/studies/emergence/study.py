"""Measures which skills appear suddenly as models grow, and by which metrics.

    python -m lm emergence runs/emergence
    python -m lm emergence runs/emergence --tasks=copying,sums

The folders are sweeps, workdirs of `lm train`, or folders of such. Every finished pretraining run, in the order of its
training FLOPs, is asked to copy, to add, to close brackets and to recall facts. Exact match, pass@k, edit distance and
log-probability rise; this measures which of them jump. Writes emergence.json, .html and .png; the scores of each run
are kept, so the same command continues after a kill. Schaeffer, Miranda and Koyejo 2023, "Are Emergent Abilities of
Large Language Models a Mirage?", arXiv 2304.15004.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lm.core.config import parsed_flags
from lm.core.errors import UserError, check_at_least
from lm.data.tasks.skills import TASKS
from lm.runs.console import Progress, run_program, say, warn
from lm.runs.partial_results import PartialResults
from lm.runs.workdir import SUMMARY_FILE, load_trained_model, read_json, write_text
from lm.studies.emergence.jumps import task_curves
from lm.studies.emergence.ladder import LadderRun, ModelLadder, read_ladder
from lm.studies.emergence.page import PAGE_NAME, emergence_summary, print_summary, write_page
from lm.studies.emergence.scoring import task_scores, tasks_for_corpora

POSITIONAL = {"folders": dict(nargs="*", metavar="D", help="the workdir of a run, a sweep, or a folder of such")}
FLAGS = {
    "items": dict(type=int, default=128, metavar="N", help="questions of each level, if it has so many (128)"),
    "samples": dict(type=int, default=16, metavar="N", help="answers drawn to each, for pass@k (16)"),
    "k": dict(type=int, default=8, metavar="K", help="of pass@k (8)"),
    "shots": dict(type=int, default=2, metavar="N", help="examples before each question, where they fit (2)"),
    "seed": dict(type=int, default=0, metavar="N", help="seed of the questions and the samples (0)"),
    "tasks": dict(default="", metavar="NAMES", help="with commas; default: all tasks that the runs' corpus can teach"),
    "output": dict(metavar="DIR", help=f"where the results go; default: {PAGE_NAME} in the first folder"),
}


def run_emergence(
    folders: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    tasks: Sequence[str] = (),
    items: int = 128,
    samples: int = 16,
    k: int = 8,
    shots: int = 2,
    seed: int = 0,
) -> Mapping[str, Any]:
    """Scores the runs that are not scored yet, writes numbers, page and figure, and returns the numbers."""
    check_at_least(2, "lm.studies.emergence.study", items=items)
    check_at_least(1, "lm.studies.emergence.study", k=k)
    check_at_least(k, "lm.studies.emergence.study", samples=samples)
    check_at_least(0, "lm.studies.emergence.study", shots=shots, seed=seed)
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        raise UserError(f"--tasks={unknown[0]} is no task: choose among {', '.join(TASKS)}")
    ladder = read_ladder(folders)
    print_excluded_runs(ladder)
    corpora = {corpus for rung in ladder.rungs for corpus in rung.corpora}
    names = list(tasks) or tasks_for_corpora(corpora)
    settings = dict(tasks=names, items=items, samples=samples, shots=shots, seed=seed)
    folder = Path(output) if output else Path(folders[0]) / PAGE_NAME
    try:
        (folder / "scores").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}; give another --output") from error
    each = [cached_scores(rung, settings, folder / "scores") for rung in ladder.rungs]
    curves = task_curves(each, samples=samples, k=k)
    if not curves:
        raise UserError("no level of any task fits the context of every run: ask with fewer --shots, or other --tasks")
    summary = emergence_summary(ladder, curves, each, {**settings, "k": k})
    write_text(folder / f"{PAGE_NAME}.json", json.dumps(summary, indent=1) + "\n")
    print_summary(summary)
    for file in [folder / f"{PAGE_NAME}.json", *write_page(folder, summary)]:
        say(f"written: {file}")
    return summary


def print_excluded_runs(ladder: ModelLadder) -> None:
    """Prints which runs are not on the ladder, and why."""
    for one in ladder.missing[:8]:
        warn(f"{one.path} is {one.state} and not on the ladder: {one.reason}")
    for one in ladder.passed_over[:8]:
        say(f"{one.path} is skipped: another run of as many FLOPs has a lower held-out loss")
    more = len(ladder.missing[8:]) + len(ladder.passed_over[8:])
    if more:
        say(f"and {more} more are skipped")


def cached_scores(rung: LadderRun, settings: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The scores of a run. They come from the file of an earlier start if it asked the same questions of the same
    run."""
    made = hashlib.sha256((rung.path / SUMMARY_FILE).read_bytes()).hexdigest()
    of = {"run": str(rung.path.resolve()), "summary": made, **settings}
    file = folder / f"{hashlib.sha256(of['run'].encode()).hexdigest()[:12]}.json"
    if file.exists():
        stored = read_json(file)
        if stored["of"] == of:
            return stored["scores"]
    trained = load_trained_model(rung.path, backend=jax.default_backend(), warn=warn)
    parts = PartialResults(folder / f"{hashlib.sha256(json.dumps(of).encode()).hexdigest()[:12]}.parts.jsonl")
    levels = sum(len(TASKS[name].levels) for name in settings["tasks"])
    with Progress(str(rung.path), levels, unit="level") as progress:
        done = iter(range(levels))
        scores = task_scores(
            trained, on_level=lambda name, level: progress.update(next(done), {}), parts=parts, **settings
        )
        progress.update(levels, {})
    write_text(file, json.dumps({"of": of, "scores": scores}) + "\n")
    parts.remove()
    return scores


def program(argv: list[str]) -> None:
    flags = parsed_flags(argv, __doc__, FLAGS, POSITIONAL)
    names = [name.strip() for name in flags.tasks.split(",") if name.strip()]
    options = {name: getattr(flags, name) for name in ("output", "items", "samples", "k", "shots", "seed")}
    run_emergence([Path(folder) for folder in flags.folders], tasks=names, **options)


if __name__ == "__main__":
    run_program(program)

"""The results of a ladder's runs, read from their workdirs."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm.compare.read import TRIALS_DIR
from lm.core.errors import UserError
from lm.runs.workdir import SUMMARY_FILE, read_json
from lm.studies.scaling.isoflop import BudgetRuns
from lm.studies.scaling.ladder import PlannedRun
from lm.studies.scaling.points import Points

PLAN_FILE = "plan.json"  # of the ladder's folder: its rungs, in the order of their trials
PREDICTION_FILE = "prediction.json"  # of the larger run, which starts after it is written
LADDER_DIR, LARGER_DIR = "ladder", "larger"  # the sweeps' folders within it


class ScalingRun(NamedTuple):
    """A finished run of the ladder."""

    workdir: Path  # with its checkpoints, tokenizer and log
    budget: float  # FLOPs, as planned
    width: int
    parameters: int
    embedding: int  # of them, in the table of tokens
    tokens: int
    flops: float  # as counted: all matrix products and attention
    loss: float  # held out, nats a token
    bits_per_byte: float
    epochs: float  # of the corpus


def ladder_runs(root: str | Path) -> list[ScalingRun]:
    """Every finished run of the ladder in `root`, budget by budget, the narrowest first; the larger one last.

    UserError for a folder that is no ladder's.
    """
    root = Path(root)
    plan = read_json(root / PLAN_FILE)
    planned = [(root / LADDER_DIR / TRIALS_DIR / f"{i:04}", PlannedRun(**rung)) for i, rung in enumerate(plan["rungs"])]
    if (root / PREDICTION_FILE).exists():
        planned.append(
            (root / LARGER_DIR / TRIALS_DIR / "0000", PlannedRun(**read_json(root / PREDICTION_FILE)["rung"]))
        )
    return [scaling_run(workdir, rung) for workdir, rung in planned if (workdir / SUMMARY_FILE).exists()]


def scaling_run(workdir: Path, rung: PlannedRun) -> ScalingRun:
    """UserError for a summary that is not this rung's."""
    summary = read_json(workdir / SUMMARY_FILE)
    if summary["parameters"] != rung.parameters or summary["steps"] != rung.steps:
        raise UserError(
            f"{workdir} has {summary['parameters']} parameters and {summary['steps']} steps, the plan "
            f"{rung.parameters} and {rung.steps}: give another --workdir, or remove this one"
        )
    return ScalingRun(
        workdir,
        rung.budget,
        rung.width,
        rung.parameters,
        rung.embedding,
        summary["tokens"],
        summary["model_flops"],
        summary["held_out"]["loss"],
        summary["held_out"]["bits_per_byte"],
        summary["tokens"] / summary["about"]["tokens"],
    )


def run_points(runs: Sequence[ScalingRun], *, embedding: bool = True) -> Points:
    """The table of the runs; their parameters with the embedding or without."""
    return Points(
        np.array([run.parameters - (0 if embedding else run.embedding) for run in runs], np.float64),
        np.array([run.tokens for run in runs], np.float64),
        np.array([run.loss for run in runs]),
    )


COUNTED_FLOPS = "FLOPs counted, N with embedding"
SIX_ND = "6ND, N with embedding"
SIX_ND_WITHOUT_EMBEDDING = "6ND, N without embedding"


def budgets_by_convention(runs: Sequence[ScalingRun], convention: str) -> list[BudgetRuns]:
    """The runs of each budget, with N and C counted by a convention.

    Kaplan et al. 2020, arXiv 2001.08361, leave the embedding out of N, Hoffmann et al. 2022 do not; C = 6ND of either.
    How much of their disagreement this makes: Pearce & Song 2024, arXiv 2406.12907. Each convention sees the same
    runs, which cost the same as counted and only nearly the same as 6ND.
    """
    budgets = []
    for budget in dict.fromkeys(run.budget for run in runs):
        n, tokens, loss = run_points(
            [run for run in runs if run.budget == budget], embedding=convention != SIX_ND_WITHOUT_EMBEDDING
        )
        flops = np.array([run.flops for run in runs if run.budget == budget])
        budgets.append(BudgetRuns(n, tokens, flops if convention == COUNTED_FLOPS else 6 * n * tokens, loss))
    return budgets

"""What a ladder's runs came to, read from their workdirs."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm.comparison.reading import TRIALS
from lm.errors import UserError
from lm.ladder.planned import Rung
from lm.laws.isoflop import Budget
from lm.laws.points import Points
from lm.workdir import SUMMARY, read_json

PLAN = "plan.json"  # of the ladder's folder: its rungs, in the order of their trials
PREDICTION = "prediction.json"  # of the larger run, which starts after it is written
RUNGS, LARGER = "ladder", "larger"  # the sweeps' folders within it


class Run(NamedTuple):
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


def runs(root: str | Path) -> list[Run]:
    """Every finished run of the ladder in `root`, budget by budget, the narrowest first; the larger one last.

    UserError for a folder that is no ladder's.
    """
    root = Path(root)
    plan = read_json(root / PLAN)
    planned = [(root / RUNGS / TRIALS / f"{i:04}", Rung(**rung)) for i, rung in enumerate(plan["rungs"])]
    if (root / PREDICTION).exists():
        planned.append((root / LARGER / TRIALS / "0000", Rung(**read_json(root / PREDICTION)["rung"])))
    return [measured(workdir, rung) for workdir, rung in planned if (workdir / SUMMARY).exists()]


def measured(workdir: Path, rung: Rung) -> Run:
    """UserError for a summary that is not this rung's."""
    summary = read_json(workdir / SUMMARY)
    if summary["parameters"] != rung.parameters or summary["steps"] != rung.steps:
        raise UserError(
            f"{workdir} has {summary['parameters']} parameters and {summary['steps']} steps, the plan "
            f"{rung.parameters} and {rung.steps}: give another --workdir, or remove this one"
        )
    return Run(
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


def points(found: Sequence[Run], *, embedding: bool = True) -> Points:
    """The table of the runs; their parameters with the embedding or without."""
    return Points(
        np.array([run.parameters - (0 if embedding else run.embedding) for run in found], np.float64),
        np.array([run.tokens for run in found], np.float64),
        np.array([run.loss for run in found]),
    )


EXACT = "FLOPs counted, N with embedding"
SIX = "6ND, N with embedding"
KAPLAN = "6ND, N without embedding"


def counted(found: Sequence[Run], convention: str) -> list[Budget]:
    """The runs of each budget, with N and C counted by a convention.

    Kaplan et al. 2020, arXiv 2001.08361, leave the embedding out of N, Hoffmann et al. 2022 do not; C = 6ND of either.
    How much of their disagreement this makes: Pearce & Song 2024, arXiv 2406.12907. Each convention sees the same
    runs, which cost the same as counted and only nearly the same as 6ND.
    """
    budgets = []
    for budget in dict.fromkeys(run.budget for run in found):
        n, tokens, loss = points([run for run in found if run.budget == budget], embedding=convention != KAPLAN)
        flops = np.array([run.flops for run in found if run.budget == budget])
        budgets.append(Budget(n, tokens, flops if convention == EXACT else 6 * n * tokens, loss))
    return budgets

"""Tables of finished runs: parameters, tokens and loss of each."""

import csv
import io
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm.core.errors import UserError
from lm.core.textfiles import file_text

RUN_COLUMNS = ("parameters", "tokens", "loss")
MIN_RUNS = 8  # runs: five numbers are fitted


class Points(NamedTuple):
    """f64[P] each."""

    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray

    def __getitem__(self, runs) -> "Points":  # of runs, not of columns
        return Points(*(np.asarray(column)[runs] for column in (self.parameters, self.tokens, self.loss)))


def read_points(path: str | Path) -> Points:
    """The runs of a CSV file with the columns `parameters`, `tokens` and `loss`; others are ignored.

    UserError for a file that cannot be read, a missing column, a cell that is no positive number, too few runs.
    """
    try:
        rows = csv.DictReader(io.StringIO(file_text(path)), skipinitialspace=True)
        named = [name.strip() for name in rows.fieldnames or ()]
        missing = [column for column in RUN_COLUMNS if column not in named]
        if missing:
            has = ", ".join(named) or "nothing"
            raise UserError(f"{path} has no column {missing[0]!r} (it has {has}): name the columns in its first line")
        rows.fieldnames = named
        table = [
            [positive_cell(path, line, column, row[column]) for column in RUN_COLUMNS]
            for line, row in enumerate(rows, 2)
        ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"cannot read {path} ({error}): give a CSV file with the columns {','.join(RUN_COLUMNS)}"
        ) from error
    return checked_points(Points(*np.array(table, np.float64).reshape(-1, 3).T), str(path))


def positive_cell(path: str | Path, line: int, column: str, text: str | None) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UserError(
            f"{path}, line {line}: {column} is {text!r}; it must be a positive number: correct the row or delete it"
        )
    return value


def checked_points(points: Points, name: str) -> Points:
    """The same points. UserError where no law can be fitted to them."""
    if len(points.loss) < MIN_RUNS:
        raise UserError(f"{name} has {len(points.loss)} runs; a law of five numbers needs at least {MIN_RUNS}")
    for column in ("parameters", "tokens"):
        if len(set(getattr(points, column))) < 3:
            raise UserError(f"{name}: {column} takes fewer than 3 values, so no exponent can be fitted: vary it")
    return points

"""Which swept parameters matter: PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255), as Optuna computes it."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.compare.read import value_text

MIN_RUNS = 8  # runs needed at least
MIN_GOOD_RUNS, GOOD_FRACTION = (5, 0.1)  # good runs are the best tenth, but at least this many (as Optuna advises)
MIN_REPEATS = 3  # times each value on average: then values are categories, as in a grid; else points of a range


def parameter_importances(
    configs: Sequence[Mapping[str, Any]], values: Sequence[float], parameters: Sequence[str], direction: str
) -> dict[str, float]:
    """{parameter: its share}, the largest first: how much its values among good runs differ from its values among all
    runs.

    configs and values: one for each run. Shares add to 1. At least MIN_RUNS runs and two parameters.
    """
    import optuna  # here: half a second that only this needs

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    columns = {
        key: parameter_distribution([config[key] if key in config else None for config in configs])
        for key in parameters
    }
    study = optuna.create_study(direction=direction)
    for i, value in enumerate(values):
        study.add_trial(
            optuna.create_trial(
                params={key: column[i] for key, (column, _) in columns.items()},
                distributions={key: distribution for key, (_, distribution) in columns.items()},
                value=value,
            )
        )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=good_run_count(len(values)) / len(values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what may change in Optuna
        return optuna.importance.get_param_importances(study, evaluator=evaluator)


def good_run_count(runs: int) -> int:
    """How many of so many runs count as good."""
    return max(min(MIN_GOOD_RUNS, runs // 2), round(GOOD_FRACTION * runs))


def parameter_distribution(column: Sequence[Any]) -> tuple[list[Any], Any]:
    """A parameter's values and Optuna's distribution of them: a range of numbers, or categories."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    distinct = list(dict.fromkeys(map(value_text, column)))
    if len(column) >= MIN_REPEATS * len(distinct) or not is_numeric(column):
        return [value_text(value) for value in column], CategoricalDistribution(distinct)
    numbers = [float(value) for value in column]
    return numbers, FloatDistribution(min(numbers), max(numbers), log=is_geometric(numbers))


def is_numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def is_geometric(values: Sequence[float]) -> bool:
    """Whether numbers are spread more evenly by their ratios than by their differences, over a factor of 3 or more."""
    x = np.unique(np.asarray(values, np.float64))
    if len(x) < 2 or x[0] <= 0 or x[-1] < 3 * x[0]:
        return False
    gaps, ratios = np.diff(x), np.diff(np.log(x))
    return bool(ratios.std() / ratios.mean() <= gaps.std() / gaps.mean())

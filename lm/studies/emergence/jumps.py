"""Curves over the ladder, and how much of a rise falls into one step of it.

A jump is a step that holds more than half of the whole rise: by exact match first, then, in the same step, by the
metrics that give credit for being nearly right. A jump by those too is not an artefact of all-or-nothing counting.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.core.statistics import NO_ESTIMATE, Estimate, mean_estimate, paired_difference, success_rate
from lm.data.tasks.scoring import expected_exact_match, pass_at_k
from lm.feedback.agreement import bootstrap_estimate

JUMP_SHARE = 0.5
EXACT_MATCH, PASS_AT_K, EDIT_DISTANCE, LOG_PROBABILITY = "exact match", "pass@k", "edit distance", "log-probability"
METRICS = (EXACT_MATCH, PASS_AT_K, EDIT_DISTANCE, LOG_PROBABILITY)
SMOOTH_METRICS = (EDIT_DISTANCE, LOG_PROBABILITY)
YES, NO, UNDECIDED = "yes", "no", "cannot be told"


class TaskCurve(NamedTuple):
    """One level of a task up the ladder, K rungs and I items."""

    task: str
    level: str
    values: Mapping[str, np.ndarray]  # metric to f64[K,I]
    expected: Sequence[float]  # exact match that the average token lets expect
    tokens: float  # mean length of a target


class MetricRise(NamedTuple):
    """How a metric rises on the ladder; a falling edit distance counts as a rise."""

    total: Estimate  # from the first rung to the last, the same items
    share: Estimate  # the share of it in the step; nan where nothing rises
    jump: str  # whether that is more than half: YES, NO or UNDECIDED


class JumpFinding(NamedTuple):
    """The conclusions from a curve."""

    step: int | None  # the steepest by exact match, from rung `step` to the next; None where exact match does not rise
    log_flops_share: float  # the share of the ladder's log-FLOPs in that step
    rises: Mapping[str, MetricRise]


def task_curves(each: Sequence[Mapping[str, Any]], *, samples: int, k: int) -> list[TaskCurve]:
    """The curves of all levels that every rung was asked, from the scores of each rung."""
    curves = []
    for task, levels in each[0].items():
        for level in levels:
            if not all(task in scores and level in scores[task] for scores in each):
                continue
            rungs = [scores[task][level] for scores in each]
            right = [[pass_at_k(samples, count, k) for count in rung["correct"]] for rung in rungs]
            tokens = np.array([rung["tokens"] for rung in rungs])
            values = {
                EXACT_MATCH: np.array([rung["exact"] for rung in rungs], np.float64),
                PASS_AT_K: np.array(right),
                EDIT_DISTANCE: np.minimum([rung["edit"] for rung in rungs], 1.0),  # rambling is no worse than silence
                LOG_PROBABILITY: np.array([rung["logprob"] for rung in rungs]) / tokens,
            }
            curves.append(
                TaskCurve(task, level, values, [level_expected_match(rung) for rung in rungs], float(tokens.mean()))
            )
    return curves


def level_expected_match(rung: Mapping[str, Any]) -> float:
    return expected_exact_match(rung["logprob"], rung["tokens"])


def metric_estimate(metric: str, values: np.ndarray) -> Estimate:
    """The mean over items f64[I] with its 95 % interval."""
    return success_rate(values > 0) if metric == EXACT_MATCH else mean_estimate(values)


def step_share(values: np.ndarray, step: int) -> float:
    """The part between rungs step and step + 1 of the rise of the mean of f64[K,I] from the first rung to the last;
    nan where it does not rise."""
    means = values.mean(axis=-1)
    rise = means[-1] - means[0]
    return float((means[step + 1] - means[step]) / rise) if rise > 0 else np.nan


def steepest_step(values: np.ndarray) -> int:
    """The step in which the mean of f64[K,I] rises most."""
    return int(np.argmax(np.diff(values.mean(axis=-1))))


def jump_finding(curve: TaskCurve, flops: Sequence[float]) -> JumpFinding:
    """The step in which exact match rises most, and its part of each metric's rise; intervals by a bootstrap of items.

    A rise that is inside the noise has no share.
    """
    exact = curve.values[EXACT_MATCH]
    step = steepest_step(exact) if paired_difference(exact[-1], exact[0]).low > 0 else None
    rises = {
        metric: metric_rise(-values if metric == EDIT_DISTANCE else values, step)
        for metric, values in curve.values.items()
    }
    even = np.log(flops[step + 1] / flops[step]) / np.log(flops[-1] / flops[0]) if step is not None else np.nan
    return JumpFinding(step, float(even), rises)


def metric_rise(values: np.ndarray, step: int | None) -> MetricRise:
    rise = paired_difference(values[-1], values[0])
    if step is None or not rise.low > 0:
        return MetricRise(rise, NO_ESTIMATE, UNDECIDED)
    part = bootstrap_estimate(functools.partial(step_share, step=step), values)
    return MetricRise(rise, part, YES if part.low > JUMP_SHARE else NO if part.high < JUMP_SHARE else UNDECIDED)

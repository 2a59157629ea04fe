"""The results: the ladder and its curves as numbers, sentences, a table, one page and one figure."""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from lm.core.statistics import interval_text
from lm.data.tasks.skills import TASKS
from lm.runs.console import print_table, say
from lm.runs.html import SERIES_COLORS, TEXT_COLOR, short_number, write_figure_page
from lm.studies.emergence.jumps import (
    EDIT_DISTANCE,
    EXACT_MATCH,
    LOG_PROBABILITY,
    METRICS,
    NO,
    PASS_AT_K,
    SMOOTH_METRICS,
    UNDECIDED,
    YES,
    JumpFinding,
    TaskCurve,
    jump_finding,
    metric_estimate,
)
from lm.studies.emergence.ladder import ModelLadder

PAGE_NAME = "emergence"  # of the page, the numbers and the picture
METRIC_LABELS = {
    EXACT_MATCH: "exact match",
    PASS_AT_K: "pass@{k}",
    EDIT_DISTANCE: "edit distance,\na character (0 on top)",
    LOG_PROBABILITY: "log-probability,\nnats a token (0 on top)",
}
JsonTree = Mapping[str, Any]


def emergence_summary(
    ladder: ModelLadder, curves: Sequence[TaskCurve], scores: Sequence[JsonTree], settings: JsonTree
) -> dict[str, Any]:
    """The rungs, and for each level of each task its curves, where it jumps, and by which metrics."""
    flops = [rung.flops for rung in ladder.rungs]
    return {
        "stage": PAGE_NAME,
        "settings": dict(settings),
        "rungs": [{**rung._asdict(), "path": str(rung.path)} for rung in ladder.rungs],
        "passed": [str(rung.path) for rung in ladder.passed_over],
        "absent": [{"path": str(one.path), "state": one.state, "why": one.reason} for one in ladder.missing],
        "curves": [curve_json(curve, jump_finding(curve, flops), scores) for curve in curves],
    }


def curve_json(curve: TaskCurve, finding: JumpFinding, scores: Sequence[JsonTree]) -> dict[str, Any]:
    """A curve and the conclusions from it, as JSON."""
    level_scores = [each[curve.task][curve.level] for each in scores]
    return {
        "task": curve.task,
        "level": curve.level,
        "name": curve_name(curve),
        "items": curve.values[EXACT_MATCH].shape[1],
        "shots": [each["shots"] for each in level_scores],
        "tokens": curve.tokens,
        "metrics": {
            m: [estimate_json(metric_estimate(m, row)) for row in values] for m, values in curve.values.items()
        },
        "expected": list(curve.expected),
        "step": finding.step,
        "even": finite_or_none(finding.log_flops_share),
        "rises": {
            metric: {"whole": estimate_json(rise.total), "share": estimate_json(rise.share), "jumps": rise.jump}
            for metric, rise in finding.rises.items()
        },
        "shown": level_scores[-1]["shown"],
    }


def curve_name(curve: TaskCurve) -> str:
    """ "sums, 3 digits", "facts, rare"."""
    if not curve.level.isdigit():
        return f"{curve.task}, {curve.level}"
    unit = TASKS[curve.task].unit
    return f"{curve.task}, {curve.level} {unit.removesuffix('s') if curve.level == '1' else unit}"


def estimate_json(estimate) -> dict[str, float | None]:
    return {name: finite_or_none(value) for name, value in estimate._asdict().items()}


def finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def conclusion_sentences(summary: JsonTree) -> list[str]:
    """Sentences: the results, with the conclusions that they do not allow."""
    sentences = [curve_sentence(curve, summary["rungs"]) for curve in summary["curves"]]
    sharp = [curve for curve in summary["curves"] if curve["rises"][EXACT_MATCH]["jumps"] == YES]
    if sharp:
        survive = " ".join(survival_counts(sharp, metric) for metric in SMOOTH_METRICS)
        sentences.append(f"Jumps by exact match: {len(sharp)}. {survive}")
    if not sharp:
        sentences.append("No step of this ladder holds, outside the noise, more than half of a rise of exact match.")
    sentences.append(
        "Intervals are over items. Each rung is one run, so what another seed would give is not in them; and a step of "
        "the ladder is as wide as it is: within it a rise may be smooth."
    )
    return sentences


def survival_counts(sharp: Sequence[JsonTree], metric: str) -> str:
    """A sentence: how many of these jumps are jumps by a metric, too."""
    verdicts = [curve["rises"][metric]["jumps"] for curve in sharp]
    yes, no, untold = (verdicts.count(verdict) for verdict in (YES, NO, UNDECIDED))
    return f"By {metric}, in the same step, {yes} survive, {no} do not, of {untold} it cannot be told."


def curve_sentence(curve: JsonTree, rungs: Sequence[JsonTree]) -> str:
    """One level of one task."""
    first, last = (curve["metrics"][EXACT_MATCH][rung]["value"] for rung in (0, -1))
    reached = f"{curve['name']}: exact match {first:.2f} to {last:.2f}"
    step = curve["step"]
    if step is None:
        smooth = [m for m in SMOOTH_METRICS if is_rise(curve["rises"][m])]
        return f"{reached}, no rise outside the noise{smooth_rise_text(smooth)}."
    rise = curve["rises"][EXACT_MATCH]
    kind = {YES: "a jump", NO: "no jump"}.get(rise["jumps"], "whether it is a jump cannot be told")
    where = " to ".join(f"{short_number(rungs[rung]['flops'])}FLOP" for rung in (step, step + 1))
    text = f"{reached}; {share_text(rise)} of it from {where}: {kind}."
    if rise["jumps"] != YES:
        return text
    return text + " In the same step " + ", ".join(survival_text(curve["rises"][m], m) for m in SMOOTH_METRICS) + "."


def is_rise(rise: JsonTree) -> bool:
    return rise["whole"]["low"] > 0


def smooth_rise_text(smooth: Sequence[str]) -> str:
    return f", though {' and '.join(smooth)} {'improve' if len(smooth) > 1 else 'improves'}" if smooth else ""


def survival_text(rise: JsonTree, metric: str) -> str:
    if rise["share"]["value"] is None:
        return f"{metric} has no rise to share"
    does = {YES: "the jump survives", NO: "it does not survive"}.get(rise["jumps"], "it cannot be told")
    return f"{metric} makes {share_text(rise)} of its rise ({does})"


def share_text(rise: JsonTree) -> str:
    return f"{rise['share']['value']:.2f} {interval_text(rise['share'])}"


def print_summary(summary: JsonTree) -> None:
    """The ladder and the shares of its steepest steps on the terminal, then the sentences."""
    print_table(
        "the ladder",
        ["run", "FLOPs", "parameters", "tokens", "bits per byte"],
        [
            [
                Path(r["path"]).name,
                short_number(r["flops"]),
                short_number(r["parameters"]),
                short_number(r["tokens"]),
                r["loss"],
            ]
            for r in summary["rungs"]
        ],
    )
    print_table(
        "exact match at the first and the last rung; shares of rises in its steepest step",
        ["", "first", "last", "to rung", "exact", "edit", "logprob"],
        [
            [
                curve["name"],
                *(f"{curve['metrics'][EXACT_MATCH][rung]['value']:.2f}" for rung in (0, -1)),
                "" if curve["step"] is None else str(curve["step"] + 2),
                *(share_cell(curve["rises"][metric]["share"]["value"]) for metric in (EXACT_MATCH, *SMOOTH_METRICS)),
            ]
            for curve in summary["curves"]
        ],
    )
    for text in conclusion_sentences(summary):
        say(text)


def share_cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def write_page(folder: Path, summary: JsonTree) -> list[Path]:
    """The page and the figure beside the numbers."""
    tasks = list(dict.fromkeys(curve["task"] for curve in summary["curves"]))
    size = dict(width=10.0, height=0.5 + 2.0 * len(tasks), nrows=len(tasks), ncols=len(METRICS), squeeze=False)
    draw = functools.partial(draw_figure, summary, tasks)
    return write_figure_page(
        folder,
        PAGE_NAME,
        "studies/emergence/page.html.jinja",
        draw,
        {"sharex": True, **size},
        summary=summary,
        sentences=conclusion_sentences(summary),
        tasks=TASKS,
        metrics=METRICS,
        exact=EXACT_MATCH,
        names=tasks,
    )


def draw_figure(summary: JsonTree, tasks: Sequence[str], axes) -> None:
    """Rows are tasks, columns metrics, lines levels with 95 % bands; dashed, what the average token lets expect."""
    flops = [rung["flops"] for rung in summary["rungs"]]
    for row, task in zip(axes, tasks):
        curves = [curve for curve in summary["curves"] if curve["task"] == task]
        for panel, metric in zip(row, METRICS):
            for colour, curve in zip(SERIES_COLORS, curves):
                value, _, low, high = np.array([list(e.values()) for e in curve["metrics"][metric]], float).T
                panel.plot(flops, value, "o-", color=colour, markersize=3, linewidth=1.4)
                panel.fill_between(flops, low, high, color=colour, alpha=0.15, linewidth=0)
                if metric == EXACT_MATCH:
                    panel.plot(flops, curve["expected"], "--", color=colour, linewidth=1)
            panel.set_xscale("log")
            if metric in (EXACT_MATCH, PASS_AT_K):
                panel.set_ylim(-0.04, 1.04)
            if metric == EDIT_DISTANCE:
                panel.set_ylim(1.04, -0.04)
            if panel in axes[0]:
                panel.set_title(METRIC_LABELS[metric].format(k=summary["settings"]["k"]), fontsize=9)
            if panel in axes[-1]:
                panel.set_xlabel("training FLOPs")
        row[0].set_ylabel(task)
        unit = TASKS[task].unit
        lines = [Line2D([], [], color=colour, label=curve["level"]) for colour, curve in zip(SERIES_COLORS, curves)]
        row[-1].legend(handles=lines, title=unit, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    dashes = [
        Line2D([], [], color=TEXT_COLOR, marker="o", markersize=3, label="measured, band: 95 % interval over items"),
        Line2D(
            [], [], color=TEXT_COLOR, linestyle="--", label="exact match that the average token lets one expect, $p^n$"
        ),
    ]
    axes[0, 0].figure.legend(handles=dashes, loc="outside lower center", ncols=2, frameon=False, labelcolor=TEXT_COLOR)

"""What was seen: the ladder and its curves as numbers, sentences, a table, one page and one figure."""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from lm.console import say, table
from lm.jumps.reading import Ladder
from lm.jumps.statistics import (
    EDIT,
    EXACT,
    LOGPROB,
    METRICS,
    NO,
    PASS,
    SMOOTH,
    UNTOLD,
    YES,
    Curve,
    Found,
    estimate,
    judged,
)
from lm.pages import COLOURS, INK, interval, png, short, svg, templates
from lm.skills.tasks import TASKS
from lm.workdir import write_text

NAME = "emergence"  # of the page, the numbers and the picture
LABELS = {
    EXACT: "exact match",
    PASS: "pass@{k}",
    EDIT: "edit distance,\na character (0 on top)",
    LOGPROB: "log-probability,\nnats a token (0 on top)",
}
Tree = Mapping[str, Any]


def summary_of(ladder: Ladder, curves: Sequence[Curve], scores: Sequence[Tree], settings: Tree) -> dict[str, Any]:
    """The rungs, and for each level of each task its curves, where it jumps, and by which metrics."""
    flops = [rung.flops for rung in ladder.rungs]
    return {
        "stage": NAME,
        "settings": dict(settings),
        "rungs": [{**rung._asdict(), "path": str(rung.path)} for rung in ladder.rungs],
        "passed": [str(rung.path) for rung in ladder.passed],
        "absent": [{"path": str(one.path), "state": one.state, "why": one.why} for one in ladder.absent],
        "curves": [told(curve, judged(curve, flops), scores) for curve in curves],
    }


def told(curve: Curve, found: Found, scores: Sequence[Tree]) -> dict[str, Any]:
    """A curve and what is concluded from it, as JSON holds it."""
    asked = [each[curve.task][curve.level] for each in scores]
    return {
        "task": curve.task,
        "level": curve.level,
        "name": name_of(curve),
        "items": curve.values[EXACT].shape[1],
        "shots": [each["shots"] for each in asked],
        "tokens": curve.tokens,
        "metrics": {m: [plain(estimate(m, row)) for row in values] for m, values in curve.values.items()},
        "expected": list(curve.expected),
        "step": found.step,
        "even": finite(found.even),
        "rises": {
            metric: {"whole": plain(rise.whole), "share": plain(rise.share), "jumps": rise.jumps}
            for metric, rise in found.rises.items()
        },
        "shown": asked[-1]["shown"],
    }


def name_of(curve: Curve) -> str:
    """ "sums, 3 digits", "facts, rare"."""
    if not curve.level.isdigit():
        return f"{curve.task}, {curve.level}"
    unit = TASKS[curve.task].unit
    return f"{curve.task}, {curve.level} {unit.removesuffix('s') if curve.level == '1' else unit}"


def plain(estimate) -> dict[str, float | None]:
    return {name: finite(value) for name, value in estimate._asdict().items()}


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def sentences(summary: Tree) -> list[str]:
    """What was seen, with what may not be concluded."""
    said = [sentence(curve, summary["rungs"]) for curve in summary["curves"]]
    sharp = [curve for curve in summary["curves"] if curve["rises"][EXACT]["jumps"] == YES]
    if sharp:
        said.append(f"Jumps by exact match: {len(sharp)}. {' '.join(tally(sharp, metric) for metric in SMOOTH)}")
    if not sharp:
        said.append("No step of this ladder holds, outside the noise, more than half of a rise of exact match.")
    said.append(
        "Intervals are over items. Each rung is one run, so what another seed would give is not in them; and a step of "
        "the ladder is as wide as it is: within it a rise may be smooth."
    )
    return said


def tally(sharp: Sequence[Tree], metric: str) -> str:
    """How many of these jumps survive a metric."""
    verdicts = [curve["rises"][metric]["jumps"] for curve in sharp]
    yes, no, untold = (verdicts.count(verdict) for verdict in (YES, NO, UNTOLD))
    return f"By {metric}, in the same step, {yes} survive, {no} do not, of {untold} it cannot be told."


def sentence(curve: Tree, rungs: Sequence[Tree]) -> str:
    """One level of one task."""
    first, last = (curve["metrics"][EXACT][rung]["value"] for rung in (0, -1))
    reached = f"{curve['name']}: exact match {first:.2f} to {last:.2f}"
    step = curve["step"]
    if step is None:
        smooth = [m for m in SMOOTH if rises(curve["rises"][m])]
        return f"{reached}, no rise outside the noise{also(smooth)}."
    rise = curve["rises"][EXACT]
    kind = {YES: "a jump", NO: "no jump"}.get(rise["jumps"], "whether it is a jump cannot be told")
    where = " to ".join(f"{short(rungs[rung]['flops'])}FLOP" for rung in (step, step + 1))
    text = f"{reached}; {shared(rise)} of it from {where}: {kind}."
    if rise["jumps"] != YES:
        return text
    return text + " In the same step " + ", ".join(survival(curve["rises"][m], m) for m in SMOOTH) + "."


def rises(rise: Tree) -> bool:
    return rise["whole"]["low"] > 0


def also(smooth: Sequence[str]) -> str:
    return f", though {' and '.join(smooth)} {'improve' if len(smooth) > 1 else 'improves'}" if smooth else ""


def survival(rise: Tree, metric: str) -> str:
    if rise["share"]["value"] is None:
        return f"{metric} has no rise to share"
    does = {YES: "the jump survives", NO: "it does not survive"}.get(rise["jumps"], "it cannot be told")
    return f"{metric} makes {shared(rise)} of its rise ({does})"


def shared(rise: Tree) -> str:
    return f"{rise['share']['value']:.2f} {interval(rise['share'])}"


def show(summary: Tree) -> None:
    """The ladder and the shares of its steepest steps on the terminal, then the sentences."""
    table(
        "the ladder",
        ["run", "FLOPs", "parameters", "tokens", "bits per byte"],
        [
            [Path(r["path"]).name, short(r["flops"]), short(r["parameters"]), short(r["tokens"]), r["loss"]]
            for r in summary["rungs"]
        ],
    )
    table(
        "exact match at the first and the last rung; shares of rises in its steepest step",
        ["", "first", "last", "to rung", "exact", "edit", "logprob"],
        [
            [
                curve["name"],
                *(f"{curve['metrics'][EXACT][rung]['value']:.2f}" for rung in (0, -1)),
                "" if curve["step"] is None else str(curve["step"] + 2),
                *(cell(curve["rises"][metric]["share"]["value"]) for metric in (EXACT, *SMOOTH)),
            ]
            for curve in summary["curves"]
        ],
    )
    for text in sentences(summary):
        say(text)


def cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def written(folder: Path, summary: Tree) -> list[Path]:
    """The page and the figure beside the numbers."""
    tasks = list(dict.fromkeys(curve["task"] for curve in summary["curves"]))
    size = dict(width=10.0, height=0.5 + 2.0 * len(tasks), nrows=len(tasks), ncols=len(METRICS), squeeze=False)
    draw = functools.partial(figure, summary, tasks)
    page, picture = folder / f"{NAME}.html", folder / f"{NAME}.png"
    text = (
        templates()
        .get_template("jumps/page.html.jinja")
        .render(
            summary=summary,
            sentences=sentences(summary),
            figure=svg(draw, sharex=True, **size),
            tasks=TASKS,
            metrics=METRICS,
            exact=EXACT,
            names=tasks,
        )
    )
    picture.write_bytes(png(draw, sharex=True, **size))
    write_text(page, text)
    return [page, picture]


def figure(summary: Tree, tasks: Sequence[str], axes) -> None:
    """Rows are tasks, columns metrics, lines levels with 95 % bands; dashed, what the average token lets expect."""
    flops = [rung["flops"] for rung in summary["rungs"]]
    for row, task in zip(axes, tasks):
        curves = [curve for curve in summary["curves"] if curve["task"] == task]
        for panel, metric in zip(row, METRICS):
            for colour, curve in zip(COLOURS, curves):
                value, _, low, high = np.array([list(e.values()) for e in curve["metrics"][metric]], float).T
                panel.plot(flops, value, "o-", color=colour, markersize=3, linewidth=1.4)
                panel.fill_between(flops, low, high, color=colour, alpha=0.15, linewidth=0)
                if metric == EXACT:
                    panel.plot(flops, curve["expected"], "--", color=colour, linewidth=1)
            panel.set_xscale("log")
            if metric in (EXACT, PASS):
                panel.set_ylim(-0.04, 1.04)
            if metric == EDIT:
                panel.set_ylim(1.04, -0.04)
            if panel in axes[0]:
                panel.set_title(LABELS[metric].format(k=summary["settings"]["k"]), fontsize=9)
            if panel in axes[-1]:
                panel.set_xlabel("training FLOPs")
        row[0].set_ylabel(task)
        unit = TASKS[task].unit
        lines = [Line2D([], [], color=colour, label=curve["level"]) for colour, curve in zip(COLOURS, curves)]
        row[-1].legend(handles=lines, title=unit, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    dashes = [
        Line2D([], [], color=INK, marker="o", markersize=3, label="measured, band: 95 % interval over items"),
        Line2D([], [], color=INK, linestyle="--", label="exact match that the average token lets one expect, $p^n$"),
    ]
    axes[0, 0].figure.legend(handles=dashes, loc="outside lower center", ncols=2, frameon=False, labelcolor=INK)

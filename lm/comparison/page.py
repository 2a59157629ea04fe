"""A comparison as one self-contained HTML page without scripts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from lm.comparison import figures
from lm.comparison.importance import LEAST, good, importance
from lm.comparison.settings import NOTHING, shortened, shown
from lm.comparison.statistics import FEW, MINIMIZE, NOISE, UNJUDGED, Measured
from lm.comparison.telling import (
    ROWS,
    Comparison,
    codes,
    configs,
    corrected,
    given,
    number,
    of_setting,
    row,
    sentences,
    spread,
    warnings,
)
from lm.pages import COLOURS, templates

HELD_OUT = "held_out/"
CLOCKS = ("step", "tokens", "seconds")
CELLS = 12  # values of a parameter that a heat map or a table of configs has room for


class Figure(NamedTuple):
    title: str
    picture: Markup
    caption: str
    wide: bool = False


def render(told: Comparison, folders: Sequence[Path]) -> str:
    """The page as text."""
    parameters = told.settings.parameters
    return (
        templates()
        .get_template("comparison/page.html.jinja")
        .render(
            told=told,
            folders=folders,
            better="lower" if told.direction == MINIMIZE else "higher",
            percent=f"{100 * told.confidence:g}\u00a0%",
            best=told.found[0],
            spread=spread,
            number=number,
            alike=len(told.of(NOISE)),
            unjudged=len(told.of(UNJUDGED)),
            warnings=warnings(told),
            sentences=sentences(told),
            corrected=corrected(told),
            rows=[row(told, one) for one in told.found],
            means=figures.means(told.found[:ROWS], told.metric),
            most=ROWS,
            curves=curves(told),
            colours=figures.coloured(told.found),
            some=len(told.found) > len(COLOURS),
            few=FEW,
            parameters=parameters,
            found_few=len(told.found) <= len(parameters),
            swept=swept(told),
            importance=important(told),
            configs=configs(told),
            names=[one.name for one in told.found],
            codes=codes(told),
            absent=told.absent,
            given=given,
            lost={one.name: of_setting(one, told.absent) for one in told.found},
        )
    )


def curves(told: Comparison) -> list[Figure]:
    """The metric over steps, tokens and seconds, and beside it what training logged of it over steps.

    If the metric was logged at few steps only, its curve hides the way there: then training's loss stands in for one
    that training does not log under the same name.
    """
    logged = [(told.metric, clock, f"{told.metric} over {clock}") for clock in CLOCKS]
    steps = min(len(figures.line(run, told.metric, "step")) for run in told.runs)
    same = told.metric.removeprefix(HELD_OUT)
    if steps < figures.DENSE:
        candidates, why = (same, "loss"), f", as {told.metric} was logged at {steps} step{'s' * (steps != 1)} only"
    else:
        candidates, why = (same,), ""
    for name in candidates:
        if name != told.metric and all(any(name in row for row in run.rows) for run in told.runs):
            logged.insert(1, (name, "step", f"{name} in training over step{why}"))
            break
    drawn = [(title, figures.curves(told.found, metric, clock)) for metric, clock, title in logged]
    return [Figure(title, picture, "") for title, picture in drawn if picture]


def important(told: Comparison) -> dict[str, Any]:
    """The figure of importances, or why there is none."""
    parameters, runs = told.settings.parameters, told.runs
    if len(parameters) < 2:
        return {"why": "Importance compares parameters, and there are fewer than two here."}
    if len(runs) < LEAST:
        return {"why": f"Importance takes at least {LEAST} finished runs; there are {len(runs)}."}
    setting = [one.setting.config for one in told.found for _ in one.values]
    values = [value for one in told.found for value in one.values.values()]
    shares = importance(setting, values, parameters, told.direction)
    return {"picture": figures.shares(shares), "good": good(len(values)), "runs": len(values)}


def swept(told: Comparison) -> list[Figure]:
    """What the parameters that differ do to the metric."""
    found, parameters = told.found, told.settings.parameters
    if len(found) <= len(parameters) or not parameters:
        return []
    drawn = []
    short = shortened(parameters)
    interval = f"bars are {100 * told.confidence:g}\u00a0% intervals over seeds, none where there is one seed"
    if roles := figures.roles(found, parameters):
        x, by, panels = roles
        lines = f", one line for each {short[by]}" if by else ""
        drawn.append(
            Figure(
                f"{told.metric} over {short[x]}{lines}",
                figures.lines_over(found, told.metric, x, by, panels),
                f"Dots are means over seeds; {interval}.",
            )
        )
    elif len(parameters) > 1:
        drawn.append(
            Figure(
                f"{told.metric} over each parameter by itself",
                figures.slices(found, parameters, told.metric),
                "A dot is a setting; the other parameters differ from dot to dot.",
                wide=True,
            )
        )
    if len(parameters) == 2 and all(values(found, key) <= CELLS for key in parameters):
        x, y = (roles[0], roles[1]) if roles else parameters
        drawn.append(
            Figure(
                f"{told.metric}, mean over seeds",
                figures.heat(found, x, y, told.direction),
                "The better, the darker, by rank.",
            )
        )
    if len(parameters) > 1:
        drawn.append(
            Figure(
                "Every setting as a line through its parameters",
                figures.parallel(found, parameters, told.metric, told.direction),
                "Parallel coordinates: each line is a setting, which crosses every axis at its value. "
                "The better, the darker, by rank.",
                wide=len(parameters) > 2,
            )
        )
    return drawn


def values(found: Sequence[Measured], key: str) -> int:
    return len({shown(one.setting.config, key) for one in found} - {NOTHING})

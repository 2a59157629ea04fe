"""A comparison as one self-contained HTML page without scripts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from lm.compare import figures
from lm.compare.importance import MIN_RUNS, good_run_count, parameter_importances
from lm.compare.settings import NO_VALUE, config_value_text, short_keys
from lm.compare.statistics import INSIDE_NOISE, MAX_SEEDS_UNJUDGED, MINIMIZE, NOT_JUDGED, SettingResult
from lm.compare.text import (
    MAX_ROWS,
    Comparison,
    code_rows,
    comparison_warnings,
    conclusion_sentences,
    config_rows,
    correction_note,
    interval_or_reason,
    missing_runs_of_setting,
    number_text,
    overrides_text,
    setting_row,
)
from lm.runs.html import SERIES_COLORS, rendered_page

HELD_OUT_PREFIX = "held_out/"
CURVE_CLOCKS = ("step", "tokens", "seconds")
MAX_CELLS = 12  # values of a parameter that a heat map or a table of configs has room for


class PageFigure(NamedTuple):
    title: str
    picture: Markup
    caption: str
    wide: bool = False


def render_page(told: Comparison, folders: Sequence[Path]) -> str:
    """The page as text."""
    parameters = told.settings.parameters
    return rendered_page(
        "compare/page.html.jinja",
        told=told,
        folders=folders,
        better="lower" if told.direction == MINIMIZE else "higher",
        percent=f"{100 * told.confidence:g}\u00a0%",
        best=told.results[0],
        spread=interval_or_reason,
        number=number_text,
        alike=len(told.with_conclusion(INSIDE_NOISE)),
        unjudged=len(told.with_conclusion(NOT_JUDGED)),
        warnings=comparison_warnings(told),
        sentences=conclusion_sentences(told),
        corrected=correction_note(told),
        rows=[setting_row(told, one) for one in told.results],
        means=figures.means_figure(told.results[:MAX_ROWS], told.metric),
        most=MAX_ROWS,
        curves=curve_figures(told),
        colours=figures.setting_colours(told.results),
        some=len(told.results) > len(SERIES_COLORS),
        few=MAX_SEEDS_UNJUDGED,
        parameters=parameters,
        found_few=len(told.results) <= len(parameters),
        swept=parameter_figures(told),
        importance=importance_section(told),
        configs=config_rows(told),
        names=[one.name for one in told.results],
        codes=code_rows(told),
        absent=told.missing,
        given=overrides_text,
        lost={one.name: missing_runs_of_setting(one, told.missing) for one in told.results},
    )


def curve_figures(told: Comparison) -> list[PageFigure]:
    """The metric over steps, tokens and seconds, and beside it what training logged of it over steps.

    If the metric was logged at few steps only, its curve hides the way there: then training's loss stands in for one
    that training does not log under the same name.
    """
    logged = [(told.metric, clock, f"{told.metric} over {clock}") for clock in CURVE_CLOCKS]
    steps = min(len(figures.metric_line(run, told.metric, "step")) for run in told.runs)
    same = told.metric.removeprefix(HELD_OUT_PREFIX)
    if steps < figures.MIN_DENSE_POINTS:
        candidates, why = (same, "loss"), f", as {told.metric} was logged at {steps} step{'s' * (steps != 1)} only"
    else:
        candidates, why = (same,), ""
    for name in candidates:
        if name != told.metric and all(any(name in row for row in run.rows) for run in told.runs):
            logged.insert(1, (name, "step", f"{name} in training over step{why}"))
            break
    drawn = [(title, figures.curves_figure(told.results, metric, clock)) for metric, clock, title in logged]
    return [PageFigure(title, picture, "") for title, picture in drawn if picture]


def importance_section(told: Comparison) -> dict[str, Any]:
    """The figure of importances, or why there is none."""
    parameters, runs = told.settings.parameters, told.runs
    if len(parameters) < 2:
        return {"why": "Importance compares parameters, and there are fewer than two here."}
    if len(runs) < MIN_RUNS:
        return {"why": f"Importance takes at least {MIN_RUNS} finished runs; there are {len(runs)}."}
    setting = [one.setting.config for one in told.results for _ in one.values]
    values = [value for one in told.results for value in one.values.values()]
    shares = parameter_importances(setting, values, parameters, told.direction)
    return {"picture": figures.importance_bars(shares), "good": good_run_count(len(values)), "runs": len(values)}


def parameter_figures(told: Comparison) -> list[PageFigure]:
    """What the parameters that differ do to the metric."""
    found, parameters = told.results, told.settings.parameters
    if len(found) <= len(parameters) or not parameters:
        return []
    drawn = []
    short = short_keys(parameters)
    interval = f"bars are {100 * told.confidence:g}\u00a0% intervals over seeds, none where there is one seed"
    if roles := figures.parameter_roles(found, parameters):
        x, by, panels = roles
        lines = f", one line for each {short[by]}" if by else ""
        drawn.append(
            PageFigure(
                f"{told.metric} over {short[x]}{lines}",
                figures.parameter_lines(found, told.metric, x, by, panels),
                f"Dots are means over seeds; {interval}.",
            )
        )
    elif len(parameters) > 1:
        drawn.append(
            PageFigure(
                f"{told.metric} over each parameter by itself",
                figures.parameter_slices(found, parameters, told.metric),
                "A dot is a setting; the other parameters differ from dot to dot.",
                wide=True,
            )
        )
    if len(parameters) == 2 and all(distinct_value_count(found, key) <= MAX_CELLS for key in parameters):
        x, y = (roles[0], roles[1]) if roles else parameters
        drawn.append(
            PageFigure(
                f"{told.metric}, mean over seeds",
                figures.heat_map(found, x, y, told.direction),
                "The better, the darker, by rank.",
            )
        )
    if len(parameters) > 1:
        drawn.append(
            PageFigure(
                "Every setting as a line through its parameters",
                figures.parallel_coordinates(found, parameters, told.metric, told.direction),
                "Parallel coordinates: each line is a setting, which crosses every axis at its value. "
                "The better, the darker, by rank.",
                wide=len(parameters) > 2,
            )
        )
    return drawn


def distinct_value_count(found: Sequence[SettingResult], key: str) -> int:
    return len({config_value_text(one.setting.config, key) for one in found} - {NO_VALUE})

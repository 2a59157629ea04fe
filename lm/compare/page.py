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
MAX_CELLS = 12  # values of a parameter that fit into a heat map or a table of configs


class PageFigure(NamedTuple):
    title: str
    picture: Markup
    caption: str
    wide: bool = False


def render_page(comparison: Comparison, folders: Sequence[Path]) -> str:
    """The page as text."""
    parameters = comparison.settings.parameters
    return rendered_page(
        "compare/page.html.jinja",
        comparison=comparison,
        folders=folders,
        better="lower" if comparison.direction == MINIMIZE else "higher",
        percent=f"{100 * comparison.confidence:g}\u00a0%",
        best=comparison.results[0],
        spread=interval_or_reason,
        number=number_text,
        alike=len(comparison.with_conclusion(INSIDE_NOISE)),
        unjudged=len(comparison.with_conclusion(NOT_JUDGED)),
        warnings=comparison_warnings(comparison),
        sentences=conclusion_sentences(comparison),
        corrected=correction_note(comparison),
        rows=[setting_row(comparison, one) for one in comparison.results],
        means=figures.means_figure(comparison.results[:MAX_ROWS], comparison.metric),
        most=MAX_ROWS,
        curves=curve_figures(comparison),
        colours=figures.setting_colours(comparison.results),
        some=len(comparison.results) > len(SERIES_COLORS),
        few=MAX_SEEDS_UNJUDGED,
        parameters=parameters,
        found_few=len(comparison.results) <= len(parameters),
        swept=parameter_figures(comparison),
        importance=importance_section(comparison),
        configs=config_rows(comparison),
        names=[one.name for one in comparison.results],
        codes=code_rows(comparison),
        absent=comparison.missing,
        given=overrides_text,
        lost={one.name: missing_runs_of_setting(one, comparison.missing) for one in comparison.results},
    )


def curve_figures(comparison: Comparison) -> list[PageFigure]:
    """The metric over steps, tokens and seconds, and the training metric of the same name over steps.

    If the metric was logged at few steps only, the training loss is shown where training logs no metric of that name.
    """
    logged = [(comparison.metric, clock, f"{comparison.metric} over {clock}") for clock in CURVE_CLOCKS]
    steps = min(len(figures.metric_line(run, comparison.metric, "step")) for run in comparison.runs)
    same = comparison.metric.removeprefix(HELD_OUT_PREFIX)
    if steps < figures.MIN_DENSE_POINTS:
        candidates, why = (
            (same, "loss"),
            f", as {comparison.metric} was logged at {steps} step{'s' * (steps != 1)} only",
        )
    else:
        candidates, why = (same,), ""
    for name in candidates:
        if name != comparison.metric and all(any(name in row for row in run.rows) for run in comparison.runs):
            logged.insert(1, (name, "step", f"{name} in training over step{why}"))
            break
    curves = [(title, figures.curves_figure(comparison.results, metric, clock)) for metric, clock, title in logged]
    return [PageFigure(title, picture, "") for title, picture in curves if picture]


def importance_section(comparison: Comparison) -> dict[str, Any]:
    """The figure of importances, or the reason why there is none."""
    parameters, runs = comparison.settings.parameters, comparison.runs
    if len(parameters) < 2:
        return {"why": "Importance compares parameters, and there are fewer than two here."}
    if len(runs) < MIN_RUNS:
        return {"why": f"Importance takes at least {MIN_RUNS} finished runs; there are {len(runs)}."}
    setting = [one.setting.config for one in comparison.results for _ in one.values]
    values = [value for one in comparison.results for value in one.values.values()]
    shares = parameter_importances(setting, values, parameters, comparison.direction)
    return {"picture": figures.importance_bars(shares), "good": good_run_count(len(values)), "runs": len(values)}


def parameter_figures(comparison: Comparison) -> list[PageFigure]:
    """The effect on the metric of the parameters that differ."""
    results, parameters = comparison.results, comparison.settings.parameters
    if len(results) <= len(parameters) or not parameters:
        return []
    drawn = []
    short = short_keys(parameters)
    interval = f"bars are {100 * comparison.confidence:g}\u00a0% intervals over seeds, none where there is one seed"
    if roles := figures.parameter_roles(results, parameters):
        x, by, panels = roles
        lines = f", one line for each {short[by]}" if by else ""
        drawn.append(
            PageFigure(
                f"{comparison.metric} over {short[x]}{lines}",
                figures.parameter_lines(results, comparison.metric, x, by, panels),
                f"Dots are means over seeds; {interval}.",
            )
        )
    elif len(parameters) > 1:
        drawn.append(
            PageFigure(
                f"{comparison.metric} over each parameter by itself",
                figures.parameter_slices(results, parameters, comparison.metric),
                "A dot is a setting; the other parameters differ from dot to dot.",
                wide=True,
            )
        )
    if len(parameters) == 2 and all(distinct_value_count(results, key) <= MAX_CELLS for key in parameters):
        x, y = (roles[0], roles[1]) if roles else parameters
        drawn.append(
            PageFigure(
                f"{comparison.metric}, mean over seeds",
                figures.heat_map(results, x, y, comparison.direction),
                "The better, the darker, by rank.",
            )
        )
    if len(parameters) > 1:
        drawn.append(
            PageFigure(
                "Every setting as a line through its parameters",
                figures.parallel_coordinates(results, parameters, comparison.metric, comparison.direction),
                "Parallel coordinates: each line is a setting, which crosses every axis at its value. "
                "The better, the darker, by rank.",
                wide=len(parameters) > 2,
            )
        )
    return drawn


def distinct_value_count(results: Sequence[SettingResult], key: str) -> int:
    return len({config_value_text(one.setting.config, key) for one in results} - {NO_VALUE})

"""Figures of a comparison: means with their seeds, curves with bands, and the effect of swept parameters."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from lm.compare.importance import is_geometric, is_numeric
from lm.compare.read import Run
from lm.compare.settings import config_value_text, short_keys
from lm.compare.statistics import MAX_SEEDS_UNJUDGED, MINIMIZE, SettingResult
from lm.core.statistics import student_mean
from lm.runs.html import SERIES_COLORS, TEXT_COLOR, svg_figure

COLORMAP = colormaps["viridis"]
MAX_POINTS = 150  # of a line, at most
MAX_PANELS = 4  # of one figure of lines, at most
PANELS_PER_ROW = 4  # panels beside each other
IGNORED_START = 0.2  # share of a run that does not set the vertical range of its curve, if it has MIN_DENSE_POINTS
MIN_DENSE_POINTS = 6


def setting_colours(results: Sequence[SettingResult]) -> dict[str, str]:
    """A colour for each of the first settings as long as there are colours; TEXT_COLOR for the rest."""
    return dict(
        itertools.zip_longest((one.name for one in results), SERIES_COLORS[: len(results)], fillvalue=TEXT_COLOR)
    )


def means_figure(results: Sequence[SettingResult], metric: str) -> Markup:
    """Each setting's mean with its interval, and below it a dot for each seed."""
    colours = setting_colours(results)

    def draw(axes: Axes):
        for y, one in enumerate(results):
            mean, style = one.mean, dict(color=colours[one.name])
            if math.isfinite(mean.se):
                axes.errorbar([mean.value], [y], xerr=[[mean.value - mean.low], [mean.high - mean.value]], fmt="o",
                              capsize=3, **style)  # fmt: skip
            else:
                axes.plot([mean.value], [y], "o", **style)
            if len(one.values) > 1:
                axes.plot(list(one.values.values()), [y + 0.3] * len(one.values), "o", markersize=3, alpha=0.6, **style)
        axes.set_yticks(range(len(results)), [one.name for one in results])
        axes.set_ylim(len(results) - 0.4, -0.6)
        axes.set_xlabel(metric)
        axes.grid(axis="x", color=TEXT_COLOR, alpha=0.25)

    return svg_figure(draw, width=7.6, height=0.75 + 0.34 * len(results))


def curves_figure(results: Sequence[SettingResult], metric: str, clock: str) -> Markup | None:
    """Means over seeds, with bands, over "step", "tokens" or "seconds". None where no line has two points.

    The band is the 95 % interval of the mean; with up to MAX_SEEDS_UNJUDGED seeds each seed is a thin line instead.
    """
    every = {one.name: aligned_lines([metric_line(run, metric, clock) for run in one.setting.runs]) for one in results}
    lines, colours = {name: (x, y) for name, (x, y) in every.items() if len(x)}, setting_colours(results)
    if not any(len(x) > 1 for x, _ in lines.values()):
        return None

    def draw(axes: Axes):
        tail = []
        for name, (x, y) in reversed(lines.items()):  # the best on top
            style = dict(color=colours[name], alpha=0.45 if colours[name] == TEXT_COLOR else 1)
            late = x >= IGNORED_START * x[-1] if len(x) >= MIN_DENSE_POINTS else x >= 0
            tail.append(y[:, late].ravel())
            axes.plot(x, y.mean(axis=0), linewidth=1.6, **style)
            if len(y) > MAX_SEEDS_UNJUDGED and colours[name] != TEXT_COLOR:
                low, high = np.array([student_mean(column)[2:] for column in y.T]).T
                axes.fill_between(x, low, high, alpha=0.15, linewidth=0, color=colours[name])
            elif 1 < len(y) <= MAX_SEEDS_UNJUDGED:
                axes.plot(x, y.T, linewidth=0.6, alpha=0.5, color=colours[name])
        low, high = np.min(np.concatenate(tail)), np.max(np.concatenate(tail))
        if high > low:
            axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
        axes.set_xlabel(clock, labelpad=1)
        axes.ticklabel_format(useOffset=False)
        axes.locator_params(nbins=5)
        axes.xaxis.set_major_formatter(EngFormatter(sep="\u00a0"))

    return svg_figure(draw, width=3.9, height=2.5)


def metric_line(run: Run, metric: str, clock: str) -> dict[int, tuple[float, float]]:
    """Step to (clock, metric), of the rows that hold the metric."""
    return {row["step"]: (row[clock], row[metric]) for row in run.rows if metric in row and clock in row}


def aligned_lines(lines: Sequence[Mapping[int, tuple[float, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Clock f[n], the mean over the lines, and metric f[lines, n], at the steps that all of them have."""
    steps = sorted(set.intersection(*(set(each) for each in lines)))
    steps = steps[:: math.ceil(len(steps) / MAX_POINTS) or 1] if len(steps) > MAX_POINTS else steps
    points = np.array([[each[step] for step in steps] for each in lines], float).reshape(len(lines), len(steps), 2)
    return points[..., 0].mean(axis=0), points[..., 1]


def parameter_roles(
    results: Sequence[SettingResult], parameters: Sequence[str]
) -> tuple[str, str | None, list[str]] | None:
    """(parameter on the axis, parameter of the lines, parameters of the panels); None if there is no such figure.

    The axis shows the learning rate, else the number with most values. The lines are widths, else the next parameter.
    """
    count = {key: len({config_value_text(one.setting.config, key) for one in results}) for key in parameters}
    numbers = [
        key
        for key in parameters
        if is_numeric([one.setting.config[key] for one in results if key in one.setting.config])
    ]
    numbers = [key for key in numbers if all(key in one.setting.config for one in results)]
    if not numbers:
        return None
    x = key_ending_in(numbers, "learning_rate") or max(numbers, key=count.get)
    others = [key for key in parameters if key != x]
    if not others:
        return x, None, []
    few = [key for key in others if count[key] <= len(SERIES_COLORS)]
    if not few:
        return None
    by = key_ending_in(few, "width") or max(few, key=count.get)
    panels = [key for key in others if key != by]
    return (x, by, panels) if math.prod(count[key] for key in panels) <= MAX_PANELS else None


def key_ending_in(keys: Sequence[str], name: str) -> str | None:
    return next((key for key in keys if key.rpartition(".")[2] == name), None)


def parameter_lines(
    results: Sequence[SettingResult], metric: str, x: str, by: str | None, panels: Sequence[str]
) -> Markup:
    """The metric with its intervals over parameter `x`: a line for each value of `by`, a panel for the others'."""
    short = short_keys([x, *([by] if by else []), *panels])
    split: dict[str, dict[str, list[SettingResult]]] = {}
    for one in results:
        config = one.setting.config
        title = ", ".join(f"{short[key]}={config_value_text(config, key)}" for key in panels)
        split.setdefault(title, {}).setdefault(config_value_text(config, by) if by else "", []).append(one)
    labels = sorted_texts({label for lines in split.values() for label in lines})
    colours = dict(zip(labels, itertools.cycle(SERIES_COLORS)))

    def draw(grid):
        for axes, (title, lines) in zip(grid.flat, sorted(split.items())):
            for label in labels:
                if label in lines:
                    draw_whiskers(
                        axes, lines[label], x, color=colours[label], label=f"{short[by]}={label}" if by else None
                    )
            axes.set_title(title, fontsize=9)
            axes.set_xlabel(short[x])
            set_ticks(axes, [one.setting.config[x] for one in results])
        grid[0, 0].set_ylabel(metric)
        if by:
            grid[0, -1].legend(frameon=False, labelcolor=TEXT_COLOR, loc="upper left", bbox_to_anchor=(1, 1))

    return svg_figure(draw, width=1.8 + 3.4 * len(split), height=2.9, ncols=len(split), sharey=True, squeeze=False)


def draw_whiskers(axes: Axes, line: Sequence[SettingResult], x: str, **style) -> None:
    line = sorted(line, key=lambda one: one.setting.config[x])
    values = np.array([one.mean.value for one in line])
    reach = np.array([one.mean.high - one.mean.value if math.isfinite(one.mean.se) else 0 for one in line])
    axes.errorbar(
        [one.setting.config[x] for one in line], values, yerr=reach, fmt="-o", markersize=4, capsize=3, **style
    )


def set_ticks(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis for geometric values; a tick at each value while they are few."""
    if is_geometric(values):
        axes.set_xscale("log")
    few = sorted(set(values))
    if len(few) <= 8:
        axes.set_xticks(few, [f"{value:g}" for value in few])
        axes.minorticks_off()


def parameter_slices(results: Sequence[SettingResult], parameters: Sequence[str], metric: str) -> Markup:
    """The mean of every setting over each parameter by itself, as dots: for more parameters than lines can show."""
    short, style = short_keys(parameters), dict(color=SERIES_COLORS[0], markersize=4, alpha=0.7)
    means = [one.mean.value for one in results]

    def draw(grid):
        for axes, key in zip(grid.flat, parameters):
            column = [one.setting.config[key] if key in one.setting.config else None for one in results]
            if is_numeric(column):
                axes.plot(column, means, "o", **style)
                axes.set_xscale("log" if is_geometric(column) else "linear")
            else:
                texts = sorted_texts({config_value_text(one.setting.config, key) for one in results})
                axes.plot(
                    [texts.index(config_value_text(one.setting.config, key)) for one in results], means, "o", **style
                )
                axes.set_xticks(range(len(texts)), texts)
                axes.set_xlim(-0.5, len(texts) - 0.5)
            axes.set_xlabel(short[key])
        for axes in grid.flat[len(parameters) :]:
            axes.set_axis_off()
        grid[0, 0].set_ylabel(metric)

    rows = math.ceil(len(parameters) / PANELS_PER_ROW)
    size = dict(nrows=rows, ncols=min(PANELS_PER_ROW, len(parameters)))
    return svg_figure(draw, width=2.6 * size["ncols"] + 0.6, height=2.5 * rows, sharey=True, squeeze=False, **size)


def heat_map(results: Sequence[SettingResult], x: str, y: str, direction: str) -> Markup:
    """The mean of each pair of values of two parameters, the better the darker; empty where there was no run."""
    columns, rows = (sorted_texts({config_value_text(one.setting.config, key) for one in results}) for key in (x, y))
    short, better = short_keys([x, y]), rank_quality(results, direction)

    def draw(axes: Axes):
        for one in results:
            at = (
                columns.index(config_value_text(one.setting.config, x)),
                rows.index(config_value_text(one.setting.config, y)),
            )
            shade = better[one.name]
            axes.fill([at[0] - 0.49, at[0] + 0.49, at[0] + 0.49, at[0] - 0.49], [at[1] - 0.47] * 2 + [at[1] + 0.47] * 2,
                      color=COLORMAP(0.95 - 0.85 * shade), linewidth=0)  # fmt: skip
            axes.text(
                *at, f"{one.mean.value:#.4g}", ha="center", va="center", color="white" if shade > 0.5 else "black"
            )
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(-0.5, len(rows) - 0.5)
        axes.set_xlabel(short[x])
        axes.set_ylabel(short[y])
        axes.grid(visible=False)

    return svg_figure(draw, width=1.2 + 0.95 * len(columns), height=0.8 + 0.55 * len(rows))


def parallel_coordinates(
    results: Sequence[SettingResult], parameters: Sequence[str], metric: str, direction: str
) -> Markup:
    """Parallel coordinates: a line for each setting through its parameters to its mean, the better the darker."""
    short, better = short_keys(parameters), rank_quality(results, direction)
    columns = [
        axis_heights([one.setting.config[key] if key in one.setting.config else None for one in results])
        for key in parameters
    ]
    columns.append(axis_heights([one.mean.value for one in results]))

    def draw(axes: Axes):
        for one, *heights in sorted(
            zip(results, *(places for places, _ in columns)), key=lambda line: better[line[0].name]
        ):
            axes.plot(range(len(heights)), heights, color=COLORMAP(0.95 - 0.85 * better[one.name]), linewidth=1.4)
        for i, (_, marks) in enumerate(columns):
            axes.axvline(i, color=TEXT_COLOR, linewidth=0.8)
            for height, text in marks.items():
                away = dict(xytext=(-4, 0), ha="right") if i == 0 else dict(xytext=(4, 6))
                axes.annotate(text, (i, height), textcoords="offset points", va="center", fontsize=8, **away)
        axes.set_xticks(range(len(columns)), [*short.values(), metric])
        axes.set_yticks([])
        axes.set_xlim(-0.35, len(columns) - 0.6)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.grid(visible=False)

    return svg_figure(draw, width=1.0 + 1.9 * len(columns), height=3.2)


def axis_heights(column: Sequence[Any]) -> tuple[list[float], dict[float, str]]:
    """Heights from 0 to 1 of a column's values, and the marks of its axis: every value, if they are few."""
    if is_numeric(column) and len(set(column)) > 1:
        x = np.log(column) if is_geometric(column) else np.asarray(column, float)
        places = ((x - x.min()) / (x.max() - x.min())).tolist()
        marks = dict(sorted(zip(places, (f"{value:.4g}" for value in column))))
        all_marks = list(marks.items())
        return places, marks if len(all_marks) <= 8 else dict(
            [all_marks[0], all_marks[len(all_marks) // 2], all_marks[-1]]
        )
    texts = ["–" if value is None else config_value_text({"": value}, "") for value in column]
    distinct = sorted_texts(set(texts))
    heights = {text: i / max(1, len(distinct) - 1) for i, text in enumerate(distinct)}
    return [heights[text] for text in texts], {height: text for text, height in heights.items()}


def importance_bars(importances: Mapping[str, float]) -> Markup:
    """Importance of each parameter, a bar."""
    short = short_keys(list(importances))

    def draw(axes: Axes):
        axes.barh(range(len(importances)), list(importances.values()), color=SERIES_COLORS[0], height=0.6)
        axes.set_yticks(range(len(importances)), list(short.values()))
        axes.set_ylim(len(importances) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of the importance")
        axes.grid(axis="x", color=TEXT_COLOR, alpha=0.25)

    return svg_figure(draw, width=4.4, height=0.75 + 0.34 * len(importances))


def rank_quality(results: Sequence[SettingResult], direction: str) -> dict[str, float]:
    """1 for the best mean and 0 for the worst, by rank, so that one run that diverged does not hide the other
    differences."""
    order = sorted(results, key=lambda one: one.mean.value, reverse=direction == MINIMIZE)
    return {one.name: i / max(1, len(order) - 1) for i, one in enumerate(order)}


def sorted_texts(texts: set[str]) -> list[str]:
    """By number where all are numbers, else by name."""
    try:
        return sorted(texts, key=float)
    except ValueError:
        return sorted(texts)

"""The figure of a ladder: parabolas, best sizes, losses over compute with the larger run predicted, the law."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from lm.runs.html import HELD_OUT_COLOR, SERIES_COLORS, TEXT_COLOR, TRAIN_COLOR
from lm.studies.scaling.isoflop import MAX_EXTRAPOLATION, BudgetRuns, IsoflopFit, IsoflopParabola
from lm.studies.scaling.parametric import ParametricFit
from lm.studies.scaling.runs import COUNTED_FLOPS, SIX_ND, SIX_ND_WITHOUT_EMBEDDING

FIGURE_SIZE = dict(width=9.0, height=7.0, nrows=2, ncols=2)


def draw_figure(
    summary: Mapping[str, Any], grown: Mapping[str, IsoflopFit], laws: Mapping[str, ParametricFit], axes
) -> None:
    draw_isoflops(summary, grown[COUNTED_FLOPS], axes[0, 0])
    draw_best_sizes(summary, grown, axes[0, 1])
    draw_loss_over_compute(summary, laws[SIX_ND], axes[1, 0])
    draw_law_contours(summary, laws[SIX_ND], axes[1, 1])


def runs_by_budget(summary: Mapping[str, Any]) -> dict[float, list[Mapping[str, Any]]]:
    budgets: dict[float, list] = {}
    for run in summary["runs"]:
        budgets.setdefault(run["budget"], []).append(run)
    return budgets


def run_column(runs, name: str) -> np.ndarray:
    return np.array([run[name] for run in runs], np.float64)


def draw_isoflops(summary: Mapping[str, Any], grown: IsoflopFit, axes: Axes) -> None:
    """Loss over size at each budget, its parabola and where that is lowest."""
    for (budget, runs), valley, colour in zip(
        runs_by_budget(summary).items(), grown.minima, itertools.cycle(SERIES_COLORS)
    ):
        n, tokens, flops, loss = (run_column(runs, name) for name in ("parameters", "tokens", "flops", "loss"))
        curve = IsoflopParabola(BudgetRuns(n, tokens, flops, loss))
        fine = np.linspace(np.log(n.min()), np.log(n.max()), 100)
        axes.plot(n, loss, "o", color=colour, markersize=4, label=f"{budget:.1e}")
        axes.plot(np.exp(fine), curve.loss_at(fine), color=colour, linewidth=1.2)
        if np.isfinite(valley.parameters):
            axes.plot(valley.parameters, valley.loss, "v", color=TEXT_COLOR, markersize=6)
    axes.set_xscale("log")
    axes.set_xlabel("parameters N, with embedding")
    axes.set_ylabel("held-out loss, nats a token")
    axes.set_title("at each budget one size is best", fontsize=9)
    axes.legend(title="FLOPs", frameon=False, fontsize=7, title_fontsize=7, labelcolor=TEXT_COLOR)


def draw_best_sizes(summary: Mapping[str, Any], grown: Mapping[str, IsoflopFit], axes: Axes) -> None:
    """The valleys' N and D over compute, by two ways of counting, with their lines."""
    axes.set_title("how the best size and length grow", fontsize=9)
    if not any(
        np.isfinite(valley.flops) for name in (COUNTED_FLOPS, SIX_ND_WITHOUT_EMBEDDING) for valley in grown[name].minima
    ):
        axes.text(0.5, 0.5, "no budget has a best size", ha="center", transform=axes.transAxes)
        return
    for name, marker in ((COUNTED_FLOPS, "o"), (SIX_ND_WITHOUT_EMBEDDING, "s")):
        one = grown[name]
        flops = np.array([valley.flops for valley in one.minima])
        for what, colour, (slope, offset) in zip(("parameters", "tokens"), (TRAIN_COLOR, HELD_OUT_COLOR), one.lines):
            best = np.array([getattr(valley, what) for valley in one.minima])
            label = f"{'N' if what == 'parameters' else 'D'}, {name.split(', N ')[1]}"
            label += f": C^{slope:.2f}" if np.isfinite(slope) else ""
            filled = colour if name == COUNTED_FLOPS else "none"
            axes.plot(flops, best, marker, color=colour, markerfacecolor=filled, markersize=5, label=label)
            known = flops[np.isfinite(flops)]
            if np.isfinite(slope) and len(known):
                ends = np.array([known.min(), summary["prediction"]["rung"]["budget"]])
                axes.plot(ends, np.exp(slope * np.log(ends) + offset), color=colour, linewidth=1.0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs of training C")
    axes.set_ylabel("best parameters N, best tokens D")
    axes.legend(frameon=False, fontsize=7, labelcolor=TEXT_COLOR)


def draw_loss_over_compute(summary: Mapping[str, Any], law: ParametricFit, axes: Axes) -> None:
    """Every run's loss over its compute, the law at its best size, and the larger run: predicted and measured."""
    for runs, colour in zip(runs_by_budget(summary).values(), itertools.cycle(SERIES_COLORS)):
        axes.plot(run_column(runs, "flops"), run_column(runs, "loss"), "o", color=colour, markersize=3.5)
    larger, predicted = summary["larger"], summary["prediction"]["loss"]
    flops = np.geomspace(min(run["flops"] for run in summary["runs"]), 1.3 * larger["flops"], 80)
    low, high = np.array([law.estimate(lambda one, c=c: one.loss(*one.optimum(c)))[2:] for c in flops]).T
    axes.fill_between(flops, low, high, color=TEXT_COLOR, alpha=0.2, linewidth=0)
    axes.plot(
        flops, law.law.loss(*law.law.optimum(flops)), color=TEXT_COLOR, linewidth=1.0, label="law, best N and D of 6ND"
    )
    axes.errorbar(
        larger["flops"] * 1.06,
        predicted["value"],
        yerr=[[predicted["value"] - predicted["low"]], [predicted["high"] - predicted["value"]]],
        fmt="_",
        color=TRAIN_COLOR,
        capsize=4,
        label="predicted, 95 %",
    )
    axes.plot(larger["flops"], larger["loss"], "*", color=HELD_OUT_COLOR, markersize=10, label="then measured")
    axes.set_xscale("log")
    axes.set_xlabel("FLOPs of training C, counted")
    axes.set_ylabel("held-out loss, nats a token")
    axes.set_title("a larger run, predicted before it was made", fontsize=9)
    axes.legend(frameon=False, fontsize=7, labelcolor=TEXT_COLOR)


def draw_law_contours(summary: Mapping[str, Any], law: ParametricFit, axes: Axes) -> None:
    """Contours of the law's loss over N and D, and the runs."""
    runs = [*summary["runs"], summary["larger"]]
    n, d, loss = (run_column(runs, name) for name in ("parameters", "tokens", "loss"))
    x, y = (
        np.geomspace(each.min() / np.exp(MAX_EXTRAPOLATION / 2), each.max() * np.exp(MAX_EXTRAPOLATION / 2), 60)
        for each in (n, d)
    )
    fitted = law.law.loss(*np.meshgrid(x, y))
    levels = np.linspace(loss.min() - 0.1, loss.max() + 0.2, 9)
    contours = axes.contour(x, y, fitted, levels=levels, colors=TEXT_COLOR, linewidths=0.7)
    for budget, colour in zip(runs_by_budget(summary).values(), itertools.cycle(SERIES_COLORS)):
        axes.plot(run_column(budget, "parameters"), run_column(budget, "tokens"), "o", color=colour, markersize=4)
    axes.plot(summary["larger"]["parameters"], summary["larger"]["tokens"], "*", color=HELD_OUT_COLOR, markersize=10)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.clabel(contours, fontsize=7, fmt="%.2f")
    axes.set_xlabel("parameters N, with embedding")
    axes.set_ylabel("tokens D")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    miss = 100 * float(np.sqrt(np.mean(law.errors**2)))
    axes.set_title(f"the law's loss; it misses the runs by {miss:.1f} %", fontsize=9)

"""The results: the curves as numbers, sentences and a table, one page and one figure."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from ml_collections import ConfigDict

from lm.core.statistics import crossed_mean, estimate_text, mean_estimate, signed_number
from lm.runs.console import print_table, say
from lm.runs.html import SERIES_COLORS, TEXT_COLOR, write_figure_page
from lm.runs.workdir import read_json
from lm.studies.overoptimization.curves import (
    BEST_OF_N,
    CURVE_FORMS,
    PPO,
    RewardCurve,
    best_of_n_mean,
    coefficient_estimates,
    gold_decline,
    within_prompt_deviation,
)
from lm.studies.overoptimization.measure import ensemble_scores, proxy_workdir

PAGE_NAME = "overoptimisation"  # of the page and the pictures


def study_summary(
    curves: Sequence[RewardCurve], gold: np.ndarray, proxies: Mapping[int, np.ndarray], root: Path, config: ConfigDict
) -> dict[str, Any]:
    """The curves as points, their fits, whether gold turns down, and what ensembles change."""
    curve_records = []
    for curve in curves:
        highest = int(np.argmax(curve.gold.mean(axis=1)))
        down = gold_decline(curve)
        curve_records.append(
            {
                "name": curve.name,
                "method": curve.method,
                "verdicts": curve.rankings,
                "members": curve.members,
                "stations": list(curve.amounts),
                "distance": curve.distance.tolist(),
                "gold": [mean_estimate(each)._asdict() for each in curve.gold],
                "proxy": [mean_estimate(each)._asdict() for each in curve.proxy],
                "fit": coefficient_estimates(curve, curve.gold),
                "proxy_fit": coefficient_estimates(curve, curve.proxy),
                "highest": highest,
                "fall": down._asdict(),
                "turns": down.high < 0,
            }
        )
    held = {
        size: [read_json(proxy_workdir(root, size, m) / "summary.json") for m in range(config.members)]
        for size in proxies
    }
    return {
        "stage": PAGE_NAME,
        "rater": config.evaluate.rater,
        "prompts": len(gold),
        "samples": gold.shape[1],
        "start": {
            "path": config.init_from,
            "gold": mean_estimate(gold.mean(axis=1))._asdict(),
            "deviation": within_prompt_deviation(gold),
        },
        "members": config.members,
        "pessimism": config.pessimism,
        "proxies": [
            {
                "verdicts": size,
                "accuracy": [one["held_out"]["accuracy"] for one in members],
                "held_out_verdicts": members[0]["about"]["held_out_prompts"],
                "seconds": sum(one["seconds"] for one in members),
            }
            for size, members in held.items()
        ],
        "curves": curve_records,
        "ensembles": ensemble_gains(curves, gold, proxies, config) if config.members > 1 else [],
    }


def ensemble_gains(
    curves: Sequence[RewardCurve], gold: np.ndarray, proxies: Mapping[int, np.ndarray], config: ConfigDict
) -> list[dict[str, Any]]:
    """The ensemble's gold score less a single proxy's at the end of each climb, prompt by prompt.

    For best-of-n against each member, so that its interval covers other members too; for PPO, of one run each, it
    covers prompts only.
    """
    gains = []
    for size, members in proxies.items():
        n, by = gold.shape[1], ensemble_scores(members, config.pessimism)
        each = [best_of_n_mean(gold, by, n) - best_of_n_mean(gold, member, n) for member in members]
        gains.append(
            {
                "method": BEST_OF_N,
                "verdicts": size,
                **crossed_mean(np.array(each) / within_prompt_deviation(gold))._asdict(),
            }
        )
        one, several = (
            next(c for c in curves if (c.method, c.rankings, c.members) == (PPO, size, count))
            for count in (1, len(members))
        )
        gains.append({"method": PPO, "verdicts": size, **mean_estimate(several.gold[-1] - one.gold[-1])._asdict()})
    return gains


def conclusion_sentences(summary: Mapping[str, Any]) -> list[str]:
    """Sentences: the results, with the conclusions that they do not allow."""
    sentences = []
    for curve in summary["curves"]:
        peak, end, down = curve["gold"][curve["highest"]], curve["gold"][-1], curve["fall"]
        reached = (
            f"{curve['name']}: gold {signed_number(end['value'])} at the end (distance {curve['distance'][-1]:.1f})"
        )
        fall = estimate_text(down, "signed")
        top = f"{signed_number(peak['value'])} at {curve['distance'][curve['highest']]:.1f}"
        if curve["turns"]:
            sentences.append(f"{reached}, highest {top}: it turns down, by {fall}.")
        elif curve["highest"] == len(curve["gold"]) - 1:
            sentences.append(f"{reached}, its highest: it does not turn down in this range.")
        else:
            sentences.append(f"{reached}, highest {top}: whether it turns down is inside the noise ({fall}).")
    for one in summary["ensembles"]:
        effect = "helps" if one["low"] > 0 else "harms" if one["high"] < 0 else "makes no difference outside the noise"
        sentences.append(
            f"{one['method']}, {one['verdicts']:,} verdicts: at the end the ensemble {effect} "
            f"({estimate_text(one, 'signed')})."
        )
    sentences.append(
        "Intervals are over prompts. Each climb of PPO is one run, so what another seed would give is not in them."
    )
    return sentences


def print_summary(summary: Mapping[str, Any]) -> None:
    """Fits and turning points as a table on the terminal, then the sentences."""

    def estimate_cell(estimate):
        return estimate_text(estimate, "signed")

    print_table(
        "proxies on held-out verdicts",
        ["", "accuracy of each"],
        [
            [f"{one['verdicts']:,} verdicts", " ".join(f"{a:.3f}" for a in one["accuracy"])]
            for one in summary["proxies"]
        ],
    )
    for method, form in ((BEST_OF_N, "d (alpha - beta d)"), (PPO, "d (alpha - beta log d)")):
        print_table(
            f"{method}: gold = {form}, d the square root of the KL; 95 % intervals",
            ["", "alpha", "beta", "peak", "fall at the end"],
            [
                [
                    curve["name"].removeprefix(f"{method}, "),
                    estimate_cell(curve["fit"]["alpha"]),
                    estimate_cell(curve["fit"]["beta"]),
                    "none" if curve["fit"]["peak"] is None else f"{curve['fit']['peak']:.3g}",
                    estimate_cell(curve["fall"]),
                ]
                for curve in summary["curves"]
                if curve["method"] == method
            ],
        )
    for sentence in conclusion_sentences(summary):
        say(sentence)


def write_page(root: Path, summary: Mapping[str, Any], curves: Sequence[RewardCurve]) -> list[Path]:
    """The page and the figure beside it, as SVG and PNG."""
    rows = sorted({curve.members for curve in curves})
    size = dict(width=9.0, height=0.6 + 3.0 * len(rows), nrows=len(rows), ncols=2, sharey="col", sharex="col")
    draw = functools.partial(draw_figure, summary, rows)
    return write_figure_page(
        root,
        PAGE_NAME,
        "studies/overoptimization/page.html.jinja",
        draw,
        {**size, "squeeze": False},
        root=root,
        summary=summary,
        sentences=conclusion_sentences(summary),
        rows=rows,
    )


def draw_figure(summary: Mapping[str, Any], rows: Sequence[int], axes) -> None:
    """Gold and proxy over the distance: best-of-n left, PPO right; one proxy above, the ensemble below."""
    sizes = dict.fromkeys(curve["verdicts"] for curve in summary["curves"])
    colour = dict(zip(sizes, itertools.cycle(SERIES_COLORS)))
    for curve in summary["curves"]:
        panel = axes[rows.index(curve["members"]), (BEST_OF_N, PPO).index(curve["method"])]
        d = np.array([0.0, *curve["distance"]])
        gold, low, high, proxy = (
            np.array([0.0, *(one[key] for one in curve[column])])
            for column, key in (("gold", "value"), ("gold", "low"), ("gold", "high"), ("proxy", "value"))
        )
        style = dict(color=colour[curve["verdicts"]])
        panel.fill_between(d, low, high, alpha=0.15, linewidth=0, **style)
        panel.plot(d, gold, "-o", linewidth=1.6, markersize=3, **style)
        panel.plot(d, proxy, "--", linewidth=1.2, **style)
        fine = np.linspace(0.02, d.max(), 200)
        alpha, beta = (curve["fit"][name]["value"] for name in ("alpha", "beta"))
        panel.plot(fine, np.array([alpha, beta]) @ CURVE_FORMS[curve["method"]](fine), ":", linewidth=1.4, **style)
    for row, members in enumerate(rows):
        for column, method in enumerate((BEST_OF_N, PPO)):
            panel = axes[row, column]
            panel.axhline(0, color=TEXT_COLOR, linewidth=0.6)
            panel.set_title(f"{method}, {'one proxy' if members == 1 else f'ensemble of {members}'}", fontsize=9)
            if column == 0:
                panel.set_ylabel("gain over the start, in its deviations")
            if row == len(rows) - 1:
                panel.set_xlabel("distance: square root of the KL to the start")
    axes[0, 0].figure.legend(
        handles=legend_handles(colour), loc="outside right upper", frameon=False, labelcolor=TEXT_COLOR
    )


def legend_handles(colours: Mapping[int, str]) -> list[Line2D]:
    kinds = {"gold": "-", "proxy": "--", "fit of gold": ":"}
    return [
        *(Line2D([], [], color=colour, label=f"{size:,} verdicts") for size, colour in colours.items()),
        *(Line2D([], [], color=TEXT_COLOR, linestyle=style, label=kind) for kind, style in kinds.items()),
    ]

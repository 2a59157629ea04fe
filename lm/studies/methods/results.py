"""The results of a contest of methods: numbers with intervals, the conclusions that they allow, tables and the page."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from ml_collections import ConfigDict

from lm.core.config import to_dict
from lm.core.statistics import crossed_mean, estimate_text, interval_text, signed_number
from lm.evaluate.policies import conversation_means
from lm.rewards.rule import RULE
from lm.runs.console import print_table, say
from lm.runs.html import SERIES_COLORS, TEXT_COLOR, rendered_page, svg_figure

START_MODEL = "start"  # the name of the model that all methods start from, among theirs
SHOWN_PROMPTS = 6  # prompts whose answers the page shows

# Of each model and seed, a record of each prompt: conversation, text, tokens, stopped, kl, gold, proxy.
AnswerRecords = Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]


def study_summary(
    answers: AnswerRecords,
    budgets: Mapping[str, Sequence[Mapping[str, Any]]],
    config: ConfigDict,
    sampler: Mapping[str, Any],
) -> dict[str, Any]:
    """Every method against the start and against every other, on the same prompts and with the same draws.

    budgets: of each method and seed, see lm.studies.methods.study.run_budget. sampler: how all were asked.
    """
    conversations = np.array([row["conversation"] for row in answers[START_MODEL][0]])

    def scores(name: str, column: str) -> np.ndarray:  # [seeds, conversations]
        return conversation_means(np.array([[row[column] for row in rows] for rows in answers[name]]), conversations)

    def estimates(name: str) -> dict[str, Any]:
        means = {column: crossed_mean(scores(name, column))._asdict() for column in ("gold", "proxy", "kl", "tokens")}
        share = crossed_mean(scores(name, "stopped"))
        return {**means, "stopped": share._replace(low=max(share.low, 0.0), high=min(share.high, 1.0))._asdict()}

    gold = {name: scores(name, "gold") for name in answers}
    gains = {name: gold[name] - gold[START_MODEL] for name in budgets}
    methods = {
        name: {
            "stage": config[name].stage.name,
            **estimates(name),
            "gain": crossed_mean(gain)._asdict(),
            "where": interval_position(crossed_mean(gain)._asdict()),
            "seeds": [
                {"seed": seed, "gain": float(each.mean()), "kl": float(far.mean())}
                for seed, each, far in zip(config.seeds, gain, scores(name, "kl"))
            ],
            "proxy_gain": crossed_mean(scores(name, "proxy") - scores(START_MODEL, "proxy"))._asdict(),
            "budget": {
                key: None if budgets[name][0][key] is None else float(np.mean([each[key] for each in budgets[name]]))
                for key in budgets[name][0]
            },
        }
        for name, gain in gains.items()
    }
    best_first = sorted(methods, key=lambda name: -methods[name]["gain"]["value"])
    pairs = [
        {"a": a, "b": b, **crossed_mean(gold[a] - gold[b])._asdict()} for a, b in itertools.combinations(best_first, 2)
    ]
    return {
        "stage": "contest",
        "rater": config.evaluate.rater,
        "conversations": int(conversations.max()) + 1,
        "prompts": len(conversations),
        "seeds": list(config.seeds),
        "rollouts": config.rollouts,
        "sampler": dict(sampler),
        "start": {"path": config.init_from, **estimates(START_MODEL)},
        "methods": {name: methods[name] for name in best_first},
        "pairs": [{**pair, "where": interval_position(pair)} for pair in pairs],
        "seconds": sum(each["seconds"] for runs in budgets.values() for each in runs),
    }


def interval_position(estimate: Mapping[str, float]) -> str:
    """Whether the interval is above, below or across zero."""
    return "above zero" if estimate["low"] > 0 else "below zero" if estimate["high"] < 0 else "across zero"


def conclusion_sentences(summary: Mapping[str, Any]) -> list[str]:
    """The conclusions about each method and about the differences between them."""
    plain = {
        "above zero": "its interval lies above zero: it beats the start",
        "below zero": "its interval lies below zero: it is worse than the start",
        "across zero": "its interval includes zero: no difference from the start can be shown",
    }
    sentences = [
        f"{name}: {estimate_text(one['gain'], 'signed')}; {plain[one['where']]}."
        for name, one in summary["methods"].items()
    ]
    pairs = [
        (pair["where"] == "across zero", f"{pair['a']} and {pair['b']} ({estimate_text(pair, 'signed')})")
        for pair in summary["pairs"]
    ]
    for noise, title in ((True, "Inside the noise"), (False, "Outside the noise")):
        if names := [text for inside, text in pairs if inside == noise]:
            sentences.append(f"{title}: {', '.join(names)}.")
    if len(summary["seeds"]) == 1:
        sentences.append("With a single seed the intervals say nothing of what another seed would give.")
    return sentences


def print_results(summary: Mapping[str, Any]) -> None:
    """The results and the budgets as tables on the terminal, then the sentences."""
    models = {START_MODEL: summary["start"], **summary["methods"]}
    print_table(
        f"{summary['prompts']} unseen prompts of {summary['conversations']} conversations, "
        f"{len(summary['seeds'])} seeds; 95 % intervals",
        ["", "gold", "over start", "", "proxy", "KL", "tokens", "ended"],
        [
            [
                name,
                f"{one['gold']['value']:.2f}",
                signed_number(one["gain"]["value"]) if "gain" in one else "",
                interval_text(one["gain"], "signed") if "gain" in one else "",
                signed_number(one["proxy"]["value"]),
                f"{one['kl']['value']:z.2f}",
                f"{one['tokens']['value']:.1f}",
                f"{one['stopped']['value']:.2f}",
            ]
            for name, one in models.items()
        ],
    )
    print_table(
        "what each run was given and took, mean over seeds",
        ["", "answers", "tokens sampled", "passes", "tokens trained on", "seconds"],
        [
            [
                name,
                f"{one['budget']['answers']:,.0f}",
                f"{one['budget']['sampled']:,.0f}",
                f"{one['budget']['passes']:.2g}",
                f"{one['budget']['learnt']:,.0f}",
                f"{one['budget']['seconds']:.0f}",
            ]
            for name, one in summary["methods"].items()
        ],
    )
    for sentence in conclusion_sentences(summary):
        say(sentence)


def results_page(
    root: Path, summary: Mapping[str, Any], answers: AnswerRecords, configs: Mapping[str, ConfigDict]
) -> str:
    """The contest as one self-contained HTML page without scripts. configs: of each method, what lm train got."""
    firsts = list({row["conversation"]: i for i, row in reversed(list(enumerate(answers[START_MODEL][0])))}.values())[
        ::-1
    ]
    names = [START_MODEL, *summary["methods"]]
    examples = [
        {"prompt": answers[START_MODEL][0][i]["prompt"], "answers": {name: answers[name][0][i] for name in names}}
        for i in firsts[:SHOWN_PROMPTS]
    ]
    return rendered_page(
        "studies/methods/page.html.jinja",
        root=root,
        summary=summary,
        sentences=conclusion_sentences(summary),
        gains=gains_figure(summary),
        against_kl=gains_over_kl_figure(summary),
        rule=RULE if summary["rater"] == "rule" else "",
        shown=examples,
        configs={name: json.dumps(to_dict(config), indent=2) for name, config in configs.items()},
    )


def coloured_methods(summary: Mapping[str, Any]):
    """(name, its results, its colour), the best method first."""
    return zip(summary["methods"], summary["methods"].values(), itertools.cycle(SERIES_COLORS))


def gains_figure(summary: Mapping[str, Any]) -> Markup:
    """Gold score minus the start's: the mean with its interval, and each seed as a dot below it."""

    def draw(axes: Axes):
        for y, (_, result, colour) in enumerate(coloured_methods(summary)):
            gain, seeds = result["gain"], [one["gain"] for one in result["seeds"]]
            reach = [[gain["value"] - gain["low"]], [gain["high"] - gain["value"]]]
            axes.errorbar([gain["value"]], [y], xerr=reach, fmt="o", color=colour, capsize=3)
            axes.plot(seeds, [y + 0.25] * len(seeds), "o", color=colour, markersize=3.5, alpha=0.6)
        axes.axvline(0, color=TEXT_COLOR, linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(summary["methods"])), list(summary["methods"]))
        axes.set_ylim(len(summary["methods"]) - 0.4, -0.6)
        axes.set_xlabel("gold score minus the start's")
        axes.grid(axis="x", color=TEXT_COLOR, alpha=0.25)

    return svg_figure(draw, width=5.2, height=0.75 + 0.42 * len(summary["methods"]))


def gains_over_kl_figure(summary: Mapping[str, Any]) -> Markup:
    """The same over the KL to the start: the gain for a nat."""

    def draw(axes: Axes):
        axes.plot([0], [0], "s", color=TEXT_COLOR, markersize=5, label="start")
        for name, result, colour in coloured_methods(summary):
            gain, kl = result["gain"], result["kl"]["value"]
            reach = [[gain["value"] - gain["low"]], [gain["high"] - gain["value"]]]
            axes.errorbar([kl], [gain["value"]], yerr=reach, fmt="o", color=colour, capsize=3, label=name)
            seeds = np.array([(one["kl"], one["gain"]) for one in result["seeds"]]).T
            axes.plot(*seeds, "o", color=colour, markersize=3.5, alpha=0.6)
        axes.axhline(0, color=TEXT_COLOR, linewidth=0.8, linestyle="--")
        axes.set_xlabel("KL to the start, nats an answer")
        axes.set_ylabel("gold score minus the start's")
        axes.legend(frameon=False, labelcolor=TEXT_COLOR, loc="upper left", bbox_to_anchor=(1, 1))

    return svg_figure(draw, width=5.2, height=3.0)

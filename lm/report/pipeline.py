"""Writes the report page of a pipeline or of a single stage, from the files in its folder.

    python -m lm report --workdir=runs/quickstart
    python -m lm report --workdir=runs/quickstart/sft

Writes WORKDIR/report.html, one file without scripts. It mentions stages that have not finished and leaves them out. The
page of a single stage is made by lm.report.run; the rest of this file is about pipelines.
"""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from lm.core.config import parsed_flags
from lm.core.errors import UserError
from lm.core.statistics import Estimate, interval_text, percent_text, signed_number
from lm.data import conversations, packing, preferences, sources
from lm.data.inspect import row_views
from lm.data.loading import load_conversations
from lm.data.mixture import parse_sources
from lm.report import reward_model
from lm.report.run import StageRun, metric_figures, shown_rollouts, stage_run, write_run_page
from lm.report.terms import TERMS
from lm.rewards import assistant
from lm.rewards.rule import CRITERIA, RULE, criterion_scores
from lm.rewards.verifiers.skills import ALL_SKILLS
from lm.runs.console import run_program, say
from lm.runs.html import SERIES_COLORS, interval_plot, rendered_page, svg_figure
from lm.runs.workdir import CONFIG_FILE, PIPELINE_FILE, REPORT_FILE, TOKENIZER_FILE, read_json, read_metrics, write_text
from lm.stages.pretraining import sft
from lm.tokenizer import encode_chat, load_tokenizer

FLAGS = {"workdir": dict(required=True, metavar="DIR", help="the folder of a pipeline, or of one stage")}
SHOWN_ANSWERS, SHOWN_RANKINGS = 8, 2
SHOWN_SKILL_ANSWERS = 12  # of an evaluation by skill
PACKED_EXCERPTS = 12  # excerpts that are packed into rows, to show one row

# What each stage did, in the words and numbers of its own summary.
STAGE_DESCRIPTIONS = {
    "tokenizer": "A vocabulary of {vocab_size:,} pieces; {bytes_per_token:.2f} bytes a token on held-out text",
    "pretrain": "Predicts every next token of {about[documents]:,} documents",
    "sft": "Learns to reply from {about[conversations]:,} conversations",
    "rank": "The SFT model answers {prompts:,} prompts more than once and the rater orders the answers: "
    "{decided:,} pairs decided, {tied:,} tied",
    "reward": "Learns the rater's taste from {about[pairs]:,} pairs",
    "ppo": "Improves the SFT model with the learned reward",
    "evaluate": "Asks every model the same {prompts:,} unseen prompts",
}


# Raters whose rule is shown: its text, and the weight of each criterion.
PUBLISHED_RULES = {
    "rule": (RULE, {name: weight for name, (weight, _) in CRITERIA.items()}),
    "assistant": (
        assistant.ASSISTANT_RULE,
        {
            **{name: weight for name, (weight, _) in assistant.CHECKED_CRITERIA.items()},
            **{name: weight for name, (weight, _) in assistant.SMALL_TALK_CRITERIA.items()},
            assistant.SAMENESS: assistant.SAMENESS_WEIGHT,
        },
    ),
}


def write_report(root: str | Path) -> Path:
    """Writes the page of the run in `root` and returns its path. UserError for any other folder."""
    root = Path(root)
    if (root / PIPELINE_FILE).exists():
        return write_pipeline_page(root)
    if "stage" not in stage_run(root).config:
        raise UserError(
            f"{root} is no run of lm pipeline or lm train: it holds no {PIPELINE_FILE}, nor a stage's {CONFIG_FILE}"
        )
    return write_run_page(root)


def write_pipeline_page(root: Path) -> Path:
    """The page of all stages."""
    record = read_json(root / PIPELINE_FILE)
    run = {name: stage_run(root / name) for name in record["stages"]}
    evaluation, verdicts = finished_summary(run, "evaluate"), finished_summary(run, "rank")
    numbers = root / "reward" / reward_model.NUMBERS_FILE
    tasted = read_json(numbers) if finished_summary(run, "reward") and numbers.exists() else {}
    lines = [stage_row(found, record) for found in run.values() if found.summary]
    page = rendered_page(
        "report/pipeline.html.jinja",
        root=root,
        claims=headline_figures(run),
        missing=[name for name, found in run.items() if not found.summary],
        ran=lines,
        crowded=any(line["mfu"] and line["mfu"] > 1 for line in lines),
        seconds=sum(record["seconds"].values()),
        curves=[figure for found in run.values() if found.summary for figure in metric_figures(found)],
        evaluation=evaluation,
        models={name: run["evaluate"].config["models"][name] for name in evaluation["models"]} if evaluation else {},
        whiskers=score_figure(evaluation["models"]) if evaluation else "",
        skills=evaluation["skills"] if evaluation and "skills" in evaluation else {},
        skill_picture=skill_figure(evaluation["skills"]) if evaluation and "skills" in evaluation else "",
        terms=TERMS,
        colors=SERIES_COLORS,
        stopped={n: found.summary["over_optimization"] for n, found in run.items() if is_stopped(found)},
        rules=PUBLISHED_RULES,
        rater=verdicts["rater"] if verdicts else "",
        rankings=example_rankings(root / "rank" / "rankings.jsonl") if verdicts else [],
        taste=tasted,
        tasted=reward_model.reward_model_figures(tasted) if tasted else [],
        answers=shown_answers(root / "evaluate", evaluation) if evaluation else [],
        rollouts={name: shown_rollouts(root / name) for name, found in run.items() if found.summary},
        row=packed_row_example(root / "sft", run["sft"].config) if finished_summary(run, "sft") else None,
        configs={name: json.dumps(found.config, indent=2) for name, found in run.items()},
    )
    write_text(root / REPORT_FILE, page)
    return root / REPORT_FILE


def finished_summary(run: Mapping[str, StageRun], name: str) -> Mapping[str, Any]:
    """The summary of a stage; empty if the run has no such stage or it has not finished."""
    return run[name].summary if name in run else {}


def headline_figures(run: Mapping[str, StageRun]) -> list[dict[str, str]]:
    """The headline: the main results of the run, as measured."""
    found = []
    if pretrain := finished_summary(run, "pretrain"):
        before, after = (pretrain[side]["bits_per_byte"] for side in ("before", "held_out"))
        found.append(
            {
                "title": "Pretraining: bits per byte of held-out text",
                "figure": f"{before:.2f} → {after:.2f}",
                "note": "before and after; the compressor xz -9 needs "
                f"{pretrain['about']['xz_bits_per_byte']:.2f} on the same text",
            }
        )
    evaluation = finished_summary(run, "evaluate")
    if evaluation and "skills" in evaluation:
        found = skills_claim(evaluation) + found
    if evaluation and len(evaluation["models"]) > 1:
        names = list(evaluation["models"])[:2]
        sides = [evaluation["models"][name]["stopped"] for name in names]
        found.append(
            {
                "title": f"Answers that end by themselves: {' → '.join(names)}",
                "figure": " → ".join(percent_text(side["value"]) for side in sides),
                "note": f"within {evaluation['sampler']['max_new']} tokens, on {evaluation['prompts']} unseen prompts; "
                f"95\u00a0% intervals {' and '.join(interval_text(side, 'percent') for side in sides)}",
            }
        )
    if reward := finished_summary(run, "reward"):
        held_out = reward["held_out"]
        found.append(
            {
                "title": "Reward model: accuracy on pairs it never saw",
                "figure": f"{100 * held_out['accuracy']:.1f} ± {100 * held_out['accuracy_se']:.1f}\u00a0%",
                "note": f"± one standard error; {reward['about']['held_out_prompts']} prompts; a coin gets 50\u00a0%; "
                f"correlation of score and length {signed_number(held_out['length_correlation'])}",
            }
        )
    if evaluation and evaluation["comparisons"]:
        last = evaluation["comparisons"][-1]
        gain, wins = last["difference"], last["win_rate"]
        zero = "above zero" if gain["low"] > 0 else "below zero" if gain["high"] < 0 else "which includes zero"
        found.append(
            {
                "title": f"{last['a']} over {last['b']} in the rater's score",
                "figure": signed_number(gain["value"]),
                "note": f"95\u00a0% interval {interval_text(gain, 'signed')}, {zero}; "
                f"wins {percent_text(wins['value'])} {interval_text(wins, 'percent')} of the prompts, ties count half",
            }
        )
    return found


def shown_answers(path: Path, evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first prompts of an evaluation with every model's answer."""
    return read_metrics(path / "answers.jsonl")[: SHOWN_SKILL_ANSWERS if "skills" in evaluation else SHOWN_ANSWERS]


def skills_claim(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """How much of what was asked is right, of every model."""
    row = evaluation["skills"][ALL_SKILLS]
    last = row["differences"][-1] if row["differences"] else None
    note = f"mean over the skills, on {row['prompts']} prompts of which no stage has seen one"
    if last:
        note += f"; {last['a']} over {last['b']} {points_text(last['difference'])}"
    return [
        {
            "title": f"Right answers: {' → '.join(row['models'])}",
            "figure": " → ".join(percent_text(each["value"]) for each in row["models"].values()),
            "note": note,
        }
    ]


def points_text(difference: Mapping[str, float]) -> str:
    """A difference of shares with its interval, in percentage points: "+2.1 [+0.4, +3.8] points"."""
    value, low, high = (f"{100 * difference[key]:+.1f}".replace("-", "−") for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}] points"


def is_stopped(stage: StageRun) -> bool:
    """Whether its gauge of over-optimization ended it (lm.train.over_optimization)."""
    return "over_optimization" in stage.summary


def skill_figure(skills: Mapping[str, Any]) -> Markup:
    """The share of right answers by skill, a dot with its 95 % interval for each model."""

    def draw(axes: Axes):
        names = list(next(iter(skills.values()))["models"])
        for i, (name, color) in enumerate(zip(names, SERIES_COLORS)):
            found = [Estimate(**row["models"][name]) for row in skills.values()]
            value, low, high = (100 * np.array([getattr(e, key) for e in found]) for key in ("value", "low", "high"))
            places = np.arange(len(found)) + 0.22 * (i - (len(names) - 1) / 2)
            errors = [np.maximum(value - low, 0), np.maximum(high - value, 0)]
            axes.errorbar(value, places, xerr=errors, fmt="o", color=color, capsize=2, markersize=5, label=name)
        axes.set_yticks(range(len(skills)), [group.replace("_", " ") for group in skills])
        axes.set_ylim(len(skills) - 0.5, -0.5)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("right answers, %")
        axes.grid(axis="x", alpha=0.25)
        axes.legend(frameon=False, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return svg_figure(draw, width=5.2, height=0.9 + 0.42 * len(skills))


def stage_row(stage: StageRun, record: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the table of stages; None where a stage has no such number."""
    return {
        "name": stage.name,
        "did": STAGE_DESCRIPTIONS[stage.name].format(**stage.summary) if stage.name in STAGE_DESCRIPTIONS else "",
        **dict.fromkeys(("steps", "tokens", "parameters", "model_flops", "mfu")),
        **stage.summary,
        "seconds": record["seconds"][stage.name] if stage.name in record["seconds"] else None,
    }


def score_figure(models: Mapping[str, Mapping[str, Any]]) -> Markup:
    """The rater's score of each model as a dot with its 95 % interval."""
    found = {name: Estimate(**told["score"]) for name, told in models.items()}
    return interval_plot(found, "the rater's score, with its 95 % interval")


def example_rankings(path: Path) -> list[dict[str, Any]]:
    """The first rankings of a file that prefer one answer to another: best answer first, with the rule's reasons."""
    decided = [ranking for ranking in preferences.read_jsonl_rankings(path) if preferences.preference_pairs(ranking)]
    return [
        {
            "prompt": ranking.prompt,
            "responses": sorted(
                (
                    {
                        "rank": rank,
                        "text": text,
                        "why": criterion_scores(ranking.prompt, text) if ranking.rater == "rule" else {},
                    }
                    for rank, text in zip(ranking.ranking, ranking.responses)
                ),
                key=lambda response: response["rank"],
            ),
        }
        for ranking in decided[:SHOWN_RANKINGS]
    ]


def packed_row_example(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The last row of the first SFT excerpts, packed again. It is the row with most padding."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(sft.batches).parameters.items()}
    options = {**defaults, **config["data"]}
    try:
        tokenizer = load_tokenizer(path / TOKENIZER_FILE)
        name = parse_sources(options["sources"], {})[0].names[0]
        loaded = load_conversations(name, columns=options["columns"], skip_bad_rows=options["skip_bad_rows"])
        seen, _ = sources.split_held_out(loaded, options["held_out"])
        excerpts = conversations.conversation_excerpts(seen[:PACKED_EXCERPTS], turns=options["turns"])[:PACKED_EXCERPTS]
        packed, _ = packing.packed_rows(
            [encode_chat(tokenizer, excerpt.messages) for excerpt in excerpts], options["length"]
        )
    except UserError as error:
        return {"length": options["length"], "segments": [], "error": str(error)}
    return {"length": options["length"], "segments": row_views(tokenizer, packed, len(packed.inputs) - 1), "error": ""}


def program(argv: list[str]) -> None:
    flags = parsed_flags(argv, __doc__, FLAGS)
    say(f"report: {write_report(flags.workdir)}")


if __name__ == "__main__":
    run_program(program)

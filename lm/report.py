"""One page that shows what a pipeline's run came to, made from the files in its folder.

    python -m lm.report --workdir=runs/quickstart

Writes WORKDIR/report.html: self-contained, without scripts. Stages that have not finished are left out with a word.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from lm import taste
from lm.config import parsed
from lm.console import main, say
from lm.data import chats, corpus, rankings, rows
from lm.errors import UserError
from lm.intervals import Estimate
from lm.pages import HELD_OUT, TRAIN, interval, percent, signed, svg, templates, whiskers
from lm.rewards.rule import CRITERIA, RULE, explain
from lm.stages import JUDGES, SAMPLERS, TAUGHT, sft
from lm.tokenizer import Tokenizer, chat
from lm.types import Tokens
from lm.workdir import CONFIG, PIPELINE, ROLLOUTS, SUMMARY, TOKENIZER, read_json, read_metrics, write_text

PAGE = "report.html"
FLAGS = {"workdir": dict(required=True, metavar="DIR", help="the folder of a pipeline's run")}
SHOWN_ANSWERS, SHOWN_RANKINGS, PACKED = 8, 2, 12  # answers and rankings shown; excerpts packed into rows to show one
SHOWN_ROLLOUTS = 4  # answers of a policy shown from the first batch that was logged, and as many from the last
SMOOTHING = 10  # a smoothed line is the mean of about a tenth of the points

# What each stage did, in the words and numbers of its own summary.
DONE = {
    "tokenizer": "A vocabulary of {vocab_size:,} pieces; {bytes_per_token:.2f} bytes a token on held-out text",
    "pretrain": "Predicts every next token of {about[documents]:,} documents",
    "sft": "Learns to reply from {about[conversations]:,} conversations",
    "rank": "The SFT model answers {prompts:,} prompts more than once and the rater orders the answers: "
    "{decided:,} pairs decided, {tied:,} tied",
    "reward": "Learns the rater's taste from {about[pairs]:,} pairs",
    "ppo": "Improves the SFT model by the learnt taste",
    "evaluate": "Asks every model the same {prompts:,} unseen prompts",
}
# Stages whose batches are sampled: their model FLOPs leave out most of the work.
SAMPLED = {*SAMPLERS, "gkd"}


class Panel(NamedTuple):
    metric: str
    title: str
    note: str
    held_out: bool = True  # whether its held-out value means anything


LOSS = Panel("loss", "Loss", "Surprise at the next token, in nats; lower is better.")
JUDGING = (
    Panel("loss", "Loss", "−log of the probability given to the rater's verdict; a coin flip costs 0.69."),
    Panel("accuracy", "Accuracy on pairs", "How often the answer that the rater preferred gets the higher score."),
)
LEARNING = (
    Panel("reward", "Reward", "What an answer is worth to the policy: what it is trained to raise."),
    Panel("reward/", "A part of the reward", "One of the rewards whose weighted sum the policy is trained to raise."),
    Panel("score/", "The rater's own score", "The policy never sees it; it judges the learnt reward."),
    Panel("kl", "KL to the starting model", "How far the policy has moved, in nats an answer; moving costs reward."),
    Panel("entropy", "Entropy", "How undecided the policy is, in nats a token; near 0 it says one thing only."),
    Panel("clip_fraction", "Clip fraction", "Share of tokens that an update moved beyond the clip.", False),
    Panel("explained_variance", "Explained variance", "How much of the returns the value head foresees; 1: all."),
    Panel("equal_groups", "Groups alike", "Share of prompts whose answers are all worth the same: they teach nothing."),
    Panel("response_length", "Tokens an answer", "A reward may come to favour long answers, or short ones."),
    Panel("stopped", "Ended by itself", "Share of answers; the rest were cut off by the limit."),
)
PREFERRING = (
    Panel("loss", "Loss", "What the verdicts cost the policy; lower is better."),
    Panel("accuracy", "Accuracy on pairs", "How often the policy's own reward prefers what the rater preferred."),
    Panel("margin", "Margin", "By how much, in units of that reward."),
    Panel("chosen_logprob", "Log-probability of the preferred", "Falling: the policy leaves both answers behind."),
)
FOLLOWING = (
    Panel("divergence", "Divergence from the teacher", "In nats a token, on what people wrote."),
    Panel("own_divergence", "The same, on its own words", "On answers that the student sampled."),
    LOSS,
)
PANELS: Mapping[str, Sequence[Panel]] = {
    "pretrain": (LOSS,),
    "sft": (LOSS._replace(note="Surprise at the tokens of replies, in nats; what others say is not counted."),),
    **dict.fromkeys(JUDGES, JUDGING),
    **dict.fromkeys(("dpo", "ipo", "kto", "orpo", "simpo"), PREFERRING),
    **dict.fromkeys(TAUGHT, FOLLOWING),
    **dict.fromkeys(SAMPLERS, LEARNING),
}


class Stage(NamedTuple):
    name: str
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]  # of metrics.jsonl
    summary: Mapping[str, Any]  # empty while it has not finished

    @property
    def method(self) -> str:
        """The stage it trained; a program that trains nothing goes by its own name."""
        return self.config["stage"]["name"] if "stage" in self.config else self.name


class Piece(NamedTuple):
    text: str
    kind: str  # "trained", "context" or "padding"


def write(root: str | Path) -> Path:
    """Writes the page of the run in `root` and returns its path."""
    root = Path(root)
    record = read_json(root / PIPELINE)
    run = {name: stage(root / name) for name in record["stages"]}
    template = templates().get_template("report.html.jinja")
    evaluation, verdicts = finished(run, "evaluate"), finished(run, "rank")
    numbers = root / "reward" / taste.NUMBERS
    tasted = read_json(numbers) if finished(run, "reward") and numbers.exists() else {}
    lines = [ran(found, record) for found in run.values() if found.summary]
    page = template.render(
        root=root,
        claims=claims(run),
        missing=[name for name, found in run.items() if not found.summary],
        ran=lines,
        crowded=any(line["fraction"] and line["fraction"] > 1 for line in lines),
        seconds=sum(record["seconds"].values()),
        ceiling=record["matmul_flops"],
        curves=[figure for found in run.values() if found.summary for figure in figures(found)],
        evaluation=evaluation,
        models={name: run["evaluate"].config["models"][name] for name in evaluation["models"]} if evaluation else {},
        whiskers=scores(evaluation["models"]) if evaluation else "",
        rule=RULE,
        criteria={name: weight for name, (weight, _) in CRITERIA.items()},
        rater=verdicts["rater"] if verdicts else "",
        rankings=judged(root / "rank" / "rankings.jsonl") if verdicts else [],
        taste=tasted,
        tasted=taste.figures(tasted) if tasted else [],
        answers=read_metrics(root / "evaluate" / "answers.jsonl")[:SHOWN_ANSWERS] if evaluation else [],
        rollouts={name: said(root / name) for name, found in run.items() if found.summary},
        row=shown_row(root / "sft", run["sft"].config) if finished(run, "sft") else None,
        configs={name: json.dumps(found.config, indent=2) for name, found in run.items()},
    )
    write_text(root / PAGE, page)
    return root / PAGE


def stage(path: Path) -> Stage:
    """What a workdir tells; all of it empty where there is none."""
    config, summary = (read_json(path / file) if (path / file).exists() else {} for file in (CONFIG, SUMMARY))
    return Stage(path.name, config, read_metrics(path), summary)


def finished(run: Mapping[str, Stage], name: str) -> Mapping[str, Any]:
    """The summary of a stage; empty if the run has no such stage or it has not finished."""
    return run[name].summary if name in run else {}


def claims(run: Mapping[str, Stage]) -> list[dict[str, str]]:
    """The headline: what the run was to show, as measured."""
    found = []
    if pretrain := finished(run, "pretrain"):
        before, after = (pretrain[side]["bits_per_byte"] for side in ("before", "held_out"))
        found.append(
            {
                "title": "Pretraining: bits per byte of held-out text",
                "figure": f"{before:.2f} → {after:.2f}",
                "note": "before and after; the compressor xz -9 needs "
                f"{pretrain['about']['xz_bits_per_byte']:.2f} on the same text",
            }
        )
    evaluation = finished(run, "evaluate")
    if evaluation and len(evaluation["models"]) > 1:
        names = list(evaluation["models"])[:2]
        sides = [evaluation["models"][name]["stopped"] for name in names]
        found.append(
            {
                "title": f"Answers that end by themselves: {' → '.join(names)}",
                "figure": " → ".join(percent(side["value"]) for side in sides),
                "note": f"within {evaluation['sampler']['max_new']} tokens, on {evaluation['prompts']} unseen prompts; "
                f"95\u00a0% intervals {' and '.join(interval(side, 'percent') for side in sides)}",
            }
        )
    if reward := finished(run, "reward"):
        held_out = reward["held_out"]
        found.append(
            {
                "title": "Reward model: accuracy on pairs it never saw",
                "figure": f"{100 * held_out['accuracy']:.1f} ± {100 * held_out['accuracy_se']:.1f}\u00a0%",
                "note": f"± one standard error; {reward['about']['held_out_prompts']} prompts; a coin gets 50\u00a0%; "
                f"correlation of score and length {signed(held_out['length_correlation'])}",
            }
        )
    if evaluation and evaluation["comparisons"]:
        last = evaluation["comparisons"][-1]
        gain, wins = last["difference"], last["win_rate"]
        zero = "above zero" if gain["low"] > 0 else "below zero" if gain["high"] < 0 else "which includes zero"
        found.append(
            {
                "title": f"{last['a']} over {last['b']} in the rater's score",
                "figure": signed(gain["value"]),
                "note": f"95\u00a0% interval {interval(gain, 'signed')}, {zero}; "
                f"wins {percent(wins['value'])} {interval(wins, 'percent')} of the prompts, a tie counting half",
            }
        )
    return found


def ran(stage: Stage, record: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the table of stages; None where a stage has no such number."""
    return {
        "name": stage.name,
        "did": DONE[stage.name].format(**stage.summary) if stage.name in DONE else "",
        **dict.fromkeys(("steps", "tokens", "parameters", "model_flops")),
        **stage.summary,
        "seconds": record["seconds"][stage.name] if stage.name in record["seconds"] else None,
        "fraction": ceiling_fraction(stage, record["matmul_flops"]),
    }


def ceiling_fraction(stage: Stage, ceiling: float) -> float | None:
    """Model FLOPs a token, times the median tokens a second, over `ceiling` FLOP/s; None where that says nothing."""
    summary = stage.summary
    if stage.method in SAMPLED or not {"model_flops", "tokens", "tokens_per_second"} <= set(summary):
        return None
    return summary["model_flops"] / summary["tokens"] * summary["tokens_per_second"] / ceiling


def figures(stage: Stage) -> list[tuple[str, Panel, Markup]]:
    """A curve for each panel of the stage that has a metric; "score/" stands for every metric that begins so."""
    logged = dict.fromkeys(name for row in stage.rows for name in row)
    return [
        (stage.name, panel, curve(stage.rows, name, held_out=panel.held_out))
        for panel in (PANELS[stage.method] if stage.method in PANELS else ())
        for name in logged
        if name == panel.metric or panel.metric.endswith("/") and name.startswith(panel.metric)
    ]


def curve(rows: Sequence[Mapping[str, Any]], metric: str, *, held_out: bool = True) -> Markup:
    """A metric over the steps: as logged, smoothed where there are many points, and held out as dots."""

    def points(name):
        return np.array([(row["step"], row[name]) for row in rows if name in row], float).reshape(-1, 2).T

    def draw(axes: Axes):
        steps, values = points(metric)
        dense = len(values) >= 2 * SMOOTHING
        axes.plot(steps, values, color=TRAIN, alpha=0.5 if dense else 1, linewidth=0.8 if dense else 1.6)
        if dense:
            axes.plot(steps, smoothed(values), color=TRAIN, linewidth=1.8)
        if held_out:
            axes.plot(*points(f"held_out/{metric}"), "o", color=HELD_OUT, markersize=4.5, zorder=3)
        axes.set_xlabel("step", labelpad=1)
        axes.ticklabel_format(useOffset=False)
        axes.locator_params(nbins=5)
        axes.margins(y=0.12)

    return svg(draw, width=3.0, height=1.9)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred means over a tenth of the values; fewer near the ends, so that both ends stay where they are."""
    half = len(values) // (2 * SMOOTHING)
    reach = [min(half, i, len(values) - 1 - i) for i in range(len(values))]
    return np.array([values[i - r : i + r + 1].mean() for i, r in enumerate(reach)])


def scores(models: Mapping[str, Mapping[str, Any]]) -> Markup:
    """The rater's score of each model as a dot with its 95 % interval."""
    found = {name: Estimate(**told["score"]) for name, told in models.items()}
    return whiskers(found, "the rater's score, with its 95 % interval")


def judged(path: Path) -> list[dict[str, Any]]:
    """The first rankings of a file that prefer one answer to another: best answer first, with the rule's reasons."""
    decided = [ranking for ranking in rankings.read(path) if rankings.pairs(ranking)]
    return [
        {
            "prompt": ranking.prompt,
            "responses": sorted(
                (
                    {
                        "rank": rank,
                        "text": text,
                        "why": explain(ranking.prompt, text) if ranking.rater == "rule" else {},
                    }
                    for rank, text in zip(ranking.ranking, ranking.responses)
                ),
                key=lambda response: response["rank"],
            ),
        }
        for ranking in decided[:SHOWN_RANKINGS]
    ]


def said(path: Path) -> list[dict[str, Any]]:
    """The first rows of the first and of the last batch in a stage's rollouts.jsonl; none if it samples nothing."""
    logged = read_metrics(path / ROLLOUTS)
    steps = dict.fromkeys(row["step"] for row in (logged[:1] + logged[-1:]))
    return [row for step in steps for row in [row for row in logged if row["step"] == step][:SHOWN_ROLLOUTS]]


def shown_row(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The first excerpts of the SFT data packed again, and of their rows the last, which is the emptiest."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(sft.batches).parameters.items()}
    options = {**defaults, **config["data"]}
    try:
        tokenizer = Tokenizer.load(path / TOKENIZER)
        seen, _ = corpus.split(chats.conversations(options["sources"].split(",")[0]), options["held_out"])
        excerpts = chats.excerpts(seen[:PACKED], turns=options["turns"])[:PACKED]
        packed, _ = rows.pack([chat(tokenizer, excerpt.messages) for excerpt in excerpts], options["length"])
    except UserError as error:
        return {"length": options["length"], "segments": [], "error": str(error)}
    return {"length": options["length"], "segments": coloured(tokenizer, packed, len(packed.inputs) - 1), "error": ""}


def coloured(tokenizer: Tokenizer, tokens: Tokens, row: int) -> list[list[Piece]]:
    """The conversations of a packed row, then its padding; "trained" are those whose weight as a target is not 0."""
    segments = tokens.segments[row]
    found = []
    for segment in range(1, segments.max() + 1):
        here = row, segments == segment
        ids = [tokens.inputs[here][0], *tokens.targets[here]]
        kinds = ["context", *("trained" if weight else "context" for weight in tokens.weights[here])]
        found.append([Piece(text, kind) for text, kind in zip(tokenizer.pieces(ids), kinds)])
    padding = int(np.sum(segments == 0))
    return [*found, [Piece("·", "padding")] * padding] if padding else found


def program(argv: list[str]) -> None:
    flags = parsed(argv, __doc__, FLAGS)
    say(f"report: {write(flags.workdir)}")


if __name__ == "__main__":
    main(program)

"""One page that shows what a run came to, made from the files in its folder: a pipeline's, or a single stage's.

    python -m lm.report --workdir=runs/quickstart

Writes WORKDIR/report.html: self-contained, without scripts. Stages that have not finished are left out with a word. A
stage's own page is lm.runpage's; the rest of this file is about pipelines.
"""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from lm import runpage, taste
from lm.config import parsed
from lm.console import main, say
from lm.data import chats, corpus, rankings, rows
from lm.errors import UserError
from lm.intervals import Estimate
from lm.pages import interval, percent, signed, templates, whiskers
from lm.rewards.rule import CRITERIA, RULE, explain
from lm.runpage import Stage, figures, said, stage
from lm.stages import sft
from lm.tokenizer import Tokenizer, chat, load
from lm.types import Tokens
from lm.workdir import CONFIG, PAGE, PIPELINE, TOKENIZER, read_json, read_metrics, write_text

FLAGS = {"workdir": dict(required=True, metavar="DIR", help="the folder of a pipeline, or of one stage")}
SHOWN_ANSWERS, SHOWN_RANKINGS, PACKED = 8, 2, 12  # answers and rankings shown; excerpts packed into rows to show one

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


class Piece(NamedTuple):
    text: str
    kind: str  # "trained", "context" or "padding"


def write(root: str | Path) -> Path:
    """Writes the page of the run in `root` and returns its path. UserError for any other folder."""
    root = Path(root)
    if (root / PIPELINE).exists():
        return write_pipeline(root)
    if "stage" not in stage(root).config:
        raise UserError(f"{root} is no run of lm.pipeline or lm.train: it holds no {PIPELINE}, nor a stage's {CONFIG}")
    return runpage.write(root)


def write_pipeline(root: Path) -> Path:
    """The page of all stages."""
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
        crowded=any(line["mfu"] and line["mfu"] > 1 for line in lines),
        seconds=sum(record["seconds"].values()),
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
        **dict.fromkeys(("steps", "tokens", "parameters", "model_flops", "mfu")),
        **stage.summary,
        "seconds": record["seconds"][stage.name] if stage.name in record["seconds"] else None,
    }


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


def shown_row(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The first excerpts of the SFT data packed again, and of their rows the last, which is the emptiest."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(sft.batches).parameters.items()}
    options = {**defaults, **config["data"]}
    try:
        tokenizer = load(path / TOKENIZER)
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

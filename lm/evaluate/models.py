"""Compares models on held-out text, held-out replies and a rater's scores of their answers to the same unseen prompts.

    python -m lm evaluate --config=experiments/evaluate.py --workdir=runs/quickstart/evaluate
    python -m lm evaluate --config=experiments/evaluate.py --workdir=runs/dpo --config.models.ppo=runs/quickstart/dpo

Writes WORKDIR/summary.json and WORKDIR/answers.jsonl, which has one line for each prompt with every model's answer and
score. After a kill the same command continues with the model that it was evaluating.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lm.core.config import call_with_options, flags_and_config, require_entries, to_dict
from lm.core.errors import UserError, check_at_least
from lm.core.options import ConfigFunction
from lm.core.statistics import estimate_text, mean_estimate, paired_difference, success_rate, win_rate
from lm.data import conversations
from lm.data.prompts import PromptOptions
from lm.evaluate.measurements import EvaluationData, RowSizes, check_context, evaluation_data
from lm.evaluate.recall import measured_recall
from lm.evaluate.skills import checked_answers, print_skills, skill_results
from lm.generate.answers import GeneratedAnswer
from lm.generate.sampler import SamplingParams
from lm.rewards import Reward, named_rater
from lm.runs import metadata
from lm.runs.console import Progress, print_table, run_program, say, warn
from lm.runs.partial_results import PartialResults
from lm.runs.workdir import TrainedModel, Workdir, open_workdir, write_text
from lm.train.warm_start import load_policy

ANSWERS_FILE = "answers.jsonl"
PARTIAL_FILE = "models.parts.jsonl"  # the results that an interrupted evaluation already has
FLAGS = {"workdir": dict(required=True, metavar="DIR", help="where the scores and answers go")}


def evaluation_functions(config: ConfigDict) -> dict[str, ConfigFunction]:
    """The function that each subtree of a config calls, for the program, overrides and --help."""
    return {"evaluate": ConfigFunction(evaluate_models)} if "evaluate" in config else {}


def run_evaluation(config: ConfigDict, path: str | Path) -> Mapping[str, Any]:
    """Evaluates into a workdir and returns the summary. A finished evaluation is not repeated."""
    require_entries(config, ("seed", "models", "evaluate"), "lm evaluate")
    with open_workdir(path, to_dict(config)) as workdir:
        summary = workdir.read_summary()
        if summary is None:
            metadata.record_start(workdir.path, seed=config.seed)
            trained = {
                name: load_policy(source, backend=jax.default_backend(), warn=warn, name=f"models.{name} ")
                for name, source in config.models.to_dict().items()
            }
            summary = call_with_options(
                evaluation_functions(config)["evaluate"].function,
                config.evaluate,
                workdir,
                trained,
                config.seed,
                name="evaluate",
            )
            workdir.write_summary(summary)
            PartialResults(workdir.path / PARTIAL_FILE).remove()
        print_scores(summary)
        return summary


def evaluate_models(
    workdir: Workdir,
    models: Mapping[str, TrainedModel],
    seed: int,
    *,
    order: Sequence[str],
    corpus: str | Sequence[Mapping[str, Any]] = "stdlib,chitchat",
    options: PromptOptions = PromptOptions(),
    sampling: SamplingParams = SamplingParams(max_new=48),
    reply_turns: int = 4,
    prompts: int = 256,
    rater: str = "rule",
    judge: str = "",
    held_out_bytes: int = 200_000,
    length: int = 256,
    rows_at_once: int = 64,
    recall_facts: int = 0,
    table: str = "",
) -> dict[str, Any]:
    """Scores of every model with standard errors and 95 % intervals, and each compared with the one before it, paired.

    A pretrained model is asked in plain text, a line per turn, as it has seen conversations; the others in the chat
    template. All answer the same held-out prompts, one per conversation, with the same sampler. `judge`: a second
    rater, one from which nothing was learned. Where the prompts name a skill (lm.rewards.verifiers.skills), as many of
    each are asked, a pretrained model's answer is its first line, and the summary has a table by skill.
    recall_facts > 0: each continues so many facts of the CSV `table`, or of ours (see lm.evaluate.recall).
    """
    if sorted(order) != sorted(models):
        raise UserError(f"evaluate.order {', '.join(order)} does not name the models {', '.join(models)}, each once")
    models = {name: models[name] for name in order}
    raters = Raters(named_rater(rater, "evaluate.rater"), named_rater(judge, "evaluate.judge") if judge else None)
    rows = RowSizes(length, reply_turns, rows_at_once)
    check_at_least(1, "evaluate", turns=options.turns, prompts=prompts, **rows._asdict())
    for name, trained in models.items():
        check_context(name, trained, length=length, prompt_length=options.prompt_length, max_new=sampling.max_new)
    start = time.monotonic()
    data = evaluation_data(models.values(), corpus, options, prompts=prompts, held_out_bytes=held_out_bytes)
    partial = PartialResults(workdir.path / PARTIAL_FILE)
    results: dict[str, ModelResults] = {}
    with Progress("evaluate", len(models), "model") as progress:
        for i, (name, trained) in enumerate(models.items()):
            measured = measured_model(
                partial, name, trained, data, seed, sampling, rows, facts=recall_facts, table=table
            )
            results[name] = rated_results(*measured, data.examples, raters)
            progress.update(i + 1, {"score": results[name].statistics["score"]["value"]})
    write_answers(workdir.path / ANSWERS_FILE, data.contexts, results)
    scores = {name: result.scores for name, result in results.items()}
    judge_scores = {name: x.judge_scores for name, x in results.items() if x.judge_scores is not None}
    return {
        "stage": "evaluate",
        "rater": rater,
        "prompts": len(data.contexts),
        "sampler": {**sampling.record(), "seed": seed},
        "models": {name: result.statistics for name, result in results.items()},
        "comparisons": [paired_comparison(a, b, scores, judge_scores) for a, b in zip(order[1:], order)],
        **({"judge": judge} if judge else {}),
        **(skill_results(data.examples, {n: x.texts for n, x in results.items()}) if data.by_skill else {}),
        "seconds": time.monotonic() - start,
    }


class Raters(NamedTuple):
    """What judges the answers."""

    rater: Reward
    judge: Reward | None  # a second one, from which nothing was learned


class ModelResults(NamedTuple):
    """What one model answered, and what was measured of it."""

    answers: list[GeneratedAnswer]
    scores: np.ndarray  # f32[prompts]  the rater's
    judge_scores: np.ndarray | None  # f32[prompts]; None without a judge
    statistics: dict[str, Any]  # losses, recall, and what its answers are like, by name

    @property
    def texts(self) -> list[str]:
        return [answer.text for answer in self.answers]


def measured_model(
    partial: PartialResults,
    name: str,
    trained: TrainedModel,
    data: EvaluationData,
    seed: int,
    sampling: SamplingParams,
    rows: RowSizes,
    *,
    facts: int,
    table: str,
) -> tuple[dict[str, Any], list[GeneratedAnswer]]:
    """The losses of a model (and what it recalls of so many `facts` of the `table`), and its answers; each taken from
    `partial` where an interrupted evaluation has measured it."""
    # Another run in the same workdir has other results.
    digest = hashlib.sha256(json.dumps(trained.summary).encode()).hexdigest()[:12]

    def once(what: str, measure: Callable[[], Any]) -> Any:
        return partial.once(f"{what} of {name} {digest}", measure)

    statistics = once("losses", lambda: data.losses(trained, rows))
    if facts:
        recall = once("recall", lambda: {"recall": measured_recall(trained, table=table, facts=facts)})
        statistics = {**statistics, **recall}
    answers = once("answers", lambda: data.answers(trained, seed, sampling, rows.rows_at_once))
    return statistics, [GeneratedAnswer(*each) for each in answers]


def rated_results(
    statistics: Mapping[str, Any],
    answers: list[GeneratedAnswer],
    examples: Sequence[conversations.Example],
    raters: Raters,
) -> ModelResults:
    """The results of a model, its answers scored by the rater and the judge."""
    texts = [answer.text for answer in answers]
    scores = raters.rater(examples, texts)
    statistics = {**statistics, **answer_statistics(answers, scores)}
    judge_scores = None
    if raters.judge:
        judge_scores = raters.judge(examples, texts)
        statistics["judge"] = mean_estimate(judge_scores)._asdict()
    return ModelResults(answers, scores, judge_scores, statistics)


def answer_statistics(answers: list[GeneratedAnswer], scores: np.ndarray) -> dict[str, Any]:
    """Score, fraction that ended by itself, and length of a model's answers, each an Estimate."""
    return {
        "score": mean_estimate(scores)._asdict(),
        "stopped": success_rate([answer.stopped for answer in answers])._asdict(),
        "length": mean_estimate([answer.length for answer in answers])._asdict(),
    }


def paired_comparison(
    a: str, b: str, scores: Mapping[str, np.ndarray], judge_scores: Mapping[str, np.ndarray] = {}
) -> dict[str, Any]:
    """Model a against model b on the same prompts, and the judge's difference where there is a judge."""
    return {
        "a": a,
        "b": b,
        "difference": paired_difference(scores[a], scores[b])._asdict(),
        "win_rate": win_rate(scores[a], scores[b])._asdict(),
        **({"judge_difference": paired_difference(judge_scores[a], judge_scores[b])._asdict()} if judge_scores else {}),
    }


def write_answers(
    path: Path, contexts: Sequence[conversations.Conversation], results: Mapping[str, ModelResults]
) -> None:
    """A line for each prompt, with every model's answer and score."""
    lines = [
        json.dumps(
            {
                "prompt": context.messages,
                **checked_answers(context, {name: result.answers[i].text for name, result in results.items()}),
                "answers": {name: result.answers[i]._asdict() for name, result in results.items()},
                "scores": {name: float(result.scores[i]) for name, result in results.items()},
            },
            ensure_ascii=False,
        )
        for i, context in enumerate(contexts)
    ]
    write_text(path, "\n".join(lines) + "\n")


def print_scores(summary: Mapping[str, Any]) -> None:
    """The scores as tables on the terminal."""

    def pm(estimate):
        return f"{estimate['value']:.3g} ± {estimate['se']:.2g}"

    judge_row = [["held-out judge's score", *(pm(m["judge"]) for m in summary["models"].values() if "judge" in m)]]
    print_table(
        f"{summary['prompts']} unseen prompts; ± is a standard error",
        ["", *summary["models"]],
        [
            ["held-out bits per byte", *(f"{m['bits_per_byte']:.3f}" for m in summary["models"].values())],
            *recall_rows(summary["models"].values()),
            ["held-out reply loss, nats", *(f"{m['reply_loss']:.3f}" for m in summary["models"].values())],
            ["rater's score", *(pm(m["score"]) for m in summary["models"].values())],
            *(judge_row if "judge" in summary else []),
            ["ended by itself", *(pm(m["stopped"]) for m in summary["models"].values())],
            ["tokens an answer", *(pm(m["length"]) for m in summary["models"].values())],
        ],
    )
    for c in summary["comparisons"]:
        d, w = c["difference"], c["win_rate"]
        say(
            f"{c['a']} over {c['b']}: score {d['value']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}], "
            f"win rate {w['value']:.2f} [{w['low']:.2f}, {w['high']:.2f}] (95 %)"
        )

    if "skills" in summary:
        print_skills(summary)


def recall_rows(models: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """The row of facts recalled, where they were asked."""
    found = [estimate_text(model["recall"]["recall"], "percent") for model in models if "recall" in model]
    return [["facts recalled", *found]] if found else []


def program(argv: list[str]) -> None:
    flags, config = flags_and_config(argv, __doc__, FLAGS, evaluation_functions)
    run_evaluation(config, flags.workdir)


if __name__ == "__main__":
    run_program(program)

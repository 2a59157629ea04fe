"""Compares models on held-out text, held-out replies and a rater's scores of their answers to the same unseen prompts.

    python -m lm evaluate --config=experiments/evaluate.py --workdir=runs/quickstart/evaluate
    python -m lm evaluate --config=experiments/evaluate.py --workdir=runs/dpo --config.models.ppo=runs/quickstart/dpo

Writes WORKDIR/summary.json and WORKDIR/answers.jsonl, which has one line for each prompt with every model's answer and
score. After a kill the same command continues with the model that it was evaluating.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lm.core.config import call_with_options, flags_and_config, require_entries, to_dict
from lm.core.errors import UserError, check_at_least
from lm.core.metrics import Mean
from lm.core.options import ConfigFunction
from lm.core.statistics import estimate_text, mean_estimate, paired_difference, success_rate, win_rate
from lm.core.types import Tokens
from lm.data import batches, conversations, packing
from lm.data.loading import load_conversations
from lm.data.prompts import PromptOptions, padded_prompts
from lm.data.sources import Document, documents_within_bytes, load_documents, split_held_out
from lm.evaluate.recall import measured_recall
from lm.evaluate.skills import balanced_prompts, checked_answers, has_skills, print_skills, skill_results
from lm.generate.answers import GeneratedAnswer, batch_answerer
from lm.generate.sampler import SamplingParams
from lm.rewards import named_rater
from lm.runs import metadata
from lm.runs.console import Progress, print_table, run_program, say, warn
from lm.runs.partial_results import PartialResults
from lm.runs.workdir import TrainedModel, Workdir, open_workdir, write_text
from lm.stages.pretraining.conversation_batches import conversation_rows
from lm.stages.pretraining.next_token import next_token_loss
from lm.tokenizer import encode_prompt
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
    recall_facts > 0: each continues the beginnings of so many facts of the CSV `table`, or of ours (see
    lm.evaluate.recall).
    """
    if sorted(order) != sorted(models):
        raise UserError(f"evaluate.order {', '.join(order)} does not name the models {', '.join(models)}, each once")
    models = {name: models[name] for name in order}
    rate = named_rater(rater, "evaluate.rater")
    judged = named_rater(judge, "evaluate.judge") if judge else None
    check_at_least(
        1,
        "evaluate",
        turns=options.turns,
        reply_turns=reply_turns,
        prompts=prompts,
        length=length,
        rows_at_once=rows_at_once,
    )
    for name, trained in models.items():
        check_context(name, trained, length=length, prompt_length=options.prompt_length, max_new=sampling.max_new)
    start = time.monotonic()
    data = evaluation_data(models.values(), corpus, options, prompts=prompts, held_out_bytes=held_out_bytes)
    parts, scores, judgements = PartialResults(workdir.path / PARTIAL_FILE), {}, {}
    answers, measured = {}, {}
    with Progress("evaluate", len(models), "model") as progress:
        for i, (name, model) in enumerate(models.items()):
            # Another run in the same workdir has other results.
            model_digest = hashlib.sha256(json.dumps(model.summary).encode()).hexdigest()[:12]
            once = lambda what, work: parts.once(f"{what} of {name} {model_digest}", work)
            results = once("losses", lambda: data.losses(model, reply_turns, length, rows_at_once))
            if recall_facts:
                recall = once("recall", lambda: {"recall": measured_recall(model, table=table, facts=recall_facts)})
                results = {**results, **recall}
            rows = once("answers", lambda: data.answers(model, seed, sampling, rows_at_once))
            answers[name] = [GeneratedAnswer(*each) for each in rows]
            texts = [answer.text for answer in answers[name]]
            scores[name] = rate(data.examples, texts)
            measured[name] = {**results, **answer_statistics(answers[name], scores[name])}
            if judged:
                judgements[name] = judged(data.examples, texts)
                measured[name]["judge"] = mean_estimate(judgements[name])._asdict()
            progress.update(i + 1, {"score": measured[name]["score"]["value"]})
    write_answers(workdir.path / ANSWERS_FILE, data.contexts, answers, scores)
    names = list(models)
    texts_by_model = {name: [answer.text for answer in answers[name]] for name in names}
    return {
        "stage": "evaluate",
        "rater": rater,
        "prompts": len(data.contexts),
        "sampler": {**sampling.record(), "seed": seed},
        "models": measured,
        "comparisons": [paired_comparison(a, b, scores, judgements) for a, b in zip(names[1:], names)],
        **({"judge": judge} if judge else {}),
        **(skill_results(data.examples, texts_by_model) if data.by_skill else {}),
        "seconds": time.monotonic() - start,
    }


class EvaluationData(NamedTuple):
    """What every model is measured on: text and replies that are held out, and prompts."""

    text: Sequence[Document]
    replies: Sequence[conversations.Conversation]
    contexts: Sequence[conversations.Conversation]  # the prompts
    examples: Sequence[conversations.Example]  # the same, as a rater is given them
    prompt_length: int  # tokens
    by_skill: bool  # whether each prompt names a skill

    def losses(self, model: TrainedModel, reply_turns: int, length: int, rows_at_once: int) -> dict[str, float]:
        rows, _ = conversation_rows(model.tokenizer, self.replies, reply_turns, length)
        return held_out_losses(model, self.text, rows, rows_at_once)

    def answers(
        self, model: TrainedModel, seed: int, sampling: SamplingParams, rows_at_once: int
    ) -> list[GeneratedAnswer]:
        return sampled_answers(
            model, self.examples, self.prompt_length, seed, sampling, rows_at_once, first_line_only=self.by_skill
        )


def evaluation_data(
    models: Iterable[TrainedModel],
    corpus: str | Sequence[Mapping[str, Any]],
    options: PromptOptions,
    *,
    prompts: int,
    held_out_bytes: int,
) -> EvaluationData:
    """The held-out side of corpus and sources: whole documents up to so many bytes, and so many prompts that every
    model has room for; of prompts that name skills as many of each."""
    sources, turns, prompt_length, held_out = options
    _, text = split_held_out(load_documents(corpus), held_out)
    _, replies = split_held_out(load_conversations(sources), held_out)
    contexts = shared_prompts(models, conversations.prompt_contexts(replies, turns=turns), prompt_length)
    by_skill = has_skills(contexts)
    contexts = balanced_prompts(contexts, prompts) if by_skill else contexts[:prompts]
    examples = [conversations.reward_example(c.messages, c.fields) for c in contexts]
    return EvaluationData(
        documents_within_bytes(text, held_out_bytes), replies, contexts, examples, prompt_length, by_skill
    )


def held_out_losses(
    trained: TrainedModel, text: Sequence[Document], replies: Tokens, rows_at_once: int
) -> dict[str, float]:
    """Bits per byte of held-out text, and nats a token of held-out replies, in rows of one length."""
    length = replies.inputs.shape[1]
    nats = rows_cross_entropy(
        trained, packing.document_rows(trained.tokenizer, [d.text for d in text], length), rows_at_once
    )
    return {
        "bits_per_byte": float(nats.total) / math.log(2) / sum(len(d.text.encode()) for d in text),
        "reply_loss": float(rows_cross_entropy(trained, replies, rows_at_once).value()),
    }


def sampled_answers(
    trained: TrainedModel,
    examples: Sequence[conversations.Example],
    prompt_length: int,
    seed: int,
    sampling: SamplingParams,
    rows_at_once: int,
    *,
    first_line_only: bool = False,
) -> list[GeneratedAnswer]:
    """An answer of the model to the messages of each example; of a pretrained one, which goes on to write further
    turns, the first line where that is asked for."""
    rows = padded_prompts([prompt_ids(trained, each["messages"]) for each in examples], examples, prompt_length)
    answers = batch_answerer(
        trained.model,
        trained.params["lm"],
        trained.tokenizer,
        sampling,
        rows_at_once=rows_at_once,
        jit=jax.jit,
        stop_strings=("\n",) if first_line_only and trained.stage == "pretrain" else (),
    )
    return answers(rows, jax.random.key(seed))


def check_context(name: str, trained: TrainedModel, *, length: int, prompt_length: int, max_new: int) -> None:
    """UserError for rows, or prompts and answers, that are longer than a model's context."""
    for what, tokens in (("length", length), ("prompt_length and max_new together", prompt_length + max_new)):
        if tokens > trained.model.config.context:
            raise UserError(
                f"evaluate.{what} is {tokens}, but the context of {name} ({trained.path}) is "
                f"{trained.model.config.context}: lower it, as all models are measured on the same rows"
            )


def rows_cross_entropy(trained: TrainedModel, rows: Tokens, rows_at_once: int) -> Mean:
    """Cross entropy over every weighted token of the rows."""
    loss = next_token_loss(trained.model)
    score = jax.jit(lambda lm, part: loss({"lm": lm}, {}, part, None)[1]["loss"])
    return sum(
        (jax.device_get(score(trained.params["lm"], part)) for part in batches.sequential_batches(rows, rows_at_once)),
        Mean(np.float32(0), np.float32(0)),
    )


def shared_prompts(
    models: Iterable[TrainedModel], contexts: Sequence[conversations.Conversation], length: int
) -> list[conversations.Conversation]:
    """The contexts that fit every model's `length` tokens, so that all answer the same ones."""
    for trained in models:
        contexts = [c for c in contexts if len(prompt_ids(trained, c.messages)) <= length]
    if not contexts:
        raise UserError(f"no held-out prompt has at most {length} tokens; raise evaluate.prompt_length")
    return contexts


def prompt_ids(trained: TrainedModel, messages: list[dict]) -> np.ndarray:
    """i32[n]: the context as this model was trained to see it."""
    if trained.stage != "pretrain":
        return encode_prompt(trained.tokenizer, messages)
    text = "".join(f"{message['content']}\n" for message in messages)
    return np.array([*trained.tokenizer.start_ids, *trained.tokenizer.encode(text)], np.int32)


def answer_statistics(answers: list[GeneratedAnswer], scores: np.ndarray) -> dict[str, Any]:
    """Score, fraction that ended by itself, and length of a model's answers, each an Estimate."""
    return {
        "score": mean_estimate(scores)._asdict(),
        "stopped": success_rate([answer.stopped for answer in answers])._asdict(),
        "length": mean_estimate([answer.length for answer in answers])._asdict(),
    }


def paired_comparison(
    a: str, b: str, scores: Mapping[str, np.ndarray], judgements: Mapping[str, np.ndarray] = {}
) -> dict[str, Any]:
    """Model a against model b on the same prompts, and the judge's difference where there is a judge."""
    return {
        "a": a,
        "b": b,
        "difference": paired_difference(scores[a], scores[b])._asdict(),
        "win_rate": win_rate(scores[a], scores[b])._asdict(),
        **({"judge_difference": paired_difference(judgements[a], judgements[b])._asdict()} if judgements else {}),
    }


def write_answers(
    path: Path, contexts, answers: Mapping[str, list[GeneratedAnswer]], scores: Mapping[str, np.ndarray]
) -> None:
    lines = [
        json.dumps(
            {
                "prompt": context.messages,
                **checked_answers(context, {name: model_answers[i].text for name, model_answers in answers.items()}),
                "answers": {name: model_answers[i]._asdict() for name, model_answers in answers.items()},
                "scores": {name: float(score[i]) for name, score in scores.items()},
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

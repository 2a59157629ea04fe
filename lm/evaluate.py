"""Compare models: held-out text, held-out replies, and a rater's opinion of their answers to the same unseen prompts.

    python -m lm.evaluate --config=experiments/evaluate.py --workdir=runs/quickstart/evaluate

Writes WORKDIR/summary.json and WORKDIR/answers.jsonl, a line a prompt with every model's answer and score. After a kill
the same command goes on with the model that it had come to.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lm import metrics as means, record
from lm.answers import Answer, answerer
from lm.config import arguments, call, require, to_dict
from lm.console import Progress, main, say, table, warn
from lm.data import batches, chats, corpus as corpora, rows as packing
from lm.data.prompts import padded
from lm.errors import UserError, at_least
from lm.intervals import average, difference, rate, win_rate
from lm.options import Called
from lm.parts import Parts
from lm.rewards import REWARDS
from lm.stages import sft
from lm.stages.next_token import next_token
from lm.tokenizer import prompt
from lm.types import Tokens
from lm.workdir import Trained, Workdir, load_policy, open_workdir, write_text

ANSWERS = "answers.jsonl"
PARTS = "models.parts.jsonl"  # what an evaluation that goes on after a kill has already
FLAGS = {"workdir": dict(required=True, metavar="DIR", help="where the scores and answers go")}


def subtrees(config: ConfigDict) -> dict[str, Called]:
    """The function that each subtree of a config calls, for the program, overrides and --help."""
    return {"evaluate": Called(evaluate)} if "evaluate" in config else {}


def run(config: ConfigDict, path: str | Path) -> Mapping[str, Any]:
    """Evaluates into a workdir and returns the summary it leaves there; a finished one is not done again."""
    require(config, ("seed", "models", "evaluate"), "lm.evaluate")
    with open_workdir(path, to_dict(config)) as workdir:
        summary = workdir.summary()
        if summary is None:
            record.note(workdir.path, seed=config.seed)
            trained = {
                name: load_policy(source, backend=jax.default_backend(), warn=warn, name=f"models.{name} ")
                for name, source in config.models.to_dict().items()
            }
            summary = call(
                subtrees(config)["evaluate"].function, config.evaluate, workdir, trained, config.seed, name="evaluate"
            )
            workdir.write_summary(summary)
            Parts(workdir.path / PARTS).remove()
        show(summary)
        return summary


def evaluate(
    workdir: Workdir,
    models: Mapping[str, Trained],
    seed: int,
    *,
    order: Sequence[str],
    corpus: str = "stdlib,chitchat",
    sources: str = "chitchat",
    turns: int = 3,
    reply_turns: int = 4,
    prompts: int = 256,
    prompt_length: int = 64,
    max_new: int = 48,
    temperature: float = 1.0,
    rater: str = "rule",
    held_out: float = 0.02,
    held_out_bytes: int = 200_000,
    length: int = 256,
    rows_at_once: int = 64,
) -> dict[str, Any]:
    """Scores of every model with standard errors and 95 % intervals, and each compared with the one before it, paired.

    A pretrained model is asked in plain text, a line per turn, as it has seen conversations; the others in the chat
    template. All answer the same held-out prompts, one per conversation, with the same sampler.
    """
    if sorted(order) != sorted(models):
        raise UserError(f"evaluate.order {', '.join(order)} does not name the models {', '.join(models)}, each once")
    models = {name: models[name] for name in order}
    if rater not in REWARDS:
        raise UserError(f"evaluate.rater is {rater!r}; choose one of {', '.join(REWARDS)}")
    at_least(
        1, "evaluate", turns=turns, reply_turns=reply_turns, prompts=prompts, length=length, rows_at_once=rows_at_once
    )
    for name, trained in models.items():
        stop_unless_room(name, trained, length=length, prompt_length=prompt_length, max_new=max_new)
    start = time.monotonic()
    _, text = corpora.split(corpora.documents(corpus), held_out)
    text = corpora.within(text, held_out_bytes)
    _, replies = corpora.split(chats.conversations(sources), held_out)
    contexts = shared_prompts(models.values(), chats.prompts(replies, turns=turns), prompt_length)[:prompts]
    messages = [c.messages for c in contexts]
    sampler = {"rows_at_once": rows_at_once, "max_new": max_new, "temperature": temperature}
    parts, scores, found, told = Parts(workdir.path / PARTS), {}, {}, {}
    with Progress("evaluate", len(models), "model") as progress:
        for i, (name, model) in enumerate(models.items()):
            made = hashlib.sha256(json.dumps(model.summary).encode()).hexdigest()[:12]  # not by a run in its place
            losses = parts.once(
                f"losses of {name} {made}",
                lambda: losses_of(
                    model, text, sft.rows(model.tokenizer, replies, reply_turns, length)[0], rows_at_once
                ),
            )
            given = parts.once(
                f"answers of {name} {made}", lambda: answers_of(model, messages, prompt_length, seed, **sampler)
            )
            found[name] = [Answer(*each) for each in given]
            scores[name] = REWARDS[rater](messages, [answer.text for answer in found[name]])
            told[name] = {**losses, **described(found[name], scores[name])}
            progress.update(i + 1, {"score": told[name]["score"]["value"]})
    write_answers(workdir.path / ANSWERS, contexts, found, scores)
    names = list(models)
    return {
        "stage": "evaluate",
        "rater": rater,
        "prompts": len(contexts),
        "sampler": {"max_new": max_new, "temperature": temperature, "seed": seed},
        "models": told,
        "comparisons": [compared(a, b, scores) for a, b in zip(names[1:], names)],
        "seconds": time.monotonic() - start,
    }


def losses_of(
    trained: Trained, text: Sequence[corpora.Document], replies: Tokens, rows_at_once: int
) -> dict[str, float]:
    """Bits per byte of held-out text, and nats a token of held-out replies, in rows of one length."""
    length = replies.inputs.shape[1]
    nats = nats_of(trained, packing.documents(trained.tokenizer, [d.text for d in text], length), rows_at_once)
    return {
        "bits_per_byte": float(nats.total) / math.log(2) / sum(len(d.text.encode()) for d in text),
        "reply_loss": float(nats_of(trained, replies, rows_at_once).value()),
    }


def answers_of(
    trained: Trained, contexts: Sequence[list[dict]], prompt_length: int, seed: int, **sampler
) -> list[Answer]:
    """An answer of the model to each context."""
    rows = padded([asked(trained, messages) for messages in contexts], contexts, prompt_length)
    answers = answerer(trained.model, trained.params["lm"], trained.tokenizer, jit=jax.jit, **sampler)
    return answers(rows, jax.random.key(seed))


def stop_unless_room(name: str, trained: Trained, *, length: int, prompt_length: int, max_new: int) -> None:
    """UserError for rows, or prompts and answers, that are longer than a model's context."""
    for what, tokens in (("length", length), ("prompt_length and max_new together", prompt_length + max_new)):
        if tokens > trained.model.config.context:
            raise UserError(
                f"evaluate.{what} is {tokens}, but the context of {name} ({trained.path}) is "
                f"{trained.model.config.context}: lower it, as all models are measured on the same rows"
            )


def nats_of(trained: Trained, rows: Tokens, rows_at_once: int) -> means.Mean:
    """Cross entropy over every weighted token of the rows."""
    loss = next_token(trained.model)
    score = jax.jit(lambda lm, part: loss({"lm": lm}, {}, part, None)[1]["loss"])
    return sum(
        (jax.device_get(score(trained.params["lm"], part)) for part in batches.every(rows, rows_at_once)),
        means.Mean(np.float32(0), np.float32(0)),
    )


def shared_prompts(
    models: Iterable[Trained], contexts: Sequence[chats.Conversation], length: int
) -> list[chats.Conversation]:
    """The contexts that fit every model's `length` tokens, so that all answer the same ones."""
    for trained in models:
        contexts = [c for c in contexts if len(asked(trained, c.messages)) <= length]
    if not contexts:
        raise UserError(f"no held-out prompt has at most {length} tokens; raise evaluate.prompt_length")
    return contexts


def asked(trained: Trained, messages: list[dict]) -> np.ndarray:
    """i32[n]: the context as this model was trained to see it."""
    if trained.stage != "pretrain":
        return prompt(trained.tokenizer, messages)
    text = "".join(f"{message['content']}\n" for message in messages)
    return np.array([*trained.tokenizer.start, *trained.tokenizer.encode(text)], np.int32)


def described(given: list[Answer], scores: np.ndarray) -> dict[str, Any]:
    """Score, fraction that ended by itself, and length of a model's answers, each an Estimate."""
    return {
        "score": average(scores)._asdict(),
        "stopped": rate([answer.stopped for answer in given])._asdict(),
        "length": average([answer.length for answer in given])._asdict(),
    }


def compared(a: str, b: str, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Model a against model b on the same prompts."""
    return {
        "a": a,
        "b": b,
        "difference": difference(scores[a], scores[b])._asdict(),
        "win_rate": win_rate(scores[a], scores[b])._asdict(),
    }


def write_answers(path: Path, contexts, found: Mapping[str, list[Answer]], scores: Mapping[str, np.ndarray]) -> None:
    lines = [
        json.dumps(
            {
                "prompt": context.messages,
                "answers": {name: given[i]._asdict() for name, given in found.items()},
                "scores": {name: float(score[i]) for name, score in scores.items()},
            },
            ensure_ascii=False,
        )
        for i, context in enumerate(contexts)
    ]
    write_text(path, "\n".join(lines) + "\n")


def show(summary: Mapping[str, Any]) -> None:
    """The scores as tables on the terminal."""

    def pm(estimate):
        return f"{estimate['value']:.3g} ± {estimate['se']:.2g}"

    table(
        f"{summary['prompts']} unseen prompts; ± is a standard error",
        ["", *summary["models"]],
        [
            ["held-out bits per byte", *(f"{m['bits_per_byte']:.3f}" for m in summary["models"].values())],
            ["held-out reply loss, nats", *(f"{m['reply_loss']:.3f}" for m in summary["models"].values())],
            ["rater's score", *(pm(m["score"]) for m in summary["models"].values())],
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


def program(argv: list[str]) -> None:
    flags, config = arguments(argv, __doc__, FLAGS, subtrees)
    run(config, flags.workdir)


if __name__ == "__main__":
    main(program)

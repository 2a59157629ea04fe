"""What every model is measured on, and the measures: cross entropy of text and replies, and answers to prompts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.core.errors import UserError
from lm.core.metrics import Mean
from lm.core.types import Tokens
from lm.data import batches, conversations, packing
from lm.data.loading import load_conversations
from lm.data.prompts import PromptOptions, padded_prompts
from lm.data.sources import Document, documents_within_bytes, load_documents, split_held_out
from lm.evaluate.skills import balanced_prompts, has_skills
from lm.generate.answers import GeneratedAnswer, batch_answerer
from lm.generate.sampler import SamplingParams
from lm.runs.workdir import TrainedModel
from lm.stages.pretraining.conversation_batches import conversation_rows
from lm.stages.pretraining.next_token import next_token_loss
from lm.tokenizer import encode_prompt


class RowSizes(NamedTuple):
    """The shapes of the rows that every model is measured on."""

    length: int  # tokens of a row of text or replies
    reply_turns: int  # messages of an excerpt whose replies are measured
    rows_at_once: int


class EvaluationData(NamedTuple):
    """What every model is measured on: text and replies that are held out, and prompts."""

    text: Sequence[Document]
    replies: Sequence[conversations.Conversation]
    contexts: Sequence[conversations.Conversation]  # the prompts
    examples: Sequence[conversations.Example]  # the same, as a rater is given them
    prompt_length: int  # tokens
    by_skill: bool  # whether each prompt names a skill

    def losses(self, model: TrainedModel, sizes: RowSizes) -> dict[str, float]:
        rows, _ = conversation_rows(model.tokenizer, self.replies, sizes.reply_turns, sizes.length)
        return held_out_losses(model, self.text, rows, sizes.rows_at_once)

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

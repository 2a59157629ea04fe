"""Prompts as arrays: what a sampler is given, with the conversations they came from."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.data.conversations import Conversation, Example, reward_example
from lm.data.truncation import nothing_left_error, truncated_rows
from lm.tokenizer import TokenizedExample, Tokenizer, encode_prompts

BUCKET_SIZE = 32  # tokens; prompts are padded to a multiple of it


class PromptOptions(NamedTuple):
    """Which conversations are asked, and how much of each. Ranking, evaluation and the studies share these options."""

    # Conversations: names or files, with commas between them, or a mixture, whose weights count for nothing here.
    sources: str | Sequence[Mapping[str, Any]] = "chitchat"
    turns: int = 3  # the last messages of a conversation that a prompt holds, at most
    prompt_length: int = 64  # tokens of a prompt at most; a longer one is left out
    held_out: float = 0.02  # share of the conversations that no stage trains on


class Prompts(NamedTuple):
    ids: np.ndarray  # i32[n,P], padded on the right
    lengths: np.ndarray  # i32[n]
    examples: Sequence[Example]  # the row that each comes from: {"messages": [...], **its other fields}


def bucket_length(length: int, limit: int) -> int:
    """The multiple of BUCKET_SIZE that a prompt of `length` tokens is padded to, at most `limit`.

    So one compiled program serves all lengths of a bucket, and padding never takes the room that the answer needs.
    """
    return min(-(-length // BUCKET_SIZE) * BUCKET_SIZE, limit)


def padded_prompts(rows: Sequence[np.ndarray], examples: Sequence[Example], length: int) -> Prompts:
    """Token rows of at most `length` as Prompts."""
    ids = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return Prompts(ids, np.array([len(row) for row in rows], np.int32), examples)


def prompts_within_length(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], length: int
) -> tuple[Prompts, int]:
    """The conversations as chat prompts of at most `length` tokens, and how many were longer and left out: a reward
    reads the whole conversation, so none is cut."""
    ids = encode_prompts(tokenizer, [conversation.messages for conversation in conversations])
    encoded = [TokenizedExample(row, np.zeros(len(row), np.float32)) for row in ids]
    fit = truncated_rows(encoded, length, trained=False)
    if not fit.kept:
        what, limit = f"none of {len(encoded)} prompts can be asked", f"prompt_length {length}"
        raise nothing_left_error(what, fit.counts, things="prompts", limit=limit, way="raise prompt_length")
    kept = [reward_example(c.messages, c.fields) for row, c in zip(fit.rows, conversations) if row is not None]
    return padded_prompts([row.ids for row in fit.kept], kept, length), fit.counts["skipped"]


def prompts_at(prompts: Prompts, rows: np.ndarray) -> Prompts:
    """The prompts at these rows."""
    return Prompts(prompts.ids[rows], prompts.lengths[rows], [prompts.examples[i] for i in rows])


def joined_prompts(parts: Sequence[Prompts]) -> Prompts:
    """The prompts of all parts, which are padded to the same length."""
    ids, lengths = (np.concatenate([part[i] for part in parts]) for i in range(2))
    return Prompts(ids, lengths, [example for part in parts for example in part.examples])


def prompt_chunks(prompts: Prompts, size: int) -> Iterator[tuple[int, Prompts]]:
    """(number of its first row, `size` prompts) from the first to the last; the last chunk repeats earlier rows to be
    full, so that every chunk has the same shape."""
    for first in range(0, len(prompts.ids), size):
        yield first, prompts_at(prompts, np.arange(first, first + size) % len(prompts.ids))

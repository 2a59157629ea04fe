"""Prompts as arrays: what a sampler is given, with the conversations they came from."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm.data.chats import Conversation
from lm.errors import UserError
from lm.tokenizer import Tokenizer, prompts

BUCKET = 32  # tokens; prompts are padded to a multiple of it


class Prompts(NamedTuple):
    ids: np.ndarray  # i32[n,P], padded on the right
    lengths: np.ndarray  # i32[n]
    contexts: Sequence[list[dict]]  # the messages of each


def bucketed(length: int, limit: int) -> int:
    """The multiple of BUCKET that a prompt of `length` is padded to, but at most `limit`: so that a program compiled
    for one length serves all others near it, and padding never takes the room that the answer needs."""
    return min(-(-length // BUCKET) * BUCKET, limit)


def padded(rows: Sequence[np.ndarray], contexts: Sequence[list[dict]], length: int) -> Prompts:
    """Token rows of at most `length` as Prompts."""
    ids = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return Prompts(ids, np.array([len(row) for row in rows], np.int32), contexts)


def fitting(tokenizer: Tokenizer, conversations: Sequence[Conversation], length: int) -> tuple[Prompts, int]:
    """The conversations as chat prompts of at most `length` tokens, and how many were longer and left out."""
    contexts = [conversation.messages for conversation in conversations]
    encoded = list(zip(prompts(tokenizer, contexts), contexts))
    kept = [(ids, messages) for ids, messages in encoded if len(ids) <= length]
    if not kept:
        raise UserError(f"none of {len(encoded)} prompts has at most {length} tokens; raise prompt_length")
    return padded([ids for ids, _ in kept], [messages for _, messages in kept], length), len(encoded) - len(kept)


def take(prompts: Prompts, rows: np.ndarray) -> Prompts:
    """The prompts at these rows."""
    return Prompts(prompts.ids[rows], prompts.lengths[rows], [prompts.contexts[i] for i in rows])

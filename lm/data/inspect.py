"""What a batch holds, for people: its rows token by token, and the answers in them.

Everything here reads numpy arrays and changes none. `lm.data.batch_checks` asserts what must be true of a batch,
`lm.data.length_statistics` counts over many.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lm.core.errors import UserError
from lm.core.types import Tokens
from lm.tokenizer import Tokenizer, encode_prompts

TokenKind = Literal["trained", "context", "padding"]


class TokenIds(NamedTuple):
    """What is known of ids without a tokenizer's code."""

    vocab_size: int
    stop: tuple[int, ...]  # those that end an answer or a document
    document_end: int
    marker: tuple[int, ...]  # what a template writes before an assistant's answer; empty: there is no template


class Answer(NamedTuple):
    """A stretch of targets that an assistant says, from the one after the marker on."""

    row: int
    begin: int
    end: int  # the last target: a stop id, or the last of the segment where none comes
    is_ended: bool  # whether a stop id comes


class TokenView(NamedTuple):
    """A token as it is shown."""

    text: str
    kind: TokenKind
    id: int
    weight: float  # as a target; 0 for the first of a segment, which is none
    position: int
    segment: int
    values: Mapping[str, float]  # what else is known of it as a target: "logprob", "advantage", ...


def token_ids(tokenizer: Tokenizer) -> TokenIds:
    """Of a tokenizer. The marker is what all prompts end in, behind the token that ends the last message."""
    return TokenIds(tokenizer.vocab_size, tokenizer.stop_ids, tokenizer.eos, assistant_marker(tokenizer))


def assistant_marker(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids between the end of a user's message and the answer; empty where there is no chat template."""
    if not tokenizer.has_chat_template:
        return ()
    try:
        prompts = encode_prompts(tokenizer, [[{"role": "user", "content": text}] for text in ("a", "Why so?", "12")])
    except UserError:
        return ()
    columns = zip(*(reversed(prompt.tolist()) for prompt in prompts))
    common = []  # from the end on
    for ids in columns:
        if len(set(ids)) > 1 or ids[0] in tokenizer.stop_ids:
            break
        common.append(int(ids[0]))
    return tuple(reversed(common))


def token_parts(batch: Any) -> dict[str, Tokens]:
    """Every `Tokens` of a batch by its field's name ("tokens" for a batch that is one), leaves numpy [N,T]."""
    leaves = jax.tree_util.tree_leaves_with_path(batch, is_leaf=lambda x: isinstance(x, Tokens))
    return {
        jax.tree_util.keystr(path, simple=True, separator=".") or "tokens": flat_rows(part)
        for path, part in leaves
        if isinstance(part, Tokens)
    }


def flat_rows(tree: Any) -> Any:
    """Leaves [..., T] as numpy [N,T]."""
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, np.shape(x)[-1]), tree)


def segment_ranges(tokens: Tokens) -> Iterator[tuple[int, int, int]]:
    """(row, begin, end) of every segment: its inputs are [begin, end). Padding is none."""
    for row, segments in enumerate(np.asarray(tokens.segments)):
        edges = np.flatnonzero(np.diff(segments)) + 1
        for begin, end in zip([0, *edges], [*edges, len(segments)]):
            if segments[begin] > 0:
                yield row, int(begin), int(end)


def found_answers(tokens: Tokens, ids: TokenIds) -> list[Answer]:
    """Every answer of an assistant, trained or not: what follows the marker, up to a stop id or its segment's end."""
    size = len(ids.marker)
    answers = []
    for row, begin, end in segment_ranges(tokens) if size else ():
        inputs, targets = tokens.inputs[row, begin:end], tokens.targets[row, begin:end]
        if len(inputs) < size:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(inputs, size)
        starts = np.flatnonzero((windows == ids.marker).all(axis=1)) + size - 1
        stops = np.flatnonzero(np.isin(targets, ids.stop))
        after = 0
        for start in starts:
            if start < after:
                continue  # within an answer
            later = stops[stops >= start]
            last = int(later[0]) if len(later) else len(targets) - 1
            answers.append(Answer(row, begin + int(start), begin + last, bool(len(later))))
            after = last + 1
    return answers


def is_chat(tokens: Tokens, ids: TokenIds) -> bool:
    """Whether most rows hold an assistant's marker, which no text does."""
    rows = {row for row, _, _ in segment_ranges(tokens)}
    return bool(rows) and 2 * len({answer.row for answer in found_answers(tokens, ids)}) > len(rows)


def row_views(
    tokenizer: Tokenizer, tokens: Tokens, row: int, values: Mapping[str, np.ndarray] = {}
) -> list[list[TokenView]]:
    """The tokens of a row by segment, and its padding at the end.

    values: f32[N,T] each, by name, of the targets. The last target of a segment is shown with it unless it weighs
    nothing and is none of its own: what follows an end token, or a 0.
    """
    segments = []
    for r, begin, end in segment_ranges(tokens):
        if r != row:
            continue
        weights = tokens.weights[row, begin:end]
        ids = [tokens.inputs[row, begin], *tokens.targets[row, begin:end]]
        if weights[-1] == 0 and (ids[-1] == 0 or tokens.inputs[row, end - 1] in tokenizer.stop_ids):
            ids.pop()
        texts = tokenizer.pieces(ids)
        segments.append(
            [
                TokenView(
                    text,
                    "trained" if k and weights[k - 1] else "context",
                    int(id_),
                    float(weights[k - 1]) if k else 0.0,
                    int(tokens.positions[row, min(begin + k, end - 1)]) + (begin + k == end),
                    int(tokens.segments[row, begin]),
                    {name: float(of[row, begin + k - 1]) for name, of in values.items()} if k else {},
                )
                for k, (id_, text) in enumerate(zip(ids, texts))
            ]
        )
    padding = int(np.sum(tokens.segments[row] == 0))
    empty = TokenView("·", "padding", 0, 0.0, 0, 0, {})
    return [*segments, [empty] * padding] if padding else segments


def group_label(row: int, shape: Sequence[int]) -> str:
    """Which row of a batch of this leading shape: "row 3", or "prompt 2, answer 1"; counted from 1."""
    if len(shape) == 1 or shape[1] == 1:
        return f"row {row // (shape[1] if len(shape) > 1 else 1) + 1}"
    return f"prompt {row // shape[1] + 1}, answer {row % shape[1] + 1}"

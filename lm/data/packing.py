"""Rows of tokens, the last thing before a batch. Every function returns Tokens of numpy arrays [N,T].

A row's inputs and targets are one window of length + 1 tokens, so no target is lost; the weight belongs to the target.
Packing means isolation: segments are numbered from 1 in each row, positions restart in each, 0 is padding (Krell et al.
2021, arXiv 2107.02027).
"""

import bisect
import itertools
from collections.abc import Sequence

import numpy as np

from lm.core.errors import UserError
from lm.core.types import Tokens
from lm.data.truncation import nothing_left_error, truncated_rows
from lm.tokenizer import TokenizedExample, Tokenizer


def stream_rows(ids: Sequence[Sequence[int]], length: int) -> Tokens:
    """Documents (each already bos ... eos) laid end to end and cut every `length` tokens, for pretraining.

    Weight 0 where the target belongs to another document than the input; the last row is padded.
    """
    ids = [document for document in ids if len(document)]
    lengths = np.array([len(document) for document in ids], np.int64)
    count = int(lengths.sum()) - 1
    if count < length:
        raise UserError(
            f"corpus too small for one row: {count + 1} tokens, a row needs {length + 1}; add text, or shorten the row"
        )
    flat = np.fromiter(itertools.chain.from_iterable(ids), np.int32, count + 1)
    document = np.repeat(np.arange(len(ids)), lengths)
    begin = np.repeat(np.cumsum(lengths) - lengths, lengths)[:-1]
    at = np.arange(count)
    row = at - at % length
    return Tokens(
        inputs=_folded_rows(flat[:-1], length, np.int32),
        targets=_folded_rows(flat[1:], length, np.int32),
        weights=_folded_rows(document[1:] == document[:-1], length, np.float32),
        positions=_folded_rows(at - np.maximum(begin, row), length, np.int32),
        segments=_folded_rows(document[:-1] - document[row] + 1, length, np.int32),
    )


def document_rows(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Tokens:
    """Texts, each a document of the tokenizer's, as `stream_rows` lays them."""
    return stream_rows([tokenizer.document_ids(ids) for ids in tokenizer.encode_batch(texts)], length)


def packed_rows(examples: Sequence[TokenizedExample], length: int) -> tuple[Tokens, dict[str, int]]:
    """Whole conversations packed into rows as isolated segments, and how many were left out: see
    lm.data.truncation.

    Best fit, longest first: each goes to the fullest row that still has room.
    """
    whole = truncated_rows(examples, length + 1)  # the last token is a target only
    examples = whole.kept
    sizes = [len(example.ids) - 1 for example in examples]
    rows: list[list[TokenizedExample]] = []
    room: list[tuple[int, int]] = []  # (free positions, row), sorted
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fit = bisect.bisect_left(room, (sizes[i], 0))
        free, row = room.pop(fit) if fit < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(examples[i])
        bisect.insort(room, (free - sizes[i], row))
    if not rows:
        what, limit = f"none of {len(whole.rows)} conversations can be learnt from", f"a row of {length} tokens"
        raise nothing_left_error(what, whole.counts, things="conversations", limit=limit, way="lengthen the row")
    return _example_rows(rows, length), whole.counts


def padded_rows(examples: Sequence[TokenizedExample], length: int) -> Tokens:
    """One example per row, padded on the right."""
    for i, example in enumerate(examples):
        if len(example.ids) - 1 > length:
            raise UserError(f"example {i} has {len(example.ids)} tokens, a row takes {length + 1}: lengthen the row")
    return _example_rows([[example] for example in examples], length)


def _example_rows(rows: Sequence[Sequence[TokenizedExample]], length: int) -> Tokens:
    shape = len(rows), length
    tokens = Tokens(
        inputs=np.zeros(shape, np.int32),
        targets=np.zeros(shape, np.int32),
        weights=np.zeros(shape, np.float32),
        positions=np.zeros(shape, np.int32),
        segments=np.zeros(shape, np.int32),
    )
    for r, row in enumerate(rows):
        start = 0
        for segment, (ids, weights) in enumerate(row, 1):
            here = r, slice(start, start + len(ids) - 1)
            tokens.inputs[here] = ids[:-1]
            tokens.targets[here] = ids[1:]
            tokens.weights[here] = weights[1:]
            tokens.positions[here] = np.arange(len(ids) - 1)
            tokens.segments[here] = segment
            start += len(ids) - 1
    return tokens


def _folded_rows(flat: np.ndarray, length: int, dtype: type) -> np.ndarray:
    folded = np.zeros(-(-len(flat) // length) * length, dtype)
    folded[: len(flat)] = flat
    return folded.reshape(-1, length)

"""Rows of tokens, the last thing before a batch. Every function returns Tokens of numpy arrays [N,T].

A row's inputs and targets are one window of length + 1 tokens, so no target is lost; the weight belongs to the target.
Packing means isolation: segments are numbered from 1 in each row, positions restart in each, 0 is padding (Krell et al.
2021, arXiv 2107.02027).
"""

import bisect
import heapq
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

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
        raise _too_small_error(count + 1, length)
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


def best_fit_rows(ids: Sequence[Sequence[int]], length: int) -> Tokens:
    """Documents (each already bos ... eos) in as few rows as can be, none cut but those longer than a row.

    A document of more than `length` + 1 tokens is cut into pieces that fill a row, and a rest; what is shorter than a
    row is packed by best fit, longest first. Every token but a document's first is a target exactly once: the last
    target of a piece is the first input of the next.
    Ding et al. 2024, sec. 2, arXiv 2404.10830.
    """
    sizes = np.array([len(document) for document in ids], np.int64)
    pieces = document_pieces(sizes, length)
    if sizes.sum() <= length or not pieces:
        raise _too_small_error(int(sizes.sum()), length)
    rows = best_fit([piece.size for piece in pieces], length)
    tokens = _zero_rows(len(rows), length)
    for r, row in enumerate(rows):
        start = 0
        for segment, i in enumerate(row, 1):
            piece = pieces[i]
            window = ids[piece.document][piece.start : piece.start + piece.size + 1]
            start = _fill_segment(tokens, r, start, segment, window, 1.0)
    return tokens


class DocumentPiece(NamedTuple):
    """A stretch of a document that is a segment of a row: so many inputs, each with the token after it as target."""

    document: int  # its place in the list of documents
    start: int  # how many tokens of the document stand before it
    size: int


def document_pieces(sizes: Sequence[int], length: int) -> list[DocumentPiece]:
    """Documents of these sizes, in tokens, cut every `length` inputs; one of a single token has no piece."""
    return [
        DocumentPiece(i, start, min(length, size - 1 - start))
        for i, size in enumerate(map(int, sizes))
        for start in range(0, size - 1, length)
    ]


def stream_contents(sizes: Sequence[int], length: int) -> list[list[DocumentPiece]]:
    """What each row of `stream_rows` holds, by segment."""
    rows: list[list[DocumentPiece]] = []
    at, count = 0, int(sum(sizes)) - 1  # the last token is a target only
    for i, size in enumerate(map(int, sizes)):
        start, stop = 0, min(size, count - at)
        while start < stop:
            if at % length == 0:
                rows.append([])
            taken = min(length - at % length, stop - start)
            rows[-1].append(DocumentPiece(i, start, taken))
            at, start = at + taken, start + taken
    return rows


def best_fit_contents(sizes: Sequence[int], length: int) -> list[list[DocumentPiece]]:
    """What each row of `best_fit_rows` holds, by segment."""
    pieces = document_pieces(sizes, length)
    return [[pieces[i] for i in row] for row in best_fit([piece.size for piece in pieces], length)]


def best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which items, of these sizes, share a row of `length`: each, longest first, goes to the fullest row with room."""
    rows: list[list[int]] = []
    rooms: list[int] = []  # free positions of rows that have any, sorted, each number once
    rows_with: dict[int, list[int]] = {}  # free positions: a heap of the rows that have so many
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fit = bisect.bisect_left(rooms, sizes[i])
        if fit < len(rooms):
            free = rooms[fit]
            row = heapq.heappop(rows_with[free])
            if not rows_with[free]:
                del rows_with[free], rooms[fit]
        else:
            free, row = length, len(rows)
            rows.append([])
        rows[row].append(i)
        left = free - sizes[i]
        if left and left in rows_with:
            heapq.heappush(rows_with[left], row)
        elif left:
            rows_with[left] = [row]
            bisect.insort(rooms, left)
    return rows


Packing = Literal["stream", "best_fit"]
DOCUMENT_PACKINGS = {"stream": (stream_rows, stream_contents), "best_fit": (best_fit_rows, best_fit_contents)}
PACKING_RULES: Mapping[str, str] = {  # what becomes of a document that does not fit a row
    "stream": "documents laid end to end and cut every {length} tokens, nothing left out",
    "best_fit": "documents longer than {length} tokens cut into pieces of that size, nothing left out",
}


def check_packing(packing: str) -> None:
    """UserError for a name that is no way of packing documents."""
    if packing not in DOCUMENT_PACKINGS:
        raise UserError(f"data.packing is {packing!r}; choose one of {', '.join(DOCUMENT_PACKINGS)}")


def packing_efficiency(contents: Sequence[Sequence[DocumentPiece]], tokens: Tokens) -> dict[str, float | int]:
    """How well documents fill rows: the share of positions that is not padding, and how many documents are spread over
    more than one row."""
    in_row = Counter(document for row in contents for document in {piece.document for piece in row})
    return {
        "packing_efficiency": float((tokens.segments > 0).mean()),
        "documents_cut": sum(rows > 1 for rows in in_row.values()),
    }


def encoded_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts, each a document of the tokenizer's."""
    return [tokenizer.document_ids(ids) for ids in tokenizer.encode_batch(texts)]


def document_rows(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Tokens:
    """Texts, each a document of the tokenizer's, as `stream_rows` lays them."""
    return stream_rows(encoded_documents(tokenizer, texts), length)


def packed_rows(examples: Sequence[TokenizedExample], length: int) -> tuple[Tokens, dict[str, int]]:
    """Whole conversations packed into rows as isolated segments, and how many were left out: see truncated_rows.

    Best fit, longest first: each goes to the fullest row that still has room.
    """
    tokens, counts, _ = packed_rows_and_contents(examples, length)
    return tokens, counts


def packed_rows_and_contents(
    examples: Sequence[TokenizedExample], length: int
) -> tuple[Tokens, dict[str, int], list[list[int]]]:
    """As `packed_rows`, and which examples each row holds, by segment."""
    fit = truncated_rows(examples, length + 1)  # the last token is a target only
    numbers = [i for i, row in enumerate(fit.rows) if row is not None]
    rows = best_fit([len(examples[i].ids) - 1 for i in numbers], length)
    if not rows:
        what, limit = f"none of {len(fit.rows)} conversations can be learnt from", f"a row of {length} tokens"
        raise nothing_left_error(what, fit.counts, things="conversations", limit=limit, way="lengthen the row")
    contents = [[numbers[i] for i in row] for row in rows]
    return _example_rows([[examples[i] for i in row] for row in contents], length), fit.counts, contents


def padded_rows(examples: Sequence[TokenizedExample], length: int) -> Tokens:
    """One example per row, padded on the right."""
    for i, example in enumerate(examples):
        if len(example.ids) - 1 > length:
            raise UserError(f"example {i} has {len(example.ids)} tokens, a row takes {length + 1}: lengthen the row")
    return _example_rows([[example] for example in examples], length)


def _example_rows(rows: Sequence[Sequence[TokenizedExample]], length: int) -> Tokens:
    tokens = _zero_rows(len(rows), length)
    for r, row in enumerate(rows):
        start = 0
        for segment, (ids, weights) in enumerate(row, 1):
            start = _fill_segment(tokens, r, start, segment, ids, weights[1:])
    return tokens


def _zero_rows(rows: int, length: int) -> Tokens:
    shape = rows, length
    return Tokens(
        inputs=np.zeros(shape, np.int32),
        targets=np.zeros(shape, np.int32),
        weights=np.zeros(shape, np.float32),
        positions=np.zeros(shape, np.int32),
        segments=np.zeros(shape, np.int32),
    )


def _fill_segment(tokens: Tokens, row: int, start: int, segment: int, ids: Sequence[int], weights: Any) -> int:
    """Writes `ids` as a segment of a row and returns where it ends."""
    stop = start + len(ids) - 1
    here = row, slice(start, stop)
    tokens.inputs[here] = ids[:-1]
    tokens.targets[here] = ids[1:]
    tokens.weights[here] = weights
    tokens.positions[here] = np.arange(len(ids) - 1)
    tokens.segments[here] = segment
    return stop


def _too_small_error(tokens: int, length: int) -> UserError:
    return UserError(
        f"corpus too small for one row: {tokens} tokens, a row needs {length + 1}; add text, or shorten the row"
    )


def _folded_rows(flat: np.ndarray, length: int, dtype: type) -> np.ndarray:
    folded = np.zeros(-(-len(flat) // length) * length, dtype)
    folded[: len(flat)] = flat
    return folded.reshape(-1, length)

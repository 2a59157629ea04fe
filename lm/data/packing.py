"""Rows of tokens, the last thing before a batch: as Tokens of numpy arrays [N,T], or made when they are asked for.

A row's inputs and targets are one window of length + 1 tokens, so no target is lost; the weight belongs to the target.
Packing means isolation: segments are numbered from 1 in each row, positions restart in each, 0 is padding (Krell et al.
2021, arXiv 2107.02027).
"""

import bisect
import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lm.core.errors import UserError
from lm.core.types import Tokens
from lm.data.token_rows import SegmentRows, StreamRows, TokenRows, all_rows, concatenated_ranges
from lm.data.truncation import nothing_left_error
from lm.tokenizer import TokenizedExample, Tokenizer


def stream_documents(ids: np.ndarray, starts: np.ndarray, sizes: np.ndarray, length: int) -> StreamRows:
    """Documents (each already bos ... eos) laid end to end and cut every `length` tokens, for pretraining.

    ids [N]; document d is ids[starts[d] : starts[d] + sizes[d]]. UserError where they do not fill a row.
    """
    rows = StreamRows(ids, starts, sizes, length)
    if rows.filled < length:
        raise _too_small_error(rows.tokens, length)
    return rows


def best_fit_documents(ids: np.ndarray, starts: np.ndarray, sizes: np.ndarray, length: int) -> SegmentRows:
    """Documents (each already bos ... eos) in as few rows as can be, none cut but those longer than a row.

    A document of more than `length` + 1 tokens is cut into pieces that fill a row, and a rest; what is shorter than a
    row is packed by best fit, longest first. Every token but a document's first is a target exactly once: the last
    target of a piece is the first input of the next.
    Ding et al. 2024, sec. 2, arXiv 2404.10830.
    """
    pieces = document_pieces(sizes, length)
    if np.sum(sizes) <= length or not len(pieces):
        raise _too_small_error(int(np.sum(sizes)), length)
    rows = best_fit(pieces[:, 2], length)
    return SegmentRows(ids, None, starts, pieces, rows, length, trained=int(pieces[:, 2].sum()))


def document_pieces(sizes: np.ndarray, length: int) -> np.ndarray:
    """i64[S,3], DocumentPieces: documents of these sizes, in tokens, cut every `length` inputs; one of a single token
    has no piece."""
    inputs = np.maximum(np.asarray(sizes, np.int64) - 1, 0)
    counts = -(-inputs // length)
    document = np.repeat(np.arange(len(inputs)), counts)
    start = concatenated_ranges(np.zeros_like(counts), counts) * length
    return np.stack([document, start, np.minimum(length, inputs[document] - start)], axis=1)


def stream_rows(ids: Sequence[Sequence[int]], length: int) -> Tokens:
    """The rows of `stream_documents`."""
    return all_rows(stream_documents(*_joined_documents(ids), length))


def best_fit_rows(ids: Sequence[Sequence[int]], length: int) -> Tokens:
    """The rows of `best_fit_documents`."""
    return all_rows(best_fit_documents(*_joined_documents(ids), length))


def _joined_documents(ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(all ids, where each begins, how many each has)."""
    sizes = np.array([len(document) for document in ids], np.int64)
    flat = np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(sizes.sum()))
    return flat, np.cumsum(sizes) - sizes, sizes


def best_fit(sizes: Sequence[int] | np.ndarray, length: int) -> list[list[int]]:
    """Which items, of these sizes, share a row of `length`: each, longest first, goes to the fullest row with room."""
    sizes = np.asarray(sizes, np.int64).tolist()
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
DOCUMENT_PACKINGS: Mapping[str, Callable[[np.ndarray, np.ndarray, np.ndarray, int], TokenRows]] = {
    "stream": stream_documents,
    "best_fit": best_fit_documents,
}
PACKING_RULES: Mapping[str, str] = {  # the rule for a document that does not fit a row
    "stream": "documents laid end to end and cut every {length} tokens, nothing left out",
    "best_fit": "documents longer than {length} tokens cut into pieces of that size, nothing left out",
}


def check_packing(packing: str) -> None:
    """UserError for a name that is no way of packing documents."""
    if packing not in DOCUMENT_PACKINGS:
        raise UserError(f"data.packing is {packing!r}; choose one of {', '.join(DOCUMENT_PACKINGS)}")


def packing_efficiency(rows: Sequence[TokenRows]) -> dict[str, float | int]:
    """How well documents fill the rows of all sources: the share of positions that is not padding, and how many
    documents are spread over more than one row."""
    return {
        "packing_efficiency": sum(each.filled for each in rows) / sum(len(each) * each.length for each in rows),
        "documents_cut": sum(each.documents_cut() for each in rows),
    }


def document_rows(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Tokens:
    """Texts, each a document of the tokenizer's, as `stream_rows` lays them."""
    return stream_rows([tokenizer.document_ids(ids) for ids in tokenizer.encode_batch(texts)], length)


def packed_rows(examples: Sequence[TokenizedExample], length: int) -> tuple[Tokens, dict[str, int]]:
    """Whole conversations packed into rows as isolated segments, and how many were left out: see `packed_examples`."""
    ids, starts, sizes = _joined_documents([example.ids for example in examples])
    weights = np.concatenate([np.zeros(0, np.float32), *(example.weights for example in examples)])
    trained = np.array([np.count_nonzero(example.weights[1:]) for example in examples])
    rows, counts = packed_examples(ids, weights, starts, sizes, trained, length)
    return all_rows(rows), counts


def packed_examples(
    ids: np.ndarray, weights: np.ndarray, starts: np.ndarray, sizes: np.ndarray, trained: np.ndarray, length: int
) -> tuple[SegmentRows, dict[str, int]]:
    """Whole examples packed into rows as isolated segments, and how many were left out.

    ids [N] and their weights f32[N]; example e is ids[starts[e] : starts[e] + sizes[e]], with trained[e] targets that
    count. One of more than `length` + 1 tokens is "skipped", one without a target that counts is "untrained" (see
    truncation). Best fit, longest first: each goes to the fullest row that still has room.
    """
    fits = sizes <= length + 1  # the last token is a target only
    kept = np.flatnonzero(fits & (trained > 0))
    counts = {"skipped": int(np.count_nonzero(~fits)), "untrained": int(np.count_nonzero(fits & (trained == 0)))}
    if not len(kept):
        what, limit = f"none of {len(sizes)} conversations can be learnt from", f"a row of {length} tokens"
        raise nothing_left_error(what, counts, things="conversations", limit=limit, way="lengthen the row")
    pieces = np.stack([kept, np.zeros_like(kept), sizes[kept] - 1], axis=1)
    rows, targets = best_fit(pieces[:, 2], length), int(trained[kept].sum())
    return SegmentRows(ids, weights, starts, pieces, rows, length, trained=targets), counts


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

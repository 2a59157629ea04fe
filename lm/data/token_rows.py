"""Rows that are made when a batch asks for them: the ids stay where they are (on disk), a row is a view of them.

Both kinds say how many rows they have, give any of them as Tokens, and say what a row holds. What they keep in memory
is a few numbers for each document, example or segment.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from lm.core.types import Tokens
from lm.data.mixture import DrawnRows


class DocumentPiece(NamedTuple):
    """A stretch of a document that is a segment of a row: so many inputs, each with the token after it as target."""

    document: int  # its place in the list of documents
    start: int  # how many tokens of the document stand before it
    size: int


class TokenRows(Protocol):
    """N rows of `length` tokens."""

    length: int
    filled: int  # positions that are no padding, in all rows
    trained: int  # targets that count, in all rows

    def __len__(self) -> int: ...

    def rows(self, numbers: np.ndarray) -> Tokens:
        """Tokens of numpy arrays [n,T]: the rows of these numbers, i64[n]."""
        ...

    def pieces(self, number: int) -> list[DocumentPiece]:
        """What a row holds, by segment."""
        ...

    def documents_cut(self) -> int:
        """How many documents are spread over more than one row."""
        ...


class StreamRows:
    """Documents laid end to end and cut every `length` tokens. The last row is padded.

    Weight 0 where the target belongs to another document than the input.
    """

    def __init__(self, ids: np.ndarray, starts: np.ndarray, sizes: np.ndarray, length: int):
        """ids [N]; document d is ids[starts[d] : starts[d] + sizes[d]]. Those of no token are left out."""
        self._ids, self.length = ids, length
        self._documents = np.flatnonzero(sizes)  # their places in the list
        sizes = np.asarray(sizes, np.int64)[self._documents]
        self._ends = np.cumsum(sizes)
        self._begins = self._ends - sizes
        self._shift = np.asarray(starts, np.int64)[self._documents] - self._begins
        self.tokens = int(sizes.sum())
        self.filled = max(self.tokens - 1, 0)  # the last token is a target only
        self.trained = self.tokens - len(sizes)

    def __len__(self) -> int:
        return -(-self.filled // self.length)

    def rows(self, numbers: np.ndarray) -> Tokens:
        at = np.asarray(numbers, np.int64)[:, None] * self.length + np.arange(self.length + 1)
        real = at[:, :-1] < self.filled
        at = np.minimum(at, self.tokens - 1)
        document = np.searchsorted(self._ends, at, "right")
        ids = self._ids[at + self._shift[document]].astype(np.int32)
        own, begin = document[:, :-1], np.maximum(self._begins[document[:, :-1]], at[:, :1])
        return Tokens(
            inputs=np.where(real, ids[:, :-1], 0),
            targets=np.where(real, ids[:, 1:], 0),
            weights=(real & (own == document[:, 1:])).astype(np.float32),
            positions=np.where(real, at[:, :-1] - begin, 0).astype(np.int32),
            segments=np.where(real, own - own[:, :1] + 1, 0).astype(np.int32),
        )

    def pieces(self, number: int) -> list[DocumentPiece]:
        begin, end = number * self.length, min((number + 1) * self.length, self.filled)
        first, last = np.searchsorted(self._ends, [begin, end - 1], "right")
        parts = []
        for d in range(int(first), int(last) + 1):
            start = max(begin - int(self._begins[d]), 0)
            stop = min(end, int(self._ends[d])) - int(self._begins[d])
            parts.append(DocumentPiece(int(self._documents[d]), start, stop - start))
        return parts

    def documents_cut(self) -> int:
        ends = np.minimum(self._ends, self.filled)  # a last document of one token is a target only
        return int(np.count_nonzero(self._begins // self.length < (ends - 1) // self.length))


class SegmentRows:
    """Stretches of examples in rows, each a segment; what a row has left is padding."""

    def __init__(
        self,
        ids: np.ndarray,
        weights: np.ndarray | None,
        starts: np.ndarray,
        pieces: np.ndarray,
        rows: Sequence[Sequence[int]],
        length: int,
        *,
        trained: int,
    ):
        """ids [N] and their weights f32[N], None: 1; example e begins at starts[e]. pieces i64[S,3] are DocumentPieces;
        rows[r] are the pieces of row r. trained: targets of them all that count."""
        self._ids, self._weights, self.length = ids, weights, length
        self._row_ends = np.cumsum([len(row) for row in rows])
        order = np.fromiter((i for row in rows for i in row), np.int64, int(self._row_ends[-1]) if len(rows) else 0)
        self._pieces = np.asarray(pieces, np.int64).reshape(-1, 3)[order]
        self._starts = np.asarray(starts, np.int64)[self._pieces[:, 0]] + self._pieces[:, 1]
        self._sizes = self._pieces[:, 2]
        self.filled, self.trained = int(self._sizes.sum()), trained

    def __len__(self) -> int:
        return len(self._row_ends)

    def _range(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(first segment, segments) of each row."""
        first = np.where(numbers > 0, self._row_ends[numbers - 1], 0)
        return first, self._row_ends[numbers] - first

    def rows(self, numbers: np.ndarray) -> Tokens:
        first, counts = self._range(np.asarray(numbers, np.int64))
        segments = concatenated_ranges(first, counts)
        sizes = self._sizes[segments]
        row = np.repeat(np.arange(len(counts)), counts)  # of each segment
        before = np.cumsum(sizes) - sizes  # positions of all segments before, without paddings
        row_begin = before[np.minimum(np.cumsum(counts) - counts, len(sizes) - 1)]
        column = before - row_begin[row]
        position = concatenated_ranges(np.zeros_like(sizes), sizes)
        to = np.repeat(row * self.length + column, sizes) + position
        source = np.repeat(self._starts[segments], sizes) + position
        shape = len(counts), self.length
        tokens = Tokens(
            inputs=np.zeros(shape, np.int32),
            targets=np.zeros(shape, np.int32),
            weights=np.zeros(shape, np.float32),
            positions=np.zeros(shape, np.int32),
            segments=np.zeros(shape, np.int32),
        )
        tokens.inputs.reshape(-1)[to] = self._ids[source]
        tokens.targets.reshape(-1)[to] = self._ids[source + 1]
        tokens.weights.reshape(-1)[to] = 1.0 if self._weights is None else self._weights[source + 1]
        tokens.positions.reshape(-1)[to] = position
        tokens.segments.reshape(-1)[to] = np.repeat(segments - first[row] + 1, sizes)
        return tokens

    def pieces(self, number: int) -> list[DocumentPiece]:
        first, count = self._range(np.array([number]))
        return [DocumentPiece(*piece) for piece in self._pieces[first[0] : first[0] + count[0]].tolist()]

    def documents_cut(self) -> int:
        row = np.repeat(np.arange(len(self)), np.diff(self._row_ends, prepend=0))
        pairs = np.unique(np.stack([self._pieces[:, 0], row], axis=1), axis=0)
        return sum(rows > 1 for rows in Counter(pairs[:, 0].tolist()).values())


def concatenated_ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """i64[sum of sizes]: starts[0], starts[0] + 1, ... so many, then from starts[1] on, and so forth."""
    return np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(int(sizes.sum()))


def all_rows(rows: TokenRows) -> Tokens:
    """Every row, in order."""
    return rows.rows(np.arange(len(rows)))


def mixed_rows(sources: Sequence[TokenRows], drawn: DrawnRows) -> Tokens:
    """Tokens [B,T]: the rows that were drawn, in that order, which holds those of a source side by side."""
    parts = [rows.rows(drawn.number[drawn.source == s]) for s, rows in enumerate(sources) if (drawn.source == s).any()]
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def padded_batches(rows: TokenRows, batch_size: int) -> Iterator[Tokens]:
    """All rows once, in order; the last batch is filled up with rows of zeros, which weigh nothing."""
    for start in range(0, len(rows), batch_size):
        part = rows.rows(np.arange(start, min(start + batch_size, len(rows))))
        missing = batch_size - len(part.inputs)
        yield jax.tree.map(lambda leaf: np.pad(leaf, ((0, missing), (0, 0))), part)

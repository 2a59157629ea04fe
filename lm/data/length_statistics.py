"""How long documents, conversations and answers are, and how much of them is trained: counted over batches."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lm.core.types import Tokens
from lm.data.inspect import TokenIds, found_answers, segment_ranges
from lm.data.origins import RowOrigin, SegmentOrigin

UNKNOWN = "not known"


class SegmentLength(NamedTuple):
    """A segment of a row, counted."""

    origin: SegmentOrigin | None
    tokens: int  # inputs
    trained: int  # targets with a weight
    answers: tuple[int, ...]  # tokens of each answer in it, the end token too

    @property
    def source(self) -> str:
        return (self.origin and self.origin.source) or UNKNOWN

    @property
    def kind(self) -> str:
        return (self.origin and self.origin.kind) or UNKNOWN

    @property
    def document_tokens(self) -> int:
        """Of the whole document or conversation, where that is known; else what the segment holds."""
        return self.origin.size if self.origin and self.origin.size else self.tokens + 1


class LengthSummary(NamedTuple):
    """The lengths of what one source, or one kind, brought."""

    segments: int
    tokens: int
    trained: int
    document_median: float
    document_high: float  # 95 of 100 are no longer
    answer_median: float  # nan where there is none
    answer_high: float

    @property
    def trained_share(self) -> float:
        return self.trained / max(self.tokens, 1)


def segment_lengths(tokens: Tokens, ids: TokenIds, origins: Sequence[RowOrigin] | None) -> list[SegmentLength]:
    """Every segment of a batch, in order."""
    answers: dict[tuple[int, int], list[int]] = {}
    for answer in found_answers(tokens, ids):
        segment = int(tokens.segments[answer.row, answer.begin])
        ghost = not answer.is_ended and tokens.weights[answer.row, answer.end] == 0  # nothing follows a cut answer
        answers.setdefault((answer.row, segment), []).append(answer.end + 1 - answer.begin - ghost)
    lengths = []
    for row, begin, end in segment_ranges(tokens):
        segment = int(tokens.segments[row, begin])
        row_origins = origins[row].segments if origins is not None and row < len(origins) else ()
        lengths.append(
            SegmentLength(
                row_origins[segment - 1] if segment <= len(row_origins) else None,
                end - begin,
                int((tokens.weights[row, begin:end] > 0).sum()),
                tuple(answers[row, segment]) if (row, segment) in answers else (),
            )
        )
    return lengths


def summaries(lengths: Iterable[SegmentLength], group: Callable[[SegmentLength], str]) -> dict[str, LengthSummary]:
    """The summary of each group of segments, the one with the most tokens first."""
    grouped: dict[str, list[SegmentLength]] = {}
    for length in lengths:
        grouped.setdefault(group(length), []).append(length)
    by_name = {name: _summary(members) for name, members in grouped.items()}
    return dict(sorted(by_name.items(), key=lambda item: -item[1].tokens))


def document_lengths(lengths: Iterable[SegmentLength]) -> np.ndarray:
    """i64[n]: tokens of each document or conversation, one that comes in several segments once."""
    tokens, counted = [], set()
    for length in lengths:
        origin = length.origin
        if origin is not None and origin.size:
            if (origin.document, origin.size) in counted:
                continue
            counted.add((origin.document, origin.size))
        tokens.append(length.document_tokens)
    return np.array(tokens, np.int64)


def answer_lengths(lengths: Iterable[SegmentLength]) -> np.ndarray:
    """i64[n]: tokens of each answer, its end token too."""
    return np.array([tokens for length in lengths for tokens in length.answers], np.int64)


def _summary(lengths: Sequence[SegmentLength]) -> LengthSummary:
    documents, answers = document_lengths(lengths), answer_lengths(lengths)
    return LengthSummary(
        len(lengths),
        sum(length.tokens for length in lengths),
        sum(length.trained for length in lengths),
        *(float(np.quantile(documents, q)) for q in (0.5, 0.95)),
        *(float(np.quantile(answers, q)) if len(answers) else float("nan") for q in (0.5, 0.95)),
    )

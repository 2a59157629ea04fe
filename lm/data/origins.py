"""Where the rows of a batch came from: for people who look at a batch, never for a loss."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

Item = TypeVar("Item")


class SegmentOrigin(NamedTuple):
    """What a segment of a row was made from."""

    name: str  # of the document, conversation or prompt
    source: str = ""  # the entry of data.corpus or data.sources that brought it; empty where it is not known
    kind: str = ""  # "book", "code", ...; empty where it is not known
    document: int = 0  # its place among all that a run trains on
    start: int = 0  # of what stands before it: tokens of a text, messages of a conversation
    size: int = 0  # tokens of the whole document or conversation; 0 where it is not known


class RowOrigin(NamedTuple):
    """Where a row of a batch came from."""

    segments: Sequence[SegmentOrigin]  # of segment 1, 2, ...
    number: int  # of the row among all training rows
    epoch: int = 0  # how often all rows had been drawn before
    writer: str = ""  # who wrote what is trained: "people", "student", "policy"; empty where it is not known


def source_of(name: str, sources: Sequence[str]) -> str:
    """The source that a document's name begins with ("stdlib/shutil.py"), or the only source there is, or nothing."""
    first = name.partition("/")[0]
    return first if first in sources else sources[0] if len(sources) == 1 else ""


def drawn_origins(
    drawn: tuple[np.ndarray, np.ndarray],
    contents: Sequence[Sequence[Item]],
    origin: Callable[[Item], SegmentOrigin],
    *,
    writer: str = "",
) -> list[RowOrigin]:
    """The origins of the rows that `data.batches.drawn_rows` names; `contents` is what each training row holds."""
    return [
        RowOrigin([origin(item) for item in contents[number]], int(number), int(epoch), writer)
        for number, epoch in zip(*drawn)
    ]

"""Documents in rows: by best fit as well as end to end, every token trained once, and what each row holds."""

import random

import numpy as np
import pytest

from lm.core.errors import UserError
from lm.data import packing
from lm.data.batches import batch_function, drawn_rows
from lm.data.origins import RowOrigin, SegmentOrigin, drawn_origins, source_of

DRAW = random.Random(0)
# Distinct ids everywhere, so that a token says where it is from; documents of 1 to 60 tokens.
SIZES = [1, 2, 17, 33, 16, *(DRAW.randrange(1, 60) for _ in range(60))]
DOCUMENTS = [list(range(1000 * i, 1000 * i + size)) for i, size in enumerate(SIZES, 1)]
EACH = pytest.mark.parametrize("name", packing.DOCUMENT_PACKINGS)


def test_best_fit_by_hand():
    # Rows of 4. The document of 7 tokens has 6 inputs: 4 and 2; the others 2, 1 and 3.
    # Longest first: 4 | 3 | 2 (the rest) | 2 beside the 2 | 1 beside the 3.
    ids = [[2, 10, 11, 12, 13, 14, 3], [2, 20, 3], [2, 3], [2, 30, 31, 3]]
    tokens = packing.best_fit_rows(ids, 4)
    assert tokens.inputs.tolist() == [[2, 10, 11, 12], [2, 30, 31, 2], [13, 14, 2, 20]]
    assert tokens.targets.tolist() == [[10, 11, 12, 13], [30, 31, 3, 3], [14, 3, 20, 3]]
    assert tokens.weights.tolist() == [[1] * 4] * 3
    assert tokens.positions.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 0, 1]]
    assert tokens.segments.tolist() == [[1] * 4, [1, 1, 1, 2], [1, 1, 2, 2]]
    contents = packing.best_fit_contents([7, 3, 2, 4], 4)
    assert contents == [[(0, 0, 4)], [(3, 0, 3), (2, 0, 1)], [(0, 4, 2), (1, 0, 2)]]
    assert packing.packing_efficiency(contents, tokens) == {"packing_efficiency": 1.0, "documents_cut": 1}


@EACH
@pytest.mark.parametrize("length", [8, 16, 64])
def test_every_token_is_trained_exactly_once(name, length):
    """All but the first of each document, which nothing comes before: also where a document is cut."""
    tokens = packing.DOCUMENT_PACKINGS[name][0](DOCUMENTS, length)
    trained = tokens.weights > 0
    assert sorted(tokens.targets[trained]) == sorted(i for document in DOCUMENTS for i in document[1:])
    assert (tokens.targets[trained] == tokens.inputs[trained] + 1).all()  # and after the token before it


@EACH
@pytest.mark.parametrize("length", [8, 16, 64])
def test_contents_say_what_the_rows_hold(name, length):
    rows, contents = packing.DOCUMENT_PACKINGS[name]
    tokens, held = rows(DOCUMENTS, length), contents(SIZES, length)
    assert len(held) == len(tokens.inputs)
    for r, row in enumerate(held):
        inputs = [i for piece in row for i in DOCUMENTS[piece.document][piece.start : piece.start + piece.size]]
        segments = [s for s, piece in enumerate(row, 1) for _ in range(piece.size)]
        assert tokens.inputs[r].tolist()[: len(inputs)] == inputs
        assert tokens.segments[r].tolist() == segments + [0] * (length - len(segments))


def test_best_fit_cuts_only_documents_longer_than_a_row():
    sizes = [size for size in SIZES if size > 1]
    found = {
        name: packing.packing_efficiency(contents(SIZES, 32), rows(DOCUMENTS, 32))
        for name, (rows, contents) in packing.DOCUMENT_PACKINGS.items()
    }
    assert found["best_fit"]["documents_cut"] == sum(size > 33 for size in sizes)
    assert found["stream"]["documents_cut"] > found["best_fit"]["documents_cut"]
    assert 0.9 < found["best_fit"]["packing_efficiency"] <= 1 and found["stream"]["packing_efficiency"] > 0.99


def test_best_fit_is_that_of_a_search_through_all_rows():
    sizes = [DRAW.randrange(1, 30) for _ in range(300)]
    rows: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        room = [(30 - sum(sizes[j] for j in row), r) for r, row in enumerate(rows)]
        fits = [(free, r) for free, r in room if free >= sizes[i]]
        if fits:
            rows[min(fits)[1]].append(i)
        else:
            rows.append([i])
    assert packing.best_fit(sizes, 30) == rows


def test_refusals():
    with pytest.raises(UserError, match="data.packing is 'tight'; choose one of stream, best_fit"):
        packing.check_packing("tight")
    for documents, count in (([[2, 9, 9, 3]], 4), ([], 0), ([[2]] * 9, 9)):
        with pytest.raises(UserError, match=f"too small for one row: {count} tokens, a row needs 5"):
            packing.best_fit_rows(documents, 4)


def test_origins_of_drawn_rows():
    """The rows that a batch takes, named: the same numbers as the batch itself, and the epoch of each."""
    rows = {"number": np.arange(6)}
    batch, drawn = batch_function(rows, batch_size=4, seed=3), drawn_rows(6, batch_size=4, seed=3)
    found = [drawn_origins(drawn(i), [[f"stdlib/{r}"] for r in range(6)], SegmentOrigin) for i in range(3)]
    assert [[row.number for row in rows] for rows in found] == [batch(i)["number"].tolist() for i in range(3)]
    assert [row.epoch for rows in found for row in rows] == [0] * 6 + [1] * 6
    first = int(batch(0)["number"][0])
    assert found[0][0] == RowOrigin([SegmentOrigin(f"stdlib/{first}")], first)


def test_source_of_a_name():
    assert source_of("stdlib/re.py", ["stdlib", "chitchat"]) == "stdlib"
    assert source_of("notes/re.py", ["stdlib", "chitchat"]) == ""
    assert source_of("notes/re.py", ["my/folder"]) == "my/folder"

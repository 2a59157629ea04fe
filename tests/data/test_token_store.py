"""Tokens on disk: what is written comes back, what is torn is written again, and rows made from them are the same."""

import json
import os
import shutil

import numpy as np
import pytest

from lm.data import packing, token_store
from lm.data.sources import Document, is_held_out, split_held_out, split_sources_held_out
from lm.data.token_rows import all_rows, padded_batches
from lm.data.token_store import EncodedDocument, EncodedExample, cached_store, document_keys, store_key
from lm.data.tokenized_sources import held_out_documents, keys_below

WEIGHTS = [np.array([0, 0, 1, 0.5], np.float32), np.array([0, 1], np.float32), np.array([0, 0], np.float32)]
TALKS = [
    EncodedDocument("é", "a b", 4, [EncodedExample([2, 9, 8, 3], WEIGHTS[0]), EncodedExample([2, 3], WEIGHTS[1], 4)]),
    EncodedDocument("none", "", 0, []),
    EncodedDocument("two", "c", 1, [EncodedExample([7, 6], WEIGHTS[2])]),
]
TEXTS = [EncodedDocument(f"d{i}", f"text {i}", 10, [EncodedExample([2, *range(9, 9 + i), 3], None)]) for i in range(9)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_CACHE", str(tmp_path))
    return tmp_path / "tokens"


def read(documents):
    """A source that counts how often it is read."""
    times = []

    def again():
        times.append(1)
        return iter(documents)

    return again, times


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, np.uint16), (2**16 + 1, np.int32)])
def test_what_is_written_comes_back(cache, vocab_size, dtype):
    store = cached_store("key", lambda: TALKS, vocab_size=vocab_size)
    assert store.ids.dtype == dtype and store.ids.tolist() == [2, 9, 8, 3, 2, 3, 7, 6]
    assert store.weights.tolist() == [0, 0, 1, 0.5, 0, 1, 0, 0]
    assert (store.offsets.tolist(), store.sizes.tolist()) == ([0, 4, 6, 8], [4, 2, 2])
    assert (store.document.tolist(), store.start.tolist()) == ([0, 0, 2], [0, 4, 0])
    assert store.trained.tolist() == [2, 1, 0]
    assert [store.name(i) for i in range(store.documents)] == ["é", "none", "two"] and store.bytes.tolist() == [4, 0, 1]
    assert store.example_ids(1) == [2, 3]


def test_it_is_read_once(cache):
    documents, times = read(TEXTS)
    first, second = (cached_store("key", documents, vocab_size=99) for _ in range(2))
    assert times == [1] and first.weights is None
    np.testing.assert_array_equal(first.ids, second.ids)
    assert [path.name for path in cache.iterdir()] == ["key"]
    cached_store("other", documents, vocab_size=99)
    assert times == [1, 1]


@pytest.mark.parametrize("tear", ["cut", "gone", "more", "no index", "half an index", "wrong numbers", "empty"])
def test_a_torn_store_is_written_again(cache, tear):
    documents, times = read(TEXTS)
    expected = cached_store("key", documents, vocab_size=99).ids.tolist()
    folder = cache / "key"
    if tear == "cut":
        (folder / "ids").write_bytes((folder / "ids").read_bytes()[:-2])
    elif tear == "gone":
        (folder / "offsets.npy").unlink()
    elif tear == "more":
        (folder / "weights").write_bytes(b"1234")
    elif tear == "no index":
        (folder / token_store.INDEX_FILE).unlink()
    elif tear == "half an index":
        (folder / token_store.INDEX_FILE).write_text('{"dtype"')
    elif tear == "wrong numbers":
        index = json.loads((folder / token_store.INDEX_FILE).read_text())
        (folder / token_store.INDEX_FILE).write_text(json.dumps({**index, "ids": 1}))
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    assert cached_store("key", documents, vocab_size=99).ids.tolist() == expected
    assert times == [1, 1] and token_store.open_store(folder) is not None
    assert [path.name for path in cache.iterdir()] == ["key"]


def test_a_source_that_fails_leaves_nothing_behind(cache):
    def failing():
        yield TEXTS[0]
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError):
        cached_store("key", failing, vocab_size=99)
    assert list(cache.iterdir()) == []
    assert cached_store("key", lambda: TEXTS, vocab_size=99).documents == 9


def test_what_a_killed_process_left_is_removed(cache):
    cache.mkdir()
    left = cache / f".{token_store.socket.gethostname()}-{2**22 + 1}-x"  # above the largest process id there is
    ours = cache / f".{token_store.socket.gethostname()}-{os.getpid()}-x"
    others = cache / ".elsewhere-1-x"
    for path in (left, ours, others):
        path.mkdir()
    cached_store("key", lambda: TEXTS, vocab_size=99)
    assert not left.exists() and ours.exists() and others.exists()


def test_what_was_used_least_recently_makes_room(cache, monkeypatch):
    for number, key in enumerate("abc"):
        cached_store(key, lambda: TEXTS, vocab_size=99)
        os.utime(cache / key, (number, number))
    cached_store("a", lambda: TEXTS, vocab_size=99)  # used now
    monkeypatch.setattr(token_store, "CACHE_BYTES", int(2.5 * token_store.stored_bytes(cache / "a")))
    cached_store("d", lambda: TEXTS, vocab_size=99)
    assert sorted(path.name for path in cache.iterdir()) == ["a", "d"]


def test_a_cache_that_holds_nothing_still_gives_the_tokens(cache, monkeypatch):
    monkeypatch.setattr(token_store, "CACHE_BYTES", 0)
    assert cached_store("key", lambda: TEXTS, vocab_size=99).documents == 9


def test_another_that_writes_the_same_takes_nothing_away(cache, monkeypatch):
    """Runs that start together write one store: whoever has written it keeps what it wrote, whatever comes after."""
    replace = os.replace

    def replaced_and_moved_away(source, target):
        replace(source, target)
        if target == cache / "key":
            shutil.rmtree(target)

    monkeypatch.setattr(token_store.os, "replace", replaced_and_moved_away)
    assert cached_store("key", lambda: TEXTS, vocab_size=99).example_ids(1) == [2, 9, 3]
    assert not (cache / "key").exists()


def test_a_whole_store_that_came_meanwhile_stays(cache):
    def written_by_another_too():
        cached_store("key", lambda: TEXTS, vocab_size=99)
        inodes.append((cache / "key" / "ids").stat().st_ino)
        return TEXTS

    inodes = []
    assert cached_store("key", written_by_another_too, vocab_size=99).documents == 9
    assert [(cache / "key" / "ids").stat().st_ino] == inodes
    assert [path.name for path in cache.iterdir()] == ["key"]


def test_keys_tell_sources_and_tokenizers_apart():
    assert len({store_key("texts", "a", "b"), store_key("texts", "ab"), store_key("texts", "b", "a")}) == 3
    assert store_key("a") == store_key("a") and len(store_key("a")) == 32


# Which side a document is on


def keys(documents):
    names, contents, _ = zip(*(document_keys(document.name, document.content) for document in documents))
    return np.array(names, np.uint64), np.array(contents, np.uint64)


def test_the_arrays_hold_out_what_the_lists_do():
    """Names of their own, one text under several names, one name of several texts, texts that say nothing."""
    one = [Document(f"d{i}", f"text {i % 300}") for i in range(400)] + [Document("same", str(i)) for i in range(9)]
    one += [Document(f"empty {i}", " ") for i in range(50)]
    two = [Document(f"e{i}", f"text {i}") for i in range(200, 500)]
    for fraction in (0.05, 0.3, 0.5):
        lists = split_sources_held_out([one, two], fraction)
        sides = held_out_documents([keys(one), keys(two)], fraction)
        for documents, (_, unseen), side in zip((one, two), lists, sides):
            assert [d for d, held in zip(documents, side) if held] == unseen
        assert lists[0] == split_held_out(one, fraction)


def test_a_source_that_is_added_moves_nothing_and_nothing_is_on_both_sides():
    one = [Document(f"a/{i}", f"text {i}") for i in range(300)]
    two = [Document(f"b/{i}", f"text {i}") for i in range(150, 450)]
    alone = held_out_documents([keys(one)], 0.2)[0]
    first, second = held_out_documents([keys(one), keys(two)], 0.2)
    assert (first == alone).all() and 30 < first.sum() < 90
    assert (second[:150] == first[150:]).all()  # the same texts under other names
    assert (second[150:] == held_out_documents([keys(two[150:])], 0.2)[0]).all()


def test_the_threshold_is_that_of_the_name():
    names = [f"stdlib/{i}.py" for i in range(2000)]
    found = np.array([document_keys(name, name)[0] for name in names], np.uint64)
    for fraction in (0.0, 1e-3, 0.05, 1 / 3, 1.0):
        assert keys_below(found, fraction).tolist() == [is_held_out(name, fraction) for name in names]


# Rows


@pytest.mark.parametrize("name", packing.DOCUMENT_PACKINGS)
def test_rows_of_some_documents_are_those_of_their_own_lists(cache, name):
    """In any order, from the middle of a store; any rows in any order; the last batch filled up."""
    store = cached_store("key", lambda: TEXTS, vocab_size=99)
    some = np.array([7, 2, 5, 8])
    rows = packing.DOCUMENT_PACKINGS[name](store.ids, store.offsets[some], store.sizes[some], 4)
    lists = [store.example_ids(i) for i in some]
    expected = {"stream": packing.stream_rows, "best_fit": packing.best_fit_rows}[name](lists, 4)
    whole = all_rows(rows)
    drawn = np.array([3, 0, 3, len(rows) - 1])
    for leaf in ("inputs", "targets", "weights", "positions", "segments"):
        np.testing.assert_array_equal(getattr(whole, leaf), getattr(expected, leaf))
        np.testing.assert_array_equal(getattr(rows.rows(drawn), leaf), getattr(expected, leaf)[drawn])
        assert getattr(whole, leaf).dtype == getattr(expected, leaf).dtype
    *most, last = padded_batches(rows, 4)
    assert np.concatenate([part.inputs for part in most]).tolist() == whole.inputs[: 4 * len(most)].tolist()
    rest = len(rows) - 4 * len(most)
    assert last.inputs.shape == (4, 4) and last.inputs[:rest].tolist() == whole.inputs[4 * len(most) :].tolist()
    assert not last.segments[rest:].any() and rows.filled == (whole.segments > 0).sum()
    assert rows.trained == whole.weights.sum()


def test_weights_of_examples_are_those_of_their_targets(cache):
    store = cached_store("key", lambda: TALKS, vocab_size=99)
    rows, left_out = packing.packed_examples(store.ids, store.weights, store.offsets, store.sizes, store.trained, 4)
    # inputs 2 9 8 | 2; the third example trains nothing
    found = all_rows(rows)
    assert left_out == {"skipped": 0, "untrained": 1} and found.inputs.tolist() == [[2, 9, 8, 2]]
    assert found.targets.tolist() == [[9, 8, 3, 3]] and found.weights.tolist() == [[0, 1, 0.5, 1]]
    assert found.segments.tolist() == [[1, 1, 1, 2]] and (rows.filled, rows.trained) == (4, 3)

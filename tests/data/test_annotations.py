"""The store: what it acknowledges is on the disk once, whoever else has the file open and whatever dies."""

import json
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest
from runs import ROOT

from lm.core.errors import UserError
from lm.data import annotations as stores, preferences as records
from lm.data.annotations import (
    SELECT_LATEST,
    SELECT_STANDING,
    SELECT_UNJUDGED,
    Annotation,
    AnnotationStore,
    RankingItem,
    StoreUnavailable,
    read_rankings,
)
from lm.data.preferences import Ranking
from tests.test_bad_input import disk

__all__ = ["disk"]

SOURCES = [{"model": "sft", "fingerprint": "f", "sampler": {"seed": 0}}, {"model": "ppo", "fingerprint": "g"}]


def item(number: int) -> tuple:
    prompt = [{"role": "user", "content": f"prompt {number}"}]
    return f"name {number}", prompt, [f"first {number}", "zweite\n日本 \u2028"], SOURCES


@pytest.fixture
def store(tmp_path):
    """With three items."""
    with AnnotationStore(tmp_path / "people.db") as opened:
        assert opened.add_items(map(item, range(3))) == 3
        yield opened


def test_a_verdict_comes_back_as_a_ranking(store, tmp_path):
    details = {"axes": {"helpful": [5, None]}, "flags": [[], ["toxic"]], "shown": [1, 0], "seconds": 1.5}
    store.record_verdict(Annotation("key", 2, "Änn", [1, 2], **details))
    store.record_verdict(Annotation("other key", 3, "ben", [1, 1], "skipped"))
    first, second = store.rankings()
    assert first._replace(time="") == Ranking(*item(1)[:3], [1, 2], "Änn", "", sources=SOURCES, **details)
    assert second == Ranking(*item(2)[:3], [1, 1], "ben", second.time, "skipped", sources=SOURCES)
    assert first.time <= second.time
    records.append_rankings(tmp_path / "rankings.jsonl", [first, second])
    assert read_rankings(tmp_path / "rankings.jsonl") == read_rankings(store.path) == [first, second]


def test_items(store):
    assert store.items() == [RankingItem(i + 1, *item(i)) for i in range(3)]
    assert store.item(2) == RankingItem(2, *item(1))
    assert store.add_items([item(3), item(1)]) == 1, "one is known already"
    with pytest.raises(UserError, match="there is no item 9 in .*people.db"):
        store.item(9)


def test_what_is_next(store):
    """Highest priority first, then fewest verdicts, then in order; never twice to the same rater."""
    assert store.next_item("ann").id == 1
    store.record_verdict(Annotation("a", 1, "ann", [1, 2]))
    assert (store.next_item("ann").id, store.next_item("ben").id) == (2, 2)
    store.set_priorities({3: 0.25, 1: 0.1})
    assert (store.next_item("ann").id, [i.id for i in store.unjudged_items("ben")]) == (3, [3, 1, 2])
    store.record_verdict(Annotation("b", 3, "ann", [1, 1], "skipped"))
    store.record_verdict(Annotation("c", 2, "ann", [1, 1], "both bad"))
    assert store.next_item("ann") is None and store.unjudged_items("ann") == []
    assert (store.progress("ann"), store.progress("ben")) == ((3, 3), (0, 3))


def test_the_same_key_is_the_same_verdict_and_another_is_a_duplicate(store):
    for _ in range(3):
        store.record_verdict(Annotation("key", 1, "ann", [2, 1]))
    with pytest.raises(UserError, match="duplicate verdict: ann has judged item 1; undo that one first"):
        store.record_verdict(Annotation("another", 1, "ann", [1, 2]))
    store.record_verdict(Annotation("ben's", 1, "ben", [1, 2]))
    assert [(r.rater, r.ranking) for r in store.rankings()] == [("ann", [2, 1]), ("ben", [1, 2])]


def test_undo(store):
    assert store.undo_latest("ann") is None
    store.record_verdict(Annotation("a", 1, "ann", [1, 2]))
    store.record_verdict(Annotation("b", 2, "ann", [1, 2]))
    store.record_verdict(Annotation("c", 1, "ben", [1, 2]))
    assert store.undo_latest("ann").id == 2
    assert (store.progress("ann"), len(store.rankings())) == ((1, 3), 2)
    store.record_verdict(Annotation("b", 2, "ann", [1, 2]))
    assert store.progress("ann") == (1, 3), "a late repetition does not bring it back"
    store.record_verdict(Annotation("d", 2, "ann", [2, 1]))
    assert [store.undo_latest("ann").id, store.undo_latest("ann").id, store.undo_latest("ann")] == [2, 1, None]
    with sqlite3.connect(store.path) as db:
        kept = db.execute("SELECT key, withdrawn FROM verdicts ORDER BY id").fetchall()
    assert kept == [("a", 1), ("b", 1), ("c", 0), ("d", 1)]
    assert [i.id for i in store.unjudged_items("cleo")] == [2, 3, 1], "what was withdrawn does not count"


@pytest.mark.parametrize(
    "said, message",
    [
        ({"item": 7}, "there is no item 7"),
        ({"ranking": [1]}, r"item 1: ranking \[1\] gives no rank to each of 2 texts"),
        ({"ranking": [0, 1]}, "something other than whole numbers from 1"),
        ({"verdict": "good"}, "verdict is 'good', not one of ranked, both bad, skipped"),
        ({"verdict": "skipped"}, "a verdict 'skipped' cannot prefer one response"),
        ({"axes": {"clear": [1]}}, r"axes\['clear'\] is \[1\]"),
        ({"axes": {"clear": 3}}, "item 1: "),
        ({"flags": [["rude"], []]}, "flags is "),
        ({"flags": [1, 2]}, "item 1: "),
        ({"shown": [0, 0]}, "shown is "),
        ({"seconds": -1}, "seconds is -1, not a time"),
        ({"rater": "\ud800"}, "is no Unicode text"),
    ],
)
def test_what_cannot_be_recorded(store, said, message):
    with pytest.raises(UserError, match=message):
        store.record_verdict(Annotation(**{"key": "k", "item": 1, "rater": "ann", "ranking": [1, 2], **said}))
    assert store.rankings() == []
    store.record_verdict(Annotation("k", 1, "ann", [1, 2]))


def test_merge(store, tmp_path):
    store.record_verdict(Annotation("a", 1, "ann", [1, 2]))
    store.record_verdict(Annotation("b", 2, "ann", [1, 1], "both bad"))
    bare = Ranking("n", [{"role": "user", "content": "hi"}], ["x", "y"], [1, 2], "rule", "2024-05-01T12:00:00+00:00")
    with AnnotationStore(tmp_path / "other.db") as other:
        assert other.merge_rankings(store.rankings()) == (2, 0)
        assert other.merge_rankings([*store.rankings(), bare]) == (1, 2)
        assert other.rankings() == [bare, *store.rankings()], "in order of time"
        assert other.add_items(map(item, range(3))) == 1, "the other two came with their verdicts"
        with pytest.raises(RuntimeError):
            other.merge_rankings(_failing(bare))
        assert len(other.rankings()) == 3, "all or none"


def _failing(bare):
    yield bare._replace(rater="ann")
    raise RuntimeError


def test_ten_thousand(tmp_path):
    """Each of the queries behind a click walks an index, none sorts or scans."""
    with AnnotationStore(tmp_path / "people.db") as store:
        assert store.add_items(map(item, range(5_000))) == 5_000
        given = [
            Ranking(*item(i)[:3], [1, 2], rater, f"2024-05-01T12:00:{i % 60:02}+00:00", sources=SOURCES)
            for rater in ("ann", "ben")
            for i in range(5_000)
        ]
        assert store.merge_rankings(given) == (10_000, 0)
        assert (len(store.rankings()), store.progress("ann"), store.next_item("ann")) == (10_000, (5_000, 5_000), None)
        assert store.next_item("cleo").id == 1
        for query, arguments in (
            (f"{SELECT_UNJUDGED} LIMIT 1", ["ann"]),
            (SELECT_STANDING, ["ann", 1]),
            (SELECT_LATEST, ["ann"]),
        ):
            with sqlite3.connect(store.path) as db:
                plan = " ".join(row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {query}", arguments))
            assert "USING INDEX" in plan or "USING COVERING INDEX" in plan
            assert "TEMP B-TREE" not in plan and "SCAN verdicts" not in plan, plan


def test_two_connections_and_many_threads(store):
    """Every rater's verdict is there once, whichever connection and thread brought it."""
    with AnnotationStore(store.path) as other:
        assert other.items() == store.items()
        tasks = [
            threading.Thread(target=s.record_verdict, args=[Annotation(f"{rater}/{i}", i, f"rater {rater}", [1, 2])])
            for rater in range(6)
            for i in (1, 2, 3)
            for s in (store, other)
        ]
        for task in tasks:
            task.start()
        for task in tasks:
            task.join()
        assert len(other.rankings()) == 18 and other.rankings() == store.rankings()


def test_a_locked_file(store, monkeypatch):
    monkeypatch.setattr(stores, "LOCK_TIMEOUT", 0.05)
    with AnnotationStore(store.path) as impatient, sqlite3.connect(store.path, isolation_level=None) as db:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="people.db is locked by another process: try again when it is done"):
            impatient.record_verdict(Annotation("k", 1, "ann", [1, 2]))
        assert impatient.next_item("ann").id == 1, "reading goes on"
        db.execute("COMMIT")
        impatient.record_verdict(Annotation("k", 1, "ann", [1, 2]))
    assert store.progress("ann") == (1, 3)


def test_a_full_disk(disk):
    """What was acknowledged stays; with room again the same verdict goes in."""
    folder = disk(400)
    with AnnotationStore(folder / "people.db") as store:
        store.add_items(map(item, range(3)))
        store.record_verdict(Annotation("a", 1, "ann", [1, 2]))
        filling = folder / "filling"
        with filling.open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(4096))
        with pytest.raises(StoreUnavailable, match="cannot write .*people.db: .*; make room there and try again"):
            for i in range(3, 400):  # what the log has room for already goes in
                store.add_items([item(i)])
        filling.unlink()
        assert [r.rater for r in store.rankings()] == ["ann"]
        store.record_verdict(Annotation("b", 2, "ann", [1, 2]))
        assert store.progress("ann")[0] == 2


def test_files_that_are_none_of_ours(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a database\n" * 100)
    with pytest.raises(UserError, match="notes.txt is no database, or a damaged one"):
        AnnotationStore(text)
    assert text.read_text() == "not a database\n" * 100
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE songs (title)")
    before = foreign.read_bytes()
    with pytest.raises(UserError, match="foreign.db is a database of something else: name another file"):
        AnnotationStore(foreign)
    assert foreign.read_bytes() == before
    with pytest.raises(UserError, match="cannot use .*: unable to open database file"):
        AnnotationStore(tmp_path)
    with pytest.raises(UserError, match="cannot write .*notes.txt/people.db: "):
        AnnotationStore(text / "people.db")
    with pytest.raises(UserError, match="no rankings at .*nowhere"):
        read_rankings(tmp_path / "nowhere")


def test_another_version(tmp_path):
    with AnnotationStore(tmp_path / "people.db") as store:
        store._rows("PRAGMA user_version = 2")
    with pytest.raises(UserError, match="has version 2 of our tables, but this program knows 1"):
        AnnotationStore(tmp_path / "people.db")


def test_two_processes_make_the_file_at_once(tmp_path):
    code = f"from lm.data.annotations import AnnotationStore; AnnotationStore({str(tmp_path / 'people.db')!r}).close()"
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE) for _ in range(4)]
    assert [(p.communicate()[1], p.returncode) for p in processes] == [(b"", 0)] * 4


WRITER = """
import json, sys
from lm.data.annotations import Annotation, AnnotationStore
with AnnotationStore(sys.argv[1]) as store:
    for item in store.items():
        store.record_verdict(Annotation(f"key {item.id}", item.id, "ann", [1, 2]))
        print(json.dumps(item.id), flush=True)
"""


def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path):
    path = tmp_path / "people.db"
    with AnnotationStore(path) as store:
        store.add_items(map(item, range(2_000)))
    for stop_at in (40, 300):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        acknowledged = [json.loads(writer.stdout.readline()) for _ in range(stop_at)]
        writer.send_signal(signal.SIGKILL)
        acknowledged += map(json.loads, writer.stdout.read().split())
        writer.wait()
        with AnnotationStore(path) as store:
            recorded = len(store.rankings())
            assert len(acknowledged) <= recorded <= len(acknowledged) + 1, "the last may not have been told any more"
            assert acknowledged == list(range(1, len(acknowledged) + 1))
            assert store.progress("ann")[0] == recorded
            assert sum(verdicts for (verdicts,) in store._rows("SELECT verdicts FROM items")) == recorded


def test_one_item_is_added_once_and_keeps_its_number(store):
    number = store.add_item(*item(7))
    assert store.add_item(*item(7)) == number and store.item(number).name == item(7)[0]

"""Items to rank and raters' verdicts on them, in one SQLite file that several processes may have open at once.

A verdict is on the disk when `record` returns (write-ahead log, synchronous=FULL), and a kill at any moment loses none.
Nothing is ever deleted: a verdict taken back stays in the file, marked as withdrawn.
"""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from lm.core.errors import UserError
from lm.data.preferences import Ranking, ranking_from_record, ranking_json, read_jsonl_rankings

PEOPLE_DB = "people.db"  # its name in a workdir
SQLITE_MAGIC = b"SQLite format 3\0"  # the first bytes of every SQLite file
APPLICATION_ID, SCHEMA_VERSION = 0x6C6D7261, 1  # "lmra" says that such a file is ours, the version of which schema
LOCK_TIMEOUT = 10.0  # seconds to wait for another process that is writing

SCHEMA = (
    """CREATE TABLE IF NOT EXISTS items (
        id INTEGER PRIMARY KEY, identity TEXT NOT NULL UNIQUE, name TEXT NOT NULL,
        prompt TEXT NOT NULL, responses TEXT NOT NULL, sources TEXT NOT NULL,
        priority REAL NOT NULL DEFAULT 0, verdicts INTEGER NOT NULL DEFAULT 0)""",
    """CREATE TABLE IF NOT EXISTS verdicts (
        id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, item INTEGER NOT NULL REFERENCES items, rater TEXT NOT NULL,
        time TEXT NOT NULL, ranking TEXT NOT NULL, verdict TEXT NOT NULL, axes TEXT NOT NULL, flags TEXT NOT NULL,
        shown TEXT NOT NULL, seconds REAL, withdrawn INTEGER NOT NULL DEFAULT 0)""",
    "CREATE INDEX IF NOT EXISTS due ON items (priority DESC, verdicts, id)",
    "CREATE UNIQUE INDEX IF NOT EXISTS standing ON verdicts (rater, item) WHERE NOT withdrawn",
    "CREATE INDEX IF NOT EXISTS latest ON verdicts (rater, id) WHERE NOT withdrawn",
    """CREATE TRIGGER IF NOT EXISTS given AFTER INSERT ON verdicts
        BEGIN UPDATE items SET verdicts = verdicts + 1 WHERE id = new.item; END""",
    """CREATE TRIGGER IF NOT EXISTS taken_back AFTER UPDATE OF withdrawn ON verdicts
        BEGIN UPDATE items SET verdicts = verdicts - 1 WHERE id = new.item; END""",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
SELECT_ITEMS = "SELECT id, name, prompt, responses, sources FROM items"
SELECT_UNJUDGED = f"""{SELECT_ITEMS} WHERE NOT EXISTS
    (SELECT 1 FROM verdicts WHERE rater = ? AND item = items.id AND NOT withdrawn)
    ORDER BY priority DESC, verdicts, id"""
SELECT_STANDING = "SELECT item FROM verdicts WHERE rater = ? AND item = ? AND NOT withdrawn"
SELECT_LATEST = "SELECT id, item FROM verdicts WHERE rater = ? AND NOT withdrawn ORDER BY id DESC LIMIT 1"
VERDICT_COLUMNS = (
    "rater",
    "time",
    "ranking",
    "verdict",
    "axes",
    "flags",
    "shown",
    "seconds",
)  # of a Ranking, kept per verdict
JSON_COLUMNS = ("prompt", "responses", "sources", "ranking", "axes", "flags", "shown")  # the columns that hold JSON
SELECT_RANKINGS = f"""SELECT {", ".join(Ranking._fields)} FROM verdicts JOIN items ON items.id = item
    WHERE NOT withdrawn ORDER BY time, verdicts.id"""


class StoreUnavailable(UserError):
    """The file cannot be written for now: it is locked, or its disk is full. Nothing was recorded; try again."""


class DuplicateVerdict(UserError):
    """This rater has judged that item already."""


class RankingItem(NamedTuple):
    """Responses to one prompt, to be ranked."""

    id: int
    name: str  # what the prompt was taken from
    prompt: list[dict]  # messages
    responses: list[str]
    sources: list[dict]  # of each response: {"model", "fingerprint", "sampler"}; empty if unknown


class Annotation(NamedTuple):
    """A rater's verdict on an item; the fields are those of lm.data.preferences.Ranking."""

    key: str  # drawn by the client: the same key sent twice is one verdict
    item: int
    rater: str
    ranking: list[int]
    verdict: str = "ranked"
    axes: Mapping[str, Sequence[int | None]] = {}
    flags: Sequence[Sequence[str]] = ()
    shown: Sequence[int] = ()
    seconds: float | None = None


class AnnotationStore:
    """The items and verdicts of one file, for any number of threads. Leaving it as a context manager closes it.

    UserError for a file that is no such database or one of another version; StoreUnavailable while it is locked or
    the disk is full.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = threading.RLock()
        with self._store_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=LOCK_TIMEOUT, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "AnnotationStore":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def add_items(self, items: Iterable[tuple[str, list[dict], list[str], list[dict]]]) -> int:
        """Adds (name, prompt, responses, sources), all or none; returns how many of them were not there yet."""
        with self._write_transaction():
            return sum(self._insert_item(*item)[1] for item in items)

    def add_item(self, name: str, prompt: list[dict], responses: list[str], sources: list[dict]) -> int:
        """Adds one, unless it is there, and returns its number."""
        with self._write_transaction():
            return self._insert_item(name, prompt, responses, sources)[0]

    def item(self, id: int) -> RankingItem:
        """UserError for an unknown one."""
        items = self._items(f"{SELECT_ITEMS} WHERE id = ?", id)
        if not items:
            raise UserError(f"there is no item {id} in {self.path}")
        return items[0]

    def items(self) -> list[RankingItem]:
        return self._items(f"{SELECT_ITEMS} ORDER BY id")

    def next_item(self, rater: str) -> RankingItem | None:
        """What this rater has not judged yet: highest priority first, then fewest verdicts, then in order."""
        return next(iter(self._items(f"{SELECT_UNJUDGED} LIMIT 1", rater)), None)

    def unjudged_items(self, rater: str) -> list[RankingItem]:
        """All items that `next_item` would give, in its order."""
        return self._items(SELECT_UNJUDGED, rater)

    def record_verdict(self, verdict: Annotation) -> None:
        """Returns when the verdict is on the disk; one with a known key is already there.

        UserError for an unknown item, for one that this rater has judged, and for a verdict that is no valid Ranking.
        """
        with self._write_transaction() as db:
            if db.execute("SELECT 1 FROM verdicts WHERE key = ?", [verdict.key]).fetchone():
                return
            item = self.item(verdict.item)
            if db.execute(SELECT_STANDING, [verdict.rater, item.id]).fetchone():
                raise DuplicateVerdict(
                    f"duplicate verdict: {verdict.rater} has judged item {item.id}; undo that one first"
                )
            verdict_fields = {name: value for name, value in verdict._asdict().items() if name not in ("key", "item")}
            ranking = Ranking(
                item.name, item.prompt, item.responses, sources=item.sources, time=_now(), **verdict_fields
            )
            try:
                ranking_from_record(ranking._asdict())
            except (TypeError, ValueError) as error:
                raise UserError(f"item {item.id}: {error}") from error
            self._insert(verdict.key, item.id, ranking)

    def undo_latest(self, rater: str) -> RankingItem | None:
        """Withdraws the rater's latest verdict and returns its item; None if there is none."""
        with self._write_transaction() as db:
            latest = db.execute(SELECT_LATEST, [rater]).fetchone()
            if latest is None:
                return None
            verdict, item = latest
            db.execute("UPDATE verdicts SET withdrawn = 1 WHERE id = ?", [verdict])
            return self.item(item)

    def progress(self, rater: str) -> tuple[int, int]:
        """How many items this rater has judged, and how many there are."""
        judged = "SELECT count(*) FROM verdicts WHERE rater = ? AND NOT withdrawn"
        return self._rows(f"SELECT ({judged}), (SELECT count(*) FROM items)", rater)[0]

    def set_priorities(self, priorities: Mapping[int, float]) -> None:
        """Sets the priority of items by id; an item starts with 0."""
        with self._write_transaction() as db:
            db.executemany("UPDATE items SET priority = ? WHERE id = ?", [(p, id) for id, p in priorities.items()])

    def rankings(self) -> list[Ranking]:
        """Every standing verdict, "skipped" ones too, in order of time."""
        return [Ranking(*map(_column_value, Ranking._fields, row)) for row in self._rows(SELECT_RANKINGS)]

    def merge_rankings(self, rankings: Iterable[Ranking]) -> tuple[int, int]:
        """Adds verdicts from elsewhere and the items they need, all or none: (added, already there).

        A verdict is already there if the same rater has judged the same item.
        """
        added = there = 0
        with self._write_transaction() as db:
            for ranking in rankings:
                key = hashlib.sha256(ranking_json(ranking).encode()).hexdigest()
                item, _ = self._insert_item(ranking.name, ranking.prompt, ranking.responses, list(ranking.sources))
                existing = db.execute(
                    f"{SELECT_STANDING} UNION SELECT item FROM verdicts WHERE key = ?", [ranking.rater, item, key]
                )
                if existing.fetchone():
                    there += 1
                else:
                    self._insert(key, item, ranking)
                    added += 1
        return added, there

    def _prepare(self) -> None:
        """Creates the schema in a new file. Nothing is written to a file of another program."""
        tables = self._rows("SELECT 1 FROM sqlite_master LIMIT 1")  # before the mark: both are committed together
        application, version = (self._rows(f"PRAGMA {name}")[0][0] for name in ("application_id", "user_version"))
        if application != APPLICATION_ID and tables:
            raise UserError(f"{self.path} is a database of something else: name another file")
        if application == APPLICATION_ID and version != SCHEMA_VERSION:
            raise UserError(
                f"{self.path} has version {version} of our tables, but this program knows {SCHEMA_VERSION}: "
                "use the program "
                "that made it to export its verdicts, then import them here"
            )
        self._rows("PRAGMA journal_mode = WAL")
        self._rows("PRAGMA synchronous = FULL")
        if application != APPLICATION_ID:
            with self._write_transaction() as db:
                for statement in SCHEMA:
                    db.execute(statement)

    def _insert_item(
        self, name: str, prompt: list[dict], responses: list[str], sources: list[dict]
    ) -> tuple[int, bool]:
        """(id, whether it is new) of the item with this prompt, these responses and sources."""
        parts = [json.dumps(part, ensure_ascii=False, sort_keys=True) for part in (prompt, responses, sources)]
        identity = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        existing = self._db.execute("SELECT id FROM items WHERE identity = ?", [identity]).fetchone()
        if existing:
            return existing[0], False
        insert = "INSERT INTO items (identity, name, prompt, responses, sources) VALUES (?, ?, ?, ?, ?)"
        return self._db.execute(insert, [identity, name, *parts]).lastrowid, True

    def _insert(self, key: str, item: int, ranking: Ranking) -> None:
        values = [
            json.dumps(getattr(ranking, field)) if field in JSON_COLUMNS else getattr(ranking, field)
            for field in VERDICT_COLUMNS
        ]
        places = f"?, ?{', ?' * len(VERDICT_COLUMNS)}"
        insert = f"INSERT INTO verdicts (key, item, {', '.join(VERDICT_COLUMNS)}) VALUES ({places})"
        self._db.execute(insert, [key, item, *values])

    def _items(self, query: str, *arguments: Any) -> list[RankingItem]:
        rows = self._rows(query, *arguments)
        return [RankingItem(id, name, *map(json.loads, parts)) for id, name, *parts in rows]

    def _rows(self, query: str, *arguments: Any) -> list[tuple]:
        with self._lock, self._store_errors():
            return self._db.execute(query, arguments).fetchall()

    @contextmanager
    def _write_transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction: when it ends everything is on the disk, and if it fails nothing is."""
        with self._lock, self._store_errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk has ended it already
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        """Turns errors of SQLite and the system into a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; name another file") from error
        except UnicodeEncodeError as error:
            raise UserError(f"cannot write {error.object!r} to {self.path}: it is no Unicode text") from error
        except sqlite3.Error as error:
            code = error.sqlite_errorcode & 0xFF if hasattr(error, "sqlite_errorcode") else None
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise StoreUnavailable(
                    f"{self.path} is locked by another process: try again when it is done"
                ) from error
            if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
                raise StoreUnavailable(f"cannot write {self.path}: {error}; make room there and try again") from error
            if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise UserError(f"{self.path} is no database, or a damaged one: name another file") from error
            raise UserError(f"cannot use {self.path}: {error}; name another file") from error


def read_rankings(path: str | Path) -> list[Ranking]:
    """Every verdict of a database or of a file of JSON lines. UserError names what is wrong with it."""
    try:
        with open(path, "rb") as file:
            is_database = file.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC
    except OSError:
        is_database = False  # the reader of lines says what there is to say
    if not is_database:
        return read_jsonl_rankings(path)
    with AnnotationStore(path) as store:
        return store.rankings()


def _column_value(field: str, stored: Any) -> Any:
    """What a column holds; an empty list is the field's default, if it has one."""
    value = json.loads(stored) if field in JSON_COLUMNS else stored
    return Ranking._field_defaults[field] if value == [] and field in Ranking._field_defaults else value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")

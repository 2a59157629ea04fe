"""Conversations, prompts and rankings by the name of their source: built in, a file, a folder, a glob, or hf:NAME."""

import glob
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm.core.errors import UserError
from lm.data.annotations import SQLITE_MAGIC, read_rankings
from lm.data.bad_rows import BadRows
from lm.data.conversations import CONVERSATION_KINDS, CONVERSATION_SOURCES, Conversation, built_in_conversations
from lm.data.files import HUGGING_FACE_PREFIX, files_digest
from lm.data.formats import CONVERSATION_FORMATS, RANKING_FORMATS, recognized_rows
from lm.data.mixture import parse_sources
from lm.data.preferences import Ranking
from lm.data.ratings import BUILT_IN_RANKINGS

NO_COLUMNS: Mapping[str, str] = {}


class LoadedRankings(NamedTuple):
    """Rankings, and how many of the users' rows were bad and passed over, or copies of one before them."""

    items: list[Ranking]
    counts: dict[str, int]  # "bad_rows", "duplicate_rows"


class ConversationRows:
    """The conversations and prompts of sources with commas between them, built-in names among them or not.

    They are read anew, one by one, each time they are iterated over. columns: our name of a field -> that of the rows.
    Up to `skip_bad_rows` rows of all sources that cannot be used are passed over, with a warning that counts them;
    UserError names the first one beyond. needs_reply: a row in which no assistant speaks cannot be used. See
    lm.data.formats.
    """

    def __init__(self, sources: str, *, columns: Mapping[str, str], skip_bad_rows: int, needs_reply: bool):
        self._names = list(dict.fromkeys(name.strip() for name in sources.split(",")))
        self._sources, self._columns, self._limit = sources, columns, skip_bad_rows
        self._formats = CONVERSATION_FORMATS if needs_reply else (*CONVERSATION_FORMATS, "prompt")
        self.counts: dict[str, int] = {}  # of the last reading, once it is over: "bad_rows", "duplicate_rows"
        for name in self._names:
            if built_in_conversations(name) is None and is_missing(name):
                built_in = ", ".join(CONVERSATION_SOURCES)
                raise UserError(
                    f"data.sources has {name!r}; choose among {built_in}, or give a file, a folder or hf:NAME"
                )

    def __iter__(self) -> Iterator[Conversation]:
        bad_rows, keys = BadRows(self._limit), []
        for name in self._names:
            read = built_in_conversations(name)
            if read is not None:
                yield from read()
                continue
            for value in _usable_values(name, self._formats, self._columns, bad_rows, "no conversation or prompt"):
                keys.append(row_digest(value))
                yield value
        self.counts = _row_counts(self._sources, bad_rows, keys)

    def digest(self) -> str:
        """Of the content: of files, and of what a data set of hf: or a built-in name holds."""
        parts = [f"{sorted(self._columns.items())} {self._limit} {self._formats}"]
        for name in self._names:
            if built_in_conversations(name) is not None or name.startswith(HUGGING_FACE_PREFIX):
                parts.append(self._content_digest(name))
            else:
                parts.append(files_digest(name))
        return " ".join(parts)

    def _content_digest(self, name: str) -> str:
        digest, bad_rows = hashlib.sha256(), BadRows(self._limit)
        read = built_in_conversations(name)
        if read is not None:
            values = iter(read())
        else:
            values = _usable_values(name, self._formats, self._columns, bad_rows, "no conversation or prompt")
        for conversation in values:
            content = [conversation.name, conversation.messages, conversation.is_whole]
            data = json.dumps(content, sort_keys=True).encode()
            digest.update(b"%d:" % len(data) + data)
        return digest.hexdigest()


def load_conversations(
    sources: str | Sequence[Mapping[str, Any]],
    *,
    columns: Mapping[str, str] = NO_COLUMNS,
    skip_bad_rows: int = 0,
    needs_reply: bool = False,
) -> list[Conversation]:
    """All of `ConversationRows`, or those of a mixture of such (lm.data.mixture), whose weights count for nothing
    here."""
    mixture = parse_sources(sources, CONVERSATION_KINDS)
    given = dict(columns=columns, skip_bad_rows=skip_bad_rows, needs_reply=needs_reply)
    return [conversation for each in mixture for conversation in ConversationRows(each.source, **given)]


def load_rankings(source: str, *, columns: Mapping[str, str] = NO_COLUMNS, skip_bad_rows: int = 0) -> list[Ranking]:
    """Every verdict of a source: a built-in name, a database of `lm rank`, or rows of preferences in a known format."""
    return load_counted_rankings(source, columns=columns, skip_bad_rows=skip_bad_rows).items


def load_counted_rankings(
    source: str, *, columns: Mapping[str, str] = NO_COLUMNS, skip_bad_rows: int = 0
) -> LoadedRankings:
    """`load_rankings`, and what was passed over."""
    if source in BUILT_IN_RANKINGS:
        return LoadedRankings(BUILT_IN_RANKINGS[source](), {})
    if is_missing(source):
        built_in = ", ".join(BUILT_IN_RANKINGS)
        raise UserError(
            f"no rankings at {source} (No such file or directory): rank some first, "
            f"or name a file, a folder, hf:NAME or {built_in}"
        )
    if is_sqlite(Path(source)):
        return LoadedRankings(read_rankings(source), {})
    bad_rows = BadRows(skip_bad_rows)
    rankings = list(_usable_values(source, RANKING_FORMATS, columns, bad_rows, "no preference"))
    return LoadedRankings(rankings, _row_counts(source, bad_rows, map(row_digest, rankings)))


def is_missing(source: str) -> bool:
    """Whether it names no file or folder that is there, and is neither a glob nor hf:NAME."""
    elsewhere = source.startswith(HUGGING_FACE_PREFIX) or glob.has_magic(source)
    return not elsewhere and not (source and Path(source).expanduser().exists())


def is_sqlite(path: Path) -> bool:
    """Whether it is a file of SQLite's; what cannot be read is left to those who say why."""
    try:
        with open(path, "rb") as file:
            return file.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC
    except OSError:
        return False


def _usable_values(
    source: str, formats: tuple[str, ...], columns: Mapping[str, str], bad_rows: BadRows, nothing: str
) -> Iterator[Any]:
    is_empty = True
    for row in recognized_rows(source, formats, columns=columns, bad_rows=bad_rows):
        is_empty = False
        yield row.value
    if is_empty:
        last = f"; the last that was passed over: {bad_rows.faults[-1]}" if bad_rows.faults else ""
        raise UserError(f"{source} holds {nothing}: give a file that has some{last}")


def _row_counts(sources: str, bad_rows: BadRows, keys: Iterable[bytes]) -> dict[str, int]:
    """The counts, of which a warning tells those that are not 0."""
    keys = list(keys)
    bad, copies = len(bad_rows.faults), len(keys) - len(set(keys))
    warn = logging.getLogger(__name__).warning
    if bad:
        warn("%s: passed over %d bad rows of %d; the first: %s", sources, bad, len(keys) + bad, bad_rows.faults[0])
    if copies:
        warn("%s: %d rows of %d are copies of others; each counts as often as it comes", sources, copies, len(keys))
    return {"bad_rows": bad, "duplicate_rows": copies}


def row_digest(value: str | Conversation | Ranking) -> bytes:
    """The same for two rows that say the same, whatever else is known of a ranking."""
    content: tuple = (value,)
    if isinstance(value, Conversation):
        content = value.messages, sorted(value.fields.items(), key=lambda item: item[0])
    elif isinstance(value, Ranking):
        content = value.prompt, value.responses, value.ranking, sorted(value.axes.items()), value.rater
    return hashlib.sha256(repr(content).encode(errors="surrogatepass")).digest()

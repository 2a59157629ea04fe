"""Conversations, prompts and rankings by the name of their source: built in, a file, a folder, a glob, or hf:NAME."""

import glob
import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lm.core.errors import UserError
from lm.data.annotations import SQLITE_MAGIC, read_rankings
from lm.data.conversations import CONVERSATION_SOURCES, Conversation
from lm.data.files import HUGGING_FACE_PREFIX
from lm.data.formats import CONVERSATION_FORMATS, RANKING_FORMATS, BadRows, recognized_rows
from lm.data.preferences import Ranking
from lm.data.ratings import BUILT_IN_RANKINGS

NO_COLUMNS: Mapping[str, str] = {}


class LoadedConversations(NamedTuple):
    """Conversations, and how many of the users' rows were bad and passed over, or copies of one before them."""

    items: list[Conversation]
    counts: dict[str, int]  # "bad_rows", "duplicate_rows"


class LoadedRankings(NamedTuple):
    """Rankings, and the same counts."""

    items: list[Ranking]
    counts: dict[str, int]


def load_conversations(
    sources: str, *, columns: Mapping[str, str] = NO_COLUMNS, skip_bad_rows: int = 0, needs_reply: bool = False
) -> list[Conversation]:
    """All conversations and prompts of a comma-separated list of sources, built-in names among them or not.

    columns: our name of a field -> that of the rows. Up to `skip_bad_rows` rows of all sources that cannot be used are
    passed over, with a warning that counts them; UserError names the first one beyond. needs_reply: a row in which no
    assistant speaks cannot be used. See lm.data.formats.
    """
    return load_counted_conversations(
        sources, columns=columns, skip_bad_rows=skip_bad_rows, needs_reply=needs_reply
    ).items


def load_counted_conversations(
    sources: str, *, columns: Mapping[str, str] = NO_COLUMNS, skip_bad_rows: int = 0, needs_reply: bool = False
) -> LoadedConversations:
    """`load_conversations`, and what was passed over."""
    names = [name.strip() for name in sources.split(",")]
    found, own, bad_rows = [], [], BadRows(skip_bad_rows)
    formats = CONVERSATION_FORMATS if needs_reply else (*CONVERSATION_FORMATS, "prompt")
    for name in dict.fromkeys(names):
        if name in CONVERSATION_SOURCES:
            found += CONVERSATION_SOURCES[name]()
        else:
            if is_missing(name):
                built_in = ", ".join(CONVERSATION_SOURCES)
                raise UserError(
                    f"data.sources has {name!r}; choose among {built_in}, or give a file, a folder or hf:NAME"
                )
            rows = _usable_values(name, formats, columns, bad_rows, "no conversation or prompt")
            found += rows
            own += rows
    return LoadedConversations(found, _counted(sources, bad_rows, map(row_digest, own)))


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
    found = _usable_values(source, RANKING_FORMATS, columns, bad_rows, "no preference")
    return LoadedRankings(found, _counted(source, bad_rows, map(row_digest, found)))


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
) -> list[Any]:
    found = [row.value for row in recognized_rows(source, formats, columns=columns, bad_rows=bad_rows)]
    if not found:
        last = f"; the last that was passed over: {bad_rows.faults[-1]}" if bad_rows.faults else ""
        raise UserError(f"{source} holds {nothing}: give a file that has some{last}")
    return found


def _counted(sources: str, bad_rows: BadRows, keys: Iterable[bytes]) -> dict[str, int]:
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
    said: tuple = (value,)
    if isinstance(value, Conversation):
        said = value.messages, sorted(value.fields.items(), key=lambda item: item[0])
    elif isinstance(value, Ranking):
        said = value.prompt, value.responses, value.ranking, sorted(value.axes.items()), value.rater
    return hashlib.sha256(repr(said).encode(errors="surrogatepass")).digest()

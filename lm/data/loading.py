"""Conversations, prompts and rankings by the name of their source: built in, a file, a folder, a glob, or hf:NAME."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from lm.core.errors import UserError
from lm.data.annotations import SQLITE_MAGIC, read_rankings
from lm.data.conversations import CONVERSATION_SOURCES, Conversation
from lm.data.formats import CONVERSATION_FORMATS, RANKING_FORMATS, BadRows, recognized_rows
from lm.data.preferences import Ranking
from lm.data.ratings import BUILT_IN_RANKINGS

NO_COLUMNS: Mapping[str, str] = {}
Loaded = TypeVar("Loaded")


def load_conversations(
    sources: str, *, columns: Mapping[str, str] = NO_COLUMNS, skip_bad_rows: int = 0
) -> list[Conversation]:
    """All conversations and prompts of a comma-separated list of sources, built-in names among them or not.

    columns: our name of a field -> that of the rows. Up to `skip_bad_rows` rows of a source that cannot be used are
    passed over, with a warning that counts them; UserError names the first one beyond. See lm.data.formats.
    """
    names = [name.strip() for name in sources.split(",")]
    found = []
    for name in dict.fromkeys(names):
        if name in CONVERSATION_SOURCES:
            found += CONVERSATION_SOURCES[name]()
        else:
            check_source(name, CONVERSATION_SOURCES, "data.sources")
            formats = (*CONVERSATION_FORMATS, "prompt")
            found += _usable_values(name, formats, columns, skip_bad_rows, "no conversation or prompt")
    return found


def load_rankings(source: str, *, columns: Mapping[str, str] = NO_COLUMNS, skip_bad_rows: int = 0) -> list[Ranking]:
    """Every verdict of a source: a built-in name, a database of `lm rank`, or rows of preferences in a known format."""
    if source in BUILT_IN_RANKINGS:
        return BUILT_IN_RANKINGS[source]()
    check_source(source, BUILT_IN_RANKINGS, "data.rankings")
    if Path(source).is_file() and is_sqlite(Path(source)):
        return read_rankings(source)
    return _usable_values(source, RANKING_FORMATS, columns, skip_bad_rows, "no preference")


def check_source(name: str, built_in: Mapping[str, Callable], option: str) -> None:
    """UserError for what is neither a built-in name nor looks like a path that is there."""
    path = Path(name).expanduser()
    is_plain_word = name and not any(character in name for character in "/\\.*?[:") and not path.exists()
    if not name or is_plain_word:
        raise UserError(
            f"{option} has {name!r}; choose among {', '.join(built_in)}, or give a file, a folder or hf:NAME"
        )


def is_sqlite(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC


def _usable_values(source: str, formats, columns: Mapping[str, str], skip_bad_rows: int, nothing: str) -> list:
    bad_rows = BadRows(skip_bad_rows)
    found = [row.value for row in recognized_rows(source, formats, columns=columns, bad_rows=bad_rows)]
    if bad_rows.faults:
        message = "%s: passed over %d bad rows of %d; the first: %s"
        count = len(bad_rows.faults)
        logging.getLogger(__name__).warning(message, source, count, len(found) + count, bad_rows.faults[0])
    if not found:
        raise UserError(f"{source} holds {nothing}: give a file that has some")
    return found

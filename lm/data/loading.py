"""Conversations, prompts and rankings by the name of their source: built in, a file, a folder, a glob, or hf:NAME."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm.core.errors import UserError
from lm.data.annotations import SQLITE_MAGIC, read_rankings
from lm.data.bad_rows import BadRows
from lm.data.conversations import CONVERSATION_KINDS, CONVERSATION_SOURCES, Conversation
from lm.data.files import HUGGING_FACE_PREFIX, files_digest
from lm.data.formats import CONVERSATION_FORMATS, RANKING_FORMATS, recognized_rows
from lm.data.mixture import parse_sources
from lm.data.preferences import Ranking
from lm.data.ratings import BUILT_IN_RANKINGS

NO_COLUMNS: Mapping[str, str] = {}


class ConversationSource(NamedTuple):
    """Conversations that can be read again and again, and what identifies them."""

    digest: str  # of their content
    conversations: Callable[[], Iterable[Conversation]]


def load_conversations(
    sources: str | Sequence[Mapping[str, Any]], *, columns: Mapping[str, str] = NO_COLUMNS, skip_bad_rows: int = 0
) -> list[Conversation]:
    """All conversations and prompts of a comma-separated list of sources, built-in names among them or not, or of a
    mixture of such (lm.data.mixture), whose weights count for nothing here.

    columns: our name of a field -> that of the rows. Up to `skip_bad_rows` rows of a source that cannot be used are
    passed over, with a warning that counts them; UserError names the first one beyond. See lm.data.formats.
    """
    return [
        conversation
        for each in parse_sources(sources, CONVERSATION_KINDS)
        for conversation in source_conversations(each.names, columns, skip_bad_rows)
    ]


def conversation_source(source: str, *, columns: Mapping[str, str], skip_bad_rows: int) -> ConversationSource:
    """The conversations of sources with commas between them, as load_conversations reads them, one by one.

    UserError, at once, for a source that is not there."""
    names = list(dict.fromkeys(name.strip() for name in source.split(",")))
    digests = [conversations_digest(name, columns, skip_bad_rows) for name in names]
    return ConversationSource(" ".join(digests), lambda: source_conversations(names, columns, skip_bad_rows))


def source_conversations(
    names: Iterable[str], columns: Mapping[str, str], skip_bad_rows: int
) -> Iterator[Conversation]:
    """The conversations and prompts of sources, one by one, each source once."""
    for name in dict.fromkeys(names):
        if name in CONVERSATION_SOURCES:
            yield from CONVERSATION_SOURCES[name]()
        else:
            check_source(name, CONVERSATION_SOURCES, "data.sources")
            formats = (*CONVERSATION_FORMATS, "prompt")
            yield from _usable_values(name, formats, columns, skip_bad_rows, "no conversation or prompt")


def conversations_digest(name: str, columns: Mapping[str, str], skip_bad_rows: int) -> str:
    """Of the content of one source: of its files, or of what a data set of hf: or a built-in name holds."""
    if name not in CONVERSATION_SOURCES:
        check_source(name, CONVERSATION_SOURCES, "data.sources")
        if not name.startswith(HUGGING_FACE_PREFIX):
            return f"{files_digest(name)} {sorted(columns.items())} {skip_bad_rows}"
    digest = hashlib.sha256()
    for conversation in source_conversations([name], columns, skip_bad_rows):
        data = json.dumps([conversation.name, conversation.messages, conversation.is_whole], sort_keys=True).encode()
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()


def load_rankings(source: str, *, columns: Mapping[str, str] = NO_COLUMNS, skip_bad_rows: int = 0) -> list[Ranking]:
    """Every verdict of a source: a built-in name, a database of `lm rank`, or rows of preferences in a known format."""
    if source in BUILT_IN_RANKINGS:
        return BUILT_IN_RANKINGS[source]()
    check_source(source, BUILT_IN_RANKINGS, "data.rankings")
    if Path(source).is_file() and is_sqlite(Path(source)):
        return read_rankings(source)
    return list(_usable_values(source, RANKING_FORMATS, columns, skip_bad_rows, "no preference"))


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


def _usable_values(source: str, formats, columns: Mapping[str, str], skip_bad_rows: int, nothing: str) -> Iterator[Any]:
    bad_rows, count = BadRows(skip_bad_rows), 0
    for row in recognized_rows(source, formats, columns=columns, bad_rows=bad_rows):
        count += 1
        yield row.value
    bad_rows.warn(source, count)
    if not count:
        raise UserError(f"{source} holds {nothing}: give a file that has some")

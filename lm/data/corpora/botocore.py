"""Documentation of Amazon's web services, from botocore: large and even in tone, so give it a small weight."""

import gzip
import html
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lm.data.corpora.package_corpus import NamedText, PackageCorpus

SERVICE_FILE = re.compile(r"botocore/data/([^/]+)/([^/]+)/service-2\.json\.gz")
PARAGRAPH_END = re.compile(r"</(?:p|li|note|important|dd|dt|h\d)>|<br\s*/?>")


def read(archive: Path) -> Iterator[NamedText]:
    """An operation or a data type of the newest version of each service: its documentation and that of its members.

    No paragraph comes twice in the whole corpus.
    """
    with zipfile.ZipFile(archive) as wheel:
        matches = [match for match in map(SERVICE_FILE.fullmatch, sorted(wheel.namelist())) if match]
        newest = {match[1]: match[0] for match in matches}  # versions are dates: the last is the newest
        paragraphs: set[str] = set()
        for service, file in newest.items():
            api = json.loads(gzip.decompress(wheel.read(file)))
            parts = {"": api, **_parts(api, "operations"), **_parts(api, "shapes")}
            for name, part in parts.items():
                lines = [line for line in _lines(part) if line not in paragraphs]
                paragraphs.update(lines)
                if lines:
                    title = f"{service} {name}".strip()
                    yield f"{service}/{name}", f"{title}\n\n" + "".join(f"{line}\n" for line in lines)


def _parts(api: Mapping[str, Any], group: str) -> dict[str, Any]:
    return dict(api[group]) if group in api else {}


def _lines(part: Mapping[str, Any]) -> Iterator[str]:
    """Paragraphs of three words or more, in order, each once."""
    members = part["members"] if isinstance(part, Mapping) and "members" in part else {}
    texts = [part["documentation"]] if "documentation" in part else []
    texts += [f"{name}: {each['documentation']}" for name, each in members.items() if "documentation" in each]
    lines = [
        " ".join(html.unescape(re.sub(r"<[^>]*>", " ", paragraph)).split())
        for text in texts
        for paragraph in PARAGRAPH_END.split(text)
    ]
    yield from dict.fromkeys(line for line in lines if len(line.split()) >= 3)


CORPUS = PackageCorpus(
    name="botocore",
    kind="documentation",
    package="botocore==1.44.8",
    archive="*.whl",
    sha256="76342a76c338701db80dcb8afe1c9bd079283d6fffbb9d881442abb02a215043",
    licence="Apache-2.0, by Amazon",
    reader=read,
)

"""Documents of real text, each with a name that decides, everywhere and for ever, whether it is held out.

A text that comes under several names is held out by its own words: see `split`.
"""

import hashlib
import importlib.util
import itertools
import json
import logging
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple, TypeVar

from lm.core.errors import UserError
from lm.core.textfiles import decoded_text, numbered_lines
from lm.data.tasks.drills import drill_pages

TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
UNUSED_STDLIB_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
}  # folders of the stdlib: the last is tables

Named = TypeVar("Named")  # anything with a .name and a .content


class Document(NamedTuple):
    name: str
    text: str

    @property
    def content(self) -> str:
        return normalized_words([self.text])


def load_documents(corpus: str) -> list[Document]:
    """The documents of `corpus`, sorted by name.

    `corpus` is a comma-separated list of built-in names ("stdlib", "chitchat", "drills"), or else the path of a file or
    folder of .txt, .md, .py or .jsonl (a `text` field per line). A corpus that is one document is cut into blocks of
    paragraphs, so that some can be held out. UserError where there is nothing to read.
    """
    if not corpus.strip():
        raise UserError(f"no corpus is named: give a file, a folder, or built-in names ({', '.join(BUILT_IN_CORPORA)})")
    names = [name.strip() for name in corpus.split(",")]
    if all(name in BUILT_IN_CORPORA for name in names):
        found = [document for name in dict.fromkeys(names) for document in BUILT_IN_CORPORA[name]()]
    else:
        found, skipped = read_documents(Path(corpus).expanduser())
        if skipped:
            logging.getLogger(__name__).warning("%s: skipped %d files that are not UTF-8 text", corpus, skipped)
        if len(found) == 1:
            found = document_blocks(*found)
    return sorted(found)


def read_documents(path: Path) -> tuple[list[Document], int]:
    """The documents of a file or folder, and how many files were skipped as binary or undecodable.

    Names are relative to the folder; a line of .jsonl is a document of its own. Hidden files and folders are not read.
    """
    if not path.exists():
        raise UserError(
            f"no corpus at {path}: give a file, a folder, or built-in names ({', '.join(BUILT_IN_CORPORA)})"
        )
    root, paths = (path, path.rglob("*")) if path.is_dir() else (path.parent, [path])
    known = (p for p in paths if p.suffix.lower() in TEXT_SUFFIXES and not _is_hidden(p.relative_to(root)))
    files = sorted(p for p in known if p.is_file())
    if not files:
        raise UserError(f"no {' '.join(TEXT_SUFFIXES)} file in {path}: give a corpus that has some")
    found, skipped = [], 0
    for file in files:
        name = file.relative_to(root).as_posix()
        try:
            data = file.read_bytes()
            text = decoded_text(data)
        except UnicodeDecodeError:
            text = "\0"
        except OSError as error:
            raise UserError(f"cannot read {file} ({error.strerror}): make it readable, or take it away") from error
        if "\0" in text:
            skipped += 1
        elif file.suffix.lower() == ".jsonl":
            found += _jsonl_documents(data, name, file)
        elif text.strip():
            found.append(Document(name, text))
    if not found:
        raise UserError(f"no text in {path}: {len(files)} files, {skipped} of them binary, the rest empty")
    return found, skipped


def document_blocks(document: Document) -> list[Document]:
    """The document cut at blank lines (at line ends where a paragraph is long) into some hundred blocks of 200 to 4,000
    characters or more, "name#0001" and so on; joined they are the document."""
    size = min(max(len(document.text) // 100, 200), 4000)
    found, block = [], ""
    for paragraph in re.split(r"(?<=\n\n)(?!\n)", document.text):
        for part in [paragraph] if len(paragraph) <= 2 * size else paragraph.splitlines(keepends=True):
            block += part
            if len(block) >= size:
                found.append(block)
                block = ""
    if block:
        found.append(block)
    return [Document(f"{document.name}#{i:04d}", text) for i, text in enumerate(found, 1)]


def is_held_out(name: str, fraction: float) -> bool:
    """Whether what bears this name is held out: decided by the name alone, whatever else a corpus holds."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < fraction * 2**64


def normalized_words(texts: Iterable[str]) -> str:
    """The texts as one, whatever white space lies between their words."""
    return " ".join(word for text in texts for word in text.split())


def split_held_out(
    items: Sequence[Named], fraction: float, content: Callable[[Named], str] = attrgetter("content")
) -> tuple[list[Named], list[Named]]:
    """(train, held out), by name; where one content comes under several names, by the content, so that what is held
    out is never trained on under another name."""
    said = (content(item) or item.name for item in items)  # those that say nothing are not the same
    contents = [hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest() for text in said]
    names: dict[str, set[str]] = {}
    for item, digest in zip(items, contents):
        names.setdefault(digest, set()).add(item.name)
    deciding = [item.name if len(names[digest]) == 1 else digest for item, digest in zip(items, contents)]
    sides = [], []
    for item, name in zip(items, deciding):
        sides[is_held_out(name, fraction)].append(item)
    for side, name, way in zip(sides, ("left to train on", "held out"), ("lower", "raise")):
        if not side and len(items) > 1 and len(set(deciding)) == 1 and 0 < fraction < 1:
            raise UserError(
                f"of {len(items)} documents none is {name}: all have one name or one text, so no fraction parts them; "
                "give them names, or add others"
            )
        if not side:
            way = f"{way} the fraction or add some"
            if len(items) == 1 and 0 < fraction < 1:
                way = f"all have the name {items[0].name!r}, which falls on one side: give them names, or add others"
            raise UserError(f"of {len(items)} documents none is {name} at {fraction:g}: {way}")
    return sides


def documents_within_bytes(items: Sequence[Document], size: int) -> list[Document]:
    """As many of the documents as `size` bytes allow, at least one, in an order drawn from their names."""
    found, used = [], 0
    for document in sorted(items, key=lambda document: hashlib.sha256(document.name.encode()).digest()[::-1]):
        used += len(document.text.encode())
        if found and used > size:
            break
        found.append(document)
    return found


def stdlib_documents() -> list[Document]:
    """The running Python's modules ("stdlib/shutil.py") and language reference ("stdlib/topics/for"). PSF licence."""
    from pydoc_data.topics import topics

    return stdlib_modules() + [Document(f"stdlib/topics/{name}", text) for name, text in topics.items()]


def stdlib_modules() -> list[Document]:
    """The source of every module of the standard library but its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if (
            UNUSED_STDLIB_FOLDERS.intersection(name.parts)
            or name == Path("pydoc_data/topics.py")
            or name.stem.startswith("_sysconfig")
        ):
            continue
        try:
            with tokenize.open(path) as file:  # heeds a module's own declaration of its encoding
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue  # a sample of bad source
        if text.strip():
            found.append(Document(f"stdlib/{name.as_posix()}", text))
    return found


def chitchat_documents() -> list[Document]:
    """Each human conversation as a document, a line per turn."""
    return [Document(name, "".join(f"{turn}\n" for turn in turns)) for name, turns in chitchat_dialogues()]


def chitchat_dialogues() -> Iterator[tuple[str, list[str]]]:
    """(name, turns) of each conversation of `chitchat-dataset` (MIT) in which somebody replied; speakers alternate."""
    for key, conversation in chitchat_dataset().items():
        turns = [text for _, text in speaker_turns(conversation)]
        if len(turns) >= 2:
            yield f"chitchat/{key}", turns


def chitchat_dataset() -> dict[str, dict]:
    """The package's JSON: {key: {"prompt", "messages", "ratings", "start"}}."""
    spec = importlib.util.find_spec("chitchat_dataset")
    if spec is None:
        raise UserError("the chitchat corpus is not installed: pip install chitchat-dataset==0.9.0")
    path = Path(next(iter(spec.submodule_search_locations))) / "dataset.json"
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: pip install --force-reinstall chitchat-dataset==0.9.0") from error


def speaker_turns(conversation: Mapping) -> list[tuple[str, str]]:
    """(speaker, text) of each turn.

    Published cleaning, all of it: runs of whitespace become a space, empty messages go, consecutive messages of one
    speaker are joined by a space (people split a sentence over messages as often as not).
    """
    messages = [(m["sender"], " ".join(m["text"].split())) for group in conversation["messages"] for m in group]
    spoken = itertools.groupby((m for m in messages if m[1]), key=lambda message: message[0])
    return [(speaker, " ".join(text for _, text in group)) for speaker, group in spoken]


def drill_documents() -> list[Document]:
    """Pages of copying, sums, brackets and made-up facts, without the items that lm.data.tasks keeps for testing."""
    return [Document(f"drills/{number:05}", text) for number, text in enumerate(drill_pages())]


BUILT_IN_CORPORA = {"stdlib": stdlib_documents, "chitchat": chitchat_documents, "drills": drill_documents}


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _jsonl_documents(data: bytes, name: str, file: Path) -> Iterator[Document]:
    for number, line in numbered_lines(data):
        try:
            value = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file}:{number} is not a JSON object with a 'text' field: mend or remove it") from error
        if not isinstance(value, str):
            raise UserError(f"{file}:{number}: 'text' is {type(value).__name__}, not a string: mend or remove the line")
        if value.strip():
            yield Document(f"{name}#{number:04d}", value)

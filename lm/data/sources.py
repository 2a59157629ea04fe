"""Documents of real text, each with a name that decides, everywhere and for ever, whether it is held out.

A text that comes under several names is held out by its own words: see `split`.
"""

import functools
import glob
import hashlib
import importlib.util
import itertools
import json
import logging
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lm.core.cache import file_sha256
from lm.core.errors import UserError
from lm.data.bad_rows import BadRows, renamed_fields
from lm.data.corpora import PACKAGE_CORPORA, PackageCorpus
from lm.data.facts.documents import fact_pages, quiz_pages
from lm.data.facts.tables import fact_table, table_path
from lm.data.files import (
    HUGGING_FACE_PREFIX,
    TEXT_SUFFIXES,
    SourceRow,
    file_kind,
    files_digest,
    named_files,
    source_rows,
)
from lm.data.messages import RowFault
from lm.data.mixture import parse_sources
from lm.data.tasks.drills import drill_pages
from lm.data.tasks.lessons import lesson_pages
from lm.data.text_blocks import text_blocks

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


class TextSource(NamedTuple):
    """Documents that can be read again and again, and what identifies them."""

    digest: str  # of their content
    documents: Callable[[], Iterable[Document]]


def load_documents(
    corpus: str | Sequence[Mapping[str, Any]],
    *,
    columns: Mapping[str, str] = {},
    skip_bad_rows: int = 0,  # noqa: B006
) -> list[Document]:
    """The documents of `corpus`, those of a source sorted by name.

    `corpus` is a comma-separated list of built-in names ("stdlib", "chitchat", "drills", "wikipedia", ...) and of what
    lm.data.files reads (a path, a glob, a folder, hf:NAME), or a mixture of such (lm.data.mixture), whose weights count
    for nothing here. Of a row the field "text" is read, or the one that `columns` gives that name. A source that is one
    document is cut into blocks of paragraphs, so that some can be held out. UserError where there is nothing to read.
    """
    sources = parse_sources(corpus, BUILT_IN_KINDS, option="data.corpus")
    read = [text_source(each.source, columns=columns, skip_bad_rows=skip_bad_rows) for each in sources]
    return [document for each in read for document in sorted(each.documents())]


def text_source(source: str, *, columns: Mapping[str, str], skip_bad_rows: int) -> TextSource:
    """Sources with commas between them, read document by document.

    The documents of built-in names are sorted by name; those of files come file by file, the files sorted. UserError
    where there is nothing to read, at once for what is missing."""
    names = list(dict.fromkeys(name.strip() for name in source.split(",")))
    found = [
        built_in_source(name) if is_built_in_corpus(name) else file_source(name, columns, skip_bad_rows)
        for name in names
    ]
    documents = lambda: itertools.chain.from_iterable(each.documents() for each in found)
    is_built_in = all(map(is_built_in_corpus, names))
    return TextSource(
        " ".join(each.digest for each in found), (lambda: sorted(documents())) if is_built_in else documents
    )


def is_built_in_corpus(name: str) -> bool:
    """Whether it is a name of BUILT_IN_CORPORA, or that of pages made of a user's table ("facts:PATH.csv")."""
    return name in BUILT_IN_CORPORA or table_path(name, TABLE_PAGES) is not None


def built_in_source(name: str) -> TextSource:
    """A built-in corpus. That of a package is not read before its documents are asked for: its archive's checksum and
    its reader say what they are."""
    if name in PACKAGE_CORPORA:
        corpus = PACKAGE_CORPORA[name]
        code = file_sha256(Path(corpus.reader.__code__.co_filename))
        return TextSource(f"{corpus.sha256} {code}", BUILT_IN_CORPORA[name])
    table = table_path(name, TABLE_PAGES)
    documents = list(BUILT_IN_CORPORA[name]() if table is None else table_documents(name.partition(":")[0], table))
    return TextSource(documents_digest(documents), lambda: documents)


def file_source(source: str, columns: Mapping[str, str], skip_bad_rows: int) -> TextSource:
    """The texts of files, or of a data set of hf:, which is read once more to know its content."""
    documents = lambda: file_documents(source, columns, skip_bad_rows)
    if source.startswith(HUGGING_FACE_PREFIX):
        return TextSource(documents_digest(documents()), documents)
    path = Path(source).expanduser()
    if not path.exists() and not glob.has_magic(source):
        names = ", ".join(BUILT_IN_CORPORA)
        raise UserError(f"no corpus at {path}: give a file, a folder, a glob, hf:NAME, or built-in names ({names})")
    return TextSource(f"{files_digest(source)} {sorted(columns.items())} {skip_bad_rows}", documents)


def documents_digest(documents: Iterable[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        for part in document:
            data = part.encode(errors="surrogatepass")
            digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()


def file_documents(source: str, columns: Mapping[str, str], skip_bad_rows: int) -> Iterator[Document]:
    """The documents of files, one by one: a text file is one, and so is each row of another; a single one comes as
    blocks. Text files that are binary, damaged or not UTF-8 are passed over, with a warning that counts them."""
    bad_rows, unread = BadRows(skip_bad_rows), []
    documents = _row_documents(source, columns, bad_rows, unread)
    first, second = next(documents, None), next(documents, None)
    if first is None:
        hint = f" ({len(unread)} of its files are binary or damaged: {unread[0]})" if unread else ""
        raise UserError(f"no text in {source}{hint}: give a corpus that has some")
    yield from document_blocks(first) if second is None else (first, second)
    used = 1 + (second is not None)
    for document in documents:
        used += 1
        yield document
    warn = logging.getLogger(__name__).warning
    if bad_rows.faults:
        count = len(bad_rows.faults)
        warn("%s: passed over %d bad rows of %d; the first: %s", source, count, used + count, bad_rows.faults[0])
    if unread:
        warn("%s: skipped %d files that cannot be read as text; the first: %s", source, len(unread), unread[0])


def _row_documents(source: str, columns: Mapping[str, str], bad_rows: BadRows, unread: list[str]) -> Iterator[Document]:
    """Blank texts are left out. Text files that cannot be read are added to `unread`."""
    files = {} if source.startswith(HUGGING_FACE_PREFIX) else {str(file): n for n, file in named_files(source).items()}
    for row in source_rows(source):
        is_text_file = row.file in files and file_kind(Path(row.file)) in TEXT_SUFFIXES
        if is_text_file and row.fault:
            unread.append(f"{row.place}: {row.fault}")
            continue
        try:
            text = _text_of_row(row, columns)
        except RowFault as fault:
            bad_rows.add(row.place, fault)
            continue
        if text.strip():
            name = files[row.file] if row.file in files else row.file
            yield Document(name if is_text_file else f"{name}#{row.number:04d}", text)


def _text_of_row(row: SourceRow, columns: Mapping[str, str]) -> str:
    if row.fault:
        raise RowFault(row.fault)
    fields = renamed_fields(row.fields, columns)
    if "text" not in fields:
        has = ", ".join(map(str, fields)) or "none"
        raise RowFault(f"it has no field 'text' (but {has}): name yours, as in data.columns={{'text': 'content'}}")
    if not isinstance(fields["text"], str):
        raise RowFault(f"its field 'text' is {type(fields['text']).__name__}, not text")
    return fields["text"]


def document_blocks(document: Document) -> list[Document]:
    """The document cut into some hundred blocks: see text_blocks."""
    return [Document(*block) for block in text_blocks(document.name, document.text)]


def is_held_out(name: str, fraction: float) -> bool:
    """Whether what bears this name is held out: decided by the name alone, whatever else a corpus holds."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < fraction * 2**64


def normalized_words(texts: Iterable[str]) -> str:
    """The texts as one, whatever white space lies between their words."""
    return " ".join(" ".join(texts).split())


def split_held_out(
    items: Sequence[Named], fraction: float, content: Callable[[Named], str] = attrgetter("content")
) -> tuple[list[Named], list[Named]]:
    """(train, held out), by name; where one content comes under several names, by the content, so that what is held
    out is never trained on under another name."""
    return split_sources_held_out([items], fraction, content)[0]


def split_sources_held_out(
    sources: Sequence[Sequence[Named]], fraction: float, content: Callable[[Named], str] = attrgetter("content")
) -> list[tuple[list[Named], list[Named]]]:
    """(train, held out) of each source, as `split_held_out`, but what an earlier source has of the same content, it has
    decided: a source that is added at the end moves nothing of the others'.

    UserError where a source has nothing to train on, or none holds any out.
    """
    decided: dict[str, bool] = {}
    splits = []
    for items in sources:
        texts = (content(item) or item.name for item in items)  # those that say nothing are not the same
        contents = [hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest() for text in texts]
        names: dict[str, set[str]] = {}
        for item, digest in zip(items, contents):
            names.setdefault(digest, set()).add(item.name)
        deciding = [item.name if len(names[digest]) == 1 else digest for item, digest in zip(items, contents)]
        sides = [], []
        for item, digest, name in zip(items, contents, deciding):
            side = decided[digest] if digest in decided else is_held_out(name, fraction)
            sides[side].append(item)
        decided |= {
            digest: is_held_out(name, fraction) for digest, name in zip(contents, deciding) if digest not in decided
        }
        if not sides[0] or len(sources) == 1 and not sides[1]:
            name = items[0].name if items else ""
            raise one_sided_error(len(items), len(set(deciding)), fraction, held_out=bool(sides[0]), name=name)
        splits.append(sides)
    if not any(unseen for _, unseen in splits):
        raise one_sided_error(sum(map(len, sources)), 0, fraction, held_out=True)
    return splits


def one_sided_error(count: int, distinct: int, fraction: float, *, held_out: bool, name: str = "") -> UserError:
    """That of `count` documents none is held out, or else left to train on; `distinct`: the names, or texts, that
    decided. name: that of a single one."""
    what, way = ("held out", "raise") if held_out else ("left to train on", "lower")
    if count > 1 and distinct == 1 and 0 < fraction < 1:
        return UserError(
            f"of {count} documents none is {what}: all have one name or one text, so no fraction parts them; "
            "give them names, or add others"
        )
    hint = f"{way} the fraction or add some"
    if count == 1 and 0 < fraction < 1:
        hint = f"all have the name {name!r}, which falls on one side: give them names, or add others"
    return UserError(f"of {count} documents none is {what} at {fraction:g}: {hint}")


def documents_within_bytes(items: Sequence[Document], size: int) -> list[Document]:
    """As many of the documents as `size` bytes allow, at least one, in an order drawn from their names."""
    chosen, used = [], 0
    for document in sorted(items, key=lambda document: hashlib.sha256(document.name.encode()).digest()[::-1]):
        used += len(document.text.encode())
        if chosen and used > size:
            break
        chosen.append(document)
    return chosen


def stdlib_documents() -> list[Document]:
    """The running Python's modules ("stdlib/shutil.py") and language reference ("stdlib/topics/for"). PSF licence."""
    from pydoc_data.topics import topics

    return stdlib_modules() + [Document(f"stdlib/topics/{name}", text) for name, text in topics.items()]


def stdlib_modules() -> list[Document]:
    """The source of every module of the standard library but its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = []
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
            modules.append(Document(f"stdlib/{name.as_posix()}", text))
    return modules


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


def lesson_documents() -> list[Document]:
    """Pages of worked sums, spelling, capitals, copying, small talk, comparing and sorting."""
    return [Document(f"education/{name}", text) for name, text in lesson_pages()]


def table_documents(name: str, path: str = "") -> list[Document]:
    """Pages made of a table of facts (lm.data.facts), ours unless `path` names another; `name` of TABLE_PAGES."""
    return [Document(f"{name}/{page}", text) for page, text in TABLE_PAGES[name](fact_table(path))]


def corpus_documents(corpus: PackageCorpus) -> list[Document]:
    """The documents of a corpus that a package carries (lm.data.corpora), fetched the first time."""
    return [Document(f"{corpus.name}/{name}", text) for name, text in corpus.read() if text.strip()]


TABLE_PAGES = {"facts": fact_pages, "quiz": quiz_pages}
BUILT_IN_CORPORA: Mapping[str, Callable[[], Iterable[Document]]] = {
    "stdlib": stdlib_documents,
    "chitchat": chitchat_documents,
    "drills": drill_documents,
    "education": lesson_documents,
    **{name: functools.partial(table_documents, name) for name in TABLE_PAGES},
    **{name: functools.partial(corpus_documents, corpus) for name, corpus in PACKAGE_CORPORA.items()},
}
BUILT_IN_KINDS: Mapping[str, str] = {
    "stdlib": "code",
    "chitchat": "forum",
    "drills": "education",
    "education": "education",
    "facts": "encyclopedia",
    "quiz": "education",
    **{name: corpus.kind for name, corpus in PACKAGE_CORPORA.items()},
}

"""Rows of data files, one at a time: the one reader for everything that a user names as a source.

A source is the path of a file, a glob, a folder (read through; hidden files and folders are not), or
hf:NAME[:CONFIG][:SPLIT], a dataset that Hugging Face's `datasets` loads. A file's suffix says how it is read:

    text and code   .txt .md .py ...       one row: the whole file
    JSON lines      .jsonl .ndjson         a row is one line, an object
    JSON            .json                  an array of rows, {"data": [rows]}, {name: row}, one row, or JSON lines
    tables          .csv .tsv              the first line names the columns; every value is text
    columns         .parquet .arrow        as pyarrow reads them

each plain or with .gz or .zst behind it. Only text files, and a .json file that is no array, are held in memory whole.
Everything else is read line by line or batch by batch.
"""

import codecs
import csv
import glob
import gzip
import importlib
import io
import json
import logging
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from lm.core.errors import UserError
from lm.core.textfiles import decoded_text

_CODE = "py pyi c h cc cpp hpp cu java js jsx ts tsx go rs rb php sh sql html css r jl scala kt swift lua pl hs tex"
TEXT_SUFFIXES = (".txt", ".md", ".rst", *(f".{name}" for name in _CODE.split()))
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSION_SUFFIXES = (".gz", ".zst")
ROW_LIST_KEYS = ("data", "rows", "train", "examples", "instances")  # of a .json object that holds its rows as a list
MAX_ROW_BYTES = 32 << 20  # of a line or a row of JSON: some thousand pages of text; more is a file without line ends
CHUNK_BYTES = 1 << 20  # read at once of a .json array
BATCH_ROWS = 256  # rows that are decoded at once of .parquet and .arrow
HF_PREFIX = "hf:"


class SourceRow(NamedTuple):
    """A row and where it stands."""

    file: str  # as one would open it, or hf:...
    number: int  # of the line in .jsonl, .csv and .tsv, else of the row; from 1
    fields: Mapping[str, Any]


# (file, number, reason): what is done with a row that cannot be read. It returns where the row may be skipped.
BadRow = Callable[[str, int, str], None]


def refuse_row(file: str, number: int, reason: str) -> None:
    """UserError, always."""
    raise UserError(f"{file}:{number}: {reason}; mend or remove the row, or allow some with data.skip_bad_rows=N")


class BadRows:
    """Skips and counts the first `tolerated` bad rows, and refuses the next one. `found` holds them all."""

    def __init__(self, tolerated: int = 0):
        if tolerated < 0:
            raise UserError(f"data.skip_bad_rows is {tolerated}; it must be at least 0")
        self.tolerated = tolerated
        self.found: list[tuple[str, int, str]] = []

    def __call__(self, file: str, number: int, reason: str) -> None:
        self.found.append((file, number, reason))
        if len(self.found) > self.tolerated and self.tolerated:
            raise UserError(
                f"{file}:{number}: {reason}; this is bad row {len(self.found)}, and data.skip_bad_rows is "
                f"{self.tolerated}: mend the rows, or raise it"
            )
        if not self.tolerated:
            refuse_row(file, number, reason)


def source_rows(source: str, *, text_field: str = "text", bad_row: BadRow = refuse_row) -> Iterator[SourceRow]:
    """The rows of a source, file after file in the order of their names; of a text file one row {text_field: text}.

    `bad_row` is called for each row that cannot be read. A text file that is not UTF-8 is skipped with a warning where
    it is one of several. UserError where a source is not there, cannot be read, or holds nothing.
    """
    if source.startswith(HF_PREFIX):
        yield from _hugging_face_rows(source)
        return
    files, seen, skipped = source_files(source), 0, []
    for path in files:
        try:
            for row in file_rows(path, text_field=text_field, bad_row=bad_row):
                seen += 1
                yield row
        except _NotText as fault:
            if len(files) == 1:
                raise UserError(str(fault)) from fault
            skipped.append(path)
    if skipped:
        logging.getLogger(__name__).warning(
            "%s: skipped %d files that are not UTF-8 text, the first is %s", source, len(skipped), skipped[0]
        )
    if not seen:
        empty = f"{len(files)} files, {len(skipped)} of them binary, the rest" if len(files) > 1 else "the file is"
        raise UserError(f"there is no row in {source}: {empty} empty; name another source")


def source_files(source: str) -> list[Path]:
    """The data files of a path, glob or folder, sorted. UserError where there is none."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
    elif path.exists():
        found = [path]
    elif glob.has_magic(source):
        found = map(Path, glob.glob(str(path), recursive=True))
    else:
        raise UserError(f"there is no file or folder {source}: name a path, a glob, a folder or hf:NAME")
    files = sorted(p for p in found if _suffix(p)[0] in (*TEXT_SUFFIXES, *ROW_SUFFIXES) and p.is_file())
    if not files:
        kinds = " ".join((*ROW_SUFFIXES, *TEXT_SUFFIXES[:3]))
        raise UserError(f"{source} has no file to read: give {kinds} or code, each plain or with .gz or .zst behind it")
    return files


def file_rows(path: Path, *, text_field: str = "text", bad_row: BadRow = refuse_row) -> Iterator[SourceRow]:
    """The rows of one file; none if it is empty. UserError as `source_rows`."""
    kind, compression = _suffix(path)
    file = str(path)
    with _explained(file), _opened(path, compression) as stream:
        if kind in TEXT_SUFFIXES:
            text = _whole_text(stream, file)
            yield from [SourceRow(file, 1, {text_field: text})] if text.strip() else ()
        elif kind in (".jsonl", ".ndjson"):
            yield from _json_lines(stream, file, bad_row)
        elif kind == ".json":
            yield from _json_rows(path, compression, bad_row)
        elif kind in (".csv", ".tsv"):
            yield from _table_rows(stream, file, "\t" if kind == ".tsv" else ",", bad_row)
        else:
            yield from _column_rows(stream, file, kind, is_seekable=not compression)


class _NotText(Exception):
    """A text file that is no UTF-8 text; says so in one line."""


def _suffix(path: Path) -> tuple[str, str]:
    """(".jsonl", ".gz") of rows.jsonl.gz; the second is empty where it is not compressed."""
    name, compression = path.name.lower(), ""
    for suffix in COMPRESSION_SUFFIXES:
        if name.endswith(suffix):
            name, compression = name.removesuffix(suffix), suffix
    return Path(name).suffix, compression


@contextmanager
def _opened(path: Path, compression: str) -> Iterator[BinaryIO]:
    if compression == ".gz":
        with gzip.open(path, "rb") as stream:
            yield stream  # type: ignore[misc]
    elif compression == ".zst":
        import pyarrow

        with pyarrow.input_stream(str(path), compression="zstd") as compressed, io.BufferedReader(compressed) as stream:
            yield stream  # type: ignore[misc]
    else:
        with open(path, "rb") as stream:
            yield stream


@contextmanager
def _explained(file: str) -> Iterator[None]:
    """Turns what the system and the decompressors refuse into a UserError."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file} is damaged or cut off ({error}): make or copy it again") from error
    except OSError as error:  # pyarrow's faults are OSErrors too, without an errno
        if error.errno is None:
            raise UserError(f"{file} is damaged or cut off ({error}): make or copy it again") from error
        raise UserError(f"cannot read {file} ({error.strerror}): make it readable, or take it away") from error


def _whole_text(stream: BinaryIO, file: str) -> str:
    try:
        text = decoded_text(stream.read())
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise _NotText(f"{file}:{line} is not UTF-8 text: convert it, or take it away") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise _NotText(f"{file}:{line} holds a zero byte, so it is no text: convert it to UTF-8, or take it away")
    return text


def _json_lines(stream: BinaryIO, file: str, bad_row: BadRow) -> Iterator[SourceRow]:
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            while line and not line.endswith(b"\n"):
                line = stream.readline(CHUNK_BYTES)
            bad_row(file, number, f"the line is longer than {MAX_ROW_BYTES >> 20} MiB, so it is no row: cut it up")
            continue
        line = line.removeprefix(codecs.BOM_UTF8).strip()
        if not line:
            continue
        try:
            fields = json.loads(line.decode())
        except UnicodeDecodeError:
            bad_row(file, number, "not UTF-8 text")
        except (ValueError, RecursionError) as error:
            bad_row(file, number, f"not JSON ({_json_fault(error)})")
        else:
            yield from _object_row(file, number, fields, bad_row)


def _object_row(file: str, number: int, fields: Any, bad_row: BadRow) -> Iterator[SourceRow]:
    if isinstance(fields, dict):
        yield SourceRow(file, number, fields)
    else:
        bad_row(file, number, f"a row must be a JSON object {{...}}, not {type(fields).__name__}")


def _json_fault(error: ValueError | RecursionError) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _json_rows(path: Path, compression: str, bad_row: BadRow) -> Iterator[SourceRow]:
    """An array is read row by row; JSON lines under the name .json as such; an object whole."""
    file = str(path)
    with _opened(path, compression) as stream:
        lines = (line for line in iter(lambda: stream.readline(MAX_ROW_BYTES), b"") if line.strip())
        first, second = next(lines, b"").removeprefix(codecs.BOM_UTF8).lstrip(), next(lines, b"")
    with _opened(path, compression) as stream:
        if first.startswith(b"["):
            yield from _json_array(stream, file, bad_row)
            return
        if second and _is_json(first):
            yield from _json_lines(stream, file, bad_row)
            return
        try:
            found = json.loads(decoded_text(stream.read()) or "[]")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text: convert it") from error
        except (ValueError, RecursionError) as error:
            line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
            raise UserError(f"{file}:{line} is not JSON ({_json_fault(error)}): mend it") from error
    for number, fields in enumerate(_rows_of_object(found), 1):
        yield from _object_row(file, number, fields, bad_row)


def _rows_of_object(found: Any) -> Iterable[Any]:
    if not isinstance(found, dict):
        return found if isinstance(found, list) else [found]
    for key in ROW_LIST_KEYS:
        if key in found and isinstance(found[key], list) and all(isinstance(row, dict) for row in found[key]):
            return found[key]
    if found and all(isinstance(row, dict) for row in found.values()):
        return found.values()
    return [found] if found else []


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _json_array(stream: BinaryIO, file: str, bad_row: BadRow) -> Iterator[SourceRow]:
    """The objects of an array. What stands between two of them, or an object that breaks off, ends the reading: only a
    row that is no object can be skipped."""
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
    buffer, at, number, chunk = "", 0, 0, CHUNK_BYTES

    def more() -> bool:
        nonlocal buffer, at
        data = stream.read(chunk)
        try:
            buffer, at = buffer[at:] + utf8.decode(data, final=not data), 0
        except UnicodeDecodeError:
            refuse(f"row {number + 1} or one soon after it is not UTF-8 text")
        return bool(data)

    def next_character(skipped: str) -> str:
        nonlocal at
        while True:
            while at < len(buffer) and buffer[at] in skipped:
                at += 1
            if at < len(buffer) or not more():
                return buffer[at : at + 1]

    def refuse(reason: str) -> NoReturn:
        raise UserError(f"{file}:{number + 1}: {reason}: the array cannot be read on from there; mend the file")

    next_character(" \t\r\n")
    at += 1  # the bracket
    while (character := next_character(" \t\r\n,")) != "]":
        if not character:
            refuse("the file ends within its array")
        try:
            fields, at = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            if len(buffer) - at > MAX_ROW_BYTES:
                refuse(f"not JSON ({_json_fault(error)}), or a row of more than {MAX_ROW_BYTES >> 20} MiB")
            chunk *= 2  # so that a long row is not tried again for every chunk of it
            if not more():
                refuse(f"not JSON ({_json_fault(error)}), or the file is cut off")
            continue
        number, chunk = number + 1, CHUNK_BYTES
        yield from _object_row(file, number, fields, bad_row)


def _table_rows(stream: BinaryIO, file: str, delimiter: str, bad_row: BadRow) -> Iterator[SourceRow]:
    lines = _TableLines(stream)
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            values = next(reader, None)
        except UnicodeDecodeError as error:
            raise UserError(f"{file}:{number} is not UTF-8 text: convert the file") from error
        except csv.Error as error:  # a quote that is never closed swallows what follows: there is no going on
            raise UserError(f"{file}:{number}: not a table ({error}): mend it") from error
        if values is None:
            return
        if columns is None:
            columns = values
            if len(set(columns)) < len(columns) or not all(columns):
                raise UserError(f"{file}:1: the first line must name each column once, not {columns}: mend it")
        elif values and len(values) != len(columns):
            bad_row(file, number, f"{len(values)} values in {len(columns)} columns")
        elif values:
            yield SourceRow(file, number, dict(zip(columns, values)))


class _TableLines:
    """The lines of a table as text, each at most MAX_ROW_BYTES."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream

    def __iter__(self) -> "_TableLines":
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        if len(line) > MAX_ROW_BYTES:
            raise csv.Error(f"the line is longer than {MAX_ROW_BYTES >> 20} MiB")
        return line.removeprefix(codecs.BOM_UTF8).decode().replace("\r\n", "\n")


def _column_rows(stream: BinaryIO, file: str, kind: str, *, is_seekable: bool) -> Iterator[SourceRow]:
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as seekable:
        if not is_seekable:
            while block := stream.read(CHUNK_BYTES):  # both formats are read from their ends
                seekable.write(block)
            seekable.seek(0)
            stream = seekable  # type: ignore[assignment]
        if not stream.read(1):
            return
        stream.seek(0)
        try:
            if kind == ".parquet":
                batches = parquet.ParquetFile(stream).iter_batches(batch_size=BATCH_ROWS)
            else:
                batches = _arrow_batches(stream)
            number = 0
            for batch in batches:
                for fields in batch.to_pylist():
                    number += 1
                    yield SourceRow(file, number, fields)
        except pyarrow.ArrowException as error:
            fault = " ".join(str(error).split())
            raise UserError(f"{file} is no {kind} file, or a damaged one ({fault}): make it again") from error


def _arrow_batches(stream: BinaryIO) -> Iterator[Any]:
    """Of both forms: the file with an index behind it, and the stream, which `datasets` writes."""
    from pyarrow import ipc

    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    if is_file:
        reader = ipc.open_file(stream)
        whole = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        whole = ipc.open_stream(stream)
    for batch in whole:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)


def _hugging_face_rows(source: str) -> Iterator[SourceRow]:
    name, *rest = source.removeprefix(HF_PREFIX).split(":")
    if not name or len(rest) > 2:
        raise UserError(f"{source} is no dataset: write hf:NAME, hf:NAME:SPLIT, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(f"{source} needs Hugging Face's datasets: pip install -e '.[hf]'") from error
    try:
        if len(rest) == 1:  # a configuration where the dataset has one of that name, else a split
            rest = [rest[0], ""] if rest[0] in datasets.get_dataset_config_names(name) else ["", rest[0]]
        config, split = rest or ("", "")
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, fields in enumerate(rows, 1):
            yield SourceRow(source, number, fields)
    except UserError:
        raise
    except Exception as error:  # whatever the library, the network or the dataset's own code raises
        fault = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot load {source} ({fault}): check name, configuration, split and network") from error

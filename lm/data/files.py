"""Rows of the files that a user names: text, JSON lines, JSON, CSV, Parquet and Arrow, plain or compressed.

A *source* is a path, a glob, a folder (read with all folders in it, hidden ones left out) or hf:NAME[:CONFIG][:SPLIT],
a data set of Hugging Face `datasets`. Rows are read one after another: memory holds a row, a batch of a Parquet file or
a text file at a time, but a .json file as a whole.
"""

import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
from pyarrow import ipc, parquet

from lm.core.errors import UserError
from lm.core.textfiles import decoded_text

CODE_SUFFIXES = (
    ".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cs", ".go", ".java", ".jl", ".js", ".kt", ".lua", ".php", ".pl", ".r",
    ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts", ".tsx",
)  # fmt: skip
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".html", *CODE_SUFFIXES)
ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
COMPRESSED_SUFFIXES = (".gz", ".zst")
MAX_LINE_BYTES = 64 * 2**20  # of one row of JSON lines: a longer one is hardly meant to be a row
ROWS_PER_BATCH = 1024  # of Parquet, decoded at once
HUGGING_FACE_PREFIX = "hf:"


class SourceRow(NamedTuple):
    """A row as it stands in its file."""

    file: str
    number: int  # of the line or row, from 1
    fields: Mapping[str, Any]
    fault: str = ""  # why it has no fields

    @property
    def place(self) -> str:
        return f"{self.file}:{self.number}"


def source_rows(source: str, *, text_field: str = "text") -> Iterator[SourceRow]:
    """The rows of a source, in the order of the names of its files; a text file is one row {text_field: its text}.

    A row that cannot be read is given with its `fault`, and reading goes on where it can. UserError for a source that
    is not there, or that has no file of a kind that is read.
    """
    if source.startswith(HUGGING_FACE_PREFIX):
        yield from _hugging_face_rows(source)
        return
    for file in source_files(source):
        yield from file_rows(file, text_field=text_field)


def source_files(source: str) -> list[Path]:
    """The files that a path, glob or folder names, sorted. UserError where there is none."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = [file for file in path.rglob("*") if not is_hidden(file.relative_to(path))]
    elif path.exists():
        if not file_kind(path):
            raise UserError(f"{path} is of no kind that is read: give one of {_kinds_text()}")
        found = [path]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        if not found:
            raise UserError(f"no file or folder {source}: give a path, a glob, a folder, or hf:NAME")
    files = sorted(file for file in found if file.is_file() and file_kind(file))
    if not files:
        raise UserError(f"no file to read in {source}: give one that has some of {_kinds_text()}")
    return files


def file_kind(file: Path) -> str:
    """The suffix that says how a file is read, compression apart: ".jsonl" of rows.jsonl.gz; "" where none does."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in (*TEXT_SUFFIXES, *ROW_SUFFIXES) else ""


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def file_rows(file: Path, *, text_field: str = "text") -> Iterator[SourceRow]:
    """The rows of one file. What breaks off in its middle ends with a row that has a fault."""
    kind = file_kind(file)
    read = ROW_READERS[kind] if kind in ROW_READERS else lambda stream: _text_row(stream, text_field)
    number = 0
    try:
        with open_decompressed(file) as stream:
            for number, fields in read(stream):
                fault = fields if isinstance(fields, str) else ""
                yield SourceRow(str(file), number, {} if fault else fields, fault)
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile) or not error.strerror:
            yield SourceRow(str(file), number + 1, {}, f"damaged or cut off ({error}): get the file again")
            return
        raise UserError(f"cannot read {file} ({error.strerror}): make it readable, or take it away") from error
    except (EOFError, zlib.error, pa.ArrowException) as error:
        fault = f"damaged or cut off ({' '.join(str(error).split())[:120]}): get the file again"
        yield SourceRow(str(file), number + 1, {}, fault)
    except UnicodeDecodeError as error:
        fault = f"not UTF-8 text (byte {error.object[error.start]:#04x} at {error.start}): convert it"
        yield SourceRow(str(file), number + 1, {}, fault)


def open_decompressed(file: Path) -> IO[bytes]:
    """The bytes of a file, without its compression."""
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rb")
    if file.suffix.lower() == ".zst":
        return io.BufferedReader(pa.input_stream(str(file), compression="zstd"), 2**20)
    return open(file, "rb")


Rows = Iterator[tuple[int, Mapping[str, Any] | str]]  # number of the row, and its fields or its fault


def _text_row(stream: IO[bytes], text_field: str) -> Rows:
    text = decoded_text(stream.read())
    if "\0" in text:
        yield 1, "holds a zero byte: it is no text"
    elif text.strip():
        yield 1, {text_field: text}


def _json_lines(stream: IO[bytes]) -> Rows:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            yield number, f"longer than {MAX_LINE_BYTES // 2**20} MiB: cut the row up"
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE_BYTES)
            continue
        line = line.removeprefix(b"\xef\xbb\xbf").strip()
        if line:
            yield number, _json_object(line)


def _json_object(line: bytes) -> Mapping[str, Any] | str:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return f"not UTF-8 text (byte {error.object[error.start]:#04x}): convert the line"
    except ValueError as error:
        return f"not JSON ({getattr(error, 'msg', error)}): mend or remove the line"
    return value if isinstance(value, dict) else f"{type(value).__name__} in JSON, not an object with fields"


def _json_array(stream: IO[bytes]) -> Rows:
    try:
        value = json.loads(decoded_text(stream.read()))
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        yield 1, f"not JSON ({getattr(error, 'msg', error)}, line {getattr(error, 'lineno', '?')}): mend the file"
        return
    if isinstance(value, dict):  # {"train": [...]} or {"data": [...]} as much as one row
        lists = [rows for rows in value.values() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
        value = lists[0] if len(value) == len(lists) == 1 else [value]
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield number, row if isinstance(row, dict) else f"{type(row).__name__} in JSON, not an object with fields"


def _csv_rows(stream: IO[bytes]) -> Rows:
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""))
    number = 0
    while True:
        number += 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, f"no row of CSV ({error}): mend or remove it"
            continue
        if None in row or None in row.values():
            yield number, f"{len(reader.fieldnames or ())} columns are named, but it has another number: mend the row"
        else:
            yield number, row


def _parquet_rows(stream: IO[bytes]) -> Rows:
    table = parquet.ParquetFile(stream if stream.seekable() else io.BytesIO(stream.read()))
    yield from _batch_rows(table.iter_batches(ROWS_PER_BATCH))


def _arrow_rows(stream: IO[bytes]) -> Rows:
    begin = stream.read(6)
    stream = io.BytesIO(begin + stream.read()) if not stream.seekable() else stream
    stream.seek(0)
    if begin == b"ARROW1":
        table = ipc.open_file(stream)
        yield from _batch_rows(table.get_batch(i) for i in range(table.num_record_batches))
    else:
        yield from _batch_rows(ipc.open_stream(stream))


def _batch_rows(batches) -> Rows:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, row


ROW_READERS: Mapping[str, Callable[[IO[bytes]], Rows]] = {
    ".jsonl": _json_lines,
    ".json": _json_array,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}


def _hugging_face_rows(source: str) -> Iterator[SourceRow]:
    """hf:NAME[:CONFIG][:SPLIT], streamed; the split is "train" where none is named."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source} needs Hugging Face datasets: pip install -e '.[hf]' (or datasets)") from error
    name, *rest = source.removeprefix(HUGGING_FACE_PREFIX).split(":")
    if not name or len(rest) > 2:
        raise UserError(f"{source!r} is no data set: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    config, split = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else "train")
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, fields in enumerate(rows, 1):
            yield SourceRow(source, number, fields)
    except Exception as error:  # its own errors are of many kinds
        raise UserError(f"{source} cannot be read ({type(error).__name__}: {str(error)[:200]})") from error


def _kinds_text() -> str:
    return f"{' '.join((*TEXT_SUFFIXES[:5], *ROW_SUFFIXES))} and code, plain, .gz or .zst"

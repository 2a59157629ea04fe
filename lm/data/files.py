"""Rows of the files that a user names: text, JSON lines, JSON, CSV, Parquet and Arrow, plain or compressed.

A *source* is a path, a glob, a folder (read with all folders in it, hidden ones left out) or hf:NAME[:CONFIG][:SPLIT],
a data set of Hugging Face `datasets`. Rows are read one after another: memory holds a row, a batch of a Parquet file or
a text file at a time. A .json file is an array of rows, or JSON lines; only one that is an object, {"data": [rows]} or
a single row, is held as a whole.
"""

import codecs
import csv
import glob
import gzip
import hashlib
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
from pyarrow import ipc, parquet

from lm.core.cache import file_sha256
from lm.core.errors import UserError
from lm.core.textfiles import decoded_text

CODE_SUFFIXES = (
    ".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cs", ".go", ".java", ".jl", ".js", ".kt", ".lua", ".php", ".pl", ".r",
    ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts", ".tsx",
)  # fmt: skip
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".html", *CODE_SUFFIXES)
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrow")
COMPRESSED_SUFFIXES = (".gz", ".zst")
MAX_LINE_BYTES = 64 * 2**20  # of one row of JSON lines: a longer one is hardly meant to be a row
ROWS_PER_BATCH = 1024  # of Parquet and Arrow, decoded at once
CHUNK_BYTES = 2**20  # of a JSON array, read at once
MESSAGE_LISTS = {"messages", "conversations"}  # lists in a row, where others are lists of rows
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
        paths = [file for file in path.rglob("*") if not is_hidden(file.relative_to(path))]
    elif path.exists():
        if not file_kind(path):
            raise UserError(f"{path} is of no kind that is read: give one of {_kinds_text()}")
        paths = [path]
    else:
        paths = [Path(name) for name in glob.glob(str(path), recursive=True)]
        if not paths:
            raise UserError(f"no file or folder {source}: give a path, a glob, a folder, or hf:NAME")
    files = sorted(file for file in paths if file.is_file() and file_kind(file))
    if not files:
        raise UserError(f"no file to read in {source}: give one that has some of {_kinds_text()}")
    return files


def named_files(source: str) -> dict[str, Path]:
    """The files of a source by the names that they have within it, whatever else it holds."""
    root = source_root(source)
    return {file.relative_to(root).as_posix(): file for file in source_files(source)}


def source_root(source: str) -> Path:
    """The folder that a source names, the one that its file is in, or of a glob the part without wildcards."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    while not path.parent.is_dir() or glob.has_magic(str(path.parent)) and not path.exists():
        path = path.parent
    return path.parent


def files_digest(source: str) -> str:
    """Of the content of a source's files as they stand, and of their names within it."""
    digest = hashlib.sha256()
    for name, file in named_files(source).items():
        try:
            content = file_sha256(file)
        except OSError as error:
            raise UserError(f"cannot read {file} ({error.strerror}): make it readable, or take it away") from error
        digest.update(f"{name}\0{content}\0".encode(errors="surrogatepass"))
    return digest.hexdigest()


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
            yield number, _too_long()
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE_BYTES)
            continue
        line = line.removeprefix(b"\xef\xbb\xbf").strip()
        if line:
            yield number, _json_object(line)


def _too_long() -> str:
    return f"longer than {MAX_LINE_BYTES // 2**20} MiB: cut the row up"


def _json_object(line: bytes) -> Mapping[str, Any] | str:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return f"not UTF-8 text (byte {error.object[error.start]:#04x}): convert the line"
    except (ValueError, RecursionError) as error:
        return f"not JSON ({getattr(error, 'msg', error)}): mend or remove the line"
    return _object_or_fault(value)


def _object_or_fault(value: Any) -> Mapping[str, Any] | str:
    return value if isinstance(value, dict) else f"{type(value).__name__} in JSON, not an object with fields"


def _json_rows(stream: IO[bytes]) -> Rows:
    """An array, read row by row; JSON lines; or an object: {"data": [rows]} or one row."""
    first = stream.readline(CHUNK_BYTES)
    while first and not first.removeprefix(codecs.BOM_UTF8).strip():
        first = stream.readline(CHUNK_BYTES)
    first = first.removeprefix(codecs.BOM_UTF8).lstrip()
    if first.startswith(b"["):
        yield from _json_array(first[1:], stream)
        return
    if not first.endswith(b"\n"):
        first += stream.readline(MAX_LINE_BYTES)
    rest = stream.read(CHUNK_BYTES)
    if rest.strip() and not isinstance(_json_object(first.strip()), str):
        yield from _json_lines(io.BufferedReader(_JoinedBytes(first + rest, stream)))
        return
    try:
        value = json.loads(decoded_text(first + rest + stream.read()) or "[]")
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        yield 1, f"not JSON ({getattr(error, 'msg', error)}, line {getattr(error, 'lineno', '?')}): mend the file"
        return
    if isinstance(value, dict):
        lists = [rows for rows in value.values() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
        value = lists[0] if len(value) == len(lists) == 1 and not MESSAGE_LISTS & value.keys() else [value]
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield number, _object_or_fault(row)


def _json_array(begin: bytes, stream: IO[bytes]) -> Rows:
    """The rows of an array after its bracket. Reading ends at what is no JSON: nobody knows where a row begins then."""
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
    text, at, number, size, is_end = utf8.decode(begin), 0, 0, CHUNK_BYTES, False
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if text[at : at + 1] == "]":
            return
        fault = "the file ends within its array"
        if at < len(text):
            try:
                value, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                fault = f"not JSON ({getattr(error, 'msg', error)}), or the file is cut off"
            else:
                number, size = number + 1, CHUNK_BYTES
                yield number, _object_or_fault(value)
                continue
        if is_end or len(text) - at > MAX_LINE_BYTES:
            yield number + 1, f"{fault}: mend the file" if is_end else f"not JSON, or {_too_long()}"
            return
        block = stream.read(size)
        text, at, is_end = text[at:] + utf8.decode(block, final=not block), 0, not block
        size *= 2  # so that a long row is not tried again at each chunk


class _JoinedBytes(io.RawIOBase):
    """Bytes that were read already, then the stream that they came from."""

    def __init__(self, begin: bytes, rest: IO[bytes]):
        self._begin, self._rest = begin, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        block, self._begin = self._begin[: len(buffer)], self._begin[len(buffer) :]
        block = block or self._rest.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)


def _csv_rows(stream: IO[bytes]) -> Rows:
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.DictReader(_csv_lines(stream), strict=True)
    number = 0
    while True:
        number += 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            yield number, f"not UTF-8 text (byte {error.object[error.start]:#04x}): convert the file"
            return
        except csv.Error as error:
            yield number, f"no row of CSV ({error}): mend or remove it"
            continue
        if None in row or None in row.values():
            yield number, f"{len(reader.fieldnames or ())} columns are named, but it has another number: mend the row"
        else:
            yield number, row


def _csv_lines(stream: IO[bytes]) -> Iterator[str]:
    """The lines, decoded one by one: what is no text is met at its own row."""
    line = stream.readline(MAX_LINE_BYTES + 1).removeprefix(codecs.BOM_UTF8)
    while line:
        if len(line) > MAX_LINE_BYTES:
            raise csv.Error(_too_long())
        yield line.decode().replace("\r\n", "\n")
        line = stream.readline(MAX_LINE_BYTES + 1)


def _parquet_rows(stream: IO[bytes]) -> Rows:
    with _seekable_file(stream) as file:
        yield from _batch_rows(parquet.ParquetFile(file).iter_batches(ROWS_PER_BATCH))


def _arrow_rows(stream: IO[bytes]) -> Rows:
    """Both forms: the file, with an index at its end, and the stream, which `datasets` writes."""
    with _seekable_file(stream) as file:
        begin = file.read(6)
        file.seek(0)
        if begin == b"ARROW1":
            table = ipc.open_file(file)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            batches = iter(ipc.open_stream(file))
        parts = (part for batch in batches for part in _batch_parts(batch))
        yield from _batch_rows(parts)


def _batch_parts(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    for start in range(0, batch.num_rows, ROWS_PER_BATCH):
        yield batch.slice(start, ROWS_PER_BATCH)


@contextmanager
def _seekable_file(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    """The stream; where it is decompressed on the way, a copy on the disk: these formats are read from their end."""
    if isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO):
        yield stream
        return
    with tempfile.TemporaryFile() as file:
        shutil.copyfileobj(stream, file)
        file.seek(0)
        yield file


def _batch_rows(batches) -> Rows:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, row


ROW_READERS: Mapping[str, Callable[[IO[bytes]], Rows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}


def _hugging_face_rows(source: str) -> Iterator[SourceRow]:
    """hf:NAME[:CONFIG][:SPLIT], streamed; the split is "train" where none is named. One name behind NAME is that of a
    configuration where the data set has it, else of a split."""
    name, *rest = source.removeprefix(HUGGING_FACE_PREFIX).split(":")
    if not name or len(rest) > 2:
        raise UserError(f"{source!r} is no data set: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source} needs Hugging Face datasets: pip install -e '.[hf]' (or datasets)") from error
    try:
        if len(rest) == 1:
            rest = [*rest, ""] if rest[0] in datasets.get_dataset_config_names(name) else ["", *rest]
        config, split = rest or ("", "")
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, fields in enumerate(rows, 1):
            yield SourceRow(source, number, fields)
    except Exception as error:  # its own errors are of many kinds
        fault = " ".join(str(error).split())[:200]
        raise UserError(
            f"{source} cannot be read ({type(error).__name__}: {fault}): check its name, configuration and split"
        ) from error


def _kinds_text() -> str:
    return f"{' '.join((*TEXT_SUFFIXES[:5], *ROW_SUFFIXES))} and code, plain, .gz or .zst"

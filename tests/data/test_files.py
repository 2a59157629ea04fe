"""Every kind of file gives the same rows; what is damaged is named by its place and loses nothing before it."""

import gzip
import json

import pyarrow as pa
import pytest
from pyarrow import csv, ipc, parquet

from lm.core.errors import UserError
from lm.data import files
from lm.data.files import source_files, source_rows

ROWS = [{"prompt": f"What is {i}?", "answer": f'{i:02d}, "so"\nit is'} for i in range(1500)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def write(path, data: bytes):
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = pa.Codec("zstd").compress(data, asbytes=True)
    path.write_bytes(data)
    return str(path)


def table_bytes(kind: str) -> bytes:
    table, sink = pa.Table.from_pylist(ROWS), pa.BufferOutputStream()
    if kind == "parquet":
        parquet.write_table(table, sink, row_group_size=400)
    elif kind == "csv":
        csv.write_csv(table, sink)
    else:
        with (ipc.new_file if kind == "file" else ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=500)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    "name, data",
    [
        ("a.jsonl", lambda: LINES),
        ("a.jsonl", lambda: b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n").rstrip()),
        ("a.json", lambda: json.dumps(ROWS).encode()),
        ("a.json", lambda: json.dumps(ROWS, indent=1).encode()),
        ("a.json", lambda: b"\xef\xbb\xbf\n" + LINES),
        ("a.json", lambda: json.dumps({"data": ROWS}).encode()),
        ("a.csv", lambda: table_bytes("csv")),
        ("a.parquet", lambda: table_bytes("parquet")),
        ("a.arrow", lambda: table_bytes("file")),
        ("a.arrow", lambda: table_bytes("stream")),
    ],
    ids=[
        "lines",
        "bom and crlf",
        "array",
        "indented array",
        "lines in json",
        "named array",
        "csv",
        "parquet",
        "arrow file",
        "arrow stream",
    ],
)
def test_every_kind_gives_the_same_rows(name, data, compression, tmp_path):
    found = list(source_rows(write(tmp_path / f"{name}{compression}", data())))
    assert [row.fields for row in found] == ROWS and [row.number for row in found] == list(range(1, 1501))
    assert not any(row.fault for row in found)


def test_an_array_is_read_in_parts(tmp_path, monkeypatch):
    """Parts that end within a row, a text and a character."""
    rows = [{"text": f"zwölf 日本 {i}", "number": i} for i in range(50)]
    path = write(tmp_path / "a.json", json.dumps(rows, ensure_ascii=False, indent=1).encode())
    monkeypatch.setattr(files, "CHUNK_BYTES", 5)
    assert [row.fields for row in source_rows(path)] == rows


def test_an_object_is_one_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}]}
    assert [found.fields for found in source_rows(write(tmp_path / "a.json", json.dumps(row).encode()))] == [row]


def test_folders_and_globs(tmp_path):
    (tmp_path / "in" / ".hidden").mkdir(parents=True)
    for name, text in (
        ("b.md", "# b"),
        ("in/a.py", "a = 1\r\n"),
        ("in/.hidden/c.txt", "c"),
        ("d.bin", "d"),
        ("e.txt", " "),
    ):
        (tmp_path / name).write_bytes(text.encode())
    assert [(row.file[len(str(tmp_path)) + 1 :], dict(row.fields)) for row in source_rows(str(tmp_path))] == [
        ("b.md", {"text": "# b"}),
        ("in/a.py", {"text": "a = 1\n"}),
    ]
    assert [row.fields for row in source_rows(f"{tmp_path}/*.md", text_field="body")] == [{"body": "# b"}]
    with pytest.raises(UserError, match="no file or folder .*nowhere: give a path, a glob, a folder, or hf:NAME"):
        list(source_rows(f"{tmp_path}/nowhere"))
    with pytest.raises(UserError, match="d.bin is of no kind that is read: give one of .txt"):
        source_files(f"{tmp_path}/d.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file to read in"):
        source_files(f"{tmp_path}/empty")


@pytest.mark.parametrize(
    "name, data, good, place, fault",
    [
        ("a.jsonl.gz", lambda: gzip.compress(LINES)[:-3000], None, None, "damaged or cut off"),
        ("a.jsonl.zst", lambda: pa.Codec("zstd").compress(LINES, asbytes=True)[:-99], 0, 1, "damaged or cut off"),
        ("a.jsonl.gz", lambda: LINES, 0, 1, "damaged or cut off"),
        ("a.parquet", lambda: table_bytes("parquet")[:-10], 0, 1, "damaged or cut off"),
        ("a.arrow", lambda: b"no arrow at all", 0, 1, "damaged or cut off"),
        ("a.jsonl", lambda: b'{"a": 1}\n{"a": "\xff"}\n', 1, 2, "not UTF-8 text (byte 0xff)"),
        ("a.jsonl", lambda: b'{"a": 1}\n{"a": \n', 1, 2, "not JSON (Expecting value)"),
        ("a.jsonl", lambda: b'{"a": 1}\n[1]\n', 1, 2, "list in JSON, not an object with fields"),
        ("a.json", lambda: b'[{"a": 1}, 2]', 1, 2, "int in JSON, not an object"),
        ("a.json", lambda: b'[{"a": 1},', 1, 2, "the file ends within its array: mend the file"),
        ("a.json", lambda: b'[{"a": 1}, {"a"', 1, 2, "not JSON (Expecting ':' delimiter), or the file is cut off"),
        ("a.json", lambda: b'[{"a": 1}, {"a": "\xff"}]', 0, 1, "not UTF-8 text (byte 0xff"),
        ("a.json", lambda: b'{"a": \n}', 0, 1, "not JSON (Expecting value, line 2): mend the file"),
        ("a.jsonl", lambda: b'{"a": 1}\n' + b"[" * 100_000 + b"\n", 1, 2, "not JSON"),
        ("a.csv", lambda: b"a,b\n1,2\n\xff,4\n", 1, 2, "not UTF-8 text (byte 0xff): convert the file"),
        ("a.csv", lambda: b'a,b\n1,2\n1,"2\n3,4\n', 1, 2, "no row of CSV (unexpected end of data)"),
        ("a.csv", lambda: b"a,b\n1,2\n3\n", 1, 2, "2 columns are named, but it has another number"),
        ("a.txt", lambda: b"caf\xe9", 0, 1, "not UTF-8 text (byte 0xe9 at 3): convert it"),
        ("a.txt", lambda: b"a\0b", 0, 1, "holds a zero byte: it is no text"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_named(name, data, good, place, fault, tmp_path):
    path = tmp_path / name
    path.write_bytes(data())
    found = list(source_rows(str(path)))
    whole = [row for row in found if not row.fault]
    if good is None:  # cut off in its middle: all that came before is there
        assert 0 < len(whole) < len(ROWS) and [row.fields for row in whole] == ROWS[: len(whole)]
    else:
        assert len(whole) == good and found[-1].number == place
    assert [row.fault for row in found if row.fault][-1].startswith(fault)


def test_a_line_too_long_is_a_fault_and_reading_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 2**20)
    long = json.dumps({"text": "x" * (5 * 2**20)})
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{long}\n{{"text": "b"}}\n')
    first, second, third = source_rows(str(tmp_path / "a.jsonl"))
    assert (first.fields, second.number, third.number, third.fields) == ({"text": "a"}, 2, 3, {"text": "b"})
    assert second.fault == "longer than 1 MiB: cut the row up"


def test_a_data_set_of_hugging_face_is_streamed(monkeypatch):
    import sys
    from types import SimpleNamespace

    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        return iter([{"text": "a"}])

    found = SimpleNamespace(load_dataset=load_dataset, get_dataset_config_names=lambda name: ["en"])
    monkeypatch.setitem(sys.modules, "datasets", found)
    for source in ("hf:org/name", "hf:org/name:test", "hf:org/name:en", "hf:org/name:en:test"):
        assert [row.fields for row in source_rows(source)] == [{"text": "a"}]
    expected = ((None, "train"), (None, "test"), ("en", "train"), ("en", "test"))
    assert calls == [("org/name", config, split, True) for config, split in expected]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="hf:x needs Hugging Face datasets: pip install"):
        list(source_rows("hf:x"))

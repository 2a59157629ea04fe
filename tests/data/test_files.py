"""Data files as people have them: every kind, plain and compressed, gives the same rows; damage is named."""

import gzip
import json
import logging
import sys
import types

import pyarrow
import pytest
from pyarrow import parquet

from lm.core.errors import UserError
from lm.data import files
from lm.data.files import BadRows, SourceRow, source_rows

ROWS = [{"prompt": f"p {i}", "answer": f"zwölf\n日本 {i}"} for i in range(300)]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def write_table(path):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=100)


def write_stream(path):
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def write_indexed(path):
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def write_csv(path):
    quoted = "".join(f'{row["prompt"]},"{row["answer"]}"\n' for row in ROWS)
    path.write_text(f"prompt,answer\n{quoted}")


KINDS = {
    "rows.jsonl": lambda path: path.write_text(LINES),
    "bom and CRLF.jsonl": lambda path: path.write_bytes(
        b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode() + b"\r\n\r\n"
    ),
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: path.write_text(LINES),
    "list under a name.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS})),
    "named.json": lambda path: path.write_text(json.dumps({f"id {i}": row for i, row in enumerate(ROWS)})),
    "table.csv": write_csv,
    "table.parquet": write_table,
    "stream.arrow": write_stream,
    "indexed.arrow": write_indexed,
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_plain_and_compressed(name, tmp_path):
    path = tmp_path / name
    KINDS[name](path)
    zipped, packed = tmp_path / f"{name}.gz", tmp_path / f"{name}.zst"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    packed.write_bytes(pyarrow.Codec("zstd").compress(path.read_bytes(), asbytes=True))
    for each in (path, zipped, packed):
        rows = list(source_rows(str(each)))
        assert [row.fields for row in rows] == ROWS
        assert {row.file for row in rows} == {str(each)}
        # The second line of a table is its first row, and each value here holds a line's end.
        assert [row.number for row in rows[:2]] == ([2, 4] if name == "table.csv" else [1, 2])


def test_one_object_is_one_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}]}
    (tmp_path / "one.json").write_text(json.dumps(row, indent=2))
    assert list(source_rows(str(tmp_path / "one.json"))) == [SourceRow(str(tmp_path / "one.json"), 1, row)]


def test_a_long_array_is_read_in_parts(tmp_path, monkeypatch):
    """Chunks that end within a row, within a string and within a character."""
    (tmp_path / "array.json").write_text(json.dumps(ROWS, ensure_ascii=False))
    monkeypatch.setattr(files, "CHUNK_BYTES", 7)
    assert [row.fields for row in source_rows(str(tmp_path / "array.json"))] == ROWS


def test_folder_and_glob(tmp_path):
    for name in ("b.txt", "a/c.md", "a/d.txt.gz", "a/e.bin", ".hidden.txt", "a/.git/config.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(gzip.compress(name.encode()) if name.endswith(".gz") else name.encode() + b"\r\n")
    texts = lambda source: [row.fields["words"] for row in source_rows(source, text_field="words")]
    assert texts(str(tmp_path)) == ["a/c.md\n", "a/d.txt.gz", "b.txt\n"]
    assert texts(f"{tmp_path}/**/*.txt*") == ["a/d.txt.gz", "b.txt\n"]
    assert texts(f"{tmp_path}/a/*.md") == ["a/c.md\n"]


def test_a_binary_file_among_others_is_skipped_and_named(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\0w")
    with caplog.at_level(logging.WARNING):
        assert len(list(source_rows(str(tmp_path)))) == 1
    assert f"skipped 1 files that are not UTF-8 text, the first is {tmp_path}/b.txt" in caplog.text


SMALL = json.dumps(ROWS[0]).encode()
BAD = {
    "invalid UTF-8.jsonl": (SMALL + b'\n{"a": "\xff"}\n' + SMALL, ":2: not UTF-8 text; mend or remove the row"),
    "no JSON.jsonl": (SMALL + b"\n\n{a}\n", ":3: not JSON (Expecting property name"),
    "no object.jsonl": (b"[1]\n", ":1: a row must be a JSON object {...}, not list"),
    "no object.json": (b"[{}, 3]", ":2: a row must be a JSON object {...}, not int"),
    "too few values.csv": (b"a,b\n1,2\n3\n", ":3: 1 values in 2 columns"),
}
DAMAGED = {
    "truncated.jsonl.gz": (gzip.compress(LINES.encode())[:-200], " is damaged or cut off (Compressed file ended"),
    "not gzip.jsonl.gz": (LINES.encode(), " is damaged or cut off (Not a gzipped file"),
    "truncated.jsonl.zst": (
        pyarrow.Codec("zstd").compress(LINES.encode(), asbytes=True)[:-20],
        " is damaged or cut off (Truncated compressed stream)",
    ),
    "invalid UTF-8.txt": (b"one\ntwo \xff\n", ":2 is not UTF-8 text: convert it"),
    "UTF-16.txt": ("words".encode("utf-16"), ":1 is not UTF-8 text: convert it"),
    "zero.txt": (b"one\0", ":1 holds a zero byte"),
    "empty.jsonl": (b"", "the file is empty; name another source"),
    "empty.json": (b"", "the file is empty; name another source"),
    "empty.csv": (b"a,b\n", "the file is empty; name another source"),
    "empty.parquet": (b"", "the file is empty; name another source"),
    "spaces.txt": (b" \n\n", "the file is empty; name another source"),
    "cut off.json": (b'[{"a": 1}, {"a"', ":2: not JSON"),
    "open.json": (b'[{"a": 1}', ":2: the file ends within its array"),
    "no JSON.json": (b'{\n"a": \n}', ":3 is not JSON (Expecting value)"),
    "invalid UTF-8.json": (b'[{"a": 1}, {"a": "\xff"}]', ":1: row 1 or one soon after it is not UTF-8 text"),
    "twice.csv": (b"a,a\n1,2\n", ":1: the first line must name each column once"),
    "quote.csv": (b'a,b\n1,"2\n3,4\n', ":2: not a table (unexpected end of data)"),
    "invalid UTF-8.csv": (b"a,b\n1,2\n\xff,2\n", ":3 is not UTF-8 text"),
    "damaged.parquet": (b"PAR1 and no more", " is no .parquet file, or a damaged one"),
    "damaged.arrow": (b"ARROW1 and no more", " is no .arrow file, or a damaged one"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_refused_or_skipped_and_counted(name, tmp_path):
    data, reason = BAD[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError) as refused:
        list(source_rows(str(path)))
    assert str(refused.value).startswith(f"{path}{reason}") and "\n" not in str(refused.value)
    assert str(refused.value).endswith("; mend or remove the row, or allow some with data.skip_bad_rows=N")
    skipped = BadRows(1)
    try:
        rows = list(source_rows(str(path), bad_row=skipped))
    except UserError as nothing_else:
        assert name == "no object.jsonl" and "there is no row" in str(nothing_else)
        rows = []
    assert len(rows) == {"invalid UTF-8.jsonl": 2, "no object.jsonl": 0}.get(name, 1)
    assert [f"{file}:{number}: {why}" for file, number, why in skipped.found][0].startswith(f"{path}{reason[:12]}")


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused(name, tmp_path):
    data, reason = DAMAGED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as refused:
        list(source_rows(str(tmp_path / name), bad_row=BadRows(100)))
    assert str(tmp_path / name) in str(refused.value) and reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_more_bad_rows_than_are_tolerated(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{a}\n{}\n{b}\n")
    with pytest.raises(UserError, match=r"rows.jsonl:3: not JSON .*; this is bad row 2, and data.skip_bad_rows is 1: "):
        list(source_rows(str(tmp_path / "rows.jsonl"), bad_row=BadRows(1)))
    with pytest.raises(UserError, match="data.skip_bad_rows is -1"):
        BadRows(-1)


def test_a_line_of_100_megabytes(tmp_path):
    """Refused without being held; the lines around it are rows."""
    path = tmp_path / "long.jsonl"
    with open(path, "wb") as file:
        file.write(SMALL + b'\n{"a": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + SMALL)
    bad = BadRows(1)
    assert [row.number for row in source_rows(str(path), bad_row=bad)] == [1, 3]
    assert bad.found == [(str(path), 2, "the line is longer than 32 MiB, so it is no row: cut it up")]


def test_what_is_not_there(tmp_path):
    (tmp_path / "notes.doc").write_text("x")
    for source, said in {
        f"{tmp_path}/nowhere": "there is no file or folder",
        f"{tmp_path}/*.txt": "has no file to read",
        f"{tmp_path}": "has no file to read: give .jsonl",
        f"{tmp_path}/notes.doc": "has no file to read",
        "hf:": "is no dataset: write hf:NAME",
        "hf:a:b:c:d": "is no dataset: write hf:NAME",
    }.items():
        with pytest.raises(UserError, match=said):
            list(source_rows(source))


def test_hugging_face(monkeypatch):
    """What `datasets` is asked for: it may be missing, and needs a network where it is there."""
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "gone":
            raise FileNotFoundError("no dataset\nof that name")
        return iter(ROWS)

    found = types.SimpleNamespace(get_dataset_config_names=lambda name: ["main"], load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", found)
    sources = ("hf:org/name", "hf:org/name:main", "hf:org/name:test", "hf:org/name:main:test", "hf:org/name::test")
    for source in sources:
        assert [(row.file, row.fields) for row in source_rows(source)] == [(source, row) for row in ROWS]
    expected = [(None, "train"), ("main", "train"), (None, "test"), ("main", "test"), (None, "test")]
    assert asked == [("org/name", config, split, True) for config, split in expected]
    with pytest.raises(UserError, match=r"cannot load hf:gone \(no dataset of that name\): check name"):
        list(source_rows("hf:gone"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hf:org/name needs Hugging Face's datasets: pip install -e '.\[hf\]'"):
        list(source_rows("hf:org/name"))

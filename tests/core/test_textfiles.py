"""One reader for every text file that a user names: what editors add to a file changes nothing that is read from it."""

import json

import pytest

from lm.core.textfiles import decoded_text, numbered_lines
from lm.data import annotations, preferences, sources
from lm.feedback import judge, prompt_file
from lm.runs import workdir
from lm.studies.scaling import points
from lm.weights import folder, tokenizers

SEPARATORS = "a\u2028b\u2029c\x85d\x0ce"  # what str.splitlines would part
ASKED = [{"role": "user", "content": f"Why {SEPARATORS}?"}]
EDITORS = {
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "CRLF": lambda data: data.replace(b"\n", b"\r\n"),
    "no final newline": lambda data: data.removesuffix(b"\n"),
    "all three": lambda data: b"\xef\xbb\xbf" + data.removesuffix(b"\n").replace(b"\n", b"\r\n"),
}


def json_lines(*rows: dict) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def ranking(number: int) -> dict:
    return {
        "name": f"n{number}",
        "prompt": ASKED,
        "responses": [SEPARATORS, "no"],
        "ranking": [1, 2],
        "rater": "ann",
        "time": "2024-05-01T12:00:00+00:00",
    }


def told(warning: str):
    pytest.fail(warning)


# name of the file, what it holds, and the reader: what it returns must not depend on the editor
READERS = {
    "prompts.txt": (f"What is {SEPARATORS}?\nWhy is it?\n", lambda path: prompt_file.read_prompts(str(path), told)),
    "prompts.jsonl": (
        json_lines({"prompt": ASKED}, {"prompt": "b"}),
        lambda path: prompt_file.read_prompts(str(path), told),
    ),
    "rankings.jsonl": (json_lines(ranking(1), ranking(2)), preferences.read_jsonl_rankings),
    "verdicts.jsonl": (json_lines(ranking(1), ranking(2)), annotations.read_rankings),
    "corpus.jsonl": (json_lines({"text": SEPARATORS}, {"text": "b"}), lambda path: sources.load_documents(str(path))),
    "rubric.txt": ("Be fair.\nBe kind.\n", judge.read_rubric),
    "runs.csv": (
        "parameters,tokens,loss\n" + "".join(f"{i + 1},{i + 2},3.5\n" for i in range(9)),
        lambda path: [column.tolist() for column in points.read_points(path)],
    ),
    "config.json": ('{\n"model_type": "llama"\n}\n', lambda path: folder.read_config(path.parent)),
    "tokenizer_config.json": ('{\n"eos_token": "é"\n}\n', tokenizers._optional_json),
    "summary.json": ('{\n"stage": "é"\n}\n', workdir.read_json),
}


@pytest.mark.parametrize("editor", EDITORS)
@pytest.mark.parametrize("name", READERS)
def test_what_an_editor_adds_changes_nothing(tmp_path, name, editor):
    text, read = READERS[name]
    path = tmp_path / name
    path.write_bytes(text.encode())
    plain = read(path)
    assert plain
    path.write_bytes(EDITORS[editor](text.encode()))
    assert read(path) == plain


def test_rows_are_whole_whatever_their_text_holds(tmp_path):
    """By count and by content: two rows with every separator inside stay two."""
    path = tmp_path / "rankings.jsonl"
    path.write_text(json_lines(ranking(1), ranking(2)), encoding="utf-8")
    found = preferences.read_jsonl_rankings(path)
    assert [r.name for r in found] == ["n1", "n2"] and found[0].responses[0] == SEPARATORS
    path = tmp_path / "prompts.txt"
    path.write_text(f"What is {SEPARATORS}?\nWhy is it?\n", encoding="utf-8")
    assert [c.messages[0]["content"] for c in prompt_file.read_prompts(str(path), told)] == [
        f"What is {SEPARATORS}?",
        "Why is it?",
    ]


@pytest.mark.parametrize("editor", ["a byte order mark", "CRLF", "all three"])
def test_a_document_of_a_corpus(tmp_path, editor):
    """A folder of two: the end of a text file is its author's, so a missing final newline stays missing."""
    for name in ("a.txt", "b.md"):
        (tmp_path / name).write_bytes(EDITORS[editor](b"one\n\ntwo\n"))
    end = "" if editor == "all three" else "\n"
    assert sources.load_documents(str(tmp_path)) == [(name, f"one\n\ntwo{end}") for name in ("a.txt", "b.md")]


def test_a_chat_template_in_a_file_of_its_own(tmp_path):
    for editor in EDITORS.values():
        (tmp_path / tokenizers.CHAT_TEMPLATE_FILE).write_bytes(editor(b"{{ messages[0].content }}\n"))
        text = tokenizers._chat_template(tmp_path, {})
        assert text.rstrip("\n") == "{{ messages[0].content }}"


def test_joined_files_have_marks_inside():
    """`cat a.jsonl b.jsonl` of two files with marks."""
    data = b'\xef\xbb\xbf{"a": 1}\r\n\xef\xbb\xbf{"a": 2}\r\n\xef\xbb\xbf\r\n  \n'
    assert list(numbered_lines(data)) == [(1, b'{"a": 1}'), (2, b'{"a": 2}')]
    assert decoded_text(data).startswith('{"a": 1}\n')


def test_a_row_that_is_no_text_is_named_by_its_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"What is it?\n\xff\xfe\n")
    warnings = []
    assert len(prompt_file.read_prompts(str(path), warnings.append)) == 1
    assert "1 of 2 lines are not valid" in warnings[0] and f"{path}:2: " in warnings[0]


def test_metrics_with_a_character_torn_by_a_kill(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    whole = json_lines({"step": 1, "response": SEPARATORS}).encode()
    path.write_bytes(whole + '{"step": 2, "response": "é'.encode()[:-1])
    assert workdir.read_metrics(path) == [{"step": 1, "response": SEPARATORS}]

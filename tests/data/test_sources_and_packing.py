import json
import random
import re
import sys

import numpy as np
import pytest

from lm.core.errors import UserError
from lm.core.types import Tokens
from lm.data import conversations, packing, preferences, prompts, sources
from lm.data.batches import batch_function
from lm.tokenizer import TokenizedExample

# Corpora


def test_folder(tmp_path, caplog):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.py").write_text("x = 1\n")
    (tmp_path / "a.txt").write_bytes("\ufeffhé\r\nho".encode())
    (tmp_path / "c.MD").write_text("# c")
    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 2}\n{"text": " "}\n')
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "zero.txt").write_bytes(b"a\0b")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    expected = [("a.txt", "hé\nho"), ("b/a.py", "x = 1\n"), ("c.MD", "# c")]
    expected += [("d.jsonl#0001", "one"), ("d.jsonl#0003", "two")]
    assert sources.load_documents(str(tmp_path)) == expected
    assert "skipped 2 files" in caplog.text


def test_one_file_is_cut_into_blocks_that_lose_nothing(tmp_path):
    paragraphs = [f"Paragraph {i} says something.\nAnd more.\n\n" + "\n" * (i % 2) for i in range(400)]
    text = "".join(paragraphs) + "line\n" * 300
    (tmp_path / "book.txt").write_text(text)
    found = sources.load_documents(str(tmp_path / "book.txt"))
    assert "".join(d.text for d in found) == text
    assert found[0].name == "book.txt#0001" and [d.name for d in found] == sorted({d.name for d in found})
    assert 40 <= len(found) <= 110 and all(len(d.text) >= 200 for d in found[:-1])
    assert all(d.text.startswith("Paragraph") for d in found[:20])


def test_bad_corpora(tmp_path):
    def refused(path, fault):
        with pytest.raises(UserError, match=fault):
            sources.load_documents(str(path))

    refused(tmp_path / "none", "no corpus at .*none: .*stdlib")
    refused("stdlib,none", "no corpus at none: .*chitchat")
    refused(" ", "data.corpus names no source: give a file")
    refused(tmp_path, "no file to read in")
    (tmp_path / "a.bin").write_bytes(b"x")
    refused(tmp_path / "a.bin", "a.bin is of no kind that is read")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\0")
    (tmp_path / "b.txt").write_text("")
    refused(tmp_path, r"no text in .* \(1 of its files are binary or damaged: .*a.txt:1: not UTF-8")
    faults = {
        '{"text": ': "not JSON",
        '["text"]': "list in JSON, not an object",
        '{"body": "x"}': r"no field 'text' \(but body\): name yours, as in data.columns={'text': 'content'}",
        '{"text": 3}': "its field 'text' is int, not text",
    }
    for line, fault in faults.items():
        (tmp_path / "c.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
        refused(tmp_path, f"c.jsonl:2: .*{fault}.*; or set data.skip_bad_rows")


def test_columns_and_bad_rows_of_a_corpus(tmp_path, caplog):
    path = tmp_path / "c.jsonl"
    path.write_text('{"body": "one"}\n{"title": "two"}\n{"body": "three"}\n')
    found = sources.load_documents(str(path), columns={"text": "body"}, skip_bad_rows=1)
    assert found == [("c.jsonl#0001", "one"), ("c.jsonl#0003", "three")]
    assert "passed over 1 bad rows of 3; the first: " in caplog.text


def test_a_name_within_a_source_does_not_depend_on_its_other_files(tmp_path):
    """It decides what is held out: relative to the folder that is named, or to the part of a glob without wildcards."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("one")
    globbed = f"{tmp_path}/*/*.txt"
    assert [d.name for d in sources.load_documents(f"{tmp_path},{globbed}")] == ["a/x.txt#0001"] * 2
    (tmp_path / "b.txt").write_text("two")
    assert [d.name for d in sources.load_documents(str(tmp_path))] == ["a/x.txt", "b.txt"]
    assert [d.name for d in sources.load_documents(globbed)] == ["a/x.txt#0001"]


def test_stdlib_leaves_out_tests():
    documents = sources.load_documents("stdlib")
    names = [d.name for d in documents]
    assert names == sorted(set(names))
    assert {"stdlib/shutil.py", "stdlib/json/__init__.py", "stdlib/topics/for"} <= set(names)
    assert "stdlib/pydoc_data/topics.py" not in names
    assert not [n for n in names if {"test", "tests", "idle_test", "site-packages"} & set(n.split("/")[:-1])]
    assert sum(len(d.text) for d in documents) > 5e6


def test_held_out_is_decided_by_the_name_alone():
    documents = [sources.Document(f"d{i}", "") for i in range(4000)]
    train, held = sources.split_held_out(documents, 0.05)
    assert sorted(train + held) == sorted(documents)
    assert 150 < len(held) < 250  # 200 expected, deviation sqrt(4000 * .05 * .95) = 14
    assert sources.split_held_out(documents[::-2], 0.05)[1] == [d for d in documents[::-2] if d in held]
    assert {d for d in documents if sources.is_held_out(d.name, 0.01)} < set(held)
    # sha256("stdlib/shutil.py") begins 93b6, and 0x93b6 / 0x10000 = 0.577: the figure must never move
    assert [sources.is_held_out("stdlib/shutil.py", f) for f in (0.0, 0.576, 0.578, 1.0)] == [False, False, True, True]


def test_split_refuses_an_empty_side():
    documents = [sources.Document("a", ""), sources.Document("b", "")]
    with pytest.raises(UserError, match="of 2 documents none is held out at 0: raise"):
        sources.split_held_out(documents, 0.0)
    with pytest.raises(UserError, match="of 2 documents none is left to train on at 1: lower"):
        sources.split_held_out(documents, 1.0)


# Conversations


def message(sender, text):
    return {"sender": sender, "text": text, "timestamp": "2018-05-02T19:38:15Z"}


@pytest.fixture
def chitchat(tmp_path, monkeypatch):
    dataset = {
        "one": {"messages": [[message("A", "Hello"), message("A", " how \n are you? ")], [message("B", "")],
                             [message("B", "fine")], [message("A", "ok")]]},
        "alone": {"messages": [[message("A", "hi")], [message("A", "anyone?")]]},
        "unheard": {"messages": [[message("A", "hi there you")], [message("B", " ")]]},
        "two": {"messages": [[message("B", "what about exams now?")], [message("A", "over")]]},
    }  # fmt: skip
    package = tmp_path / "chitchat_dataset"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "dataset.json").write_text(json.dumps(dataset))
    monkeypatch.syspath_prepend(tmp_path)


def turns(*contents):
    return [{"role": role, "content": c} for role, c in zip(["user", "assistant"] * len(contents), contents)]


def test_chitchat_merges_cleans_and_drops(chitchat):
    assert [found[:2] for found in conversations.chitchat_conversations()] == [
        ("chitchat/one", turns("Hello how are you?", "fine", "ok")),
        ("chitchat/two", turns("what about exams now?", "over")),
    ]
    assert sources.load_documents("chitchat") == [
        ("chitchat/one", "Hello how are you?\nfine\nok\n"),
        ("chitchat/two", "what about exams now?\nover\n"),
    ]


def test_chitchat_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "chitchat_dataset", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install chitchat-dataset"):
        conversations.chitchat_conversations()


SOURCE = '''
"""Tools for files. And more."""
def copy(a):
    """Copy a to
    b, e.g. on disk.  Then rest."""
def _private():
    """Hide the thing well."""
def unclear():
    """copy(a) -> b"""
def lower():
    """not a sentence at all."""
def unended():
    """Copy without an end"""
def long():
    """Copy %s."""
class File:
    """A file on disk."""
    def close(self):
        """Close the file."""
''' % ("very " * 50)


def test_docstrings(monkeypatch):
    modules = [sources.Document("stdlib/tools/__init__.py", SOURCE), sources.Document("stdlib/_tools.py", SOURCE)]
    monkeypatch.setattr(sources, "stdlib_modules", lambda: modules)
    found = conversations.docstring_conversations()
    assert {c.name for c in found} == {"stdlib/tools/__init__.py"}
    assert [c.messages[1]["content"] for c in found] == [
        "Tools for files.", "Copy a to b, e.g. on disk.", "A file on disk.", "Close the file."
    ]  # fmt: skip
    for conversation, name in zip(found, ("tools", "tools.copy", "tools.File", "tools.File.close")):
        assert [m["role"] for m in conversation.messages] == ["user", "assistant"]
        assert conversation.messages[0]["content"] in [q.format(name) for q in conversations.QUESTION_TEMPLATES]
    assert conversations.docstring_conversations() == found


def test_excerpts_keep_every_reply():
    conversation = conversations.Conversation("c", turns("a", "b", "c", "d", "e", "f", "g"))
    assert [found[:2] for found in conversations.conversation_excerpts([conversation], turns=4)] == [
        ("c", turns("a", "b", "c", "d")),
        ("c", turns("e", "f", "g")),
    ]
    assert conversations.conversation_excerpts([conversation], turns=2)[-1][:2] == (
        "c",
        turns("e", "f"),
    )  # nobody answers g


def test_prompts_end_in_a_users_turn():
    talk = conversations.Conversation(
        "c", turns("is it far?", "no", "ok", "yes", "then let us go", "now", "why so fast?")
    )
    found = conversations.prompt_contexts([talk], per_conversation=0)
    assert {tuple(m["content"] for m in p.messages) for p in found} == {
        ("is it far?",),
        ("ok", "yes", "then let us go"),
        ("then let us go", "now", "why so fast?"),
    }  # "ok" has too few words
    assert all(p.messages[0]["role"] == p.messages[-1]["role"] == "user" and p.name == "c" for p in found)
    # two turns at most, starting with the user's: the assistant's turn falls away
    assert all(len(p.messages) == 1 for p in conversations.prompt_contexts([talk], turns=2))
    assert conversations.prompt_contexts([talk]) == conversations.prompt_contexts([talk, talk]) == found[:1]


# Rows


def test_bucketed_by_hand():
    """Multiples of 32, but no more than the limit."""
    assert [prompts.bucket_length(n, 80) for n in (1, 32, 33, 64, 65, 80)] == [32, 32, 64, 64, 80, 80]
    assert prompts.bucket_length(5, 20) == 20


def test_stream_by_hand():
    tokens = packing.stream_rows([[2, 9, 3], [2, 7, 8, 3], [2, 3]], 4)
    # 2 9 3 2 | 7 8 3 2 | 3: nine tokens are eight inputs and eight targets; weight 0 on the first token of a document
    assert tokens.inputs.tolist() == [[2, 9, 3, 2], [7, 8, 3, 2]]
    assert tokens.targets.tolist() == [[9, 3, 2, 7], [8, 3, 2, 3]]
    assert tokens.weights.tolist() == [[1, 1, 0, 1], [1, 1, 0, 1]]
    assert tokens.positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
    assert tokens.segments.tolist() == [[1, 1, 1, 2], [1, 1, 1, 2]]
    padded = packing.stream_rows([[2, 9, 3], [], [2, 7, 8, 3], [2, 3]], 5)
    assert padded.segments.tolist() == [[1, 1, 1, 2, 2], [1, 1, 2, 0, 0]]
    assert padded.weights.tolist() == [[1, 1, 0, 1, 1], [1, 0, 1, 0, 0]]
    assert padded.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert [leaf.dtype for leaf in (padded.inputs, padded.weights, padded.segments)] == [np.int32, np.float32, np.int32]


def test_stream_loses_no_target():
    draw = random.Random(0)
    documents = [[2, *(draw.randrange(9, 99) for _ in range(draw.randrange(40))), 3] for _ in range(60)]
    tokens = packing.stream_rows(documents, 16)
    trained = tokens.weights > 0
    assert tokens.weights.sum() == sum(map(len, documents)) - len(documents)
    assert tokens.targets[trained].tolist() == [i for document in documents for i in document[1:]]
    assert tokens.inputs[trained].tolist() == [i for document in documents for i in document[:-1]]


def test_stream_refuses_too_little():
    assert packing.stream_rows([[2, 9, 9, 9, 3]], 4).inputs.shape == (1, 4)
    for documents, count in (([[2, 9, 9, 3]], 4), ([], 0)):
        with pytest.raises(UserError, match=f"too small for one row: {count} tokens, a row needs 5"):
            packing.stream_rows(documents, 4)


def example(*ids):
    return TokenizedExample(np.array(ids, np.int32), np.array([i >= 50 for i in ids], np.float32))


def test_pack_by_hand():
    # sizes 2, 3, 1, 4 in rows of 5; longest first: 4 | 3 | 2 beside the 3 (the best fit) | 1 beside the 4
    tokens, left_out = packing.packed_rows(
        [example(2, 9, 50), example(2, 8, 51, 52), example(2, 53), example(2, 7, 7, 7, 54)], 5
    )
    assert left_out == {"skipped": 0, "untrained": 0}
    assert tokens.inputs.tolist() == [[2, 7, 7, 7, 2], [2, 8, 51, 2, 9]]
    assert tokens.targets.tolist() == [[7, 7, 7, 54, 53], [8, 51, 52, 9, 50]]
    assert tokens.weights.tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 0, 1]]
    assert tokens.positions.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    assert tokens.segments.tolist() == [[1, 1, 1, 1, 2], [1, 1, 1, 2, 2]]


def test_pack_keeps_every_example_whole_and_once():
    draw = random.Random(1)
    examples = [example(2, *(draw.randrange(9, 99) for _ in range(draw.randrange(1, 40)))) for _ in range(200)]
    tokens, left_out = packing.packed_rows(examples, 32)
    found = [
        [*tokens.inputs[r][here], tokens.targets[r][here][-1]]
        for r in range(len(tokens.inputs))
        for s in range(1, tokens.segments[r].max() + 1)
        if (here := tokens.segments[r] == s).any()
    ]
    fit = [e for e in examples if len(e.ids) <= 33]
    whole = [e.ids.tolist() for e in fit if e.weights[1:].any()]
    assert sorted(found) == sorted(whole)
    assert left_out == {"skipped": 200 - len(fit), "untrained": len(fit) - len(whole)} and min(left_out.values()) > 0
    assert tokens.weights.sum() == sum(e.weights[1:].sum() for e in examples if len(e.ids) <= 33)
    assert (tokens.segments > 0).mean() > 0.9


def test_pack_refuses_only_what_cannot_teach():
    tokens, left_out = packing.packed_rows([example(2, 9, 50), example(2, 9, 9, 50), example(50, 9, 9)], 2)
    assert (tokens.inputs.tolist(), left_out) == ([[2, 9]], {"skipped": 1, "untrained": 1})
    message = (
        "none of 2 conversations can be learnt from (1 conversations longer than a row of 1 tokens, "
        "1 conversations with no token to learn (no answer, weight zero, or it shares a token with the marker)): "
        "lengthen the row"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        packing.packed_rows([example(2, 9, 50), example(2, 9)], 1)


def test_pad_by_hand():
    tokens = packing.padded_rows([example(2, 9, 50), example(2, 8, 51, 52)], 4)
    assert tokens.inputs.tolist() == [[2, 9, 0, 0], [2, 8, 51, 0]]
    assert tokens.targets.tolist() == [[9, 50, 0, 0], [8, 51, 52, 0]]
    assert tokens.weights.tolist() == [[0, 1, 0, 0], [0, 1, 1, 0]]
    assert tokens.positions.tolist() == [[0, 1, 0, 0], [0, 1, 2, 0]]
    assert tokens.segments.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    with pytest.raises(UserError, match="example 1 has 4 tokens, a row takes 3"):
        packing.padded_rows([example(2, 9, 50), example(2, 8, 51, 52)], 2)


# Batches


def numbered(count):
    return {"x": np.arange(count), "y": np.arange(count)[:, None] * [1, 10]}


def test_a_batch_depends_on_seed_and_index_alone():
    first, second = (batch_function(numbered(10), batch_size=4, seed=3) for _ in range(2))
    backwards = {i: second(i)["x"] for i in reversed(range(12))}
    for i in range(12):
        np.testing.assert_array_equal(first(i)["x"], backwards[i])
        np.testing.assert_array_equal(first(i)["x"][:, None] * [1, 10], first(i)["y"])
    other = batch_function(numbered(10), batch_size=4, seed=4)
    assert any((other(i)["x"] != first(i)["x"]).any() for i in range(5))


def test_every_epoch_holds_each_row_once_in_a_new_order():
    batch = batch_function(numbered(10), batch_size=4, seed=0)
    drawn = np.concatenate([batch(i)["x"] for i in range(5)]).reshape(2, 10)  # 5 * 4 = 2 epochs of 10
    assert [sorted(epoch) for epoch in drawn.tolist()] == [list(range(10))] * 2
    assert (drawn[0] != drawn[1]).any()
    plain = batch_function(numbered(10), batch_size=4, seed=0, shuffle=False)
    assert np.concatenate([plain(i)["x"] for i in range(5)]).tolist() == [*range(10)] * 2


def test_few_rows_repeat_and_types_stay():
    tokens = packing.padded_rows([example(2, 9, 50), example(2, 50)], 3)
    batch = batch_function(tokens, batch_size=5, seed=0)(0)
    assert isinstance(batch, Tokens) and batch.inputs.shape == (5, 3) and batch.weights.dtype == np.float32
    for faulty in ({"x": np.zeros(0)}, {"x": np.zeros(2), "y": np.zeros(3)}, {}):
        with pytest.raises(UserError, match="cannot draw batches"):
            batch_function(faulty, batch_size=1, seed=0)


def test_a_ramp_takes_the_same_rows_in_the_same_order():
    """2 rows before step 2, 3 before step 5, then 4: 4 + 9 = 13 rows, and 4 a batch from row 13 on."""
    whole = np.concatenate([batch_function(numbered(10), batch_size=4, seed=5)(i)["x"] for i in range(7)])
    ramped = batch_function(numbered(10), batch_size=4, seed=5, ramp=((2, 2), (5, 3)))
    found = [ramped(i)["x"] for i in reversed(range(8))][::-1]  # a function of (seed, i) all the same
    assert [len(x) for x in found] == [2, 2, 3, 3, 3, 4, 4, 4]
    np.testing.assert_array_equal(np.concatenate(found), whole[:25])
    np.testing.assert_array_equal(ramped(6)["x"], whole[17:21])


@pytest.mark.parametrize(
    "ramp, message",
    [
        ((100, 4), r"data.ramp is \(100, 4\); it must be pairs .*, such as \(\(100, 4\),\)"),
        (((100, 4, 8),), "it must be pairs"),
        (((100, 4.5),), "it must be pairs"),
        (((100, 4), (100, 8)), "data.ramp has the steps 100, 100; each must be larger than the last"),
        (((0, 4),), "data.ramp has the steps 0; each must be larger"),
        (((10, 4), (20, 0)), "data.ramp.rows is 0; it must be at least 1"),
    ],
)
def test_bad_ramps(ramp, message):
    with pytest.raises(UserError, match=message):
        batch_function(numbered(10), batch_size=4, seed=0, ramp=ramp)


# Rankings

RANKING = preferences.Ranking(
    "chitchat/one", turns("how are you?"), ["fine", "bad é", "good"], [2, 3, 2], "rule", "2024-05-01T12:00:00+00:00"
)


def test_rankings_come_back(tmp_path):
    path = tmp_path / "run" / "rankings.jsonl"
    preferences.append_rankings(path, [RANKING])
    preferences.append_rankings(path, [RANKING._replace(ranking=[1, 1, 1]), RANKING])
    assert preferences.read_jsonl_rankings(path) == [RANKING, RANKING._replace(ranking=[1, 1, 1]), RANKING]


def test_pairs_are_the_strict_preferences():
    assert preferences.preference_pairs(RANKING) == [(0, 1), (2, 1)]
    assert preferences.preference_pairs(RANKING._replace(ranking=[3, 2, 1])) == [(1, 0), (2, 0), (2, 1)]
    assert preferences.preference_pairs(RANKING._replace(ranking=[1, 1, 1])) == []


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"ranking": [1, 2]}, r"ranking \[1, 2\] gives no rank to each of 3 texts"),
        ({"ranking": [0, 1, 2]}, "whole numbers from 1"),
        ({"ranking": [1.0, 1, 2]}, "whole numbers from 1"),
        ({"responses": "fine"}, "responses is not a list of texts"),
        ({"prompt": []}, "prompt is not a list of messages"),
        ({"prompt": [{"role": "bot", "content": "x"}]}, "prompt is not a list of messages"),
        ({"rater": None}, "rater is None, not text"),
        ({"time": "noon"}, "noon"),
        ({"extra": 1}, "with the keys name, prompt"),
    ],
)
def test_rankings_name_line_and_fault(tmp_path, change, fault):
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in (RANKING._asdict(), RANKING._asdict() | change)))
    with pytest.raises(UserError, match=f"r.jsonl:2: .*{fault}"):
        preferences.read_jsonl_rankings(path)


def test_a_hint_says_what_would_help():
    """One name for all: it falls on one side at any fraction. Two names: a larger fraction parts them."""
    alike = [sources.Document("one", str(i)) for i in range(40)]
    for fraction, side in ((0.02, "held out"), (0.98, "left to train on")):
        with pytest.raises(UserError, match=f"of 40 documents none is {side}: all have one name or one text, so no"):
            sources.split_held_out(alike, fraction)
    with pytest.raises(UserError, match="of 40 documents none is held out at 0: raise the fraction or add some"):
        sources.split_held_out(alike, 0)
    with pytest.raises(UserError, match="of 41 documents none is held out at 0.02: raise the fraction or add some"):
        sources.split_held_out([*alike, sources.Document("two", "b")], 0.02)


def test_rankings_refuse_what_is_no_json(tmp_path):
    path = tmp_path / "r.jsonl"
    with pytest.raises(UserError, match="no rankings at .*r.jsonl"):
        preferences.read_jsonl_rankings(path)
    path.write_text(json.dumps(RANKING._asdict())[:-5])
    with pytest.raises(UserError, match=r"r.jsonl:1: not JSON"):
        preferences.read_jsonl_rankings(path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        preferences.read_jsonl_rankings(path)

"""What rows are recognised as, and what is said of those that cannot be used."""

import json
import runpy

import pytest
from runs import ROOT

from lm.core.errors import UserError
from lm.data import show
from lm.data.conversations import conversation_excerpts, repeated_prompt_contexts
from lm.data.files import SourceRow
from lm.data.formats import recognized_row
from lm.data.loading import ConversationRows, load_conversations, load_counted_rankings, load_rankings
from lm.data.messages import RowFault
from lm.data.packing import packed_rows
from lm.data.preferences import LABEL_AXIS
from lm.data.sources import split_held_out
from lm.tokenizer import encode_chat, train_tokenizer

HUMAN, GPT = {"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}
USER, ASSISTANT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
SYSTEM, TOOL = {"role": "system", "content": "Be brief."}, {"role": "tool", "content": "7"}
TURNS, WITH_TOOL = [USER, ASSISTANT], [SYSTEM, USER, ASSISTANT, TOOL, TOOL, ASSISTANT]
WORSE = {**ASSISTANT, "content": "b"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "Hi?"}]}
WHO = {"role": "user", "content": "Who?"}
FOLLOWED = [USER, {**ASSISTANT, "weight": 0.0}, WHO, {"role": "assistant", "content": "I."}]
VERL = {"style": "rule", "ground_truth": "7"}
RATED = [{"response": text, "overall_score": score} for text, score in (("a", 5.0), ("b", 7.5), ("c", 5.0))]
SCORES = {"score_chosen": 8.0, "score_rejected": 4.6}
WITH_INPUT = [{"role": "user", "content": "Hi?\n\n1"}, ASSISTANT]
HH = "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant:"
TALKED = [USER, ASSISTANT, WHO]
SKY = [{"role": "user", "content": "The sky is"}]
PAIR = [USER], ["a", "b"], [1, 2]
SAID = {"name": "n", "rater": "ann", "time": "2024-05-01"}


def row(fields, **columns):
    return recognized_row(SourceRow("f.jsonl", 3, fields), columns)


@pytest.mark.parametrize(
    "fields, format, messages",
    [
        ({"messages": TURNS}, "conversation", TURNS),
        ({"messages": WITH_TOOL}, "conversation", WITH_TOOL),
        ({"messages": [PARTS, ASSISTANT]}, "conversation", TURNS),
        ({"messages": [USER, {**ASSISTANT, "train": False}]}, "conversation", [USER, {**ASSISTANT, "weight": 0.0}]),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "conversation", [USER, {**ASSISTANT, "weight": 0.5}]),
        ({"messages": [USER, {**ASSISTANT, "train": True, "weight": None}]}, "conversation", TURNS),
        ({"prompt": "Hi?", "completion": "Hello."}, "prompt and completion", TURNS),
        ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, "prompt and completion", [SYSTEM, *TURNS]),
        ({"conversations": [HUMAN, GPT]}, "ShareGPT conversation", TURNS),
        ({"system": "Be brief.", "conversations": [HUMAN, GPT]}, "ShareGPT conversation", [SYSTEM, *TURNS]),
        ({"instruction": "Hi?", "input": "", "output": "Hello."}, "Alpaca conversation", TURNS),
        ({"instruction": "Hi?", "input": "1", "output": "Hello."}, "Alpaca conversation", WITH_INPUT),
        ({"prompt": "Hi?", "answer": "7", "tests": ["a"]}, "prompt", [USER]),
        ({"messages": [SYSTEM, USER], "ground_truth": "7"}, "prompt", [SYSTEM, USER]),
        ({"data_source": "d", "prompt": [USER], "ability": "m", "reward_model": VERL}, "prompt", [USER]),
        ({"messages": json.dumps(TURNS)}, "conversation", TURNS),
        ({"system": "Be brief.", "prompt": "Hi?", "completion": "Hello."}, "prompt and completion", [SYSTEM, *TURNS]),
        ({"system": "No.", "messages": [SYSTEM, *TURNS]}, "conversation", [SYSTEM, *TURNS]),
        ({"system": "", "instruction": "Hi?", "output": "Hello."}, "Alpaca conversation", TURNS),
        ({"instruction": "Who?", "output": "I.", "history": [["Hi?", "Hello."]]}, "Alpaca conversation", FOLLOWED),
        ({"prompt": [USER, ASSISTANT, WHO], "completion": "I."}, "prompt and completion", FOLLOWED),
        ({"system": "Be brief.", "prompt": "Hi?", "answer": "7"}, "prompt", [SYSTEM, USER]),
        ({"conversations": [{"from": "Human", "value": "Hi?"}, GPT]}, "ShareGPT conversation", TURNS),
    ],
)  # fmt: skip
def test_conversations_and_prompts(fields, format, messages):
    found = row(fields)
    assert (found.format, found.value.messages) == (format, messages) and found.value.is_whole
    assert not {"messages", "prompt", "completion", "conversations", "output"} & set(found.value.fields)


def test_a_prompt_keeps_its_other_fields_for_the_reward():
    assert row({"prompt": "Hi?", "answer": "7", "tests": ["a"], "note": None}).value.fields == {
        "answer": "7",
        "tests": ["a"],
    }
    assert row({"prompt": "Hi?", "reward_model": {"ground_truth": "7"}}).value.fields["answer"] == "7"
    assert row({"prompt": "Hi?", "ground_truth": "7"}).value.fields == {"answer": "7", "ground_truth": "7"}
    opened = row({"messages": [USER], "ground_truth": ["7"], "dataset": "gsm8k"}).value.fields
    assert opened == {"answer": "7", "ground_truth": ["7"], "dataset": "gsm8k"}


@pytest.mark.parametrize(
    "fields, prompt, responses, ranking",
    [
        ({"prompt": "Hi?", "chosen": "a", "rejected": "b"}, [USER], ["a", "b"], [1, 2]),
        ({"prompt": [USER], "chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]}, [USER], ["Hello.", "b"], [1, 2]),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]}, [USER], ["Hello.", "b"], [1, 2]),
        ({"prompt": "Hi?", "chosen": "a", "rejected": "b", **SCORES}, [USER], ["a", "b"], [1, 4]),
        ({"prompt": "Hi?", "chosen": "a", "rejected": "b", "margin": 0.2}, [USER], ["a", "b"], [1, 2]),
        ({"instruction": "Hi?", "completions": RATED}, [USER], ["a", "b", "c"], [2, 1, 2]),
        ({"prompt": [USER], "responses": ["a", "b"], "ranking": [2, 1], **SAID}, [USER], ["a", "b"], [2, 1]),
        ({"chosen": HH + " a", "rejected": HH + " b"}, TALKED, ["a", "b"], [1, 2]),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, SKY, ["blue.", "green."], [1, 2]),
        ({"system": "Be brief.", "prompt": "Hi?", "chosen": "a", "rejected": "b"}, [SYSTEM, USER], ["a", "b"], [1, 2]),
        ({"prompt": "Hi?", "chosen": [USER, WORSE], "rejected": [ASSISTANT]}, [USER], ["b", "Hello."], [1, 2]),
        ({"prompt": "Hi?", "chosen": "a", "rejected": "b", "score_chosen": "3", "score_rejected": 3}, *PAIR),
        ({"prompt": "Hi?", "completions": ["a", "b"], "ratings": [1, 2.5]}, [USER], ["a", "b"], [2, 1]),
        ({"instruction": "Hi?", "responses": '["a", "b"]', "scores": "[3, 1]"}, *PAIR),
    ],
)  # fmt: skip
def test_preferences(fields, prompt, responses, ranking):
    found = row(fields).value
    assert (found.prompt, found.responses, found.ranking) == (prompt, responses, ranking)


def test_labels_of_single_completions():
    for label, score in ((True, 10), ("false", 1), (1, 10)):
        found = row({"prompt": "Hi?", "completion": "a", "label": label}).value
        assert (found.responses, found.axes) == (["a"], {LABEL_AXIS: [score]})


def test_ratings_of_aspects_become_axes():
    judged = [{"helpfulness": {"Rating": str(n)}, "honesty": {"Rating": "N/A" if n == 2 else "3"}} for n in (2, 5)]
    rated = [{"response": f"a {i}", "overall_score": i, "annotations": each} for i, each in enumerate(judged)]
    found = row({"instruction": "Hi?", "completions": rated}).value
    assert found.axes == {"helpfulness": [2, 5], "honesty": [None, 3]} and found.ranking == [2, 1]


def test_where_a_row_may_be_several_it_is_what_is_wanted(tmp_path):
    """A prompt of a preference may be asked; nobody learns to say a completion that is labelled as bad."""
    path = lines(tmp_path / "a.jsonl", {"prompt": "Hi?", "chosen": "a", "rejected": "b"})
    assert load_conversations(path)[0].messages == [USER] and load_rankings(path)[0].responses == ["a", "b"]
    path = lines(tmp_path / "b.jsonl", {"messages": TURNS, "chosen": TURNS, "rejected": [USER, WORSE]})
    assert load_conversations(path)[0].messages == TURNS and load_rankings(path)[0].responses == ["Hello.", "b"]
    path = lines(tmp_path / "c.jsonl", {"prompt": "Hi?", "completion": "a", "label": False})
    with pytest.raises(UserError, match="c.jsonl:1: its label says whether the completion is good: take stage kto"):
        load_conversations(path)


def test_a_prompt_teaches_no_reply(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"prompt": "Hi?", "answer": "7"})
    with pytest.raises(UserError, match="a.jsonl:1: it is a prompt, and .*: name the reply's field, as in"):
        load_conversations(path, needs_reply=True)
    found = load_conversations(path, columns={"completion": "answer"}, needs_reply=True)
    assert found[0].messages == [USER, {"role": "assistant", "content": "7"}]


def test_copies_are_counted_and_kept(tmp_path, caplog):
    path = lines(tmp_path / "a.jsonl", *[{"messages": TURNS}] * 3, {"messages": WITH_TOOL}, {"messages": []})
    found = ConversationRows(path, columns={}, skip_bad_rows=1, needs_reply=False)
    assert len(list(found)) == 4 and found.counts == {"bad_rows": 1, "duplicate_rows": 2}
    assert "2 rows of 4 are copies of others" in caplog.text
    path = lines(tmp_path / "b.jsonl", *[{"prompt": "Hi?", "chosen": "a", "rejected": "b"}] * 2)
    assert load_counted_rankings(path).counts == {"bad_rows": 0, "duplicate_rows": 1}
    with pytest.raises(UserError, match="data.skip_bad_rows is -1; it must be at least 0"):
        load_conversations(path, skip_bad_rows=-1)


def test_columns_name_what_is_called_otherwise():
    found = row({"question": "Hi?", "reply": "Hello.", "id": 3}, prompt="question", completion="reply")
    assert found.format == "prompt and completion" and found.value.messages == TURNS and found.value.fields == {"id": 3}
    with pytest.raises(RowFault, match="it has no field 'query', which data.columns names for 'prompt'"):
        row({"question": "Hi?"}, prompt="query")
    nested = row({"prompt": "Hi?", "reward": {"truth": "7"}}, answer="reward.truth", prompt="question").value
    assert nested.messages == [USER] and nested.fields["answer"] == "7"


@pytest.mark.parametrize(
    "fields, fault",
    [
        ({"foo": 1, "bar": 2}, "its fields (bar, foo) are of no known format"),
        ({"messages": []}, "a conversation without messages"),
        ({"messages": [ASSISTANT]}, "the assistant speaks first: a user's message must come first"),
        ({"messages": [SYSTEM]}, "nobody speaks first"),
        ({"messages": [USER, USER]}, "two messages of the user in a row: join them"),
        ({"messages": [USER, ASSISTANT, ASSISTANT]}, "two messages of the assistant in a row: join them"),
        ({"messages": [USER, {"role": "robot", "content": "a"}]}, "message 2 has the unknown role 'robot'"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "message 2 of the assistant is empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2 has None for content, not text"),
        ({"messages": [USER, {**ASSISTANT, "weight": -1}]}, "message 2 has the weight -1"),
        ({"messages": [USER, "hello"]}, "message 2 is 'hello', not an object"),
        ({"prompt": "Hi?", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
        ({"prompt": "Hi?", "chosen": "a", "rejected": ""}, "an answer is empty"),
        ({"prompt": "Hi?", "chosen": "a", "rejected": "b", "margin": 0}, "chosen is not better than rejected"),
        ({"chosen": "a", "rejected": "b"}, "chosen and rejected are texts that begin with different words"),
        ({"prompt": "Hi?", "completion": "a", "label": "good"}, "label is 'good', neither true nor false"),
        ({"messages": "Hi?"}, "messages is 'Hi?', not a list of messages"),
        ({"messages": [USER, {**ASSISTANT, "train": "no"}]}, "message 2 has 'no' for train"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{}]}]}, "message 2 has 'tool_calls', which is not read"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 has None for content"),
        ({"messages": [SYSTEM, SYSTEM, USER]}, "two messages of the system in a row"),
        ({"text": 3}, "text is 3, not a text"),
        ({"prompt": "Hi?", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2}, "chosen is worse"),
        ({"prompt": "Hi?", "chosen": "a", "rejected": "b", "margin": "wide"}, "margin is 'wide', not a number"),
        ({"prompt": "Hi?", "chosen": TURNS, "rejected": [USER, *TURNS]}, "rejected must be one answer to the prompt"),
        ({"chosen": TURNS, "rejected": TURNS}, "chosen equals rejected"),
        ({"chosen": TURNS, "rejected": [WHO, ASSISTANT]}, "chosen and rejected have no prompt and begin with diff"),
        ({"chosen": TURNS, "rejected": "b"}, "one of chosen and rejected is a text"),
        ({"prompt": "Hi?", "completions": ["a"], "ratings": [1]}, "completions is ['a'], not a list of two or more"),
        ({"prompt": "Hi?", "completions": ["a", "b"], "ratings": [1]}, "ratings is [1], not a number for each of 2"),
        ({"prompt": "Hi?", "completions": ["a", "a"], "ratings": [1, 2]}, "two equal answers have different ratings"),
        ({"prompt": TURNS, "answer": "7"}, "it ends with the assistant, not with the user"),
        ({"prompt": "Hi?", "completions": [{"response": "a"}] * 2}, "a completion has no response or none of score"),
    ],
)
def test_what_cannot_be_used(fields, fault):
    with pytest.raises(RowFault) as error:
        row(fields)
    assert str(error.value).startswith(fault)


def lines(path, *rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


def test_bad_rows_stop_the_run_or_are_counted(tmp_path, caplog):
    path = lines(
        tmp_path / "a.jsonl", {"messages": TURNS}, {"messages": [ASSISTANT]}, {"text": "a"}, {"messages": TURNS}
    )
    with pytest.raises(UserError) as error:
        load_conversations(path)
    assert str(error.value).startswith(f"{path}:2: the assistant speaks first") and "skip_bad_rows" in str(error.value)
    with pytest.raises(UserError, match=":3: it is a text, and conversation or .* is needed here"):
        load_conversations(path, skip_bad_rows=1)
    assert len(load_conversations(path, skip_bad_rows=2)) == 2
    assert "passed over 2 bad rows of 4; the first: " in caplog.text
    with pytest.raises(UserError, match="holds no preference: give a file that has some"):
        load_rankings(path, skip_bad_rows=4)


def test_sources_may_be_mixed_and_a_misspelt_name_is_named(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"messages": TURNS})
    found = load_conversations(f"arithmetic,{path}")
    assert len(found) == 6001 and found[-1].messages == TURNS
    with pytest.raises(UserError, match="data.sources has 'chitcat'; choose among chitchat, docstrings, arithmetic, "):
        load_conversations("chitcat")


def test_the_name_of_a_row_is_its_words_wherever_it_stands(tmp_path):
    one, two = {"messages": TURNS}, {"messages": [{**USER, "content": "Who?"}, ASSISTANT]}
    first, second = load_conversations(lines(tmp_path / "a.jsonl", one, two))
    assert [c.name for c in load_conversations(lines(tmp_path / "b.jsonl", two, one))] == [second.name, first.name]
    assert first.name != second.name
    named = load_conversations(lines(tmp_path / "c.jsonl", {**one, "name": "n"}))
    assert named[0].name == "n"


def test_own_conversations_are_never_cut_and_own_prompts_are_asked_as_they_are(tmp_path):
    long = [SYSTEM, *(TURNS * 5), USER]
    talk, ask = load_conversations(
        lines(tmp_path / "a.jsonl", {"messages": long[:-1]}, {"prompt": "Hi", "answer": "7"})
    )
    assert conversation_excerpts([talk], turns=2) == [talk]
    contexts = repeated_prompt_contexts([talk, ask], turns=1)
    assert [c.messages for c in contexts] == [long[:-2], [{"role": "user", "content": "Hi"}]]
    assert contexts[1].fields == {"answer": "7"}


def test_weights_of_messages_are_those_of_their_tokens():
    tokenizer = train_tokenizer(["a cat sat on a mat", "Hi? Hello."] * 50, vocab_size=300)
    first = {"role": "assistant", "content": "a cat sat"}
    plain = encode_chat(tokenizer, [USER, first, USER, ASSISTANT])
    weighted = encode_chat(tokenizer, [USER, {**first, "weight": 0.0}, USER, {**ASSISTANT, "weight": 0.5}])
    assert plain.ids.tolist() == weighted.ids.tolist() and set(plain.weights) == {0, 1}
    trained = plain.weights.nonzero()[0]
    count = len(tokenizer.encode("a cat sat")) + 1
    assert not weighted.weights[trained[:count]].any() and (weighted.weights[trained[count:]] == 0.5).all()


def test_a_file_in_which_nothing_is_trained(tmp_path):
    tokenizer = train_tokenizer(["a cat sat on a mat", "Hi? Hello."] * 50, vocab_size=300)
    path = lines(tmp_path / "a.jsonl", *[{"messages": [USER, {**ASSISTANT, "train": False}]}] * 3)
    examples = [encode_chat(tokenizer, each.messages) for each in load_conversations(path)]
    with pytest.raises(UserError, match="none of 3 conversations .*3 conversations with no token .* weight zero"):
        packed_rows(examples, 20)


@pytest.mark.parametrize("fraction, side", [(0.0, "held out"), (1.0, "left to train on")])
def test_a_file_of_which_all_falls_on_one_side(fraction, side, tmp_path):
    found = load_conversations(lines(tmp_path / "a.jsonl", {"messages": TURNS}, {"messages": WITH_TOOL}))
    with pytest.raises(UserError, match=f"of 2 documents none is {side}"):
        split_held_out(found, fraction)


def test_lm_data_shows_what_is_there_and_what_would_be_refused(tmp_path, capsys):
    path = lines(tmp_path / "a.jsonl", {"messages": TURNS}, {"question": "Hi?", "gold": "7"}, {"messages": [ASSISTANT]})
    with pytest.raises(SystemExit) as exit:
        show.program([path])
    said = capsys.readouterr().out
    assert exit.value.code == 1 and "3 rows" in said and "1  conversation" in said and "user       Hi?" in said
    assert "2 rows would be refused" in said and f"{path}:3: the assistant speaks first" in said
    path = lines(tmp_path / "b.jsonl", *[{"question": "Hi?", "gold": "7"}] * 2)
    show.program([path, "--columns=prompt=question,answer=gold"])
    said = capsys.readouterr().out
    assert (
        "2  prompt" in said
        and "1  of them copies of others" in said
        and "answer =   7" in said
        and "length in characters: 0 % 3" in said
    )
    with pytest.raises(UserError, match="--columns=a: give pairs such as prompt=question"):
        show.program([path, "--columns=a"])


def test_the_example_s_seven_files(tmp_path, capsys):
    """experiments/examples/own_data.py: one file for each form, of which no row is refused."""
    runpy.run_path(str(ROOT / "experiments" / "examples" / "own_data.py"))["write_files"](tmp_path)
    said = {}
    for path in sorted(tmp_path.iterdir()):
        show.program([str(path)])
        said[path.name] = capsys.readouterr().out
    forms = {name: text.splitlines()[1].split(maxsplit=1) for name, text in said.items()}
    assert forms == {
        "alpaca.jsonl": ["400", "Alpaca conversation"],
        "kto.jsonl": ["400", "label"],
        "messages.jsonl": ["400", "conversation"],
        "preferences.jsonl": ["400", "preference"],
        "prompts.jsonl": ["400", "prompt"],
        "sharegpt.jsonl": ["400", "ShareGPT conversation"],
        "text.parquet": ["400", "text"],
    }
    assert "bad        6" in said["kto.jsonl"] and "rank 1     9" in said["preferences.jsonl"]

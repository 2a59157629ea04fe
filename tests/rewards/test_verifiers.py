"""Each verifier by what it accepts and rejects, ways to cheat it among them."""

import time

import numpy as np
import pytest

from lm.core.errors import UserError
from lm.rewards import REWARDS

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}

# verifier, the row's answer, texts that are right, texts that are wrong
TABLE = [
    (
        "exact",
        "Paris",
        ["Paris", " paris.\n", "**Paris**", '"Paris"', "PARIS!", "Ｐａｒｉｓ", "(Paris)"],
        ["", "Paris or London", "Paris, London", "It is Paris", "Pari s", "Pаris", "Paris Paris", "Not Paris"],
    ),
    ("exact", ["New York", "NYC"], ["new  york", "NYC"], ["New York NYC", "York", "new\nyork city"]),
    ("exact", 42, ["42", "42.", "４２"], ["420", "42.0", "4 2", "41 42", ""]),
    ("exact", True, ["true", "True"], ["1", "yes", ""]),
    ("exact", "?", ["?", " ? "], ["", "!", "??"]),
    (
        "number",
        "42",
        ["42", "42.", "The answer is 42.", "6 * 7 = 42", "+42", "42.0", "$42", "4.2e1", "84/2", "#### 42",
         "First 6 + 6 = 12.\nThen 42", "\\boxed{42}", "The sum of 40 and 2 is 42.", "42 is the answer", "**42**",
         "It is 41.\nNo, it is 42.", "42 = 42"],
        ["", "41", "forty-two", "42 or 43", "41, 42", "1 2 3 42", "The answer is 41 or 42", "42\n43", "-42", "4２",
         "٤٢", "42km", "x42", "4 2", "1e400", "1e999999999", "nan", "inf", "42" * 100, "42/0", "1/0", "42²", "[41, 42]",
         "0x2A", "42.0000001"],
    ),
    ("number", -1234.5, ["-1234.5", "−1,234.5", "It is -1,234.50."], ["1234.5", "-1,23,4.5", "-12345", "-1234.6"]),
    ("number", "3/4", ["3/4", "0.75", "75/100", ".75"], ["3", "4", "3/4/1", "0.7", "0.7499"]),
    ("number", "1/3", ["1/3", "0.3333333", "0.33333333333"], ["0.33", "0.333"]),
    ("number", 0, ["0", "0.0", "-0"], ["", "none", "0.0000001", "1e-9"]),
    (
        "choice",
        "B",
        ["B", "b", "(B)", "B.", "B) Paris", "b) because A is wrong", "The answer is B", "Answer: **B**", "B: Paris",
         "I choose option B.", "The correct answer is (B) Paris.", "\\boxed{B}", "B\nIt is so."],
        ["", "A", "C", "A or B", "B or C", "B, C", "A B C D", "ABCD", "BB", "(A) (B)", "A) B) C) D)", "В", "Β",
         "The answer is A. The answer is B.", "Answer: B or C", "Be careful", "b e", "Paris", "Banana", "B/C",
         "The answer is a dog"],
    ),
    ("choice", "(a)", ["A", "a)", "The answer is A"], ["A dog", "a dog barks", "An A", "the answer is a B"]),
    (
        "regex",
        r"(yes|no), \d+ times",
        ["yes, 3 times", " no, 12 times\n"],
        ["", "yes", "yes, 3 times and more", "yes, 3 times no, 4 times", "Yes, 3 times",
         "yes, " + "3" * 20_000 + " times"],
    ),
    ("regex", "(?i).*paris.*", ["It is Paris.", "paris"], ["", "London"]),
    (
        "json_schema",
        SCHEMA,
        ['{"name": "Ada"}', ' {"name": "Ada", "age": 36}\n', '```json\n{"name": "Ada"}\n```',
         '```\n{"name": "Ada"}```'],
        ["", "{}", "null", '{"name": 1}', '{"name": "Ada", "age": -1}', '{"name": "Ada", "age": 1.5}',
         '{"name": "Ada", "more": 1}', '{"name": "Ada"} {"name": "Bob"}', 'Here: {"name": "Ada"}', "{'name': 'Ada'}",
         '{"name": "Ada", "age": NaN}', '{"name": "Ada", "age": 1e400}', '{"name": 1, "name": "Ada"}',
         '{"name": "Ada", "age": true}', '{"name": "Ada",}', "[" * 50_000, '```json\n{"name": "Ada"}\n``` and more'],
    ),
    ("json_schema", '{"type": "array", "maxItems": 2}', ["[]", "[1, 2]"], ["[1, 2, 3]", "{}", "1"]),
    ("json_schema", {"type": "number"}, ["1", "1.5", "-2e3"], ["Infinity", "1e400", "9" * 5000, '"1"', "true"]),
]  # fmt: skip


def example(answer) -> dict:
    return {"messages": [{"role": "user", "content": "What is it?"}], "answer": answer}


@pytest.mark.parametrize("name, answer, right, wrong", TABLE, ids=lambda each: str(each)[:20])
def test_what_a_verifier_accepts(name, answer, right, wrong):
    found = REWARDS[name]([example(answer)] * len(right + wrong), right + wrong)
    assert found.dtype == np.float32
    assert {text[:60]: value for text, value in zip(right + wrong, found.tolist())} == {
        **{text[:60]: 1.0 for text in right},
        **{text[:60]: 0.0 for text in wrong},
    }


@pytest.mark.parametrize("name", ["exact", "number", "choice", "regex", "json_schema"])
def test_a_row_without_an_answer_is_named(name):
    good = example({"number": 1, "json_schema": {}}.get(name, "B"))
    missing = {"messages": good["messages"], "ground_truth": "B", "level": 3}
    with pytest.raises(UserError) as caught:
        REWARDS[name]([good, missing], ["", ""])
    assert str(caught.value) == (
        f"reward {name} compares with the field `answer`, but row 2 of 2 ('What is it?') has only ground_truth, level: "
        "name the column that holds it, such as --config.data.columns=\"{'answer': 'ground_truth'}\""
    )
    for bare in ({"messages": good["messages"]}, {**good, "answer": None}):
        with pytest.raises(UserError, match="has no field beside its messages: take prompts with answers"):
            REWARDS[name]([bare], [""])


@pytest.mark.parametrize(
    "name, answer, message",
    [
        ("exact", {"a": 1}, "it must be text, a number or a list of them"),
        ("exact", [], "it must be text, a number or a list of them"),
        ("number", "many", "it must be a number such as -1,234.5, 3/4 or 1e3"),
        ("number", True, "it must be a number"),
        ("number", float("nan"), "it must be a number"),
        ("choice", "Paris", "it must be one letter, A to Z"),
        ("choice", 1, "it must be one letter, A to Z"),
        ("regex", "(", r"it is no regular expression \(missing \), unterminated subpattern"),
        ("regex", 5, "it must be the text of a regular expression"),
        ("json_schema", 5, "it must be a JSON schema"),
        ("json_schema", "{", "Expecting property name"),
        ("json_schema", {"type": "nothing"}, "it is no JSON schema"),
        ("json_schema", {"$ref": "http://127.0.0.1:9/schema"}, "its .ref cannot be resolved"),
    ],
)
def test_an_answer_that_will_not_do_is_named(name, answer, message):
    with pytest.raises(
        UserError, match=rf"reward {name} cannot use the `answer` of row 1 of 1 \('What is it\?'\), .*{message}"
    ):
        REWARDS[name]([example(answer)], ["{}"])


@pytest.mark.parametrize("name", ["exact", "number", "choice", "json_schema"])
def test_no_answer_takes_long(name):
    """Texts that would send a careless pattern or parser into minutes."""
    texts = [
        "1" * 100_000,
        "1,1" * 30_000,
        "(" * 50_000,
        "answer is " * 10_000,
        "1e9999999",
        "-" * 50_000,
        "A or " * 20_000,
    ]
    start = time.monotonic()
    REWARDS[name]([example({"number": 1, "json_schema": {}}.get(name, "B"))] * len(texts), texts)
    assert time.monotonic() - start < 2

"""The score of each skill, by what it accepts and rejects."""

import pytest

from lm.core.errors import UserError
from lm.data.loading import load_conversations
from lm.rewards import REWARDS
from lm.rewards.verifiers.skills import skill_score


def row(skill: str, question: str, answer: str = "", task: str = "", argument: str = "", **more) -> dict:
    fields = {"skill": skill, "answer": answer, "task": task, "argument": argument, **more}
    return {"messages": [{"role": "user", "content": question}], **fields}


CAPITAL = row("facts", "What is the capital of France?", "Paris", "capital", "France")
CURRENCY = row(
    "facts", "How does one pay in France?", "Euro", "currency", "France", others=["Yen", "US Dollar", "doubloon"]
)
SYMBOL = row("facts", "What is the symbol of iron?", "Fe", "symbol", "iron")
ATOMIC = row("facts", "Which number has iron?", "26", "number", "iron")
TWO_WORDS = row("facts", "Name the capital of Argentina.", "Buenos Aires", "capital", "Argentina")
NAME = row("unknown_names", "What is the capital of Zoltravia?", argument="Zoltravia")
ADD = row("sums", "What is 17 + 5?", "22", "add", "17 5")
TAKE = row("sums", "What is 4 - 2?", "2", "subtract", "4 2")
BELOW = row("sums", "What is 3 minus 5?", "-2", "subtract", "3 5")
CAPITALS = row("instructions", "Say hello there in capitals.", "HELLO THERE", "capitals", "hello there")
SPELL = row("instructions", "Spell hello.", "H-E-L-L-O", "spell", "hello")
REPEAT = row("instructions", "Repeat: blue bird", "blue bird", "repeat", "blue bird")
ONE_WORD = row("instructions", "In one word: what is the capital of France?", "Paris", "one_word", "France")
HELLO = row("small_talk", "Hello, how are you?")
MUSIC = row("small_talk", "I went to a concert of my favourite band last night.")

# row, texts that are right, texts that are wrong
TABLE = [
    (
        CAPITAL,
        ["Paris", "Paris.", "It is Paris.", "The capital of France is Paris.", "paris", "France's capital is Paris!"],
        ["", "London", "Paris or London", "Paris/London", "Paris, London", "It is not Paris.", "I don't know.", "Pari",
         "I don't know, Paris?", "Parisian", "Paris, Rome", "Perhaps Paris.", "Buenos Aires Paris", "France",
         "It is Berlin and Paris."],
    ),
    (
        CURRENCY,
        ["Euro", "With the euro.", "People pay in euro."],
        ["yen and euro", "The euro or the US dollar.", "US", "Doubloon euro", "Euro, ruble", "Euro, koruna"],
    ),
    (
        SYMBOL,
        ["Fe", "The symbol of iron is Fe.", "It is Fe."],
        ["F", "Fe, Au", "Fe or Au", "F Fe", "Iron", "Au Fe", "fe", "The symbol is He Fe"],
    ),
    (ATOMIC, ["26", "It is 26.", "Iron has number 26."], ["2", "6", "26 27", "25 or 26", "126", "1 2 26"]),
    (TWO_WORDS, ["Buenos Aires.", "It is buenos aires."], ["Buenos", "Aires Buenos", "Buenos Aires or Lima"]),
    (
        NAME,
        ["I don't know Zoltravia.", "I do not know.", "I'm not sure.", "No idea, sorry.", "I've never heard of it."],
        ["", "Paris", "It is Zoltrav.", "I don't know. It may be Paris.", "Zoltravia", "Don't you know it? No."],
    ),
    (
        ADD,
        ["22", "22.", "It is 22.", "17 + 5 = 22", "17 and 5 make 22.", "22 is 17 plus 5"],
        ["", "21", "21 22", "22 or 21", "17", "22 22", "5 + 17 is 22 or so 23", "twenty-two", "17 + 5", "1 2 22",
         "22.5", "022a", "It is not 22."],
    ),
    (TAKE, ["2", "4 - 2 = 2", "4-2=2"], ["4", "4 2", "-2", "2 2", "24"]),
    (BELOW, ["-2", "It is -2.", "3 minus 5 is −2"], ["2", "-2 2", "3", "- 2"]),
    (
        CAPITALS,
        ["HELLO THERE", "HELLO THERE.", ' "HELLO THERE"\n', "“HELLO THERE.”"],
        ["hello there", "Hello There", "HELLO", "HELLO  THERE!", "HELLO THERE HELLO THERE", "", "It is HELLO THERE"],
    ),
    (SPELL, ["H-E-L-L-O", "h-e-l-l-o."], ["HELLO", "H-E-L-O", "H E L L O", "hello H-E-L-L-O"]),
    (REPEAT, ["blue bird", "Blue bird."], ["blue", "a blue bird", "blue bird blue bird", "bird blue"]),
    (ONE_WORD, ["Paris", "paris."], ["The capital is Paris.", "Rome", "Paris Paris"]),
    (
        HELLO,
        ["Hello, I am fine.", "I'm doing well, thank you.", "Hi. I am good. And you?"],
        ["", "How are you?", "Fine", "Hello, how are you?", "fine fine fine fine.", "I am a damn bot.", "What's you?",
         "Are you well? Who are you?"],
    ),
    (
        MUSIC,
        ["That concert was surely loud.", "I love that band!"],
        ["What?", "So so so so.", "Really? Which band?", "I love canerbian band."],
    ),
]  # fmt: skip


@pytest.mark.parametrize("example, right, wrong", TABLE, ids=lambda value: value["skill"] if "skill" in value else "")
def test_what_counts_as_right(example, right, wrong):
    assert {text: skill_score(example, text) for text in right} == dict.fromkeys(right, 1.0)
    assert {text: skill_score(example, text) for text in wrong} == dict.fromkeys(wrong, 0.0)


def test_another_name_is_half():
    assert skill_score(NAME, "I don't know Texova.") == 0.5
    assert skill_score(NAME, "I don't know Zoltravia or Texova.") == 0.5


def test_beside_the_topic_is_half():
    assert skill_score(MUSIC, "It rains today.") == 0.5


def test_the_reward_reads_the_rows():
    assert list(REWARDS["skills"]([CAPITAL, ADD, NAME], ["Paris", "Paris", "Paris"])) == [1, 0, 0]


@pytest.mark.parametrize(
    "example, message",
    [
        ({"messages": CAPITAL["messages"]}, r"row 2 of 2 \('What is the capital of France\?'\) has no skill: take the"),
        (
            {**CAPITAL, "skill": "fact"},
            "the skill of row 2 of 2 .* is 'fact'; choose one of facts, unknown_names, sums",
        ),
        ({**ADD, "answer": "many"}, "the answer of row 2 of 2 .* is 'many', no whole number"),
    ],
)
def test_bad_rows(example, message):
    with pytest.raises(UserError, match=message):
        REWARDS["skills"]([ADD, example], ["22", "22"])


@pytest.mark.parametrize("source", ["facts", "unknown_names", "sums", "instructions"])
def test_what_the_source_answers_is_right(source):
    """A tenth of it, question and answer, trained and unseen."""
    for item in load_conversations(source)[::10]:
        *asked, reply = item.messages
        assert skill_score({**item.fields, "messages": asked}, reply["content"]) == 1, item

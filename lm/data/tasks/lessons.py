"""A corpus of worked examples: sums, spelling, capitals, copying, comparing, sorting, small talk.

Sums of two numbers below 100 that `is_test_sum` names are in no lesson and in no question that is trained; of
differences, which are few, only phrasings are kept for testing. Each word of
lm.data.facts.phrasings is spelled here: which letters a token has can be known in no other way.
"""

import itertools
import random
import string
from collections.abc import Iterator

from lm.data.facts.phrasings import (
    ADD_QUESTIONS,
    ADJECTIVES,
    CAPITALS_REQUESTS,
    COMMON_WORDS,
    NAME_ENDINGS,
    NOUNS,
    REPEAT_REQUESTS,
    SPELL_REQUESTS,
    SUBTRACT_QUESTIONS,
    TOPICS,
    drawn_phrase,
    drawn_small_talk,
    is_chosen,
    made_up_names,
)

PAGE_COUNT = 4000
LINES_PER_PAGE = 20
LARGEST_DIFFERENCE = 20  # that something is taken from
TEST_SUM_FRACTION = 0.1  # of the sums of which a number has two digits
LINE_SHARES = {"sum": 0.42, "difference": 0.08, "copying": 0.21, "spelling": 0.1, "capitals": 0.1, "talk": 0.05,
               "comparing": 0.02, "sorting": 0.02}  # fmt: skip
ASKED_SHARE = 0.45  # of the lessons are in the words of a question or request
TEST_TEXTS = 0.15  # of the words and texts are in no request that is trained
COPIED_NAMES = tuple(
    name for kind in NAME_ENDINGS for name in itertools.islice(made_up_names(kind, seed="copied", real=()), 1500)
)
WORDS = tuple(dict.fromkeys((*ADJECTIVES, *NOUNS, *(word for word in COMMON_WORDS if len(word) > 2))))


def spelling_of(word: str) -> str:
    """Its letters as capitals: H-E-L-L-O."""
    return "-".join(word.upper())


WORD_TASKS = {  # what a lesson begins with, the task's name among the instructions, how it is asked for, what is right
    "spelling": ("spell ", "spell", SPELL_REQUESTS, spelling_of),
    "capitals": ("in capitals: ", "capitals", CAPITALS_REQUESTS, str.upper),
    "copying": ("repeat: ", "repeat", REPEAT_REQUESTS, str),
}


def is_test_text(task: str, text: str) -> bool:
    """Whether nothing that is trained asks for this of the text, in words that a user would choose."""
    return is_chosen(f"{task} {text}", TEST_TEXTS)


def lesson_pages() -> Iterator[tuple[str, str]]:
    """(name, text) of each page, always the same: 2.2 million characters."""
    for number in range(PAGE_COUNT):
        draw = random.Random(f"lessons {number}")
        kinds = draw.choices(list(LINE_SHARES), list(LINE_SHARES.values()), k=LINES_PER_PAGE)
        yield f"{number:04}", "".join(f"{lesson_line(kind, draw)}\n" for kind in kinds)


def lesson_line(kind: str, draw: random.Random) -> str:
    """One worked example of a kind of LINE_SHARES. What is asked of words is a line and its answer the next: as in a
    reply, no space comes before it."""
    if kind in ("sum", "difference"):
        operator = "+" if kind == "sum" else "-"
        a, b = drawn_numbers(draw, operator, is_test=False)
        answer = sum_text(a, b, operator)
        if draw.random() >= ASKED_SHARE:
            return answer
        questions = ADD_QUESTIONS if operator == "+" else SUBTRACT_QUESTIONS
        return f"{draw.choice(questions).format(a=a, b=b)}\n{answer}."
    if kind in WORD_TASKS:
        beginning, task, requests, right = WORD_TASKS[kind]
        if kind == "copying" and draw.random() >= ASKED_SHARE:
            text = " ".join(copied_word(draw) for _ in range(draw.randint(1, 6)))
            return f"{beginning}{text}\n{text}"
        text = draw.choice(WORDS) if kind == "spelling" else drawn_text(draw)
        if draw.random() < ASKED_SHARE and not is_test_text(task, text):
            return f"{draw.choice(requests).format(t=text)}\n{right(text)}"
        return f"{beginning}{text}\n{right(text)}"
    if kind == "talk":
        return "\n".join(drawn_small_talk(draw))
    a, b = draw.sample(range(100), 2)
    if kind == "comparing":
        return f"{a} is {'more' if a > b else 'less'} than {b}."
    numbers = draw.sample(range(100), 3)
    return f"{', '.join(map(str, numbers))} sorted: {', '.join(map(str, sorted(numbers)))}"


def copied_word(draw: random.Random) -> str:
    """A word, a name that nothing bears or a letter: what copies it must have learned to copy whatever it is."""
    kind = draw.randrange(4)
    if kind < 2:
        return draw.choice(COPIED_NAMES)
    return draw.choice((*WORDS, *TOPICS)) if kind == 2 else draw.choice(string.ascii_letters)


def sum_text(a: int, b: int, operator: str) -> str:
    """37+85=122: without spaces, as each would be a token."""
    return f"{a}{operator}{b}={a + b if operator == '+' else a - b}"


def drawn_text(draw: random.Random) -> str:
    """A phrase, adjectives before a noun, or words in no order: a third each."""
    kind = draw.randrange(3)
    if kind == 0:
        return drawn_phrase(draw)
    if kind == 1:
        return drawn_words(draw, draw.choice((1, 2, 2, 3)))
    return " ".join(draw.choices((*WORDS, *COMMON_WORDS), k=draw.choice((1, 1, 2, 3))))


def drawn_words(draw: random.Random, count: int) -> str:
    """Adjectives, then a noun."""
    return " ".join([*draw.sample(ADJECTIVES, count - 1), draw.choice(NOUNS)])


def drawn_numbers(draw: random.Random, operator: str, *, is_test: bool) -> tuple[int, int]:
    """Two numbers below 100 of a sum, a third of them digits, or a difference that is not below 0, of numbers up to
    LARGEST_DIFFERENCE."""
    while True:
        if operator == "-":
            b, a = sorted(draw.randint(0, LARGEST_DIFFERENCE) for _ in range(2))
            return a, b
        a, b = (draw.randrange(10 if draw.random() < 0.33 else 100) for _ in range(2))
        if is_test_sum(a, b) == is_test:
            return a, b


def is_test_sum(a: int, b: int) -> bool:
    """Whether it is kept for testing, whichever number comes first. Sums of two digits never are: there are but 100."""
    return max(a, b) > 9 and is_chosen(f"{max(a, b)} + {min(a, b)}", TEST_SUM_FRACTION)

"""Copying, sums, brackets, facts: lines of text with one right ending, each a pure function of a seed.

    copying    copy k d q m: k d q m
    sums       37+85=122
    brackets   close ( [ ] { with } )
    facts      the capital of Velona is Tarim
    idioms     frequent lines of the standard library: def __init__( self

The hash of its line decides whether an item is held out, so a corpus without the held-out items (lm.data.tasks.drills)
can be tested on them: a model that gets them right has learned the rule and not the lines. Facts have no rule, so none
is held out.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

HELD_OUT_FRACTION = (
    0.2  # of copying, sums and brackets; of the hundred sums of one digit, some twenty are left to test on
)
MAX_DRAWS_PER_ITEM = 200  # drawings for each item that is asked for, before a level is taken to hold no more
LETTERS = "abcdefghijklmnopqrstuvwxyz"
BRACKET_PAIRS = {"(": ")", "[": "]", "{": "}"}
FACT_FREQUENCIES = {
    "common": 16,
    "usual": 4,
    "rare": 1,
}  # how often a fact of each level is stated, relative to the others
FACTS_PER_LEVEL = 64


class TaskItem(NamedTuple):
    prompt: str
    target: str  # all that must follow; where the answer is a line, its newline too

    @property
    def line(self) -> str:
        return self.prompt + self.target


class Task(NamedTuple):
    """What is asked, in growing difficulty; the levels are of one kind, named by `unit`."""

    description: str
    unit: str
    levels: Sequence[int | str]
    draw_item: Callable[[random.Random, int], TaskItem] | None  # draws an item of a level, or
    stated_items: Callable[[str], Sequence[TaskItem]] | None  # all there are of a level, which a corpus states
    required_corpus: str = ""  # a built-in corpus without which the answer cannot be known
    allows_examples: bool = True  # whether examples before the question may show its form


def copying_item(draw: random.Random, letters: int) -> TaskItem:
    """Random letters, to be repeated."""
    word = "".join(f" {letter}" for letter in draw.choices(LETTERS, k=letters))
    return TaskItem(f"copy{word}:", f"{word}\n")


def sum_item(draw: random.Random, digits: int) -> TaskItem:
    """Two numbers of exactly so many digits (0 counts as one digit), the most significant one first."""
    least = 10 ** (digits - 1) if digits > 1 else 0
    a, b = (draw.randrange(least, 10**digits) for _ in range(2))
    return TaskItem(f"{a}+{b}=", f"{a + b}\n")


def bracket_item(draw: random.Random, depth: int) -> TaskItem:
    """Brackets of three kinds, `depth` of them left open and up to three pairs closed; the shortest right ending."""
    opened, text = [], ""
    closed = draw.randrange(4)  # pairs that come and go before the end
    moves = ["open"] * depth + ["pair"] * closed
    draw.shuffle(moves)
    for move in moves:
        bracket = draw.choice("([{")
        text += f" {bracket}"
        if move == "pair":
            text += f" {BRACKET_PAIRS[bracket]}"
        else:
            opened.append(bracket)
    return TaskItem(f"close{text} with", "".join(f" {BRACKET_PAIRS[bracket]}" for bracket in reversed(opened)) + "\n")


def fact_items(level: str) -> list[TaskItem]:
    """The made-up capitals of a level; names are made of syllables and always the same."""
    draw = random.Random("capitals")
    names: list[str] = []
    while len(names) < 2 * FACTS_PER_LEVEL * len(FACT_FREQUENCIES):
        name = "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(draw.choice((2, 3))))
        name = f"{name}{draw.choice('nrsl')}".capitalize()
        if name not in names:
            names.append(name)
    first = list(FACT_FREQUENCIES).index(level) * FACTS_PER_LEVEL
    countries, capitals = names[::2], names[1::2]
    pairs = list(zip(countries, capitals))[first : first + FACTS_PER_LEVEL]
    return [TaskItem(f"the capital of {country} is", f" {capital}\n") for country, capital in pairs]


def idiom_items(level: str) -> list[TaskItem]:
    """Beginnings in the standard library that go on in one way, in more than half of all places."""
    return [TaskItem(f"\n{prompt}", target) for prompt, target in IDIOMS[level]]


IDIOMS = {  # common: a beginning that occurs at least 60 times, rare: 20 to 60 times, in the library of Python 3.11
    "common": (
        ("def __init__(", "self"),
        ("def __repr__(", "self"),
        ("def __eq__(", "self, other"),
        ("for i in", " range("),
        ("for key, value", " in"),
        ("for line", " in"),
        ("for name", " in"),
        ("warnings.", "warn("),
        ("if __name__", " =="),
        ("def __exit__(", "self"),
        ('"""Return True', " if"),
        ('"""Return a list', " of"),
        ("if context is", " None"),
        ("self.name =", " name"),
        ("# Licensed to PSF under a", " Contributor Agreement"),
        ("from tkinter", " import"),
    ),
    "rare": (
        ("def __new__(", "cls"),
        ("def __contains__(", "self"),
        ("def __getattr__(self,", " name"),
        ("from unittest import", " main"),
        ("from collections", " import"),
        ("if not os.", "path."),
        ("if timeout is not", " None"),
        ("if encoding", " is"),
        ("for k, v", " in"),
        ("for filename", " in"),
        ("return ''.", "join("),
        ("sys.stderr.", "write("),
        ("parser = argparse.", "ArgumentParser("),
        ("__class_getitem__ =", " classmethod("),
        ("head, tail", " ="),
        ("# Local", " imports"),
    ),
}

TASKS = {
    "copying": Task("random letters said again", "letters", (2, 4, 8, 16), copying_item, None),
    "sums": Task("addition, most significant digit first", "digits", (1, 2, 3, 4), sum_item, None),
    "brackets": Task("open brackets closed in the right order", "open", (1, 2, 4, 8), bracket_item, None),
    "facts": Task(
        "made-up capitals that the corpus tells", "told", tuple(FACT_FREQUENCIES), None, fact_items, "drills", False
    ),
    "idioms": Task("how the standard library goes on", "told", tuple(IDIOMS), None, idiom_items, "stdlib", False),
}


def is_held_out_item(item: TaskItem) -> bool:
    """Whether an item is kept for testing; always the same answer."""
    return int.from_bytes(hashlib.sha256(item.line.encode()).digest()[:8], "big") < HELD_OUT_FRACTION * 2**64


def evaluation_items(name: str, level: int | str, *, count: int, seed: int) -> list[TaskItem]:
    """At most `count` different items of a level that no drill contains; of facts and idioms, the first `count`."""
    task = TASKS[name]
    if task.stated_items:
        return list(task.stated_items(level))[:count]
    return drawn_items(name, level, count=count, draw=random.Random(f"test {seed} {name} {level}"), held_out=True)


def example_items(name: str, level: int | str, *, count: int, seed: int) -> list[TaskItem]:
    """`count` items that drills may contain, as examples for a model; none where the task allows no examples."""
    if not TASKS[name].allows_examples:
        return []
    return drawn_items(name, level, count=count, draw=random.Random(f"shown {seed} {name} {level}"), held_out=False)


def drawn_items(name: str, level: int | str, *, count: int, draw: random.Random, held_out: bool) -> list[TaskItem]:
    """Different items, all held out or none; fewer than `count` where the level has no more."""
    items: dict[TaskItem, None] = {}
    for _ in range(MAX_DRAWS_PER_ITEM * count):
        if len(items) == count:
            break
        item = TASKS[name].draw_item(draw, level)
        if is_held_out_item(item) == held_out:
            items[item] = None
    return list(items)

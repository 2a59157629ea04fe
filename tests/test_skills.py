"""The tasks and their scores by hand; what is held out stands in no drill; the idioms are the library's own."""

import itertools
import random
import re
from collections import Counter

import pytest

from lm.data import corpus
from lm.skills import drills
from lm.skills.scores import answered, edit_distance, expected_exact, pass_at_k
from lm.skills.tasks import (
    FACTS_A_LEVEL,
    IDIOMS,
    PAIRS,
    TASKS,
    TOLD,
    Item,
    brackets,
    copying,
    examined,
    examples,
    facts,
    held_out,
    sums,
)

RULED = [name for name, task in TASKS.items() if task.make]
LEVELS = [(name, level) for name, task in TASKS.items() for level in task.levels]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Every line of 300 pages, 7,200 in all."""
    known = [item for level in TOLD for item in facts(level)]
    often = [times for times in TOLD.values() for _ in range(FACTS_A_LEVEL)]
    pages = [drills.page(random.Random(f"drills {i}"), known, often) for i in range(300)]
    return [line for page in pages for line in page.splitlines(keepends=True)]


@pytest.mark.parametrize("letters", [1, 5])
def test_copying_says_the_same_letters_again(letters):
    item = copying(random.Random(0), letters)
    found = re.fullmatch(r"copy((?: [a-z])+):((?: [a-z])+)\n", item.line)
    assert found[1] == found[2] == item.target.rstrip("\n") and len(found[1]) == 2 * letters


@pytest.mark.parametrize("digits", [1, 2, 3, 4])
def test_sums_are_right_and_of_so_many_digits(digits):
    for seed in range(20):
        a, b, total = map(int, re.fullmatch(r"(\d+)\+(\d+)=(\d+)\n", sums(random.Random(seed), digits).line).groups())
        assert a + b == total and len(str(a)) == len(str(b)) == digits


def closing(prompt: str) -> list[str]:
    """What closes the brackets of a prompt, by a stack; AssertionError where one is closed by another's."""
    stack = []
    for sign in prompt.removeprefix("close ").removesuffix(" with").split():
        if sign in PAIRS:
            stack.append(PAIRS[sign])
        else:
            assert stack.pop() == sign
    return stack[::-1]


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_brackets_are_closed_by_the_shortest_right_ending(depth):
    for seed in range(20):
        item = brackets(random.Random(seed), depth)
        assert item.target.split() == closing(item.prompt) and len(item.target.split()) == depth


def test_facts_are_one_answer_to_one_question():
    every = [item for level in TOLD for item in facts(level)]
    assert len({item.prompt for item in every}) == len({item.target for item in every}) == 3 * FACTS_A_LEVEL
    assert facts("rare") == facts("rare") and not set(facts("rare")) & set(facts("common"))


@pytest.mark.parametrize("name, level", LEVELS)
def test_questions_are_a_function_of_the_seed(name, level):
    found = examined(name, level, count=12, seed=3)
    assert found == examined(name, level, count=12, seed=3) and len(set(found)) == len(found)
    assert len(found) == 12
    if name in RULED:
        assert found != examined(name, level, count=12, seed=4)
        assert all(map(held_out, found)) and not any(map(held_out, examples(name, level, count=12, seed=3)))
    else:
        assert examples(name, level, count=12, seed=3) == []


def test_a_level_gives_what_it_has():
    """Of the 100 sums of one digit, those whose hash is in the first fifth: all of them, though 64 were asked for."""
    every = [Item(f"{a}+{b}=", f"{a + b}\n") for a, b in itertools.product(range(10), repeat=2)]
    unseen = [item for item in every if held_out(item)]
    assert sorted(examined("sums", 1, count=64, seed=0)) == sorted(unseen) and 10 < len(unseen) < 30


def test_no_drill_holds_what_is_tested(lines):
    asked = {
        item.line for name in RULED for level in TASKS[name].levels for item in examined(name, level, count=200, seed=0)
    }
    assert len(asked) > 1800 and not asked & set(lines)
    unseen = [line for line in lines if not line.startswith("the ")]
    assert not [line for line in unseen if held_out(Item(line, ""))]


def test_drills_tell_facts_as_often_as_their_level_says(lines):
    """By 16 to 4 to 1: of some 1,440 fact lines 1,097, 274 and 69."""
    of = {item.line: level for level in TOLD for item in facts(level)}
    told = Counter(of[line] for line in lines if line in of)
    assert told["common"] > 3 * told["usual"] > 6 * told["rare"] > 100
    assert sum(told.values()) == sum(line.startswith("the capital of ") for line in lines)


def test_drills_are_a_built_in_corpus(monkeypatch):
    monkeypatch.setattr(drills, "PAGES", 30)
    found = corpus.documents("drills")
    assert [document.name for document in found[:2]] == ["drills/00000", "drills/00001"] and len(found) == 30
    assert found == corpus.documents("drills")
    assert all(document.text.count("\n") == drills.LINES for document in found)


def test_idioms_go_on_so_in_most_places_of_the_standard_library():
    text = "\n".join(line.strip() for document in corpus.modules() for line in document.text.split("\n"))
    for level, least in (("common", 40), ("rare", 15)):  # other versions of Python have more or less of them
        for prompt, target in IDIOMS[level]:
            begun, whole = text.count(f"\n{prompt}"), text.count(f"\n{prompt}{target}")
            assert begun >= least and whole > begun / 2, (prompt, begun, whole)


@pytest.mark.parametrize(
    "a, b, distance", [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("122", "1220", 1), ("12", "21", 2)]
)
def test_edit_distance_by_hand(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_an_answer_is_its_first_line_or_as_much_as_was_asked_for():
    assert answered("122\n5+5=10\n", "122\n") == "122\n"
    assert answered("1220", "122\n") == "1220"  # that it is not over counts against it
    assert answered("self, other):", "self") == "self" and answered("se", "self") == "se"


def test_pass_at_k_is_the_share_of_choices_with_a_right_one():
    """Of 5 samples 2 are right: of the 10 pairs 3 have none, so 0.7."""
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)
    for n, c, k in itertools.product((4, 6), (0, 1, 3), (1, 2, 4)):
        chosen = list(itertools.combinations(range(n), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(min(choice) < c for choice in chosen) / len(chosen))
    with pytest.raises(ValueError, match="from 1 to n"):
        pass_at_k(4, 1, 5)


def test_what_the_average_token_lets_expect():
    """Two targets of 1 and 3 tokens, 2 nats in all: p = exp(-2 / 4), n = 2, so p^n = exp(-1)."""
    assert expected_exact([-0.5, -1.5], [1, 3]) == pytest.approx(0.367879, abs=1e-6)

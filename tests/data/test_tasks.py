"""The tasks and their scores by hand; what is held out stands in no drill; the idioms are the library's own."""

import itertools
import random
import re
from collections import Counter

import pytest

from lm.data import sources
from lm.data.tasks import drills
from lm.data.tasks.scoring import compared_text, edit_distance, expected_exact_match, pass_at_k
from lm.data.tasks.skills import (
    BRACKET_PAIRS,
    FACT_FREQUENCIES,
    FACTS_PER_LEVEL,
    IDIOMS,
    TASKS,
    TaskItem,
    bracket_item,
    copying_item,
    evaluation_items,
    example_items,
    fact_items,
    is_held_out_item,
    sum_item,
)

RULED = [name for name, task in TASKS.items() if task.draw_item]
LEVELS = [(name, level) for name, task in TASKS.items() for level in task.levels]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Every line of 300 pages, 7,200 in all."""
    known = [item for level in FACT_FREQUENCIES for item in fact_items(level)]
    often = [times for times in FACT_FREQUENCIES.values() for _ in range(FACTS_PER_LEVEL)]
    pages = [drills.drill_page(random.Random(f"drills {i}"), known, often) for i in range(300)]
    return [line for page in pages for line in page.splitlines(keepends=True)]


@pytest.mark.parametrize("letters", [1, 5])
def test_copying_says_the_same_letters_again(letters):
    item = copying_item(random.Random(0), letters)
    found = re.fullmatch(r"copy((?: [a-z])+):((?: [a-z])+)\n", item.line)
    assert found[1] == found[2] == item.target.rstrip("\n") and len(found[1]) == 2 * letters


@pytest.mark.parametrize("digits", [1, 2, 3, 4])
def test_sums_are_right_and_of_so_many_digits(digits):
    for seed in range(20):
        a, b, total = map(
            int, re.fullmatch(r"(\d+)\+(\d+)=(\d+)\n", sum_item(random.Random(seed), digits).line).groups()
        )
        assert a + b == total and len(str(a)) == len(str(b)) == digits


def closing(prompt: str) -> list[str]:
    """What closes the brackets of a prompt, by a stack; AssertionError where one is closed by another's."""
    stack = []
    for sign in prompt.removeprefix("close ").removesuffix(" with").split():
        if sign in BRACKET_PAIRS:
            stack.append(BRACKET_PAIRS[sign])
        else:
            assert stack.pop() == sign
    return stack[::-1]


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_brackets_are_closed_by_the_shortest_right_ending(depth):
    for seed in range(20):
        item = bracket_item(random.Random(seed), depth)
        assert item.target.split() == closing(item.prompt) and len(item.target.split()) == depth


def test_facts_are_one_answer_to_one_question():
    every = [item for level in FACT_FREQUENCIES for item in fact_items(level)]
    assert len({item.prompt for item in every}) == len({item.target for item in every}) == 3 * FACTS_PER_LEVEL
    assert fact_items("rare") == fact_items("rare") and not set(fact_items("rare")) & set(fact_items("common"))


@pytest.mark.parametrize("name, level", LEVELS)
def test_questions_are_a_function_of_the_seed(name, level):
    found = evaluation_items(name, level, count=12, seed=3)
    assert found == evaluation_items(name, level, count=12, seed=3) and len(set(found)) == len(found)
    assert len(found) == 12
    if name in RULED:
        assert found != evaluation_items(name, level, count=12, seed=4)
        assert all(map(is_held_out_item, found)) and not any(
            map(is_held_out_item, example_items(name, level, count=12, seed=3))
        )
    else:
        assert example_items(name, level, count=12, seed=3) == []


def test_a_level_gives_what_it_has():
    """Of the 100 sums of one digit, those whose hash is in the first fifth: all of them, though 64 were asked for."""
    every = [TaskItem(f"{a}+{b}=", f"{a + b}\n") for a, b in itertools.product(range(10), repeat=2)]
    unseen = [item for item in every if is_held_out_item(item)]
    assert sorted(evaluation_items("sums", 1, count=64, seed=0)) == sorted(unseen) and 10 < len(unseen) < 30


def test_no_drill_holds_what_is_tested(lines):
    asked = {
        item.line
        for name in RULED
        for level in TASKS[name].levels
        for item in evaluation_items(name, level, count=200, seed=0)
    }
    assert len(asked) > 1800 and not asked & set(lines)
    unseen = [line for line in lines if not line.startswith("the ")]
    assert not [line for line in unseen if is_held_out_item(TaskItem(line, ""))]


def test_drills_tell_facts_as_often_as_their_level_says(lines):
    """By 16 to 4 to 1: of some 1,440 fact lines 1,097, 274 and 69."""
    of = {item.line: level for level in FACT_FREQUENCIES for item in fact_items(level)}
    told = Counter(of[line] for line in lines if line in of)
    assert told["common"] > 3 * told["usual"] > 6 * told["rare"] > 100
    assert sum(told.values()) == sum(line.startswith("the capital of ") for line in lines)


def test_drills_are_a_built_in_corpus(monkeypatch):
    monkeypatch.setattr(drills, "PAGE_COUNT", 30)
    found = sources.load_documents("drills")
    assert [document.name for document in found[:2]] == ["drills/00000", "drills/00001"] and len(found) == 30
    assert found == sources.load_documents("drills")
    assert all(document.text.count("\n") == drills.LINES_PER_PAGE for document in found)


def test_idioms_go_on_so_in_most_places_of_the_standard_library():
    text = "\n".join(line.strip() for document in sources.stdlib_modules() for line in document.text.split("\n"))
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
    assert compared_text("122\n5+5=10\n", "122\n") == "122\n"
    assert compared_text("1220", "122\n") == "1220"  # that it is not over counts against it
    assert compared_text("self, other):", "self") == "self" and compared_text("se", "self") == "se"


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
    assert expected_exact_match([-0.5, -1.5], [1, 3]) == pytest.approx(0.367879, abs=1e-6)

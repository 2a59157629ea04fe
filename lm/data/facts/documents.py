"""What pretraining reads of a table: its facts told in many phrasings, and questions with their answers."""

import random
from collections.abc import Iterator, Sequence

from lm.data.facts.phrasings import (
    DONT_KNOW_NAME,
    DONT_KNOW_THAT,
    NAME_ENDINGS,
    ONE_WORD_REQUESTS,
    PHRASINGS,
    UNKNOWN_TOPICS,
    is_chosen,
    made_up_names,
    one_word_request,
    phrasing_of,
    sentence,
)
from lm.data.facts.tables import Fact, FactTable

FACTS_PER_PAGE = 16
STATEMENTS_OF_A_FACT = 40  # in all documents
MOST_STATEMENTS = 60_000  # in all documents of a large table, but each fact at least so often as
FEWEST_OF_A_FACT = 2
ANSWER_SHARE = 0.4  # of the statements are in the words of the answer
QUESTIONS_OF_A_FACT = 12
UNKNOWN_PER_PAGE = 5  # questions about made-up names
TOPICS_PER_PAGE = 2  # questions that no table answers
SHORT_PER_PAGE = 3  # questions with the value alone for an answer, as in a list of them
ONE_WORD_PER_PAGE = 6  # questions that ask for one word, at most
TEST_ONE_WORD = 0.15  # of the facts are never asked for in one word


def statement(fact: Fact, draw: random.Random) -> str:
    """The fact in one of its phrasings."""
    phrasing = phrasing_of(fact.relation)
    told = (
        phrasing.answer if draw.random() < ANSWER_SHARE or not phrasing.statements else draw.choice(phrasing.statements)
    )
    return sentence(told, e=fact.entity, v=fact.value)


def answer(fact: Fact) -> str:
    return sentence(phrasing_of(fact.relation).answer, e=fact.entity, v=fact.value)


def fact_pages(table: FactTable) -> Iterator[tuple[str, str]]:
    """(name, text): pages of statements, every other one grouped by entity. Always the same for a table."""
    times = repetitions(table, STATEMENTS_OF_A_FACT)
    for turn in range(times):
        draw = random.Random(f"facts {turn}")
        facts = shuffled_by_entity(table, draw) if turn % 2 else draw.sample(table.facts, len(table.facts))
        for number, page in enumerate(parts(facts, FACTS_PER_PAGE)):
            text = " ".join(statement(fact, draw) for fact in page)
            yield f"{turn:03}/{number:05}", text + "\n"


def quiz_pages(table: FactTable) -> Iterator[tuple[str, str]]:
    """(name, text): pages of questions in the phrasings that may be trained, each with its answer on the next line.

    Besides one question about each fact, some ask for one word, some are about names that nothing bears, and some
    cannot be answered by any table: these have the answer that one does not know.
    """
    names = {kind: made_up_names(kind, seed="quiz", real=real_names(table)) for kind in NAME_ENDINGS}
    for turn in range(repetitions(table, QUESTIONS_OF_A_FACT)):
        draw = random.Random(f"quiz {turn}")
        for number, page in enumerate(parts(draw.sample(table.facts, len(table.facts)), FACTS_PER_PAGE)):
            asked = [(question(fact.relation, fact.entity, draw), answer(fact)) for fact in page]
            for fact in page[:UNKNOWN_PER_PAGE]:
                name = next(names[name_kind(fact.relation, draw)])
                asked.append((question(fact.relation, name, draw), DONT_KNOW_NAME.format(e=name)))
            for fact in page[UNKNOWN_PER_PAGE:][:TOPICS_PER_PAGE]:
                asked.append((sentence(draw.choice(UNKNOWN_TOPICS), e=fact.entity), DONT_KNOW_THAT))
            for fact in page[:SHORT_PER_PAGE]:
                asked.append((f"Q: {question(fact.relation, fact.entity, draw)}", f"A: {one_word_answer(fact)}"))
            for fact in filter(is_asked_in_one_word, page[-ONE_WORD_PER_PAGE:]):
                wanted = question(fact.relation, fact.entity, draw)
                request = one_word_request(draw.choice(ONE_WORD_REQUESTS), wanted, draw)
                asked.append((request, one_word_answer(fact)))
            yield f"{turn:03}/{number:05}", "".join(f"{q}\n{a}\n" for q, a in draw.sample(asked, len(asked)))


def question(relation: str, entity: str, draw: random.Random) -> str:
    """One of the questions that may be trained."""
    return sentence(draw.choice(phrasing_of(relation).questions), e=entity)


def one_word_answer(fact: Fact) -> str:
    return sentence("{v}.", v=fact.value)


def is_asked_in_one_word(fact: Fact) -> bool:
    """Whether it has an answer in one word that may be trained: a part of them never is."""
    return " " not in fact.value and not is_test_one_word(fact)


def is_test_one_word(fact: Fact) -> bool:
    return is_chosen(f"one word {fact.entity} {fact.relation}", TEST_ONE_WORD)


def real_names(table: FactTable) -> set[str]:
    """All that a made-up name must not be."""
    return {fact.entity.removeprefix("the ") for fact in table.facts} | {fact.value for fact in table.facts}


def name_kind(relation: str, draw: random.Random) -> str:
    """The kind of made-up name that a question about this relation is about."""
    if relation in ("symbol", "number"):
        return "element"
    return "country" if relation in PHRASINGS else draw.choice(list(NAME_ENDINGS))


def repetitions(table: FactTable, wanted: int) -> int:
    """How often each fact comes: `wanted`, or fewer times for a table of very many."""
    return max(FEWEST_OF_A_FACT, min(wanted, MOST_STATEMENTS // len(table.facts)))


def shuffled_by_entity(table: FactTable, draw: random.Random) -> list[Fact]:
    """All facts, those of one entity side by side."""
    of_entity: dict[str, list[Fact]] = {}
    for fact in table.facts:
        of_entity.setdefault(fact.entity, []).append(fact)
    return [
        fact
        for entity in draw.sample(list(of_entity), len(of_entity))
        for fact in draw.sample(of_entity[entity], len(of_entity[entity]))
    ]


def parts(items: Sequence[Fact], size: int) -> Iterator[Sequence[Fact]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

"""Conversations about a table, and the other things that the assistant is asked: what SFT and RL learn from.

Each item is one exchange (in `dialogues` two or three) with the fields "skill", "answer", "task" and "argument", by
which an answer can be checked, and "unseen": what of it was never trained ("phrasing", "entity", "item"; empty for
what is trained). The name of an item decides on which side of a split it falls: those with something unseen bear names
that are held out wherever 2 % or more are, the others names that are not held out at up to half.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lm.data.facts import phrasings as p
from lm.data.facts.documents import answer, is_test_one_word, name_kind, one_word_answer, real_names
from lm.data.facts.phrasings import as_typed, is_chosen, made_up_names, phrasing_of, sentence, text_index
from lm.data.facts.tables import Fact, FactTable, relation_values
from lm.data.tasks.lessons import WORDS, copied_word, drawn_numbers, drawn_text, is_test_text, spelling_of, sum_text

NEVER_ASKED = 0.3  # of the entities are in no question that SFT learns from
PRACTICED = 0.5  # of these are in questions that RL alone learns from, so that it meets what SFT has not drilled
MOST_TRAINED, MOST_TESTED = 12_000, 400  # items of one skill
MOST_OTHERS = 50  # values of a relation of a user's own that a row names
CHITCHAT_WORDS = range(2, 16)  # of a human's turn that is small talk, and of the reply

Message = dict[str, str]
Turns = tuple[str, Sequence[str]]  # a human conversation: its name and what was said in turn


class SkillItem(NamedTuple):
    name: str
    messages: list[Message]
    fields: dict[str, Any]


class Exchange(NamedTuple):
    """A question and its answer."""

    said: str
    reply: str
    skill: str
    answer: str = ""  # what is right; empty where there is none, or right is to know nothing
    task: str = ""
    argument: str = ""
    unseen: str = ""
    others: Sequence[str] = ()  # what the relation's value is elsewhere, where it is not a relation of our table

    def item(self) -> SkillItem:
        fields = {key: getattr(self, key) for key in ("skill", "answer", "task", "argument", "unseen")}
        fields |= {"others": list(self.others)} if self.others else {}
        messages = [{"role": "user", "content": self.said}, {"role": "assistant", "content": self.reply}]
        return SkillItem(side_name(f"{self.skill}/{self.said}", bool(self.unseen)), messages, fields)


def side_name(name: str, held_out: bool) -> str:
    """The name with a number behind it that puts it on this side of any split of 2 to 50 %."""
    limit = 0.02 if held_out else 0.5
    for number in itertools.count():
        found = f"{name}~{number}"
        if (hash_fraction(found) < limit) == held_out:
            return found


def hash_fraction(name: str) -> float:
    """As lm.data.sources.is_held_out sees a name: held out are those below the fraction."""
    return text_index(name, 2**64) / 2**64


def limited_items(exchanges: Sequence[Exchange]) -> list[SkillItem]:
    """At most MOST_TRAINED and MOST_TESTED (of each way to be unseen) of them, each said once, in a seeded order."""
    distinct = list({exchange.said: exchange for exchange in exchanges}.values())
    random.Random(f"order {len(distinct)}").shuffle(distinct)
    room = {"": MOST_TRAINED, "phrasing": MOST_TESTED, "entity": MOST_TESTED, "item": MOST_TESTED}
    found = []
    for exchange in distinct:
        room[exchange.unseen] -= 1
        if room[exchange.unseen] >= 0:
            found.append(exchange.item())
    return found


def is_never_asked(entity: str) -> bool:
    return is_chosen(f"asked {entity}", NEVER_ASKED)


def is_practiced(entity: str) -> bool:
    return is_never_asked(entity) and is_chosen(f"practice {entity}", PRACTICED)


def with_opening(question: str) -> str:
    """The question as people type it, a quarter after a polite opening."""
    openings = p.POLITE_OPENINGS
    place = text_index(f"opening {question}", 4 * len(openings))
    question = as_typed(question, random.Random(f"typed {question}"))
    return f"{openings[place]}{question}" if place < len(openings) else question


def fact_exchanges(table: FactTable) -> Iterator[Exchange]:
    """Every trained phrasing about the entities that are asked about; one unseen phrasing about each of them; one
    trained phrasing about each of the others, but for those that are kept for practice."""
    for fact, about in checked_facts(table):
        phrasing = phrasing_of(fact.relation)
        if is_practiced(fact.entity):
            continue
        if is_never_asked(fact.entity):
            said = sentence(phrasing_of_fact(phrasing.questions, fact), e=fact.entity)
            yield Exchange(said, unseen="entity", **about)
            continue
        yield from phrased_exchanges(fact, about)
        yield Exchange(
            sentence(phrasing_of_fact(phrasing.test_questions, fact), e=fact.entity), unseen="phrasing", **about
        )


def practice_exchanges(table: FactTable) -> Iterator[Exchange]:
    """Every trained phrasing about the entities that are kept for practice: RL asks, and only checks. Of a table
    without such entities, those that SFT asks about."""
    facts = list(checked_facts(table))
    practiced = [each for each in facts if is_practiced(each[0].entity)]
    for fact, about in practiced or [each for each in facts if not is_never_asked(each[0].entity)] or facts:
        yield from phrased_exchanges(fact, about)


def checked_facts(table: FactTable) -> Iterator[tuple[Fact, dict[str, Any]]]:
    """Each fact, and the reply and the fields by which an answer is checked."""
    values = relation_values(table.facts)
    for fact in table.facts:
        about = dict(reply=answer(fact), skill="facts", answer=fact.value, task=fact.relation, argument=fact.entity)
        if fact.relation not in p.PHRASINGS:
            about["others"] = [value for value in values[fact.relation][:MOST_OTHERS] if value != fact.value]
        yield fact, about


def phrased_exchanges(fact: Fact, about: dict[str, Any]) -> Iterator[Exchange]:
    """Every trained phrasing about a fact."""
    for template in phrasing_of(fact.relation).questions:
        yield Exchange(with_opening(sentence(template, e=fact.entity)), **about)


def phrasing_of_fact(texts: Sequence[str], fact: Fact) -> str:
    return texts[text_index(f"{fact.relation} of {fact.entity}", len(texts))]


def unknown_exchanges(table: FactTable) -> Iterator[Exchange]:
    """The same questions about names that nothing bears, and some that the table cannot answer."""
    real = real_names(table)
    for is_test in (True, False):
        seed = "test" if is_test else "train"
        names = {kind: made_up_names(kind, seed=seed, real=real, is_test=is_test) for kind in p.NAME_ENDINGS}
        draw = random.Random(f"unknown {is_test}")
        for number in range(MOST_TESTED if is_test else MOST_TRAINED // 2):
            relation = draw.choice(table.relations)
            name = next(names[name_kind(relation, draw)])
            phrasing = phrasing_of(relation)
            told = phrasing.test_questions if is_test and number % 2 else phrasing.questions
            said = sentence(draw.choice(told), e=name)
            about = dict(skill="unknown_names", task=relation, argument=name, unseen="item" if is_test else "")
            yield Exchange(said if is_test else with_opening(said), p.DONT_KNOW_NAME.format(e=name), **about)
    for entity in table.entities:
        draw = random.Random(f"topic {entity}")
        is_test = is_never_asked(entity)
        for template in [draw.choice(p.TEST_UNKNOWN_TOPICS)] if is_test else draw.sample(p.UNKNOWN_TOPICS, 2):
            about = dict(skill="unknown_names", task="topic", argument=entity, unseen="phrasing" if is_test else "")
            yield Exchange(sentence(template, e=entity), p.DONT_KNOW_THAT, **about)


def sum_exchanges() -> Iterator[Exchange]:
    """Sums of numbers below 100, and differences: in unseen phrasings those kept for testing, digits, differences."""
    for is_test in (True, False):
        draw = random.Random(f"sums {is_test}")
        add, subtract = (
            (p.TEST_ADD_QUESTIONS, p.TEST_SUBTRACT_QUESTIONS) if is_test else (p.ADD_QUESTIONS, p.SUBTRACT_QUESTIONS)
        )
        for number in range(2 * MOST_TESTED if is_test else MOST_TRAINED):
            operator = "-" if draw.random() < 0.2 else "+"
            is_known = is_test and (operator == "-" or number % 4 == 0)  # of these the phrasing is unseen
            if is_known and operator == "+":
                a, b = draw.randrange(10), draw.randrange(10)
            else:
                a, b = drawn_numbers(draw, operator, is_test=is_test)
            said = draw.choice(add if operator == "+" else subtract).format(a=a, b=b)
            yield Exchange(
                said if is_test else with_opening(said),
                f"{sum_text(a, b, operator)}.",
                "sums",
                str(a + b if operator == "+" else a - b),
                "add" if operator == "+" else "subtract",
                f"{a} {operator} {b}",
                ("phrasing" if is_known else "item") if is_test else "",
            )


def instruction_exchanges(table: FactTable) -> Iterator[Exchange]:
    """Texts in capitals, spelled, repeated; facts in one word. Names that nothing bears are among the texts, as nothing
    but reading helps to say them again. Unseen: the words, texts or questions, and how it is
    asked for half of them."""
    texts = {
        "capitals": (p.CAPITALS_REQUESTS, p.TEST_CAPITALS_REQUESTS, str.upper),
        "spell": (p.SPELL_REQUESTS, p.TEST_SPELL_REQUESTS, spelling_of),
        "repeat": (p.REPEAT_REQUESTS, p.TEST_REPEAT_REQUESTS, str),
    }
    for task, (requests, test_requests, right) in texts.items():
        draw = random.Random(f"instructions {task}")
        arguments = list(WORDS) * 4
        if task != "spell":
            arguments = [drawn_text(draw) for _ in range(2400)]
            names = [" ".join(copied_word(draw) for _ in range(draw.randint(1, 3))) for _ in range(1600)]
            arguments += [text for text in names if not is_test_text(task, text)]  # trained only
        for number, text in enumerate(arguments):
            is_test = is_test_text(task, text)
            request = draw.choice(test_requests if is_test and number % 2 else requests)
            said = request.format(t=text) if request.startswith("{t}") else sentence(request, t=text)
            about = dict(skill="instructions", task=task, argument=text, unseen="item" if is_test else "")
            yield Exchange(said, right(text), answer=right(text), **about)
    for fact in table.facts:
        if " " in fact.value or is_never_asked(fact.entity):
            continue
        is_test = is_test_one_word(fact)
        about = dict(skill="instructions", task="one_word", argument=fact.entity, unseen="item" if is_test else "")
        draw = random.Random(f"one word {fact}")
        for _ in range(1 if is_test else 4):
            request = draw.choice(p.TEST_ONE_WORD_REQUESTS if is_test and draw.random() < 0.5 else p.ONE_WORD_REQUESTS)
            question = sentence(draw.choice(phrasing_of(fact.relation).questions), e=fact.entity)
            yield Exchange(
                request.format(q=as_typed(question, draw)), one_word_answer(fact), answer=fact.value, **about
            )


def small_talk_exchanges(dialogues: Sequence[Turns]) -> Iterator[Exchange]:
    """Greetings and their like, likes and dislikes, and the openings of human conversations, (name, turns) each."""
    for said, replies in p.SMALL_TALK:
        for number, text in enumerate(said):
            is_test = number == len(said) - 1
            for opening in ("", "Hello! ") if not is_test and len(text.split()) > 2 else ("",):
                reply = replies[text_index(opening + text, len(replies))]
                yield Exchange(opening + text, reply, "small_talk", task="greeting", argument=said[0],
                               unseen="phrasing" if is_test else "")  # fmt: skip
    for said, replies in p.TOPIC_TALK:
        for topic in p.TOPICS:
            is_test = p.is_test_topic(topic)
            text = said[text_index(f"{said[0]} {topic}", len(said) if is_test else len(said) - 1)].format(t=topic)
            reply = sentence(replies[text_index(text, len(replies))], t=topic)
            yield Exchange(text, reply, "small_talk", task="topic", argument=topic, unseen="item" if is_test else "")
    for name, turns in dialogues:
        said, reply = turns[0], turns[1]
        is_short = len(said.split()) in CHITCHAT_WORDS and len(reply.split()) in CHITCHAT_WORDS
        if is_short and reply[-1] in ".!" and reply[:1].isupper() and said[:1].isupper() and "?" not in reply:
            is_test = is_chosen(f"chitchat {said}", 0.1)
            yield Exchange(said, reply, "small_talk", task="chitchat", argument=name, unseen="item" if is_test else "")


def dialogue_items(parts: Sequence[Sequence[SkillItem]], count: int = 3000) -> list[SkillItem]:
    """Two or three trained exchanges of different skills in one conversation, with the fields of the last."""
    trained = [[item for item in items if not item.fields["unseen"]] for items in parts]
    draw, found = random.Random("dialogues"), []
    for number in range(count):
        skills = draw.sample(trained, draw.choice((2, 3)))
        items = [draw.choice(items) for items in skills if items]
        messages = [message for item in items for message in item.messages]
        found.append(SkillItem(side_name(f"dialogues/{number}", False), messages, items[-1].fields))
    return found


def skill_items(skill: str, table: FactTable, chitchat: Callable[[], Sequence[Turns]]) -> list[SkillItem]:
    """The items of a skill: one of SKILLS, all of them ("assistant"), "practice" (facts that SFT never asks about), or
    "dialogues". chitchat: reads human conversations, (name, turns) each, where they are needed."""
    if skill in ("assistant", "dialogues"):
        parts = [skill_items(each, table, chitchat) for each in SKILLS]
        return dialogue_items(parts) if skill == "dialogues" else [item for items in parts for item in items]
    exchanges = {
        "facts": lambda: fact_exchanges(table),
        "unknown_names": lambda: unknown_exchanges(table),
        "sums": sum_exchanges,
        "instructions": lambda: instruction_exchanges(table),
        "small_talk": lambda: small_talk_exchanges(chitchat()),
        "practice": lambda: practice_exchanges(table),
    }
    return limited_items(list(exchanges[skill]()))


SKILLS = ("facts", "unknown_names", "sums", "instructions", "small_talk")

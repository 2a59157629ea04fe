"""Tables of facts, what is said and asked about them, and the sources that are made of them."""

import csv
import itertools
import json
import logging
import os
import re

import pytest

from lm.core.errors import UserError
from lm.data.conversations import CONVERSATION_KINDS, CONVERSATION_SOURCES, SKILL_SOURCES
from lm.data.facts import documents, phrasings, questions, tables, world
from lm.data.facts.abstention import is_abstention
from lm.data.facts.tables import Fact, fact_table
from lm.data.loading import load_conversations
from lm.data.mixture import parse_sources
from lm.data.sources import BUILT_IN_KINDS, load_documents, split_held_out
from lm.data.tasks import lessons


@pytest.fixture
def table_file(tmp_path):
    """text -> the path of a CSV file with it."""
    numbers = itertools.count()

    def written(text: str) -> str:
        path = tmp_path / f"table{next(numbers)}.csv"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return written


def chitchat():
    return [("chitchat/1", ["What a fine day today!", "Yes, it is a lovely day."]), ("chitchat/2", ["Hm", "What?"])]


def items(skill: str, table=None):
    return questions.skill_items(skill, table or fact_table(), chitchat)


def test_our_table_knows_france_and_gold_and_holds_each_fact_once():
    facts = fact_table().facts
    assert {Fact("France", "capital", "Paris"), Fact("gold", "symbol", "Au"), Fact("gold", "number", "79")} < set(facts)
    assert len({(fact.entity, fact.relation) for fact in facts}) == len(facts) > 900
    assert set(fact_table().relations) == set(phrasings.PHRASINGS)


def test_our_table_is_made_of_the_packages(tmp_path, monkeypatch):
    country = dict(population=10**6, continentcode="EU", currencyname="Euro", languages="fr-FR,br", capital="Ville")
    countries = {"FR": dict(country, name="France"), "NL": dict(country, name="The Netherlands"), "AN": country}
    small = dict(country, name="Tiny", population=1000)
    texts = {
        world.COUNTRIES: json.dumps({**countries, "XX": small}),
        world.ELEMENTS: "    0: ('neutron',     'n',  [], []),\n    79: ('Gold',     'Au', [1, 3], []),\n",
    }
    monkeypatch.setattr(world, "packaged_text", texts.__getitem__)
    path = tmp_path / "world.csv"
    assert world.write_world(path) == 10
    rows = list(csv.reader(path.open()))
    assert rows[0] == ["entity", "relation", "value"] and ["the Netherlands", "currency", "euro"] in rows
    assert rows[-2:] == [["gold", "symbol", "Au"], ["gold", "number", "79"]]


def test_long_and_wide_tables_are_the_same_facts(table_file):
    long = fact_table(table_file("value,relation,entity\nred,colour,fox\n4,legs,fox\n"))
    wide = fact_table(table_file("animal,colour,legs\nfox,red,4\n"))
    assert long.facts == wide.facts == (Fact("fox", "colour", "red"), Fact("fox", "legs", "4"))
    assert long.digest == wide.digest != fact_table().digest


def test_what_is_missing_double_or_contradicting_is_said_and_passed_over(table_file, caplog):
    path = table_file("animal,colour,legs\nfox,red,4\nant,,6\n\nFox,red,4\nfox,grey\n")
    with caplog.at_level(logging.WARNING):
        found = fact_table(path)
    assert found.facts == (Fact("fox", "colour", "red"), Fact("fox", "legs", "4"), Fact("ant", "legs", "6"))
    missing, double, contradicting = (record.getMessage() for record in caplog.records)
    assert missing == f"{path}: passed over 2 missing cells, the first in line 3"
    assert double == f"{path}: 2 facts come again: each counts once"
    assert "1 facts contradict earlier ones" in contradicting and "line 6" in contradicting
    assert "the colour of fox is 'red', not 'grey'" in contradicting


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "its first line is ''"),
        ("entity\nfox\n", "its first line is 'entity'"),
        ("a,b,B\n", "with different names"),
        ("animal,colour\n", "holds no fact"),
        ("animal,colour\nfox,\n", "holds no fact"),
        ("animal,colour\nfox,red,brown\n", ":2: 3 cells, but 2 columns"),
    ],
)
def test_what_is_no_table_is_one_clear_line(table_file, text, message):
    with pytest.raises(UserError) as error:
        fact_table(table_file(text))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_table_that_is_missing_or_not_text(tmp_path):
    with pytest.raises(UserError, match="no table at .*none.csv"):
        load_documents(f"facts:{tmp_path / 'none.csv'}")
    (tmp_path / "binary.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    with pytest.raises(UserError, match="not a CSV file in UTF-8"):
        load_conversations(f"facts:{tmp_path / 'binary.csv'}")


def test_a_changed_file_is_read_anew(table_file):
    path = table_file("animal,colour\nfox,red\n")
    assert fact_table(path).facts[0].value == "red"
    with open(path, "w") as file:
        file.write("animal,colour\nfox,brown\n")
    os.utime(path, ns=(1, 1))
    assert fact_table(path).facts[0].value == "brown"


def test_one_relation_of_a_user_s_own_is_told_and_asked_about_in_general_words(table_file):
    table = fact_table(table_file("animal,main_{colour}\n" + "".join(f"animal{i},c{i % 7}\n" for i in range(60))))
    text = "".join(page for _, page in documents.fact_pages(table))
    assert "The main {colour} of animal1 is c1." in text and "Animal1 has the main {colour} c1." in text
    found = items("facts", table)
    asked = {item.messages[0]["content"] for item in found if item.fields["argument"] == "animal1"}
    assert any("main {colour} of animal1" in each for each in asked)
    assert {item.fields["unseen"] for item in found} == {"", "phrasing", "entity"}
    assert all(item.fields["task"] == "main_{colour}" for item in found)
    assert all(set(item.fields["others"]) | {item.fields["answer"]} == {f"c{i}" for i in range(7)} for item in found)


def test_a_table_of_20000_rows_is_told_fewer_times_and_says_so(table_file, caplog):
    path = table_file("thing,code\n" + "".join(f"thing number{i},{i}\n" for i in range(20_000)))
    with caplog.at_level(logging.WARNING):
        table = fact_table(path)
    assert "20000 facts; a model of a million parameters learns some 4000" in caplog.text
    assert documents.repetitions(table, 40) == 3 and documents.repetitions(fact_table(), 40) == 40
    found = items("facts", table)
    count = {side: sum(item.fields["unseen"] == side for item in found) for side in ("", "phrasing", "entity")}
    assert count == {"": questions.MOST_TRAINED, "phrasing": questions.MOST_TESTED, "entity": questions.MOST_TESTED}


def test_every_fact_is_told_in_the_answer_s_words_and_no_test_phrasing_is_read_before_the_test():
    table = fact_table()
    told = "".join(text for _, text in documents.fact_pages(table))
    quiz = "".join(text for _, text in documents.quiz_pages(table))
    for fact in table.facts[::17]:
        assert told.count(documents.answer(fact)) >= 5, fact
    asked = {line for line in quiz.split("\n") if line.endswith("?")}
    for fact in table.facts:
        for template in phrasings.phrasing_of(fact.relation).test_questions:
            assert phrasings.sentence(template, e=fact.entity) not in asked


@pytest.mark.parametrize("skill", SKILL_SOURCES)
def test_what_is_unseen_is_on_the_held_out_side_and_nothing_else_is(skill):
    found = items(skill)
    train, held_out = (
        {item.messages[0]["content"] for item in found if bool(item.fields["unseen"]) is side} for side in (False, True)
    )
    assert train and (held_out or skill in ("dialogues", "practice")) and not train & held_out
    assert items(skill) == found
    for fraction in (0.02, 0.05, 0.5):
        sides = split_held_out([questions_named(item) for item in found], fraction) if held_out else None
        if sides:
            assert [bool(each.unseen) for side in sides for each in side] == [False] * len(sides[0]) + [True] * len(
                sides[1]
            )


def questions_named(item):
    class Named:
        name, content, unseen = item.name, str(item.messages), item.fields["unseen"]

    return Named


def test_practice_asks_about_entities_that_neither_sft_nor_evaluation_asks_about():
    practiced, asked = items("practice"), items("facts")
    entities = [{item.fields["argument"] for item in each} for each in (practiced, asked)]
    assert len(entities[0]) > 30 and not entities[0] & entities[1]
    assert {(item.fields["skill"], item.fields["unseen"]) for item in practiced} == {("facts", "")}
    one = tables.FactTable((Fact("fox", "colour", "red"),), "digest")
    assert len(questions.skill_items("practice", one, list)) == len(phrasings.GENERIC.questions)


def test_questions_held_out_by_entity_and_by_phrasing():
    found = items("facts")
    asked = {item.fields["argument"] for item in found if not item.fields["unseen"]}
    never = {item.fields["argument"] for item in found if item.fields["unseen"] == "entity"}
    assert not asked & never and 0.1 < len(never) / len(asked | never) < 0.25
    instructed = items("instructions")
    one_word = {item.fields["argument"] for item in instructed if item.fields["task"] == "one_word"}
    assert not one_word & never
    for item in found:
        if item.fields["unseen"] == "phrasing":
            tests = phrasings.phrasing_of(item.fields["task"]).test_questions
            said = item.messages[0]["content"]
            assert said in [phrasings.sentence(each, e=item.fields["argument"]) for each in tests]


def test_made_up_names_are_nobody_s_and_those_of_the_test_are_new():
    real = {fact.entity.casefold() for fact in fact_table().facts} | {f.value.casefold() for f in fact_table().facts}
    found = [item for item in items("unknown_names") if item.fields["task"] != "topic"]
    names = [{i.fields["argument"].casefold() for i in found if bool(i.fields["unseen"]) is s} for s in (False, True)]
    assert not names[0] & names[1] and not (names[0] | names[1]) & real and len(names[1]) == questions.MOST_TESTED
    assert all(item.fields["answer"] == "" and is_abstention(item.messages[1]["content"]) for item in found)


def test_answers_are_right():
    for item in items("assistant"):
        said, reply = (message["content"] for message in item.messages)
        fields = item.fields
        if fields["skill"] == "facts":
            assert reply[-1] == "." and fields["answer"] in reply
        elif fields["skill"] == "sums":
            a, operator, b = fields["argument"].split()
            assert int(fields["answer"]) == (int(a) + int(b) if operator == "+" else int(a) - int(b)) >= 0
            assert reply == f"{a}{operator}{b}={fields['answer']}." and a in said and b in said
        elif fields["task"] == "spell":
            assert fields["answer"] == reply == "-".join(fields["argument"].upper()) and fields["argument"] in said
        elif fields["task"] == "capitals":
            assert fields["answer"] == reply == fields["argument"].upper()
        elif fields["task"] == "repeat":
            assert fields["answer"] == reply == fields["argument"]
        elif fields["task"] == "one_word":
            assert reply.lower() == f"{fields['answer'].lower()}." and " " not in reply
        elif fields["skill"] == "small_talk":
            assert reply[-1] in ".!?" and not is_abstention(reply)


def test_dialogues_end_with_what_their_fields_say():
    found = items("dialogues")
    assert {len(item.messages) for item in found} == {4, 6}
    for item in found[::50]:
        if item.fields["skill"] == "sums":
            assert item.fields["answer"] in item.messages[-1]["content"]
    assert {item.fields["unseen"] for item in found} == {""}


def test_sums_kept_for_testing_are_in_no_lesson_and_no_question_whichever_number_is_first():
    kept = {pair for pair in itertools.product(range(100), repeat=2) if lessons.is_test_sum(*pair)}
    assert 0.08 < len(kept) / 10_000 < 0.12 and all((b, a) in kept for a, b in kept)
    assert all(max(pair) > 9 for pair in kept)
    sides = {True: set(), False: set()}
    for item in items("sums"):
        if item.fields["task"] == "add" and item.fields["unseen"] != "phrasing":
            a, _, b = item.fields["argument"].split()
            sides[item.fields["unseen"] == "item"].add((int(a), int(b)))
    assert sides[True] <= kept and not sides[False] & kept and len(sides[False]) > 1000
    found = 0
    for number, (_, page) in enumerate(lessons.lesson_pages()):
        for line in page.splitlines() if number < 300 else ():
            if re.fullmatch(r"\d+\+\d+=\d+\.?", line):  # in a lesson, and in the answer to a question
                a, b = (int(word) for word in line.partition("=")[0].split("+"))
                assert (a, b) not in kept and line.rstrip(".") == f"{a}+{b}={a + b}"
                found += 1
    assert found > 1000


def test_no_lesson_or_quiz_asks_in_a_user_s_words_for_what_is_kept_for_testing():
    read = "".join(text for _, text in lessons.lesson_pages())
    read += "".join(text for _, text in documents.quiz_pages(fact_table()))
    asked = set(read.split("\n"))
    found = [item for item in items("assistant") if item.fields["unseen"] and item.fields["skill"] != "small_talk"]
    by_entity = [item for item in found if item.fields["unseen"] == "entity"]  # the quiz asks about every entity
    others = [item.messages[0]["content"] for item in found if item.fields["unseen"] != "entity"]
    assert by_entity and len(others) > 1500 and not asked.intersection(others)


def test_lessons_are_right():
    lines = "".join(text for _, text in itertools.islice(lessons.lesson_pages(), 200)).splitlines()
    assert len(lines) > 200 * lessons.LINES_PER_PAGE
    right = {"in capitals: ": str.upper, "spell ": lessons.spelling_of, "repeat: ": str}
    counts = dict.fromkeys([*right, " sorted: ", " than "], 0)
    for line, following in zip(lines, lines[1:]):
        for asked, answer in right.items():
            if line.startswith(asked):
                assert following == answer(line.removeprefix(asked))
                counts[asked] += 1
        if " sorted: " in line:
            given, _, ordered = line.partition(" sorted: ")
            assert [int(n) for n in ordered.split(", ")] == sorted(int(n) for n in given.split(", "))
            counts[" sorted: "] += 1
        elif " than " in line:
            a, _, more, _, b = line.rstrip(".").split()
            assert (int(a) > int(b)) == (more == "more")
            counts[" than "] += 1
    assert min(counts.values()) > 50, counts


@pytest.mark.parametrize("text", ["I don't know Velora.", "I don’t know that.", "No idea!", "I'm not sure.",
                                  "I have never heard of it.", "i do not know"])  # fmt: skip
def test_abstentions(text):
    assert is_abstention(text)


@pytest.mark.parametrize("text", ["The capital of France is Paris.", "I know.", "You know what?", ""])
def test_no_abstentions(text):
    assert not is_abstention(text)


def test_sources_of_a_user_s_table_by_name(table_file, monkeypatch):
    path = table_file("animal,colour\n" + "".join(f"beast{i},c{i % 5}\n" for i in range(40)))
    monkeypatch.setattr("lm.data.sources.chitchat_dialogues", chitchat)
    pages = load_documents(f"facts:{path},quiz:{path}")
    assert {page.name.split("/")[0] for page in pages} == {"facts", "quiz"} and "beast1 " in pages[0].text + pages[
        1
    ].text
    train, held_out = split_held_out(load_conversations(f"assistant:{path}"), 0.05)
    assert {c.fields["skill"] for c in train} == set(questions.SKILLS) and all(c.is_whole for c in train)
    assert not any("France" in message["content"] for c in train for message in c.messages)
    assert all(c.fields["unseen"] for c in held_out)
    entries = [{"source": f"facts:{path}", "weight": 1.0}, {"source": "education", "weight": 1.0}]
    assert [each.kind for each in parse_sources(entries, BUILT_IN_KINDS)] == ["encyclopedia", "education"]
    assert set(CONVERSATION_KINDS) == set(CONVERSATION_SOURCES)


def test_names_that_only_look_like_a_source_of_a_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="data.sources has 'sum:x.csv'"):
        load_conversations("sum:x.csv")
    assert tables.table_path("hf:facts", SKILL_SOURCES) is None

"""The table of skills, from answers that are right or wrong by construction."""

import pytest

from lm.core.statistics import Z95
from lm.data.conversations import Conversation
from lm.evaluate import skills


def context(skill: str, number: int, unseen: str = "item", answer: str = "Paris") -> Conversation:
    fields = {"skill": skill, "answer": answer, "task": "capital", "argument": "France", "unseen": unseen}
    said = f"{skill} {number}?"
    return Conversation(said, [{"role": "user", "content": said}], fields, True)


CONTEXTS = [
    *(context("facts", i) for i in range(4)),
    *(context("facts", i, "entity") for i in range(4, 6)),
    *(context("unknown_names", i, answer="") for i in range(10, 12)),
]
EXAMPLES = [{**c.fields, "messages": c.messages} for c in CONTEXTS]


def test_prompts_of_all_skills_take_turns():
    groups = [skills.skill_group(c.fields) for c in skills.balanced_prompts(CONTEXTS, 7)]
    assert groups == ["facts", "facts_never_asked", "unknown_names"] * 2 + ["facts"]
    assert skills.has_skills(CONTEXTS) and not skills.has_skills([Conversation("a", [])]) and not skills.has_skills([])


def test_the_table_by_hand():
    """b: 3 of 4 facts, no entity never asked about, both made-up names; a: 2, 1 and none."""
    unsure = "I don't know."
    texts = {
        "a": ["Paris.", "Paris.", "Rome.", unsure, "Paris.", "Rome.", "Rome.", "Rome."],
        "b": ["Paris.", "It is Paris.", "Paris.", "Rome.", unsure, unsure, unsure, unsure],
    }
    table = skills.skill_table(EXAMPLES, texts)
    values = {g: [e["value"] for e in row["models"].values()] for g, row in table.items()}
    assert values == {
        "facts": [0.5, 0.75],
        "facts_never_asked": [0.5, 0],
        "unknown_names": [0, 1],
        "all": [0.25, 0.875],
    }
    assert [row["prompts"] for row in table.values()] == [4, 2, 2, 6]
    (pair,) = table["facts"]["differences"]
    assert (pair["a"], pair["b"], pair["difference"]["value"]) == ("b", "a", 0.25)
    assert table["all"]["differences"][0]["difference"]["value"] == pytest.approx((0.25 + 1) / 2)
    assert table["facts"]["abstains"]["a"]["value"] == 0.25
    assert 0 < table["facts"]["models"]["a"]["low"] < 0.5 < table["facts"]["models"]["a"]["high"] < 1
    assert skills.skill_results(EXAMPLES, texts)["distinct"] == {"prompts": 8, "models": {"a": 3, "b": 4}}


def test_distinct_answers_do_not_count_marks_or_case_nor_more_than_a_hundred():
    assert skills.distinct_answers(["Paris", "paris.", "Rome"]) == 2
    assert skills.distinct_answers([str(i) for i in range(300)]) == 100


def test_the_mean_of_independent_estimates():
    """Standard errors 0.3 and 0.4: their mean's is 0.5 / 2."""
    parts = [{"value": v, "low": v - Z95 * se, "high": v + Z95 * se} for v, se in ((1.0, 0.3), (0.0, 0.4))]
    found = skills.mean_of_estimates(parts)
    assert found.value == 0.5 and found.se == pytest.approx(0.25) and found.high == pytest.approx(0.99, abs=0.001)

"""Recall: what counts as a fact continued, and what the table of it says."""

import pytest

from lm.data.facts.tables import Fact, fact_table
from lm.evaluate import recall
from lm.generate.answers import GeneratedAnswer


def test_the_beginning_of_an_answer_ends_before_its_value():
    assert recall.fact_beginning(Fact("France", "capital", "Paris")) == "The capital of France is"
    assert recall.fact_beginning(Fact("the Netherlands", "continent", "Europe")) == "The Netherlands is in"
    assert recall.fact_beginning(Fact("Japan", "currency", "yen")) == "The currency of Japan is the"
    assert recall.fact_beginning(Fact("fox", "colour", "red")) == "The colour of fox is"


@pytest.mark.parametrize(
    "said, value, right",
    [
        (" Paris. The", "Paris", True),
        (" Paris", "Paris", True),
        ("Paris", "Paris", False),  # no space: another word goes on
        (" Parish.", "Paris", False),
        (" 12.", "1", False),
        (" 1.", "1", True),
        ("", "1", False),
    ],
)
def test_a_fact_is_recalled_where_its_value_comes_next(said, value, right):
    assert recall.is_continued(said, value) is right


class Trained:
    """What `recalled_facts` asks of a run: the tokenizer is letters."""

    model, params = None, {"lm": {}}

    class tokenizer:  # noqa: N801
        start_ids = (2,)
        encode = staticmethod(lambda text: [ord(c) % 250 for c in text])


def test_shares_by_relation_and_what_was_missed(monkeypatch):
    facts = fact_table().facts[:8]  # two countries, four relations each
    wrong = facts[0]

    def batch_answerer(model, lm, tokenizer, sampling, *, rows_at_once, jit):
        assert sampling.temperature == 0.0 and sampling.max_new == max(len(f" {fact.value}.") for fact in facts)
        return lambda prompts, key: [
            GeneratedAnswer(" nothing." if fact == wrong else f" {fact.value}.", 3, False) for fact in facts
        ]

    monkeypatch.setattr(recall, "batch_answerer", batch_answerer)
    summary = recall.recall_summary(recall.recalled_facts(Trained, facts))
    assert summary["facts"] == 8 and summary["recall"]["value"] == 7 / 8
    assert summary["by_relation"]["capital"]["value"] == 0.5 and summary["by_relation"]["language"]["value"] == 1.0
    # Wilson's 95 % interval of 7 in 8: centre (7/8 + z^2/16) / (1 + z^2/8), z = 1.96
    assert summary["recall"]["low"] == pytest.approx(0.529, abs=1e-3)
    assert summary["missed"] == [{"beginning": recall.fact_beginning(wrong), "said": " nothing.", "right": wrong.value}]

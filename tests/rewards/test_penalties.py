"""Penalties by reading: what each says of an answer, and that rewards add up with each part kept apart."""

import numpy as np
import pytest

from lm.core.errors import UserError
from lm.rewards import REWARDS, named_reward, weighted_reward


def said(name: str, message: str, answer: str) -> float:
    return float(REWARDS[name]([{"messages": [{"role": "user", "content": message}]}], [answer])[0])


@pytest.mark.parametrize(
    "name, message, answer, value",
    [
        ("toxicity", "hi", "You are lovely.", 0),
        ("toxicity", "hi", "What the FUCK.", -1),
        ("toxicity", "hi", "A class of assessment in Scunthorpe.", 0),  # words, not letters
        ("length", "hi", "word " * 40, 0),
        ("length", "hi", "word " * 60, -0.5),  # (60 - 40) / 40
        ("length", "hi", "word " * 200, -1),
        ("repetition", "hi", "a b c d e", 0),
        ("repetition", "hi", "a b c a b c a b c", -4 / 7),  # 7 trigrams, 3 of them distinct
        ("repetition", "hi", "a b", 0),
        ("refusal", "How do I make a pipe bomb?", "I can't help with that.", 1),
        ("refusal", "How do I make a pipe bomb?", "I can’t help with that.", 1),  # a typographer's apostrophe
        ("refusal", "How do I make a pipe bomb?", "Take a pipe.", -1),
        ("refusal", "How do I make a cake?", "I'm sorry, no.", -1),
        ("refusal", "How do I make a cake?", "Take flour.", 0),
        ("punctuation", "hi", "Fine!", 0),
        ("punctuation", "hi", "Fine, and", -1),
        ("punctuation", "hi", "  ", -1),
    ],
)
def test_by_reading(name, message, answer, value):
    assert said(name, message, answer) == pytest.approx(value)


def test_an_old_name_is_refused_with_the_new_one():
    with pytest.raises(UserError, match="rank.rater is 'form', which is called punctuation now; choose one of rule, "):
        named_reward("form", "rank.rater")


def test_a_weighed_sum_keeps_its_parts_apart():
    parts = {"punctuation": (2.0, REWARDS["punctuation"]), "length": (0.5, REWARDS["length"])}
    total, each, _ = weighted_reward(parts)(
        [{"messages": [{"role": "user", "content": "hi"}]}] * 2, ["word " * 60, "Fine."]
    )
    np.testing.assert_allclose(total, [-2.25, 0.0])  # 2 * -1 + 0.5 * -0.5
    np.testing.assert_allclose(each["punctuation"], [-1, 0])
    np.testing.assert_allclose(each["length"], [-0.5, 0])

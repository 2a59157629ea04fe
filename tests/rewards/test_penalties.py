"""Penalties by reading: what each says of an answer, and that rewards add up with each part kept apart."""

import numpy as np
import pytest

from lm.rewards import REWARDS, weighted_reward


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
        ("form", "hi", "Fine!", 0),
        ("form", "hi", "Fine, and", -1),
        ("form", "hi", "  ", -1),
    ],
)
def test_by_reading(name, message, answer, value):
    assert said(name, message, answer) == pytest.approx(value)


def test_a_weighed_sum_keeps_its_parts_apart():
    parts = {"form": (2.0, REWARDS["form"]), "length": (0.5, REWARDS["length"])}
    total, each, _ = weighted_reward(parts)(
        [{"messages": [{"role": "user", "content": "hi"}]}] * 2, ["word " * 60, "Fine."]
    )
    np.testing.assert_allclose(total, [-2.25, 0.0])  # 2 * -1 + 0.5 * -0.5
    np.testing.assert_allclose(each["form"], [-1, 0])
    np.testing.assert_allclose(each["length"], [-0.5, 0])

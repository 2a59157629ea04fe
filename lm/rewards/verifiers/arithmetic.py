"""A verifier: whether an answer to a sum states its value."""

import re
from collections.abc import Sequence

import numpy as np

from lm.data.arithmetic import expression_value
from lm.data.conversations import Example, last_user_message

EXPRESSION = re.compile(r"\d[\d +*-]*\d|\d")
NUMBER = re.compile(r"-?\d+")


def arithmetic_reward(examples: Sequence[Example], texts: Sequence[str]) -> np.ndarray:
    """f32[B]: 1 where the last number of an answer is the value of the expression in the user's last message, else
    0."""
    return np.array([states_value(example, text) for example, text in zip(examples, texts, strict=True)], np.float32)


def states_value(example: Example, text: str) -> bool:
    asked, numbers = EXPRESSION.search(last_user_message(example["messages"])), NUMBER.findall(text)
    return bool(asked and numbers) and numbers[-1] == expression_value(asked[0])

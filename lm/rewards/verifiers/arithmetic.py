"""A verifier: whether an answer to a sum states its value."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from lm.data.arithmetic import expression_value

EXPRESSION = re.compile(r"\d[\d +*-]*\d|\d")
NUMBER = re.compile(r"-?\d+")


def arithmetic_reward(examples: Sequence[Sequence[Mapping[str, str]]], texts: Sequence[str]) -> np.ndarray:
    """f32[B]: 1 where the last number of an answer is the value of the expression in the user's last message, else
    0."""
    return np.array([states_value(example, text) for example, text in zip(examples, texts, strict=True)], np.float32)


def states_value(example: Sequence[Mapping[str, str]], text: str) -> bool:
    message = next((m["content"] for m in reversed(example) if m["role"] == "user"), "")
    asked, numbers = EXPRESSION.search(message), NUMBER.findall(text)
    return bool(asked and numbers) and numbers[-1] == expression_value(asked[0])

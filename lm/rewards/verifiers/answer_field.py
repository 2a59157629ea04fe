"""From a check of one answer to a reward over the rows' field `answer`."""

import functools
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lm.core.errors import UserError
from lm.data.conversations import Example, last_user_message

FIELD = "answer"


def answer_reward(check: Callable[[Any, str], bool]) -> Callable[..., np.ndarray]:
    """The reward f32[B] that is 1 where check(example["answer"], text), else 0; its name is that of `check`.

    ValueError of the check means that the row's own `answer` will not do. UserError names that row, or one without the
    field, and the way out.
    """
    name = check.__name__.removesuffix("_reward")

    @functools.wraps(check)
    def reward(examples: Sequence[Example], texts: Sequence[str]) -> np.ndarray:
        found = np.zeros(len(texts), np.float32)
        for i, (example, text) in enumerate(zip(examples, texts, strict=True)):
            if FIELD not in example or example[FIELD] is None:
                raise UserError(_missing_answer(name, i, examples))
            try:
                found[i] = check(example[FIELD], text)
            except ValueError as error:
                raise UserError(
                    f"reward {name} cannot use the `{FIELD}` of {_row(i, examples)}, {example[FIELD]!r:.80}: {error}; "
                    "correct the row or leave it out"
                ) from error
        return found

    del reward.__wrapped__  # its signature is a reward's, not that of the check
    return reward


def _missing_answer(name: str, i: int, examples: Sequence[Example]) -> str:
    others = [field for field in examples[i] if field not in ("messages", FIELD)]
    if not others:
        return (
            f"reward {name} compares with the field `{FIELD}`, but {_row(i, examples)} has no field beside its "
            f"messages: take prompts with answers, {{'prompt': ..., '{FIELD}': ...}} a row, or another reward"
        )
    return (
        f"reward {name} compares with the field `{FIELD}`, but {_row(i, examples)} has only {', '.join(others)}: name "
        f"the column that holds it, such as --config.data.columns=\"{{'{FIELD}': '{others[0]}'}}\""
    )


def _row(i: int, examples: Sequence[Example]) -> str:
    asked = textwrap.shorten(last_user_message(examples[i]["messages"]), 40, placeholder="...")
    return f"row {i + 1} of {len(examples)} ({asked!r})"

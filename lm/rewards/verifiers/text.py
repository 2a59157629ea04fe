"""Verifiers of text: the same words, or a pattern."""

import functools
import re
import unicodedata
from typing import Any

from lm.rewards.verifiers.answer_field import answer_reward

LONGEST_MATCHED = 10_000  # characters; a longer text is wrong: a pattern may take exponential time on it
SURROUNDING = " \t\"'“”‘’`*.,;:!?()[]{}"  # marks around an answer that are none of it


def normalized_answer(text: str) -> str:
    """Compatibility forms unified (NFKC), no case, single spaces, and no quotes, brackets or marks around it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(SURROUNDING)


def accepted_texts(truth: Any) -> list[str]:
    """The texts that a row's `answer` accepts: itself, or each of a list. ValueError for anything else."""
    texts = truth if isinstance(truth, list) else [truth]
    if not texts or not all(isinstance(each, str | int | float) for each in texts):
        raise ValueError("it must be text, a number or a list of them")
    return [str(each).lower() if isinstance(each, bool) else str(each) for each in texts]


@answer_reward
def exact_reward(truth: Any, text: str) -> bool:
    """Whether the whole text is the answer, or one of a list of them, once both are normalised.

    Nothing else may stand in the text, so an answer among several is wrong. An `answer` that is empty when normalised,
    such as a lone mark, is compared as it is.
    """
    said = normalized_answer(text)
    for accepted in accepted_texts(truth):
        wanted = normalized_answer(accepted)
        if said == wanted if wanted else text.strip() == accepted.strip():
            return True
    return False


@functools.lru_cache(maxsize=4096)
def _pattern(truth: str) -> re.Pattern[str]:
    try:
        return re.compile(truth)
    except re.error as error:
        raise ValueError(f"it is no regular expression ({error})") from error


@answer_reward
def regex_reward(truth: Any, text: str) -> bool:
    """Whether the whole text, without space around it, matches the pattern `answer` (Python's `re`, its inline flags).

    A text of more than LONGEST_MATCHED characters is wrong. Patterns are the data's and trusted: one that backtracks
    without end does so here.
    """
    if not isinstance(truth, str):
        raise ValueError("it must be the text of a regular expression")
    return len(text) <= LONGEST_MATCHED and _pattern(truth).fullmatch(text.strip()) is not None

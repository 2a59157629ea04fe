"""A verifier of multiple choice: the one letter that an answer commits itself to."""

import re
from typing import Any

from lm.rewards.verifiers.answer_field import answer_reward

_LETTER = r"(?:\\boxed\{)?[*_`\"'([{]*(?P<letter>[A-Za-z])(?![\w'’])"
# The answer begins with a letter: "B", "(B)", "**B.**", "B) because ..."
OPENING = re.compile(rf"\s*{_LETTER}(?P<rest>.*)", re.DOTALL)
# ... or says it: "The answer is B", "Answer: (B)", "I choose option B".
CLAIM = re.compile(
    rf"\b(?:answer|choice|option|choose|pick)(?: is| would be|:| option| choice)*:?[ \t]+{_LETTER}", re.IGNORECASE
)
# Another letter that is offered as an answer too: "or C", "/ C", ", C", "C)", "(C"
OTHER = re.compile(r"(?:\b(?:or|and|maybe|also)\b|[/,&|(])\s*(?P<joined>[A-Z])(?!\w)|(?<!\w)(?P<marked>[A-Z])(?=[).:])")


def chosen_letter(text: str) -> str | None:
    """The letter A to Z that a text chooses, as a capital; None where it chooses none, or more than one."""
    claims = [c for c in CLAIM.finditer(text) if c["letter"].isupper() or _is_set_apart(text[c.end() :])]
    if claims:
        letters, rest = {claim["letter"].upper() for claim in claims}, text[claims[-1].end() :]
    else:
        opening = OPENING.fullmatch(text)
        if opening is None or not _is_set_apart(opening["rest"]):
            return None
        letters, rest = {opening["letter"].upper()}, opening["rest"]
    letters |= {found["joined"] or found["marked"] for found in OTHER.finditer(rest)}
    return letters.pop() if len(letters) == 1 else None


def _is_set_apart(rest: str) -> bool:
    """Whether a letter with this behind it is an answer and no word: "A dog" and "I think" open no choice."""
    return not rest.strip() or rest[0] in ")].:}*,;_`\"'\n/" or rest.lstrip().startswith(("or ", "and ", "because"))


@answer_reward
def choice_reward(truth: Any, text: str) -> bool:
    """Whether the text chooses the letter `answer` (A to Z, case does not count), and no other letter beside it.

    A choice is the letter at the beginning, alone or with a mark behind it, or one behind "answer is", "option" and
    their like. Letters are ASCII's: a Cyrillic В is no B.
    """
    if not isinstance(truth, str) or not re.fullmatch(r"\(?[A-Za-z][).]?", truth.strip(), re.ASCII):
        raise ValueError("it must be one letter, A to Z")
    return chosen_letter(text) == truth.strip().strip("().").upper()

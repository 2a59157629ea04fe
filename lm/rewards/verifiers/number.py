"""A verifier of numbers: the one number that an answer commits itself to."""

import re
from fractions import Fraction
from typing import Any

from lm.rewards.verifiers.answer_field import answer_reward

RELATIVE_TOLERANCE = Fraction(1, 10**6)  # of a number that is not whole; a whole one must be met exactly
LONGEST_NUMBER = 60  # characters; and exponents of up to 3 digits: 1e999999999 is no answer but a way to stop a run
# A run of signs, digits of any script and what may stand between them. It counts as a number only if NUMBER says so.
NUMBER_LIKE = re.compile(r"(?<!\w)[-+−]?[$€£]?(?:\d|[.](?=\d))[\d.,/_]*(?:[eE][-+−]?\d+)?\w*")
NUMBER = re.compile(
    r"(?P<sign>[-+]?)(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?P<part>\.[0-9]+)?(?P<power>e[-+]?[0-9]{1,3})?"
    r"(?:/(?P<under>[0-9]+))?",
    re.ASCII | re.IGNORECASE,
)
# What an answer is said behind, in the last line with a number: only what stands behind the last of these counts.
LEAD = re.compile(r"####|\\boxed|[=:]|\b(?:answer|is|are|equals|makes|gives)\b", re.IGNORECASE)


def number_value(text: str) -> Fraction | None:
    """The value of -1,234.5, 1e3, 3/4, $5 or 5.; None for what is no such number in ASCII digits."""
    text = text.strip().replace("−", "-")
    text = re.sub(r"^([-+]?)[$€£]", r"\1", text.rstrip("%").rstrip(".,"))
    found = NUMBER.fullmatch(text) if len(text) <= LONGEST_NUMBER else None
    if not found or not (found["whole"] or found["part"]):
        return None
    digits = (found["whole"] or "0").replace(",", "") + (found["part"] or "") + (found["power"] or "")
    if found["under"] and int(found["under"]) == 0:
        return None
    value = Fraction(digits) / int(found["under"] or 1)
    return -value if found["sign"] == "-" else value


def stated_number(text: str) -> Fraction | None:
    """The number that a text ends with: the only one in its last line with a number, or behind the line's last LEAD.

    None where there is none, or where several different ones stand there.
    """
    lines = [line for line in text.splitlines() if NUMBER_LIKE.search(line)]
    if not lines:
        return None
    behind = LEAD.split(lines[-1])[-1]
    found = NUMBER_LIKE.findall(behind) or NUMBER_LIKE.findall(lines[-1])
    values = {number_value(each) for each in found}
    return values.pop() if len(values) == 1 else None


@answer_reward
def number_reward(truth: Any, text: str) -> bool:
    """Whether the text's number is `answer`: exactly where that is whole, else within a relative 1e-6.

    The number is the only one in the last line that has any, or behind the line's last "=", ":", "is", "answer", "####"
    or \\boxed. Two different numbers there are wrong: whoever lists several has not answered. Digits are ASCII's; a
    sign, thousands with commas, a decimal point, an exponent and a fraction are understood; a per cent sign and a
    currency before it are ignored; nothing else may touch the number.
    """
    wanted = number_value(str(truth)) if isinstance(truth, str | int | float) and not isinstance(truth, bool) else None
    if wanted is None:
        raise ValueError("it must be a number such as -1,234.5, 3/4 or 1e3")
    said = stated_number(text)
    if said is None:
        return False
    return said == wanted or wanted.denominator != 1 and abs(said - wanted) <= RELATIVE_TOLERANCE * abs(wanted)

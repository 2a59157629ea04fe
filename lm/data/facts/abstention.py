"""Whether an answer says that it does not know."""

import re

ABSTENTION = re.compile(
    r"\b(?:don['\u2019]?t|do not|does not|doesn['\u2019]?t|can(?:no|['\u2019])?t) (?:really |actually |even )?"
    r"(?:know|say|tell)\b|\bno idea\b|\bnot (?:quite |really )?sure\b|\bnever heard\b|\bunknown to me\b",
    re.IGNORECASE,
)


def is_abstention(text: str) -> bool:
    """True of "I don't know Velora.", "No idea.", "I'm not sure", "I have never heard of it"."""
    return ABSTENTION.search(text) is not None

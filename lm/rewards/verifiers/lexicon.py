"""Which words there are: those of the human conversations, word lists and facts that come with this library."""

import functools
from collections import Counter
from collections.abc import Collection

from lm.data.facts import phrasings
from lm.data.facts.tables import fact_table
from lm.data.sources import chitchat_dialogues
from lm.data.tasks.lessons import WORDS
from lm.rewards.rule import words

FEWEST_TIMES = 3  # that a word must come in the conversations: what comes less often is often misspelt


@functools.cache
def lexicon() -> frozenset[str]:
    """Lower-case words, some 10,000."""
    counts = Counter(word for _, turns in chitchat_dialogues() for turn in turns for word in words(turn))
    told = [" ".join((*said, *replies)) for said, replies in (*phrasings.SMALL_TALK, *phrasings.TOPIC_TALK)]
    asked = [" ".join((one.noun, one.answer, *one.statements)) for one in phrasings.PHRASINGS.values()]
    named = [f"{fact.entity} {fact.value}" for fact in fact_table().facts]
    own = words(" ".join((*told, *asked, *named, *WORDS, *phrasings.TOPICS)))
    return frozenset(word for word, count in counts.items() if count >= FEWEST_TIMES) | frozenset(own)


def made_up_words(text: str, known: Collection[str] = ()) -> list[str]:
    """The words of a text that are neither in the lexicon nor `known`. Numbers are words."""
    there = lexicon() | set(known)
    return [word for word in words(text) if word not in there and not word.isdigit()]

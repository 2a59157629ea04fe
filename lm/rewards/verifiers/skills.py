"""A verifier for an assistant: one score from 0 to 1 for each of five skills, by the row's fields.

A row says what is asked of it: `skill` is one of SKILLS, `answer` the right answer (empty where there is none),
`task` the relation or instruction, `argument` what it is about. The built-in source "assistant" has them, and so has
any file of one's own with such columns.
"""

import functools
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lm.core.errors import UserError
from lm.data.conversations import Example, last_user_message
from lm.data.facts.abstention import is_abstention
from lm.data.facts.tables import fact_table
from lm.rewards.rule import (
    STOP_WORDS,
    content_stems,
    ends_with_punctuation,
    has_rude_word,
    is_not_repetitive,
    sentences,
    words,
)
from lm.rewards.verifiers.lexicon import made_up_words

FIELDS = ("skill", "answer", "task", "argument")
SYMBOL_LENGTH = 2  # letters up to which a value is a symbol
MOST_VALUE_WORDS = 4
FEWEST_WORDS = 3  # of small talk
NUMBER = re.compile(r"(?<![\w.,])[-−]?\d+(?![\w]|[.,]\d)", re.ASCII)
# More than one answer is offered: "Paris or London", "Paris/London", "maybe Paris", "not Paris".
HEDGE = re.compile(r"\b(?:or|either|maybe|perhaps|not|isn't|never)\b|/", re.IGNORECASE)
CAPITALIZED = re.compile(r"[^\W\d_][\w'’-]*")
YES_NO_OPENINGS = frozenset("are is am was were do does did can could will would have has should may shall".split())
YES_NO_WORDS = frozenset("yes no sure yeah nope certainly gladly of".split())
# What is said for courtesy, or of a mood, and what answers it.
COURTESIES: Sequence[tuple[frozenset[str], frozenset[str]]] = tuple(
    (frozenset(said.split()), frozenset(answer.split()))
    for said, answer in (
        (
            "hello hi hey morning evening afternoon greetings",
            "hello hi hey morning evening afternoon welcome glad nice",
        ),
        ("thanks thank thankful grateful", "welcome pleasure glad happy problem"),
        ("bye goodbye night later farewell", "bye goodbye night soon care later luck"),
        ("sorry apologies apologize", "problem worry fine okay ok right matter"),
        ("meet meeting", "nice meet glad pleased pleasure too"),
        ("sad unhappy bad tired bored boring hungry sick ill lonely sleep food", "sorry hope should could better rest"),
        ("great smart nice kind clever love done job like", "thank thanks kind"),
        ("happy glad good great", "good glad nice happy"),
        ("wrong stupid bad right", "sorry mistake mistakes"),
    )
)
ABSTAINING_WORDS = frozenset("know idea sure heard never tell say afraid sorry anything about".split())
QUOTES = "\"'“”‘’`*"


def fact_score(example: Example, text: str) -> float:
    """1 where the value's words stand in the answer, in their order, and the answer offers nothing else.

    Something else is another value of the same relation, a number or a name that neither the question nor the value
    has, a word that is none, or one such as "or". The other values are those of our own table; a row of another
    table may bring its own, the field `others`, a list. One who says that they do not know has not answered. Case
    counts for symbols ("Fe").
    """
    is_symbol = len(example["answer"]) <= SYMBOL_LENGTH and example["answer"].isalpha()
    split = cased_words if is_symbol else words
    said, value = split(text), split(example["answer"])
    at = _last_position(said, value)
    if at is None or is_abstention(text):
        return 0.0
    rest = said[:at] + said[at + len(value) :]
    known = {*words(last_user_message(example["messages"])), *words(example["argument"]), *words(example["answer"])}
    known |= {word.removesuffix("'s") for word in known} | {f"{word}'s" for word in known}
    if HEDGE.search(" ".join(rest)) or "/" in text or any(word.isdigit() and word not in known for word in rest):
        return 0.0
    others = {tuple(split(other)) for other in (example["others"] if "others" in example else ())}
    others |= {tuple(split(other)) for other in world_values(example["task"])}
    for n in range(1, MOST_VALUE_WORDS + 1):
        for i in range(len(rest) - n + 1):
            phrase = tuple(rest[i : i + n])
            is_common = i == 0 and is_symbol and phrase[0].lower() in STOP_WORDS
            if phrase in others and not is_common and not known.issuperset(word.lower() for word in phrase):
                return 0.0
    return float(not strange_names(text, known) and not made_up_words(text, known))


def cased_words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.replace("’", "'"))


@functools.cache
def world_values(relation: str) -> frozenset[str]:
    """The values of a relation in our own table of facts; none where it has no such relation."""
    return frozenset(fact.value for fact in fact_table().facts if fact.relation == relation)


def unknown_name_score(example: Example, text: str) -> float:
    """1 where the answer says that one does not know, and makes no claim beside it; 0.5 where it speaks of another
    name than the question."""
    if not is_abstention(text) or len(sentences(text)) != 1:
        return 0.0
    asked = words(f"{last_user_message(example['messages'])} {example['argument']}")
    known = {*asked, *ABSTAINING_WORDS, *STOP_WORDS}
    return 1.0 if known.issuperset(words(text)) else 0.5


def sum_score(example: Example, text: str) -> float:
    """1 where the only number besides those of the question is `answer`; the question's may be repeated in order."""
    found = [int(number.replace("−", "-")) for number in NUMBER.findall(text)]
    asked = [int(number.replace("−", "-")) for number in NUMBER.findall(last_user_message(example["messages"]))]
    truth = [int(example["answer"])]
    if re.search(r"\b(?:or|not|maybe)\b", text, re.IGNORECASE) or len(re.findall(r"\d+", text)) != len(found):
        return 0.0
    return float(found in (truth, asked + truth, truth + asked))


def instruction_score(example: Example, text: str) -> float:
    """1 for the exact answer, but for space, quotes and a full stop around it. Case matters for `capitals` only."""
    said, truth = (_bare(each) for each in (text, example["answer"]))
    if example["task"] != "capitals":
        said, truth = said.casefold(), truth.casefold()
    return float(said == truth)


def small_talk_score(example: Example, text: str) -> float:
    """1 for whole sentences that say something of their own, on topic or politely, without repetition; 0.5 for such
    beside the topic; 0 for the rest: empty, cut off, rude, only questions, the user's own words, or words that are
    none."""
    message = last_user_message(example["messages"])
    told = [sentence for sentence in sentences(text) if not sentence.endswith("?")]
    said, asked = words(text), words(message)
    is_whole = bool(told) and len(said) >= FEWEST_WORDS and ends_with_punctuation(message, text) > 0
    if not is_whole or has_rude_word(message, text) or not is_not_repetitive(message, text):
        return 0.0
    if said == asked or made_up_words(text, asked):
        return 0.0
    is_on_topic = bool(content_stems(message) & content_stems(text))
    is_in_kind = returns_courtesy(message, text) or is_personal_reply(message, text)
    return 1.0 if is_on_topic or is_in_kind or is_yes_or_no_reply(message, text) else 0.5


def is_yes_or_no_reply(message: str, text: str) -> bool:
    """Whether it begins with yes, no or their like, and the message asks for that."""
    asked = message.endswith("?") and words(message)[:1] and words(message)[0] in YES_NO_OPENINGS
    return bool(asked) and bool(words(text)) and words(text)[0] in YES_NO_WORDS


def returns_courtesy(message: str, text: str) -> bool:
    """Whether it answers a greeting, thanks, an apology or a good-bye as people do."""
    asked, said = set(words(message)), set(words(text))
    return any(asked & occasion and said & reply for occasion, reply in COURTESIES)


def is_personal_reply(message: str, text: str) -> bool:
    """Whether it answers a question about "you" with "I" or "we"."""
    asked = set(words(" ".join(s for s in sentences(message) if s.endswith("?"))))
    return not asked.isdisjoint(("you", "your", "you're")) and not {
        *(word.partition("'")[0] for word in words(text))
    }.isdisjoint(("i", "my", "me", "we", "our"))


SKILLS: Mapping[str, Callable[[Example, str], float]] = {
    "facts": fact_score,
    "unknown_names": unknown_name_score,
    "sums": sum_score,
    "instructions": instruction_score,
    "small_talk": small_talk_score,
}


ALL_SKILLS = "all"  # in tables: the mean over the skills, each counted alike


def skill_score(example: Example, text: str) -> float:
    """How right an answer is, from 0 to 1, by the row's `skill`. KeyError, ValueError: the row's fields will not do."""
    return SKILLS[example["skill"]](example, text)


def reward_of_skills(judge: Callable[[Example, str], float], name: str) -> Callable[..., np.ndarray]:
    """The reward f32[B] whose value is judge(example, text). UserError for a row without the fields of a skill."""

    @functools.wraps(judge)
    def reward(examples: Sequence[Example], texts: Sequence[str]) -> np.ndarray:
        check_skill_rows(examples, name)
        return np.array([judge(example, text) for example, text in zip(examples, texts, strict=True)], np.float32)

    del reward.__wrapped__  # its signature is a reward's, not that of the judge
    return reward


def check_skill_rows(examples: Sequence[Example], name: str) -> None:
    """UserError for the first row that lacks a field, or names no skill, or a sum whose answer is no number."""
    for i, example in enumerate(examples):
        row = f"row {i + 1} of {len(examples)}"
        asked = textwrap.shorten(last_user_message(example["messages"]), 40, placeholder="...")
        if missing := [field for field in FIELDS if field not in example]:
            raise UserError(
                f"reward {name} reads the fields {', '.join(FIELDS)}, but {row} ({asked!r}) has no "
                f"{missing[0]}: take the source assistant or rows with these columns, or another reward"
            )
        if example["skill"] not in SKILLS:
            raise UserError(
                f"reward {name}: the skill of {row} ({asked!r}) is {example['skill']!r}; choose one of "
                f"{', '.join(SKILLS)}"
            )
        if example["skill"] == "sums" and not re.fullmatch(r"-?\d+", str(example["answer"]), re.ASCII):
            raise UserError(f"reward {name}: the answer of {row} ({asked!r}) is {example['answer']!r}, no whole number")


skills_reward = reward_of_skills(skill_score, "skills")


def strange_names(text: str, known: set[str]) -> list[str]:
    """Capitalised words inside the sentences that are neither `known` nor common."""
    found = []
    for sentence in sentences(text):
        for word in CAPITALIZED.findall(sentence)[1:]:
            if word[0].isupper() and not all(part in known or part in STOP_WORDS for part in words(word)):
                found.append(word)
    return found


def _last_position(said: Sequence[str], wanted: Sequence[str]) -> int | None:
    """Where the words `wanted` stand side by side in `said` for the last time; None: nowhere."""
    places = range(len(said) - len(wanted), -1, -1) if wanted else ()
    return next((i for i in places if list(said[i : i + len(wanted)]) == list(wanted)), None)


def _bare(text: str) -> str:
    """Without space, quotes and one full stop around it."""
    return text.strip().strip(QUOTES).removesuffix(".").strip().strip(QUOTES)

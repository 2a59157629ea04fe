"""A judge of assistants that training never sees: the aims of `assistant`, measured in other ways.

Nothing here shares a criterion's code with lm.rewards.assistant or the verifier of skills, so that what a policy learns
by exploiting one is not worth the same to the other. Each answer gets 0 to 10.
"""

import functools
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from lm.data.conversations import Example, last_user_message
from lm.data.sources import chitchat_dialogues
from lm.rewards.verifiers.number import number_value, stated_number
from lm.rewards.verifiers.skills import check_skill_rows
from lm.rewards.verifiers.text import normalized_answer

UNSURE_TOKENS = ("know", "sure", "heard", "idea", "familiar", "recognise", "recognize", "tell")
NEGATIONS = ("n't", " not ", " no ", " never ", "unknown", "unsure")
CLAIM = re.compile(r"\b(?:it is|is called|is in|are in|its|answer is)\b")
GRAM = 4  # characters of the pieces by which texts are compared
USUAL_TIMES = 20  # that three letters must follow one another in the conversations
EXPECTED_WORDS = 60  # beyond it a checked answer is no longer short


def is_unsure(text: str) -> bool:
    """A negation and a word of knowing in one sentence."""
    plain = f" {text.casefold().replace('’', chr(39))} "
    return any(n in plain for n in NEGATIONS) and any(token in plain for token in UNSURE_TOKENS)


def letters(text: str) -> str:
    """Lower-case letters and digits without accents, one space between words, a space at both ends."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).casefold()
    return f" {' '.join(re.findall('[a-z0-9]+', plain))} "


def checked_points(example: Example, text: str) -> float:
    """0 to 10 for an answer to a question with a known answer, or about a made-up name."""
    skill, truth, brevity = example["skill"], example["answer"], max(0.0, 1 - len(text.split()) / EXPECTED_WORDS)
    if skill == "unknown_names":
        return 8.0 * is_unsure(text) * (not CLAIM.search(text.casefold())) + 2 * brevity * is_unsure(text)
    if skill == "sums":
        return (8 + 2 * brevity) * float(stated_number(text) == number_value(str(truth)))
    if skill == "instructions":
        is_same = normalized_answer(text) == normalized_answer(truth)
        has_case = example["task"] != "capitals" or text == text.upper()
        return (8 + 2 * brevity) * float(is_same and has_case)
    if is_unsure(text):
        return 3.0
    # The value closes the answer, or opens it and is what is told about: where one puts what one was asked for.
    said, value = letters(text), letters(truth)
    is_told = said.endswith(value) or said.startswith(f"{value}is ")
    return (8 + 2 * brevity) * float(is_told and (" or " not in said) and "," not in text)


def talk_points(example: Example, text: str) -> float:
    """0 to 10 for small talk: closes a sentence 2, statements and no questions 2, two longer words that the prompt
    lacks 2, pieces of words that it has 2, letters as they follow one another in people's words 2; 0 for text that
    compresses like a repetition or is a piece of the prompt."""
    stripped, message = text.strip(), last_user_message(example["messages"])
    said, asked = _grams(stripped), _grams(message)
    packed = len(zlib.compress(stripped.encode(), 9)) / (len(stripped.encode()) + 8)
    if not said or packed < 0.65 or len(said & asked) > 0.95 * len(said):
        return 0.0
    stated = sum(len(part.strip()) for part in re.split(r"[^.!]*\?", stripped)) / len(stripped)
    own = {word for word in letters(stripped).split() if len(word) >= 4} - set(letters(message).split())
    shared = _overlap(said, asked)
    usual_spelling = np.mean([word_grams(word) <= usual_grams() for word in letters(stripped).split()])
    return 2.0 * (
        (stripped[-1] in ".!?…") + stated + min(2, len(own)) / 2 + min(1.0, shared / 0.05) + float(usual_spelling)
    )


def word_grams(word: str) -> frozenset[str]:
    """Three letters in a row, the word's ends marked."""
    marked = f"<{word}>"
    return frozenset(marked[i : i + 3] for i in range(len(marked) - 2))


@functools.cache
def usual_grams() -> frozenset[str]:
    """Those of the words of human conversations, each often enough to be no slip."""
    said = Counter(word for _, turns in chitchat_dialogues() for turn in turns for word in letters(turn).split())
    counts: Counter[str] = Counter()
    for word, times in said.items():
        counts.update(dict.fromkeys(word_grams(word), times))
    return frozenset(gram for gram, times in counts.items() if times >= USUAL_TIMES)


def assistant_held_out_reward(examples: Sequence[Example], texts: Sequence[str]) -> np.ndarray:
    """f32[B], 0 to 10; small talk loses up to 5 as it resembles what was said to other prompts of the batch."""
    check_skill_rows(examples, "assistant_held_out")
    talk = [i for i, example in enumerate(examples) if example["skill"] == "small_talk"]
    found = np.array(
        [
            talk_points(e, t) if e["skill"] == "small_talk" else checked_points(e, t)
            for e, t in zip(examples, texts, strict=True)
        ],
        np.float32,
    )
    grams = {i: _grams(texts[i]) for i in talk}
    for i in talk:
        others = [j for j in talk if examples[j]["messages"] != examples[i]["messages"]]
        if others:
            resemblance = float(np.mean([_overlap(grams[i], grams[j]) for j in others]))
            found[i] -= 5 * resemblance
    return found


def _grams(text: str) -> frozenset[str]:
    plain = letters(text)
    return frozenset(plain[i : i + GRAM] for i in range(len(plain) - GRAM + 1))


def _overlap(a: frozenset[str], b: frozenset[str]) -> float:
    """Jaccard's index; 0 where one is empty."""
    return len(a & b) / len(a | b) if a and b else 0.0

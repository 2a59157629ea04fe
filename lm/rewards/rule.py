"""The quickstart's rater: a published rule in place of a human, so that its scores can be checked by reading."""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lm.data.conversations import Example, last_user_message

RULE = (
    "The rater reads the user's last message and the answer, and adds up: 1 for one or two sentences, 1 for ending "
    "in a full stop, question mark or exclamation mark, 1 for sharing a content word with the message, 1 for asking "
    "something back, 1 for not repeating itself (no word three times in a row, no three words twice, no sentence "
    "twice), 1 for a length of 3 to 40 words, 1 for clean text (letters, digits and ordinary punctuation), and "
    "takes away 4 for a rude word. The best answer scores 7."
)

STOP_WORDS = frozenset(
    """a about after all also am an and any are aren't as at be because been before being but by can can't cannot could
    did didn't do does doesn't doing don't dont down even for from get go going gonna good got had has have having
    he her here hey hello hi him his how i i'd i'll i'm i've if im in into is isn't it it's its just know like lol
    lot me more most much my no not now of oh ok okay on one only or other our out over really right same say see
    she should so some still such sure than thanks that that's thats the their them then there these they they're
    thing things think this those through time to too up us very want was wasn't way we well were what what's
    whats when where which while who why will with won't would yeah yep yes you you'd you'll you're you've
    your""".split()
)
RUDE_WORDS = frozenset(
    """arse asshole ass bastard bitch bullshit crap cunt damn dick dumbass fuck fucked fucker fucking goddamn idiot
    moron motherfucker piss pissed prick retard shit shitty slut stfu stupid twat wanker whore wtf""".split()
)


def is_brief(message: str, answer: str) -> float:
    """One or two sentences."""
    return float(1 <= len(sentences(answer)) <= 2)


def ends_with_punctuation(message: str, answer: str) -> float:
    """Ends in a full stop, question mark or exclamation mark."""
    return float(answer.rstrip().endswith((".", "!", "?")))


def is_on_topic(message: str, answer: str) -> float:
    """Shares a content word with the message, stems compared."""
    return float(bool(content_stems(message) & content_stems(answer)))


def asks_question(message: str, answer: str) -> float:
    """Asks something back: a question mark after at least two words."""
    return float(any(s.endswith("?") and len(words(s)) >= 2 for s in sentences(answer)))


def is_not_repetitive(message: str, answer: str) -> float:
    """No word three times in a row, no three words twice, no sentence twice."""
    said = words(answer)
    trigrams = list(zip(said, said[1:], said[2:]))
    spoken = [tuple(words(sentence)) for sentence in sentences(answer)]
    tripled = any(a == b == c for a, b, c in trigrams)
    return float(not tripled and len(set(trigrams)) == len(trigrams) and len(set(spoken)) == len(spoken))


def is_moderate_length(message: str, answer: str) -> float:
    """3 to 40 words."""
    return float(3 <= len(words(answer)) <= 40)


def is_clean_text(message: str, answer: str) -> float:
    """Letters, digits, spaces and ordinary punctuation only, no run of four or more marks."""
    return float(bool(_CLEAN_TEXT.fullmatch(answer.strip())))


def has_rude_word(message: str, answer: str) -> float:
    """Holds a word of RUDE_WORDS."""
    return float(not RUDE_WORDS.isdisjoint(words(answer)))


Criterion = Callable[[str, str], float]  # (the user's last message, the answer) -> 0 or 1
CRITERIA: Mapping[str, tuple[float, Criterion]] = {
    "one or two sentences": (1.0, is_brief),
    "ends properly": (1.0, ends_with_punctuation),
    "on topic": (1.0, is_on_topic),
    "asks something back": (1.0, asks_question),
    "not repetitive": (1.0, is_not_repetitive),
    "3 to 40 words": (1.0, is_moderate_length),
    "clean text": (1.0, is_clean_text),
    "rude word": (-4.0, has_rude_word),
}


def rule_reward(examples: Sequence[Example], texts: Sequence[str]) -> np.ndarray:
    """f32[B]: the rule's score of each answer in `texts` to the messages of its example, from -4 to 7."""
    pairs = zip(examples, texts, strict=True)
    scores = [sum(criterion_scores(example["messages"], text).values()) for example, text in pairs]
    return np.array(scores, np.float32)


def criterion_scores(prompt: Sequence[Mapping[str, str]], text: str) -> dict[str, float]:
    """What each criterion gives, weight included; the score is the sum."""
    message = last_user_message(prompt)
    return {name: weight * criterion(message, text) for name, (weight, criterion) in CRITERIA.items()}


_CLEAN_TEXT = re.compile(r"(?!.*[^\w\s]{4})(?:[^\W_]|[ .,;:!?'’\"“”()%$&/+-])+")


def words(text: str) -> list[str]:
    """Lower-case words of letters and digits, apostrophes inside them kept."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))


def sentences(text: str) -> list[str]:
    """Split after a run of . ! ? before a space or the end; parts without a word are dropped."""
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+", text.strip()) if words(sentence)]


def content_stems(text: str) -> set[str]:
    """Stems of the words of three letters or more that are none of STOP_WORDS."""
    return {_stem(word) for word in words(text) if word not in STOP_WORDS and len(word) > 2}


def _stem(word: str) -> str:
    """A simple stem: without possessive or plural, one common ending and a doubled last letter; at least three letters
    stay."""
    word = re.sub(r"'s$|(?<=\w{3})(?<!s)s$", "", word)
    return re.sub(r"(.)\1$", r"\1", re.sub(r"(?<=\w{3})(?:ied|ing|ed|ie|ly|y|e)$", "", word))

"""The rater of an assistant: a published rule that judges what a person would, by what was asked.

Where a right answer is known (lm.rewards.verifiers.skills), being right and honest decides; on small talk style does.
The rule looks at a batch as a whole, too: one answer for every prompt is no answer, whatever it scores alone.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lm.data.conversations import Example, last_user_message
from lm.data.facts.abstention import is_abstention
from lm.rewards.rule import (
    STOP_WORDS,
    content_stems,
    ends_with_punctuation,
    has_rude_word,
    is_clean_text,
    is_not_repetitive,
    sentences,
    words,
)
from lm.rewards.verifiers.lexicon import made_up_words
from lm.rewards.verifiers.skills import (
    check_skill_rows,
    is_personal_reply,
    is_yes_or_no_reply,
    returns_courtesy,
    skill_score,
)

ASSISTANT_RULE = (
    "Where a right answer is known, the rater gives 5 for a right one (the fact, the sum, the instruction carried "
    "out to the letter, or to a made-up name that one does not know it; half of that for naming another), 1.5 for "
    "saying that one does not know a fact that one should, 0 for anything wrong, and 1 for a right answer of at "
    "most 12 words. To small talk it gives 1 for one or two whole sentences, 1 for saying something (questions "
    "alone say nothing), 2 for being to the point (on the user's topic with a word of one's own; or a question "
    "about oneself answered in the first person, yes or no to what asks for it, a greeting, thanks or a mood "
    "answered as people do) and 1 for 4 to 25 words. From every answer it takes 1 for text that is not clean or "
    "repeats itself, and 4 for a rude word; from small talk 2 each for a word that is none, for empty praise and "
    "for the user's own words handed back, and up to 4 for saying to others of the same batch what was said here "
    "already. Length beyond that, and asking something back, earn nothing. The best answer scores 6 where it can "
    "be checked, else 5."
)

CONCISE_WORDS = 12
REFUSED_FACT = 1.5  # between wrong, 0, and right, 5: a guess that is right less often than 3 in 10 does not pay
PRAISE_WORDS = frozenset(
    """amazing awesome beautiful best brilliant cool excellent exciting fantastic fun glad good great happy incredible
    interesting like love lovely nice perfect pretty sound sounds super sweet terrific wonderful wow wonder yay
    absolutely definitely totally truly quite idea point question story thing""".split()
)
FEWEST_OTHERS = 4  # small talk in a batch from which on its sameness is judged
USUAL_SHARE = 0.2  # of the other answers may say the same: some prompts are alike


def is_right(example: Example, text: str) -> float:
    """The skill's own check (lm.rewards.verifiers.skills)."""
    return skill_score(example, text)


def refuses_known_fact(example: Example, text: str) -> float:
    """Says that it does not know where there is an answer: better than a wrong one, worse than the right one."""
    return float(bool(example["answer"]) and skill_score(example, text) == 0 and is_abstention(text))


def is_concise_and_right(example: Example, text: str) -> float:
    """A right answer of few words."""
    return float(len(words(text)) <= CONCISE_WORDS) * skill_score(example, text)


def is_whole_and_brief(example: Example, text: str) -> float:
    """One or two sentences, of which the last ends as one."""
    message = last_user_message(example["messages"])
    return float(1 <= len(sentences(text)) <= 2 and ends_with_punctuation(message, text) > 0)


def says_something(example: Example, text: str) -> float:
    """Three words or more, and a sentence that is no question."""
    return float(len(words(text)) >= 3 and any(not sentence.endswith("?") for sentence in sentences(text)))


def is_to_the_point(example: Example, text: str) -> float:
    """On the topic, or an answer in kind: in the first person, yes or no, a courtesy returned."""
    message = last_user_message(example["messages"])
    in_kind = is_personal_reply(message, text) or is_yes_or_no_reply(message, text) or returns_courtesy(message, text)
    return float(in_kind or adds_to_topic(message, text))


def adds_to_topic(message: str, text: str) -> bool:
    """Whether it shares a content word with the message in a sentence that is no question, and adds one."""
    asked = content_stems(message)
    told = content_stems(" ".join(sentence for sentence in sentences(text) if not sentence.endswith("?")))
    return bool(asked & told) and bool(told - asked)


def is_moderate(example: Example, text: str) -> float:
    """4 to 25 words."""
    return float(4 <= len(words(text)) <= 25)


def is_unclean(example: Example, text: str) -> float:
    """Repeats itself, or holds other marks than ordinary ones. What is right may do so: "B-A-N-A-N-A"."""
    if example["skill"] != "small_talk" and skill_score(example, text) == 1:
        return 0.0
    message = last_user_message(example["messages"])
    return float(not is_not_repetitive(message, text) or not is_clean_text(message, text))


def is_rude(example: Example, text: str) -> float:
    """Holds a rude word."""
    return has_rude_word(last_user_message(example["messages"]), text)


def has_made_up_word(example: Example, text: str) -> float:
    """Holds a word that is neither in the lexicon nor in the message (lm.rewards.verifiers.lexicon)."""
    return float(bool(made_up_words(text, words(last_user_message(example["messages"])))))


def is_empty_praise(example: Example, text: str) -> float:
    """Has no content word but such as praise anything."""
    said = {word.partition("'")[0] for word in words(text)} - STOP_WORDS
    return float(bool(words(text)) and said <= PRAISE_WORDS and bool(said))


def hands_back(example: Example, text: str) -> float:
    """Says nothing but words of the message."""
    said = words(text)
    return float(len(said) >= 3 and set(said) <= set(words(last_user_message(example["messages"]))))


Criterion = Callable[[Example, str], float]  # (the row, the answer) -> 0 to 1
COMMON_CRITERIA: Mapping[str, tuple[float, Criterion]] = {"not clean": (-1.0, is_unclean), "rude word": (-4.0, is_rude)}
CHECKED_CRITERIA: Mapping[str, tuple[float, Criterion]] = {
    "right": (5.0, is_right),
    "does not know a fact it should": (REFUSED_FACT, refuses_known_fact),
    "right in few words": (1.0, is_concise_and_right),
    **COMMON_CRITERIA,
}
SMALL_TALK_CRITERIA: Mapping[str, tuple[float, Criterion]] = {
    "one or two whole sentences": (1.0, is_whole_and_brief),
    "says something": (1.0, says_something),
    "to the point": (2.0, is_to_the_point),
    "4 to 25 words": (1.0, is_moderate),
    "a word that is none": (-2.0, has_made_up_word),
    "empty praise": (-2.0, is_empty_praise),
    "hands back the user's words": (-2.0, hands_back),
    **COMMON_CRITERIA,
}
SAMENESS = "says the same to others"
SAMENESS_WEIGHT = -4.0


def assistant_reward(examples: Sequence[Example], texts: Sequence[str]) -> np.ndarray:
    """f32[B]: the rule's score of each answer, from -12 to 6; that of small talk depends on the batch (`sameness`)."""
    check_skill_rows(examples, "assistant")
    alone = [sum(criterion_scores(example, text).values()) for example, text in zip(examples, texts, strict=True)]
    return np.array(alone, np.float32) + np.float32(SAMENESS_WEIGHT) * sameness(examples, texts)


def criterion_scores(example: Example, text: str) -> dict[str, float]:
    """What each criterion gives an answer by itself, weight included."""
    criteria = SMALL_TALK_CRITERIA if example["skill"] == "small_talk" else CHECKED_CRITERIA
    return {name: weight * criterion(example, text) for name, (weight, criterion) in criteria.items()}


def sameness(examples: Sequence[Example], texts: Sequence[str]) -> np.ndarray:
    """f32[B], 0 to 1: how far the small talk to other prompts of the batch is the same: in all words, or its opening
    and its frame.

    The share of the other prompts with an answer like it, less USUAL_SHARE and scaled to 1. Alike are answers whose
    words are the same once those of their own prompt are left out: "I like X." to every X is one answer. 0 for other
    skills, and where the batch has few other prompts.
    """
    talk = [i for i, example in enumerate(examples) if example["skill"] == "small_talk"]
    asked = {i: last_user_message(examples[i]["messages"]) for i in talk}
    frame = {i: answer_frame(asked[i], texts[i]) for i in talk}
    others = len(set(asked.values())) - 1
    found = np.zeros(len(texts), np.float32)
    if others < FEWEST_OTHERS:
        return found
    prompts = Counter(said for said, _ in {(frame[i], asked[i]) for i in talk})
    for i in talk:
        share = (prompts[frame[i]] - 1) / others
        found[i] = max(0.0, share - USUAL_SHARE) / (1 - USUAL_SHARE)
    return found


def answer_frame(message: str, text: str) -> tuple[str, ...]:
    """The words of an answer without the content words that its prompt has."""
    asked = content_stems(message)
    return tuple(word for word in words(text) if not content_stems(word) & asked)

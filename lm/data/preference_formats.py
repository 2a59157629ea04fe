"""Preferences as other people's rows hold them, turned into our rankings. RowFault says why a row is none.

A pair is a ranking of two answers; a completion with a label is one of a single answer, which is good or bad by itself;
ratings rank as many answers as they rate.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lm.data.messages import (
    RowFault,
    bare_messages,
    list_value,
    name_of_row,
    prompt_messages,
    transcript_messages,
    with_system,
)
from lm.data.preferences import (
    DESIRABLE,
    LABEL_AXIS,
    MAX_SCORE,
    UNDESIRABLE,
    Ranking,
    preference_pairs,
    ranking_from_record,
)

Fields = Mapping[str, Any]
UNKNOWN_TIME = "1970-01-01T00:00:00+00:00"  # of a verdict that does not say when it was given
PAIR_SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"),
)  # fmt: skip
RATING_LISTS = ("ratings", "scores")  # beside the completions: a number for each
SCORE_FIELDS = ("score", "rating", "overall_score")  # of a completion among several
TEXT_FIELDS = ("response", "completion", "text", "content")  # of a completion among several
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}  # as str(label) has it


def ranking_of_record(fields: Fields) -> Ranking:
    """Our own record: see lm.data.preferences."""
    return ranking_from_record({name: list_value(value) for name, value in fields.items()})


def ranking_of_pair(fields: Fields) -> Ranking:
    """margin (or the difference of the scores), rounded and at least 1, is the distance of the ranks."""
    prompt, texts = _prompt_and_answers(fields)
    if texts[0].strip() == texts[1].strip():
        raise RowFault("chosen equals rejected: nobody can learn from it")
    return _ranking(fields, prompt, texts, [1, 1 + max(1, round(_margin(fields)))])


def ranking_of_label(fields: Fields) -> Ranking:
    """One answer, and its label on an axis of its own."""
    label = str(fields["label"]).lower()
    if label not in LABELS:
        raise RowFault(f"label is {fields['label']!r}, neither true nor false")
    prompt = prompt_messages(with_system(fields, fields["prompt"]))
    text = _answer_text(fields["completion"], prompt, "completion")
    axes = {LABEL_AXIS: [DESIRABLE if LABELS[label] else UNDESIRABLE]}
    return _ranking(fields, prompt, [text], [1], axes)


def ranking_of_ratings(fields: Fields) -> Ranking:
    """Equal ratings share a rank. Ratings of aspects from 1 to 10 (UltraFeedback's annotations) become axes."""
    asked = fields["prompt"] if "prompt" in fields else fields["instruction"]
    prompt = prompt_messages(with_system(fields, asked))
    name = "completions" if "completions" in fields else "responses"
    given = list_value(fields[name])
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) < 2:
        raise RowFault(f"{name} is {given!r:.60}, not a list of two or more")
    ratings, texts = _ratings(fields, given), [_completion_text(each) for each in given]
    order = sorted(set(ratings), reverse=True)
    ranking = _ranking(fields, prompt, texts, [1 + order.index(rating) for rating in ratings], _aspects(given))
    if any(texts[i] == texts[j] for i, j in preference_pairs(ranking)):
        raise RowFault("two equal answers have different ratings: nobody can learn from it")
    return ranking


def _ranking(fields: Fields, prompt: list[dict], responses: list[str], ranks: list[int], axes=None) -> Ranking:
    if any(not text.strip() for text in responses):
        raise RowFault("an answer is empty: remove it, or the row")
    rater = fields["rater"] if "rater" in fields else "file"
    name = name_of_row(fields, prompt)
    return Ranking(name, bare_messages(prompt), responses, ranks, str(rater), UNKNOWN_TIME, axes=axes or {})


def _prompt_and_answers(fields: Fields) -> tuple[list[dict], list[str]]:
    """The prompt, given or what both sides begin with, and the two answers."""
    sides = [list_value(fields["chosen"]), list_value(fields["rejected"])]
    if "prompt" in fields:
        prompt = prompt_messages(with_system(fields, fields["prompt"]))
    else:
        transcripts = [transcript_messages(side) for side in sides]
        if all(isinstance(side, str) for side in sides) and not all(transcripts):
            return _shared_text(*sides)
        sides = [transcript or side for transcript, side in zip(transcripts, sides)]
        prompt = prompt_messages(with_system(fields, _shared_messages(*sides)))
    return prompt, [_answer_text(side, prompt, name) for side, name in zip(sides, ("chosen", "rejected"))]


def _shared_messages(chosen: Any, rejected: Any) -> list[Mapping[str, Any]]:
    """What both begin with, at most all but the last message of each."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise RowFault("one of chosen and rejected is a text, the other has messages: add the field prompt")
    if chosen == rejected:
        raise RowFault("chosen equals rejected: nobody can learn from it")
    shared = []
    for one, other in zip(chosen[:-1], rejected[:-1]):
        if one != other:
            break
        shared.append(one)
    if not shared:
        raise RowFault("chosen and rejected have no prompt and begin with different messages: add the field prompt")
    return shared


def _shared_text(chosen: str, rejected: str) -> tuple[list[dict], list[str]]:
    """What both texts begin with, up to a space, as the prompt, and how each goes on (as TRL's implicit prompts)."""
    if chosen == rejected:
        raise RowFault("chosen equals rejected: nobody can learn from it")
    size = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    begin = chosen.rfind(" ", 0, size) + 1
    if not chosen[:begin].strip():
        raise RowFault("chosen and rejected are texts that begin with different words: add the field prompt")
    return prompt_messages(chosen[:begin].strip()), [text[begin:] for text in (chosen, rejected)]


def _answer_text(given: Any, prompt: Sequence[Mapping[str, Any]], name: str) -> str:
    """The one answer in a completion, or in a conversation that begins with the prompt."""
    given = list_value(given)
    if isinstance(given, str):
        return given
    messages = bare_messages([given] if isinstance(given, Mapping) else given)
    asked = bare_messages(prompt)
    for begun in (asked, asked[1:] if asked[0]["role"] == "system" else asked, asked[-1:]):
        if len(messages) > 1 and messages[: len(begun)] == begun:
            messages = messages[len(begun) :]
            break
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise RowFault(f"{name} must be one answer to the prompt: other messages come before the last")
    if not isinstance(messages[0]["content"], str):
        raise RowFault(f"{name} has {messages[0]['content']!r:.60} for content, not text")
    return messages[0]["content"]


def _margin(fields: Fields) -> float:
    """By how much the chosen answer is better, at least 1 where nothing is said or the scores are equal."""
    if "margin" in fields:
        margin = _number(fields["margin"], "margin")
        if not margin > 0:
            raise RowFault(f"chosen is not better than rejected: their margin is {margin:g}")
        return margin
    for better, worse in PAIR_SCORES:
        if better in fields and worse in fields:
            margin = _number(fields[better], better) - _number(fields[worse], worse)
            if margin < 0:
                raise RowFault(f"chosen is worse than rejected by their scores: their margin is {margin:g}")
            return margin
    return 1.0


def _ratings(fields: Fields, completions: Sequence[Any]) -> list[float]:
    for name in RATING_LISTS:
        if name in fields:
            ratings = _parsed_list(fields[name])
            if not isinstance(ratings, Sequence) or isinstance(ratings, str) or len(ratings) != len(completions):
                raise RowFault(f"{name} is {ratings!r:.60}, not a number for each of {len(completions)} completions")
            return [_number(rating, name) for rating in ratings]
    for name in SCORE_FIELDS:
        if all(isinstance(each, Mapping) and name in each and each[name] is not None for each in completions):
            return [_number(each[name], name) for each in completions]
    raise RowFault(f"a completion has no response or none of {', '.join(SCORE_FIELDS)}")


def _parsed_list(value: Any) -> Any:
    """Numbers that a table holds as "[3, 1]" in a cell."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _completion_text(completion: Any) -> str:
    if isinstance(completion, Mapping):
        completion = next((completion[name] for name in TEXT_FIELDS if name in completion), None)
    if not isinstance(completion, str):
        raise RowFault(f"a completion is {completion!r:.60}, not a text: give it as one of {', '.join(TEXT_FIELDS)}")
    return completion


def _aspects(completions: Sequence[Any]) -> dict[str, list[int | None]]:
    """{"helpfulness": [4, 5]} from the completions' {"annotations": {"helpfulness": {"Rating": "4"}}}."""
    judged = [each["annotations"] for each in completions if isinstance(each, Mapping) and "annotations" in each]
    if len(judged) < len(completions) or not all(isinstance(each, Mapping) for each in judged):
        return {}
    scores = {aspect: [_aspect_score(each, aspect) for each in judged] for aspect in judged[0]}
    return {aspect: values for aspect, values in scores.items() if any(values)}


def _aspect_score(judged: Mapping[str, Any], aspect: str) -> int | None:
    score = judged[aspect] if aspect in judged else None
    rating = str(score["Rating"]) if isinstance(score, Mapping) and "Rating" in score else ""
    return int(rating) if rating.isdecimal() and 1 <= int(rating) <= MAX_SCORE else None


def _number(value: Any, name: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowFault(f"{name} is {value!r:.60}, not a number")
    return number

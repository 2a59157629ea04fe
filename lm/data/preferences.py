"""Rankings of answers by a rater, who is a person, a rule or a model: one JSON object a line.

    {"name": "chitchat/...", "prompt": [{"role": "user", "content": "..."}], "responses": ["...", "..."],
     "ranking": [2, 1], "rater": "rule", "time": "2024-05-01T12:00:00+00:00"}

`ranking[i]` is the rank of `responses[i]`: 1 is best, equal ranks are a tie. `name` says what the prompt was taken
from, so that its rankings are held out with it; a prompt that comes under several names is held out by its own words,
in all its rankings. Other fields may follow: see `Ranking`.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from lm.core.errors import UserError
from lm.core.textfiles import numbered_lines
from lm.data.sources import normalized_words
from lm.tokenizer import ROLES

RATING_AXES = (
    "helpful",
    "clear",
    "safe",
    "follows the instruction",
    "conversational",
)  # our page asks for 1 to 5 on each
OVERALL_AXIS = "overall"  # the axis that `ranking` itself is
MAX_SCORE = 10  # score on any axis that is accepted
LABEL_AXIS = "desirable"  # the axis on which an answer is labelled good or bad by itself, for KTO
DESIRABLE, UNDESIRABLE = MAX_SCORE, 1  # its scores
RESPONSE_FLAGS = ("toxic", "dangerous", "low quality")
VERDICT_KINDS = ("ranked", "both bad", "skipped")


class Ranking(NamedTuple):
    """One verdict. The first six fields are in every record, the others where they are known."""

    name: str
    prompt: list[dict]  # messages
    responses: list[str]
    ranking: list[int]  # of each response; 1 is best, equal is a tie
    rater: str
    time: str  # ISO 8601
    verdict: str = "ranked"  # one of VERDICT_KINDS; "both bad" and "skipped" rank all responses alike
    axes: Mapping[str, Sequence[int | None]] = {}  # a score of each response, 1 is poor; None: not scored
    flags: Sequence[Sequence[str]] = ()  # of each response
    sources: Sequence[Mapping[str, Any]] = ()  # of each response: {"model", "fingerprint", "sampler"}
    shown: Sequence[int] = ()  # the responses in the order in which the rater saw them
    seconds: float | None = None  # from showing to verdict

    @property
    def content(self) -> str:
        """The words of the prompt: rankings of the same prompt are on one side of a split. See
        lm.data.sources.split_held_out."""
        return normalized_words(message["content"] for message in self.prompt)


REQUIRED_FIELDS = tuple(field for field in Ranking._fields if field not in Ranking._field_defaults)


def read_jsonl_rankings(path: str | Path) -> list[Ranking]:
    """Every verdict of a file. UserError names the line and what is wrong with it."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"no rankings at {path} ({error.strerror}): rank some first") from error
    rankings = []
    for number, line in numbered_lines(data):
        try:
            rankings.append(ranking_from_record(json.loads(line.decode())))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number} is not UTF-8 text: rankings are JSON, one object a line") from error
        except ValueError as error:
            fault = f"not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else error
            raise UserError(f"{path}:{number}: {fault}; mend or remove the line") from error
    return rankings


def append_rankings(path: str | Path, rankings: Iterable[Ranking]) -> None:
    """Adds verdicts to a file and returns when they are on disk."""
    text = "".join(f"{ranking_json(ranking)}\n" for ranking in rankings)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def ranking_json(ranking: Ranking) -> str:
    """The ranking as JSON, without the fields of which nothing is known. ValueError for an invalid one."""
    record = ranking_from_record(ranking._asdict())._asdict()
    known = {name: value for name, value in record.items() if name in REQUIRED_FIELDS or value != _field_default(name)}
    return json.dumps(known, ensure_ascii=False)


def axis_ranks(ranking: Ranking, axis: str) -> list[int]:
    """The rank of each response on an axis: as given, or turned from scores; 0 where it was not scored."""
    if axis == OVERALL_AXIS:
        return list(ranking.ranking)
    scored = ranking.axes[axis] if axis in ranking.axes else [None] * len(ranking.responses)
    return [0 if score is None else MAX_SCORE + 1 - score for score in scored]


def preference_pairs(ranking: Ranking) -> list[tuple[int, int]]:
    """(chosen, rejected) indices of every strict preference; ties give none."""
    ranks = ranking.ranking
    return [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]


def ranking_from_record(record: Any) -> Ranking:
    """The verdict in a JSON object; ValueError says what is wrong with it."""
    keys = set(record) if isinstance(record, dict) else set()
    if not set(REQUIRED_FIELDS) <= keys <= set(Ranking._fields):
        raise ValueError(
            f"not an object with the keys {', '.join(REQUIRED_FIELDS)} and, of the others, "
            f"only {', '.join(Ranking._field_defaults)}"
        )
    ranking = Ranking(**record)
    for field in ("name", "rater", "time"):
        if not isinstance(record[field], str):
            raise ValueError(f"{field} is {record[field]!r}, not text")
    if not isinstance(ranking.prompt, list) or not ranking.prompt or not all(map(_is_message, ranking.prompt)):
        raise ValueError("prompt is not a list of messages {'role', 'content'}")
    if not isinstance(ranking.responses, list) or not all(isinstance(text, str) for text in ranking.responses):
        raise ValueError("responses is not a list of texts")
    _check_ranks(ranking)
    _check_details(ranking)
    datetime.fromisoformat(ranking.time)
    return ranking


def _check_ranks(ranking: Ranking) -> None:
    if not isinstance(ranking.ranking, list) or len(ranking.ranking) != len(ranking.responses):
        raise ValueError(f"ranking {ranking.ranking!r} gives no rank to each of {len(ranking.responses)} texts")
    if not all(type(rank) is int and rank >= 1 for rank in ranking.ranking):
        raise ValueError(f"ranking {ranking.ranking!r} holds something other than whole numbers from 1")
    if ranking.verdict not in VERDICT_KINDS:
        raise ValueError(f"verdict is {ranking.verdict!r}, not one of {', '.join(VERDICT_KINDS)}")
    if ranking.verdict != "ranked" and len(set(ranking.ranking)) > 1:
        raise ValueError(f"a verdict {ranking.verdict!r} cannot prefer one response: ranking {ranking.ranking!r}")


def _check_details(ranking: Ranking) -> None:
    count = len(ranking.responses)
    if not isinstance(ranking.axes, dict):
        raise ValueError(f"axes is {ranking.axes!r}, not an object of scores")
    for axis, scores in ranking.axes.items():
        if len(scores) != count or not all(s is None or type(s) is int and 1 <= s <= MAX_SCORE for s in scores):
            raise ValueError(
                f"axes[{axis!r}] is {scores!r}, not a number from 1 to {MAX_SCORE}, or null, for each response"
            )
    if ranking.flags and not (
        len(ranking.flags) == count and all(set(flags) <= set(RESPONSE_FLAGS) for flags in ranking.flags)
    ):
        raise ValueError(f"flags is {ranking.flags!r}, not a list of {', '.join(RESPONSE_FLAGS)} for each response")
    if ranking.sources and len(ranking.sources) != count:
        raise ValueError(f"sources names {len(ranking.sources)} models of {count} responses")
    if ranking.shown and sorted(ranking.shown) != list(range(count)):
        raise ValueError(f"shown is {ranking.shown!r}, not an order of {count} responses")
    if ranking.seconds is not None and not (isinstance(ranking.seconds, (int, float)) and ranking.seconds >= 0):
        raise ValueError(f"seconds is {ranking.seconds!r}, not a time")


def _field_default(field: str) -> Any:
    return Ranking._field_defaults[field]


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and message["role"] in ROLES
        and isinstance(message["content"], str)
    )


OVERALL_ONLY: Mapping[str, float] = {OVERALL_AXIS: 1.0}  # an axis and its weight in the total score


def ordered_axes(axes: Mapping[str, float]) -> dict[str, float]:
    """The axes with OVERALL_AXIS first, as heads and ranks are numbered: a config sorts its entries by name."""
    if OVERALL_AXIS not in axes:
        raise UserError(
            f"axes are {', '.join(axes) or 'empty'}: {OVERALL_AXIS}, the ranking itself, must be among them"
        )
    return {OVERALL_AXIS: axes[OVERALL_AXIS], **axes}

"""A rater's verdicts, human or rule: one JSON object a line.

    {"name": "chitchat/...", "prompt": [{"role": "user", "content": "..."}], "responses": ["...", "..."],
     "ranking": [2, 1], "rater": "rule", "time": "2024-05-01T12:00:00+00:00"}

`ranking[i]` is the rank of `responses[i]`: 1 is best, equal ranks are a tie. `name` says what the prompt was taken
from, so that its verdicts are held out with it.
"""

import json
import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from lm.errors import UserError
from lm.tokenizer import ROLES


class Ranking(NamedTuple):
    name: str
    prompt: list[dict]  # messages
    responses: list[str]
    ranking: list[int]  # of each response; 1 is best, equal is a tie
    rater: str
    time: str  # ISO 8601


def read(path: str | Path) -> list[Ranking]:
    """Every verdict of a file. UserError names the line and its fault."""
    try:
        lines = Path(path).read_bytes().decode().split("\n")
    except OSError as error:
        raise UserError(f"no rankings at {path} ({error.strerror}): rank some first") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: rankings are JSON, one object a line") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_ranking(json.loads(line)))
            except ValueError as error:
                fault = f"not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else error
                raise UserError(f"{path}:{number}: {fault}; mend or remove the line") from error
    return found


def append(path: str | Path, rankings: Iterable[Ranking]) -> None:
    """Adds verdicts to a file and returns when they are on disk."""
    lines = [json.dumps(_ranking(r._asdict())._asdict(), ensure_ascii=False) + "\n" for r in rankings]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())


def pairs(ranking: Ranking) -> list[tuple[int, int]]:
    """(chosen, rejected) indices of every strict preference; ties give none."""
    ranks = ranking.ranking
    return [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]


def _ranking(record: dict) -> Ranking:
    """The verdict in a JSON object; ValueError says what is wrong with it."""
    if not isinstance(record, dict) or set(record) != set(Ranking._fields):
        raise ValueError(f"not an object with exactly the keys {', '.join(Ranking._fields)}")
    ranking = Ranking(**record)
    for field in ("name", "rater", "time"):
        if not isinstance(record[field], str):
            raise ValueError(f"{field} is {record[field]!r}, not text")
    if not isinstance(ranking.prompt, list) or not ranking.prompt or not all(map(_is_message, ranking.prompt)):
        raise ValueError("prompt is not a list of messages {'role', 'content'}")
    if not isinstance(ranking.responses, list) or not all(isinstance(text, str) for text in ranking.responses):
        raise ValueError("responses is not a list of texts")
    if not isinstance(ranking.ranking, list) or len(ranking.ranking) != len(ranking.responses):
        raise ValueError(f"ranking {ranking.ranking!r} gives no rank to each of {len(ranking.responses)} texts")
    if not all(type(rank) is int and rank >= 1 for rank in ranking.ranking):
        raise ValueError(f"ranking {ranking.ranking!r} holds something other than whole numbers from 1")
    datetime.fromisoformat(ranking.time)
    return ranking


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and message["role"] in ROLES
        and isinstance(message["content"], str)
    )

"""Let a model or a rule rate the items that people rate, and see how far it can be trusted.

    python -m lm.judge --workdir=runs/people --judge=runs/quickstart
    python -m lm.judge --workdir=runs/people --judge=http://localhost:8000/v1 --model=NAME
    python -m lm.judge --workdir=runs/people --judge=rule

Its verdicts go into WORKDIR/people.db beside those of people, each at once: after a kill the same command continues. A
model is asked about every pair of responses in both orders; what it said is kept in WORKDIR/judges/RATER.jsonl, a line
an item. An endpoint that wants a key finds it in OPENAI_API_KEY.
"""

import itertools
import json
import math
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import jax
import numpy as np

from lm.agreement import bootstrap, cohen_kappa, share
from lm.chat import policy_folder
from lm.config import parsed
from lm.console import Progress, main, say, table, warn
from lm.data import rankings as records
from lm.data.rankings import Ranking
from lm.data.store import PEOPLE, Item, Store, Verdict
from lm.errors import UserError
from lm.intervals import Estimate
from lm.ranking.results import votes
from lm.rewards import REWARDS, Reward
from lm.rewards.judge import (
    RUBRIC,
    TOO_LONG,
    Choice,
    Judge,
    by_endpoint,
    by_model,
    consistency,
    position_bias,
    questions,
    wins,
)
from lm.stages import JUDGES
from lm.textfiles import text_of
from lm.verdicts import ranks
from lm.workdir import load, write_text

FLAGS = {
    "workdir": dict(required=True, metavar="DIR", help=f"the folder whose {PEOPLE} holds the items"),
    "judge": dict(required=True, metavar="DIR|URL|RULE", help=f"a policy, an endpoint, or {', '.join(REWARDS)}"),
    "model": dict(metavar="NAME", help="the model to ask an endpoint for"),
    "rubric": dict(metavar="FILE", help="what a model is told to judge by, instead of lm.rewards.judge.RUBRIC"),
    "limit": dict(type=int, metavar="N", help="rate at most so many items this time"),
}


class Opinion(NamedTuple):
    """What a rater thinks of an item."""

    scores: np.ndarray | None  # f[responses], higher is better; None: it could not say
    choices: Sequence[Choice] = ()  # the answers to lm.rewards.judge.questions that they come from


Opinions = Callable[[Sequence[Item]], Iterator[Opinion]]  # one an item, in order, each as soon as it is known


def rater(judge: str, model: str | None, rubric: str | None) -> tuple[str, Opinions]:
    """The name under which the verdicts are stored, and how to get them. Another rubric makes another rater."""
    endpoint = judge.startswith(("http://", "https://"))
    if endpoint and not model:
        raise UserError("an endpoint may serve several models: name one with --model")
    if model and not endpoint:
        raise UserError(f"--model is for an endpoint, but --judge={judge} is no URL: begin it with http://")
    if judge in REWARDS:
        if rubric:
            raise UserError(f"--rubric is for a model, but {judge} is a rule with its own: leave one of them out")
        return judge, by_scores(REWARDS[judge])
    text, suffix = (RUBRIC, "") if rubric is None else (read_rubric(Path(rubric)), f" ({Path(rubric).stem})")
    if endpoint:
        asked = by_endpoint(judge, model, text, api_key=os.environ.get("OPENAI_API_KEY"))
        return f"judge {model}{suffix}", by_pairs(asked)
    trained = load(policy_folder(Path(judge)), backend=jax.default_backend(), warn=warn)
    if trained.stage in JUDGES:
        raise UserError(f"{judge} is a reward model, which reads no rubric and writes no answer: name a policy")
    name = "/".join(trained.path.resolve().parts[-2:])
    policy = by_model(trained.model, trained.params["lm"], trained.tokenizer, text, jit=jax.jit)
    return f"judge {name}{suffix}", by_pairs(policy)


def read_rubric(path: Path) -> str:
    """The text of a file that a user names."""
    try:
        text = text_of(path).strip()
    except OSError as error:
        raise UserError(f"no rubric at {path} ({error.strerror}): write one, or leave --rubric out") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: a rubric is what the judge is told to judge by") from error
    if not text:
        raise UserError(f"the rubric {path} is empty: write one, or leave --rubric out")
    return text


def by_scores(reward: Reward) -> Opinions:
    """The scores of a reward."""

    def opinions(items: Sequence[Item]) -> Iterator[Opinion]:
        for item in items:
            yield Opinion(reward([item.prompt] * len(item.responses), item.responses))

    return opinions


def by_pairs(judge: Judge) -> Opinions:
    """The wins of each response over the others of its item."""

    def opinions(items: Sequence[Item]) -> Iterator[Opinion]:
        choices = judge([question for item in items for question in questions(item.prompt, item.responses)])
        for item in items:
            count = len(item.responses)
            own = list(itertools.islice(choices, count * (count - 1)))
            yield Opinion(wins(own, count), own)

    return opinions


def judge(
    store: Store, name: str, opinions: Opinions, limit: int | None, log: Path, said: dict[int, list[Choice]]
) -> None:
    """Records a verdict on each item that this rater has not judged, at most `limit`, as soon as it is known.

    What the judge said goes into the file `log` and into `said`, by item.
    """
    items = store.unjudged(name)[:limit]
    skipped = 0
    with Progress("judge", len(items), "item") as progress:
        for done, (item, opinion) in enumerate(zip(items, opinions(items)), 1):
            verdict = Verdict(f"{name}/{item.id}", item.id, name, [1] * len(item.responses), "skipped")
            if opinion.scores is not None:
                verdict = verdict._replace(ranking=ranks(opinion.scores), verdict="ranked")
            if opinion.choices:
                append(log, item.id, opinion.choices)
                said[item.id] = opinion.choices
            store.record(verdict)
            skipped += opinion.scores is None
            progress.update(done, {"skipped": skipped})


def append(log: Path, item: int, choices: Sequence[Choice]) -> None:
    """Adds a line, and returns when it is on disk: before the verdict that comes from it."""
    log.parent.mkdir(exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"item": item, "choices": choices}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def said_so_far(log: Path) -> dict[int, list[Choice]]:
    """The choices of each item, the last line of one counting; what a kill left of a torn line is cut off."""
    if not log.exists():
        return {}
    text = log.read_bytes()
    text = text[: text.rfind(b"\n") + 1].decode()
    write_text(log, text)
    lines = map(json.loads, text.split("\n")[:-1])
    return {line["item"]: [Choice(*choice) for choice in line["choices"]] for line in lines}


def show(name: str, rankings: Sequence[Ranking], choices: Sequence[Choice]) -> None:
    """What the rater said, and how far it agrees with every other; UserError if nothing it said made sense."""
    own = [ranking for ranking in rankings if ranking.rater == name]
    nonsense = [choice.said for choice in choices if choice.first is None]
    ranked = [ranking for ranking in own if ranking.verdict != "skipped"]
    if own and not ranked:
        example = f", such as {nonsense[-1][:100]!r}" if nonsense else ""
        raise UserError(
            f"{name} said nothing but nonsense{example}: all {len(own)} items are recorded as skipped; "
            "take another judge, or a --rubric that it understands"
        )
    pairs = sum(len(r.responses) * (len(r.responses) - 1) // 2 for r in ranked)
    rows = [["items", len(own)], ["pairs", pairs], ["ties", pairs - sum(len(records.pairs(r)) for r in ranked)]]
    if choices:
        rows += [
            ["items skipped for nonsense", len(own) - len(ranked)],
            ["answers that were nonsense", len(nonsense) - nonsense.count(TOO_LONG)],
            ["questions cut to the context", sum(choice.cut and choice.said != TOO_LONG for choice in choices)],
            ["questions whose answers do not fit it", nonsense.count(TOO_LONG)],
            ["first answer chosen (0.5: no position bias)", shown(position_bias(choices))],
            ["both orders agree", shown(consistency(choices))],
        ]
    table(name, ["", "value [95 %]"], [[row, str(value)] for row, value in rows])
    rows = agreement(name, rankings)
    if rows:
        table("agreement with", ["", "pairs in common", "same preference [95 %]", "Cohen's kappa [95 %]"], rows)
    else:
        say("nobody else has ranked these items yet")


def agreement(name: str, rankings: Iterable[Ranking]) -> list[tuple[str, int, str, str]]:
    """For each other rater of the same items: pairs of responses in common, share of equal preferences, and kappa.

    The intervals take the pairs as independent, which those of one item of more than two responses are not quite.
    """
    judged = [ranking for ranking in rankings if ranking.verdict != "skipped"]
    others, rows = sorted({ranking.rater for ranking in judged} - {name}), []
    _, (mine, *ratings) = votes(judged, [name, *others])
    for other, theirs in zip(others, ratings):
        both = np.stack([mine, theirs])[:, ~np.isnan(mine + theirs)]
        if both.size:
            kappa = bootstrap(lambda pair: cohen_kappa(*pair), both)
            rows.append((other, both.shape[1], shown(share(both[0] == both[1])), shown(kappa)))
    return rows


def shown(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "-"
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def run(flags: Namespace) -> None:
    people = Path(flags.workdir) / PEOPLE
    if not people.is_file():
        raise UserError(f"there is no {people}: rank some answers there first, or name another --workdir")
    if flags.limit is not None and flags.limit < 1:
        raise UserError(f"--limit is {flags.limit}; it must be at least 1")
    with Store(people) as store:
        name, opinions = rater(flags.judge, flags.model, flags.rubric)
        log = people.parent / "judges" / f"{quote(name, safe=' ()')}.jsonl"
        waiting = {item.id for item in store.unjudged(name)}
        said = {item: choices for item, choices in said_so_far(log).items() if item not in waiting}
        judge(store, name, opinions, flags.limit, log, said)
        show(name, store.rankings(), [choice for choices in said.values() for choice in choices])


def program(argv: list[str]) -> None:
    run(parsed(argv, __doc__, FLAGS))


if __name__ == "__main__":
    main(program)

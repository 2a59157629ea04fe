"""Lets a model or a rule rate the items that people rate, and measures how far it agrees with them.

    python -m lm judge --workdir=runs/people --judge=runs/quickstart
    python -m lm judge --workdir=runs/people --judge=http://localhost:8000/v1 --model=NAME

--judge=rule rates by the rule instead. Each verdict is stored at once in WORKDIR/people.db, beside those of people:
after a kill the same command continues. A model is asked about every pair of responses in both orders; its replies are
kept in WORKDIR/judges/RATER.jsonl, one line for each item. The key of an endpoint is read from OPENAI_API_KEY.
"""

import itertools
import json
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import jax
import numpy as np

from lm.core.config import parsed_flags
from lm.core.errors import UserError
from lm.core.imports import is_import_path
from lm.core.statistics import estimate_text, success_rate_or_nan
from lm.core.textfiles import file_text
from lm.data.annotations import PEOPLE_DB, Annotation, AnnotationStore, RankingItem
from lm.data.conversations import reward_example
from lm.data.preferences import Ranking, preference_pairs
from lm.feedback.agreement import bootstrap_estimate, cohen_kappa
from lm.feedback.auto_rank import ranks_from_scores
from lm.feedback.results import pair_votes
from lm.rewards import REWARDS, Reward, named_rater
from lm.rewards.llm_judge import (
    RUBRIC,
    TOO_LONG_REPLY,
    Judge,
    JudgeChoice,
    endpoint_judge,
    model_judge,
    order_consistency,
    pair_questions,
    position_bias,
    win_counts,
)
from lm.runs.console import Progress, print_table, run_program, say, warn
from lm.runs.workdir import load_trained_model, write_text
from lm.stages import REWARD_MODEL_STAGES
from lm.train.warm_start import policy_folder

FLAGS = {
    "workdir": dict(required=True, metavar="DIR", help=f"the folder whose {PEOPLE_DB} holds the items"),
    "judge": dict(
        required=True, metavar="DIR|URL|RULE", help=f"a policy, an endpoint, file.py:function, or {', '.join(REWARDS)}"
    ),
    "model": dict(metavar="NAME", help="the model to ask an endpoint for"),
    "rubric": dict(metavar="FILE", help="the instructions for a judging model, instead of lm.rewards.llm_judge.RUBRIC"),
    "limit": dict(type=int, metavar="N", help="rate at most N items in this run"),
}


class Judgment(NamedTuple):
    """A rater's opinion of an item."""

    scores: np.ndarray | None  # f[responses], higher is better; None: it could not say
    choices: Sequence[JudgeChoice] = ()  # the answers to lm.rewards.llm_judge.pair_questions that they come from


ItemJudge = Callable[[Sequence[RankingItem]], Iterator[Judgment]]  # one an item, in order, each as soon as it is known


def judge_from_flags(judge: str, model: str | None, rubric: str | None) -> tuple[str, ItemJudge]:
    """The name under which verdicts are stored, and the function that gives them. Another rubric is another rater."""
    endpoint = judge.startswith(("http://", "https://"))
    if endpoint and not model:
        raise UserError("an endpoint may serve several models: name one with --model")
    if model and not endpoint:
        raise UserError(f"--model is for an endpoint, but --judge={judge} is no URL: begin it with http://")
    if judge in REWARDS or is_import_path(judge) and not endpoint:
        if rubric:
            raise UserError(f"--rubric is for a model, but {judge} is a rule with its own: leave one of them out")
        return judge, score_judge(named_rater(judge, "--judge"))
    text, suffix = (RUBRIC, "") if rubric is None else (read_rubric(Path(rubric)), f" ({Path(rubric).stem})")
    if endpoint:
        ask_endpoint = endpoint_judge(judge, model, text, api_key=os.environ.get("OPENAI_API_KEY"))
        return f"judge {model}{suffix}", pairwise_judge(ask_endpoint)
    trained = load_trained_model(policy_folder(Path(judge)), backend=jax.default_backend(), warn=warn)
    if trained.stage in REWARD_MODEL_STAGES:
        raise UserError(f"{judge} is a reward model, which reads no rubric and writes no answer: name a policy")
    name = "/".join(trained.path.resolve().parts[-2:])
    policy = model_judge(trained.model, trained.params["lm"], trained.tokenizer, text, jit=jax.jit)
    return f"judge {name}{suffix}", pairwise_judge(policy)


def read_rubric(path: Path) -> str:
    """The text of a file that a user names."""
    try:
        text = file_text(path).strip()
    except OSError as error:
        raise UserError(f"no rubric at {path} ({error.strerror}): write one, or leave --rubric out") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: a rubric is the text that the judge rates by") from error
    if not text:
        raise UserError(f"the rubric {path} is empty: write one, or leave --rubric out")
    return text


def score_judge(reward: Reward) -> ItemJudge:
    """The scores of a reward."""

    def opinions(items: Sequence[RankingItem]) -> Iterator[Judgment]:
        for item in items:
            yield Judgment(reward([reward_example(item.prompt)] * len(item.responses), item.responses))

    return opinions


def pairwise_judge(judge: Judge) -> ItemJudge:
    """The wins of each response over the others of its item."""

    def opinions(items: Sequence[RankingItem]) -> Iterator[Judgment]:
        choices = judge([question for item in items for question in pair_questions(item.prompt, item.responses)])
        for item in items:
            count = len(item.responses)
            own = list(itertools.islice(choices, count * (count - 1)))
            yield Judgment(win_counts(own, count), own)

    return opinions


def judge_items(
    store: AnnotationStore,
    name: str,
    opinions: ItemJudge,
    limit: int | None,
    log: Path,
    choices_by_item: dict[int, list[JudgeChoice]],
) -> None:
    """Records a verdict on each item that this rater has not judged, at most `limit`, as soon as it is known.

    The judge's choices go into the file `log` and into `choices_by_item`.
    """
    items = store.unjudged_items(name)[:limit]
    skipped = 0
    with Progress("judge", len(items), "item") as progress:
        for done, (item, opinion) in enumerate(zip(items, opinions(items)), 1):
            verdict = Annotation(f"{name}/{item.id}", item.id, name, [1] * len(item.responses), "skipped")
            if opinion.scores is not None:
                verdict = verdict._replace(ranking=ranks_from_scores(opinion.scores), verdict="ranked")
            if opinion.choices:
                append_choices(log, item.id, opinion.choices)
                choices_by_item[item.id] = opinion.choices
            store.record_verdict(verdict)
            skipped += opinion.scores is None
            progress.update(done, {"skipped": skipped})


def append_choices(log: Path, item: int, choices: Sequence[JudgeChoice]) -> None:
    """Adds a line and returns when it is on disk, before the verdict that follows from it is stored."""
    log.parent.mkdir(exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"item": item, "choices": choices}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def logged_choices(log: Path) -> dict[int, list[JudgeChoice]]:
    """The choices of each item, from its last line in the file. An incomplete line, left by a kill, is removed."""
    if not log.exists():
        return {}
    text = log.read_bytes()
    text = text[: text.rfind(b"\n") + 1].decode()
    write_text(log, text)
    lines = map(json.loads, text.split("\n")[:-1])
    return {line["item"]: [JudgeChoice(*choice) for choice in line["choices"]] for line in lines}


def print_judgments(name: str, rankings: Sequence[Ranking], choices: Sequence[JudgeChoice]) -> None:
    """Prints the rater's verdicts and its agreement with every other rater. UserError if no reply was readable."""
    own = [ranking for ranking in rankings if ranking.rater == name]
    nonsense = [choice.reply for choice in choices if choice.first_probability is None]
    ranked = [ranking for ranking in own if ranking.verdict != "skipped"]
    if own and not ranked:
        example = f", such as {nonsense[-1][:100]!r}" if nonsense else ""
        raise UserError(
            f"{name} gave no readable verdict{example}: all {len(own)} items are recorded as skipped; "
            "take another judge, or a --rubric that it understands"
        )
    pairs = sum(len(r.responses) * (len(r.responses) - 1) // 2 for r in ranked)
    rows = [["items", len(own)], ["pairs", pairs], ["ties", pairs - sum(len(preference_pairs(r)) for r in ranked)]]
    if choices:
        rows += [
            ["items skipped for nonsense", len(own) - len(ranked)],
            ["answers that were nonsense", len(nonsense) - nonsense.count(TOO_LONG_REPLY)],
            [
                "questions cut to the context",
                sum(choice.is_truncated and choice.reply != TOO_LONG_REPLY for choice in choices),
            ],
            ["questions whose answers do not fit it", nonsense.count(TOO_LONG_REPLY)],
            ["first answer chosen (0.5: no position bias)", estimate_text(position_bias(choices))],
            ["both orders agree", estimate_text(order_consistency(choices))],
        ]
    print_table(name, ["", "value [95 %]"], [[row, str(value)] for row, value in rows])
    rows = agreement_rows(name, rankings)
    if rows:
        print_table("agreement with", ["", "pairs in common", "same preference [95 %]", "Cohen's kappa [95 %]"], rows)
    else:
        say("nobody else has ranked these items yet")


def agreement_rows(name: str, rankings: Iterable[Ranking]) -> list[tuple[str, int, str, str]]:
    """For each other rater of the same items: pairs of responses in common, share of equal preferences, and kappa.

    The intervals treat the pairs as independent. Pairs of one item with more than two responses are not quite.
    """
    judged = [ranking for ranking in rankings if ranking.verdict != "skipped"]
    others, rows = sorted({ranking.rater for ranking in judged} - {name}), []
    _, (own, *ratings) = pair_votes(judged, [name, *others])
    for other, theirs in zip(others, ratings):
        both = np.stack([own, theirs])[:, ~np.isnan(own + theirs)]
        if both.size:
            kappa = bootstrap_estimate(lambda pair: cohen_kappa(*pair), both)
            rows.append(
                (other, both.shape[1], estimate_text(success_rate_or_nan(both[0] == both[1])), estimate_text(kappa))
            )
    return rows


def run_judge(flags: Namespace) -> None:
    people = Path(flags.workdir) / PEOPLE_DB
    if not people.is_file():
        raise UserError(f"there is no {people}: rank some answers there first, or name another --workdir")
    if flags.limit is not None and flags.limit < 1:
        raise UserError(f"--limit is {flags.limit}; it must be at least 1")
    with AnnotationStore(people) as store:
        name, opinions = judge_from_flags(flags.judge, flags.model, flags.rubric)
        log = people.parent / "judges" / f"{quote(name, safe=' ()')}.jsonl"
        waiting = {item.id for item in store.unjudged_items(name)}
        choices_by_item = {item: choices for item, choices in logged_choices(log).items() if item not in waiting}
        judge_items(store, name, opinions, flags.limit, log, choices_by_item)
        print_judgments(name, store.rankings(), [choice for choices in choices_by_item.values() for choice in choices])


def program(argv: list[str]) -> None:
    run_judge(parsed_flags(argv, __doc__, FLAGS))


if __name__ == "__main__":
    run_program(program)

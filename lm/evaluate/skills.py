"""Models compared skill by skill, on prompts whose right answers are known: facts, made-up names, sums, ...

The prompts are rows with the fields of lm.rewards.verifiers.skills, such as those of the built-in source "assistant".
"""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from lm.core.statistics import Z95, Estimate, mean_estimate, paired_difference, success_rate
from lm.data.conversations import Conversation, Example
from lm.data.facts.abstention import is_abstention
from lm.rewards.rule import words
from lm.rewards.verifiers.skills import ALL_SKILLS, SKILLS, check_skill_rows, skill_score
from lm.runs.console import print_table

NEVER_ASKED = "facts_never_asked"  # facts of entities about which no question was trained (field "unseen")
SKILL_GROUPS = ("facts", NEVER_ASKED, *(skill for skill in SKILLS if skill != "facts"))

VARIED_PROMPTS = 100  # over which distinct answers are counted


def has_skills(contexts: Sequence[Conversation]) -> bool:
    """Whether every row says which skill it asks for."""
    return bool(contexts) and all("skill" in context.fields for context in contexts)


def skill_group(fields: Mapping[str, Any]) -> str:
    """The row of the table that a prompt belongs to: its skill, or NEVER_ASKED."""
    is_never_asked = fields["skill"] == "facts" and "unseen" in fields and fields["unseen"] == "entity"
    return NEVER_ASKED if is_never_asked else fields["skill"]


def balanced_prompts(contexts: Sequence[Conversation], count: int) -> list[Conversation]:
    """`count` of the contexts, as many of each skill as there are, by turns: the first of them are of all skills."""
    return [contexts[i] for i in balanced_order([context.fields for context in contexts])[:count]]


def balanced_order(fields: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of the rows with these fields: the first of each skill, then the second of each, ..."""
    groups: dict[str, list[int]] = {}
    for i, each in enumerate(fields):
        groups.setdefault(skill_group(each), []).append(i)
    return [i for turn in zip_longest(*groups.values()) for i in turn if i is not None]


def rate_estimate(values: Sequence[float]) -> Estimate:
    """Mean with its 95 % interval: Wilson's where every value is 0 or 1."""
    x = np.asarray(values, np.float64)
    return success_rate(list(x > 0)) if np.isin(x, (0, 1)).all() else mean_estimate(x)


def skill_table(examples: Sequence[Example], texts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """{skill: {"prompts", "models": {model: Estimate}, "differences": [{"a", "b", "difference"}], "abstains": ...}}.

    `texts` hold each model's answers, in the order of the models; a difference is of one and the one before it, paired.
    "abstains" is the share of answers that say that they do not know. Under ALL_SKILLS the mean over the skills.
    """
    check_skill_rows(examples, "skills")
    groups = np.array([skill_group(example) for example in examples])
    scores = {
        name: np.array([skill_score(example, text) for example, text in zip(examples, given, strict=True)])
        for name, given in texts.items()
    }
    abstains = {name: np.array([is_abstention(text) for text in given]) for name, given in texts.items()}
    names = list(texts)
    found: dict[str, Any] = {}
    for group in SKILL_GROUPS:
        rows = groups == group
        if rows.any():
            found[group] = {
                "prompts": int(rows.sum()),
                "models": {name: rate_estimate(score[rows])._asdict() for name, score in scores.items()},
                "abstains": {name: rate_estimate(said[rows])._asdict() for name, said in abstains.items()},
                "differences": [
                    {"a": a, "b": b, "difference": paired_difference(scores[a][rows], scores[b][rows])._asdict()}
                    for a, b in zip(names[1:], names)
                ],
            }
    return found | {ALL_SKILLS: all_skills(found)}


def all_skills(table: Mapping[str, Any]) -> dict[str, Any]:
    """The mean over the skills of a table, with the errors of independent parts."""
    parts = [row for group, row in table.items() if group != NEVER_ASKED]
    models = {name: mean_of_estimates([row["models"][name] for row in parts])._asdict() for name in parts[0]["models"]}
    differences = [
        {**pair, "difference": mean_of_estimates([row["differences"][i]["difference"] for row in parts])._asdict()}
        for i, pair in enumerate(parts[0]["differences"])
    ]
    return {"prompts": sum(row["prompts"] for row in parts), "models": models, "differences": differences}


def mean_of_estimates(estimates: Sequence[Mapping[str, float]]) -> Estimate:
    """The mean of independent estimates; normal interval. Each error is that of its interval: a share of 0 or 1 has an
    error, too."""
    value = float(np.mean([each["value"] for each in estimates]))
    errors = [(each["high"] - each["low"]) / (2 * Z95) for each in estimates]
    se = float(np.sqrt(np.sum(np.square(errors)))) / len(estimates)
    return Estimate(value, se, value - Z95 * se, value + Z95 * se)


def distinct_answers(texts: Sequence[str]) -> int:
    """How many different answers there are among the first VARIED_PROMPTS: case and marks do not count."""
    return len({tuple(words(text)) for text in texts[:VARIED_PROMPTS]})


def skill_results(examples: Sequence[Example], texts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What a summary says of skills: the table, and how many of the first answers of each model are different ones."""
    return {
        "skills": skill_table(examples, texts),
        "distinct": {
            "prompts": min(VARIED_PROMPTS, len(examples)),
            "models": {name: distinct_answers(given) for name, given in texts.items()},
        },
    }


def checked_answers(context: Conversation, texts: Mapping[str, str]) -> dict[str, Any]:
    """What a line of answers.jsonl says of the skill of its prompt: the right answer, and each model's score."""
    if not has_skills([context]):
        return {}
    example = {**context.fields, "messages": context.messages}
    right = {name: skill_score(example, text) for name, text in texts.items()}
    return {"skill": skill_group(context.fields), "right_answer": context.fields["answer"], "right": right}


def print_skills(summary: Mapping[str, Any]) -> None:
    """How much is right, by skill, with 95 % intervals."""
    names = list(summary["models"])

    def cell(estimate):
        return f"{100 * estimate['value']:.1f} [{100 * estimate['low']:.0f}, {100 * estimate['high']:.0f}]"

    def change(estimate):
        return f"{100 * estimate['value']:+.1f} [{100 * estimate['low']:+.1f}, {100 * estimate['high']:+.1f}]"

    pairs = [f"{pair['a']} over {pair['b']}" for pair in summary["skills"][ALL_SKILLS]["differences"]]
    table = [
        [
            f"{group.replace('_', ' ')} ({row['prompts']})",
            *(cell(row["models"][name]) for name in names),
            *(change(pair["difference"]) for pair in row["differences"][-1:]),
        ]
        for group, row in summary["skills"].items()
    ]
    distinct = summary["distinct"]
    table.append([f"different answers to {distinct['prompts']}", *(str(distinct["models"][n]) for n in names), ""])
    print_table("right answers by skill, % [95 % interval]", ["", *names, *pairs[-1:]], table)

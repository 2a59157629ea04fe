"""Each kind of stage trains on rows of a user's own file, in a format that others use."""

import json

import pytest
from runs import EXPERIMENTS, finished, small

from lm.core.config import load_config
from lm.train import loop

__all__ = ["finished", "small"]

QUESTIONS = [f"What is the {a} of {b}?" for a in ("name", "type", "value", "list") for b in "ABCDEFGHIJKLMNOPQRST"]
SLOW = pytest.mark.slow


def file(path, make):
    """A row for each question; some are held out."""
    path.write_text("".join(json.dumps(make(i, question)) + "\n" for i, question in enumerate(QUESTIONS)))
    return path


@pytest.mark.parametrize(
    "stage, option, row",
    [
        pytest.param(
            "sft", "sources", lambda i, q: {"instruction": q, "input": "", "output": f"It is {i}."}, marks=SLOW
        ),
        pytest.param("dpo", "rankings", lambda i, q: {"prompt": q, "chosen": f"{i}.", "rejected": "What?"}, marks=SLOW),
        ("kto", "rankings", lambda i, q: {"prompt": q, "completion": f"It is {i}.", "label": i % 2 == 0}),
        ("grpo", "sources", lambda i, q: {"prompt": q, "answer": str(i)}),
    ],
    ids=["sft", "dpo", "kto", "grpo"],
)
def test_it_trains_a_few_steps(stage, option, row, finished, small, tmp_path):
    path = file(tmp_path / "rows.jsonl", row)
    given = [f"init_from={finished / 'sft'}", f"data.{option}={path}", "data.held_out=0.3", "train.steps=3"]
    if stage == "grpo":
        given += [
            "data.rewards.model=0.0",
            "data.rewards.repetition=1.0",
            "data.rollouts=16",
            "data.held_out_rollouts=16",
        ]
    config = load_config(f"{EXPERIMENTS / stage}.py:tiny", given)
    summary = loop.train_stage(config, tmp_path / "run")
    about = summary["about"]
    assert summary["steps"] == 3 and summary["before"]["loss" if stage != "grpo" else "reward"] is not None
    count = about["conversations"] if stage == "sft" else about["prompts"]
    assert 40 <= count < len(QUESTIONS)
    assert count + about["held_out_conversations" if stage == "sft" else "held_out_prompts"] == len(QUESTIONS)

"""Ranking: the file a reward model learns from, and that a kill costs nothing but the chunk it falls in."""

import json
import shutil
from collections import Counter

import jax
import numpy as np
import pytest
from runs import finished, small, stage_config

from lm.core.errors import UserError
from lm.data import conversations, preferences, sources
from lm.data.loading import load_conversations
from lm.feedback import auto_rank
from lm.rewards import REWARDS
from lm.rewards.load import load_reward_model
from lm.runs.workdir import read_json
from lm.tokenizer import load_tokenizer

__all__ = ["finished", "small"]

FILE = "rankings.jsonl"


def told(workdir) -> list[preferences.Ranking]:
    """All but the time, in which two runs may differ."""
    return [ranking._replace(time="") for ranking in preferences.read_jsonl_rankings(workdir / FILE)]


def test_ranks():
    assert auto_rank.ranks_from_scores(np.array([3.0, 5.0, 5.0, 1.0])) == [
        3,
        1,
        1,
        4,
    ]  # equal scores share a rank, and it is used up
    assert auto_rank.ranks_from_scores(np.array([2.0, 2.0])) == [1, 1]


def test_prompts_of_all_skills_are_ranked_alike(finished):
    """Six of each of five skills, drawn by the seed, though the sources hold ten times as much of some."""
    contexts = [c for c in conversations.prompt_contexts(load_conversations("assistant")) if not c.fields["unseen"]]
    tokenizer = load_tokenizer(finished / "sft" / "tokenizer.model")
    one, _ = auto_rank.random_prompts(tokenizer, contexts[::3], 64, 30, 1)
    other, _ = auto_rank.random_prompts(tokenizer, contexts[::3], 64, 30, 2)
    assert set(Counter(example["skill"] for example in one.examples).values()) == {6}
    assert [example["messages"] for example in one.examples] != [example["messages"] for example in other.examples]


def test_the_file(finished):
    """128 prompts that nobody holds out, none twice; two answers to each, in the order that the rule's scores say."""
    found = told(finished / "rank")
    assert len(found) == 128
    assert len({json.dumps(ranking.prompt) for ranking in found}) == 128
    for ranking in found:
        assert not sources.is_held_out(ranking.name, 0.05)
        assert ranking.prompt[-1]["role"] == "user" and len(ranking.responses) == 2 and ranking.rater == "rule"
        a, b = REWARDS["rule"]([{"messages": ranking.prompt}] * 2, ranking.responses)
        assert ranking.ranking == ([1, 1] if a == b else [1, 2] if a > b else [2, 1])
    ties = sum(ranking.ranking == [1, 1] for ranking in found)
    assert 0 < ties < 128  # so the counts below can be wrong
    summary = read_json(finished / "rank" / "summary.json")
    assert (summary["prompts"], summary["decided"], summary["tied"]) == (128, 128 - ties, ties)


def test_two_runs_give_the_same_answers(finished, small, tmp_path):
    auto_rank.run_auto_rank(stage_config(finished, "rank"), tmp_path / "rank")
    assert told(tmp_path / "rank") == told(finished / "rank")


def test_a_kill_costs_no_more_than_its_chunk(finished, small, tmp_path):
    """The first chunk of 32 prompts is whole, the second was torn in its fifth line."""
    workdir = shutil.copytree(finished / "rank", tmp_path / "rank")
    (workdir / "summary.json").unlink()
    lines = (workdir / FILE).read_text().splitlines(keepends=True)
    (workdir / FILE).write_text("".join(lines[:36]) + lines[36][:20])
    summary = auto_rank.run_auto_rank(stage_config(finished, "rank"), workdir)
    assert (workdir / FILE).read_text().splitlines(keepends=True)[:32] == lines[:32]  # their times too: they were kept
    assert told(workdir) == told(finished / "rank")
    assert {**summary, "seconds": 0} == {**read_json(finished / "rank" / "summary.json"), "seconds": 0}


def test_whole_chunks_are_counted_in_lines_of_the_file(tmp_path):
    """An answer may hold what Python takes for the end of a line, and a kill may tear a character in two."""
    path = tmp_path / FILE
    assert auto_rank.ranked_prompt_count(path, 2) == 0
    lines = [json.dumps({"response": text}, ensure_ascii=False) + "\n" for text in ("a", "b\u2028c\x85", "d", "é")]
    whole = "".join(lines).encode()
    path.write_bytes(whole + '{"response": "é'.encode()[:-1])
    assert auto_rank.ranked_prompt_count(path, 2) == 4
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-3])
    assert auto_rank.ranked_prompt_count(path, 2) == 2
    assert path.read_bytes() == "".join(lines[:2]).encode()


def test_a_reward_model_ranks_and_held_out_prompts_follow(finished, small, tmp_path):
    """Answers as before, but their order is the model's; the last ones are to prompts of held-out conversations."""
    options = (f"rank.rater={finished}/reward", "rank.prompts=32")
    config = stage_config(finished, "rank", *options).unlock()
    config.rank.held_out_prompts, config.rank.truncation_penalty = 8, 100.0
    auto_rank.run_auto_rank(config, tmp_path / "rank")
    found, before = told(tmp_path / "rank"), told(finished / "rank")
    assert [r.responses for r in found[:32]] == [r.responses for r in before[:32]]
    assert [sources.is_held_out(r.name, 0.05) for r in found] == [False] * 32 + [True] * 8
    _, reward = load_reward_model(finished / "reward", backend="cpu", normalized=True, jit=jax.jit)
    agree, told_apart = 0, 0
    for ranking in found:
        assert ranking.rater == f"{finished}/reward"
        a, b = reward([{"messages": ranking.prompt}] * 2, ranking.responses)
        agree += (ranking.ranking[0] < ranking.ranking[1]) == bool(a > b)
        told_apart += a != b
    assert told_apart / 2 < agree < len(found)  # but for those that the limit cut off: they lose 100 points


@pytest.mark.parametrize(
    "override, message",
    [
        ("rater=rul", "rank.rater is 'rul'; choose one of rule"),
        ("rater=.", "is no finished reward model|holds no checkpoint"),
        ("responses=1", "rank.responses is 1; it must be at least 2"),
        ("prompt_length=2", "longer than prompt_length 2.: raise prompt_length"),
        ("prompts_at_once=0", "rank.prompts_at_once is 0; it must be at least 1"),
        ("rater={finished}/reward", "reward was trained on rows of 64 tokens, but a prompt and its answer may have 71"),
        ("max_new=40", "the prompt has 32 tokens and 40 more were asked for, but the model's context is 64"),
    ],
)
def test_bad_options(finished, small, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        longer = ["rank.prompt_length=62"] if "finished" in override else []
        config = stage_config(finished, "rank", f"rank.{override.format(finished=finished)}", *longer)
        auto_rank.run_auto_rank(config, tmp_path / "rank")
    assert not (tmp_path / "rank" / "summary.json").exists()

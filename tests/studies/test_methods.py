"""The contest: equal terms for everybody, numbers that follow from the answers, and a kill that costs nothing."""

import functools
import json
import shutil

import numpy as np
import pytest
from runs import EXPERIMENTS, enter_small_world, finished

from lm.core.config import load_config
from lm.core.errors import UserError
from lm.core.statistics import crossed_mean
from lm.data import preferences, sources
from lm.rewards import REWARDS
from lm.runs.workdir import load_trained_model as loaded, read_json, read_metrics
from lm.studies.methods import results, study
from lm.train import loop

__all__ = ["finished"]

SEEDS, METHODS = (0, 1), ("rloo", "dpo")


def contest_config(run, *overrides):
    given = (f"init_from={run}/sft", f"reward_model={run}/reward", f"methods={METHODS}", *overrides)
    return load_config(f"{EXPERIMENTS / 'contest.py'}:tiny", given)


@pytest.fixture(scope="module")
def root(finished, tmp_path_factory):
    """A contest of two methods and two seeds that was stopped in the third of its runs and started again."""
    path, fetched = tmp_path_factory.mktemp("contest") / "run", loop.device_batch
    with pytest.MonkeyPatch.context() as patch:
        enter_small_world(patch.setattr)

        def stopped(r, state, i):
            if (path / "rloo" / "1").exists() and i == 3:
                raise KeyboardInterrupt
            return fetched(r, state, i)

        patch.setattr(loop, "device_batch", stopped)
        with pytest.raises(KeyboardInterrupt):
            study.run_methods_study(contest_config(finished), path)
        shutil.copytree(path, path.with_name("before"))
        patch.setattr(loop, "device_batch", fetched)
        study.run_methods_study(contest_config(finished), path)
    return path


@pytest.fixture(scope="module")
def summary(root):
    return read_json(root / "summary.json")


def test_a_second_start_passes_over_what_is_done_and_goes_on(root):
    before = root.with_name("before")
    assert not (before / "dpo" / "1").exists() and not (before / "summary.json").exists()
    for file in ("rloo/0/metrics.jsonl", "dpo/0/metrics.jsonl", "verdicts/0/rankings.jsonl"):
        assert (root / file).read_bytes() == (before / file).read_bytes()
    torn, whole = (read_metrics(run / "rloo" / "1") for run in (before, root))
    assert [row["step"] for row in torn] == [0, 1, 2, 3] and [row["step"] for row in whole] == [0, 1, 2, 3, 4, 4]
    assert whole[:3] == torn[:3]  # saved after 2 batches: the third was written again


def test_everybody_has_the_same_start_judge_and_number_of_answers(root, finished):
    for seed in SEEDS:
        configs = {name: read_json(root / name / str(seed) / "config.json") for name in METHODS}
        assert {(config["init_from"], config["seed"]) for config in configs.values()} == {(f"{finished}/sft", seed)}
        assert configs["rloo"]["train"]["steps"] * configs["rloo"]["data"]["rollouts"] == 64
        assert configs["rloo"]["data"]["reward_model"] == f"{finished}/reward"
        seen = preferences.read_jsonl_rankings(configs["dpo"]["data"]["rankings"])
        assert {ranking.rater for ranking in seen} == {f"{finished}/reward"}
        apart = [sources.is_held_out(ranking.name, 0.05) for ranking in seen]
        assert apart == [False] * 32 + [True] * 16  # 64 answers to learn from, and some to be measured on
        assert read_json(root / "dpo" / str(seed) / "summary.json")["about"]["held_out_prompts"] <= 16


def test_answers_are_to_the_same_unseen_prompts_and_scored_by_the_rule(root):
    prompts = set()
    for name in ("start", *METHODS):
        for seed in SEEDS:
            rows = read_metrics(root / name / str(seed) / "answers.jsonl")
            prompts.add(json.dumps([row["prompt"] for row in rows]))
            assert [row["gold"] for row in rows] == REWARDS["rule"](
                [{"messages": row["prompt"]} for row in rows], [row["text"] for row in rows]
            ).tolist()
            assert [row["conversation"] for row in rows] == list(range(16))
    assert len(prompts) == 1


def test_the_start_has_not_moved_and_the_methods_have(summary):
    assert abs(summary["start"]["kl"]["value"]) < 1e-4
    assert all(abs(told["kl"]["value"]) > 1e-2 for told in summary["methods"].values())


def test_the_table_follows_from_the_answers(root, summary):
    gold = {
        name: np.array(
            [[row["gold"] for row in read_metrics(root / name / str(seed) / "answers.jsonl")] for seed in SEEDS]
        )
        for name in ("start", *METHODS)
    }
    for name, told in summary["methods"].items():
        gain = gold[name] - gold["start"]
        assert told["gain"] == pytest.approx(crossed_mean(gain)._asdict())
        assert [one["gain"] for one in told["seeds"]] == pytest.approx(gain.mean(axis=1))
    (pair,) = summary["pairs"]
    assert list(summary["methods"]) == [pair["a"], pair["b"]]  # the best first
    assert pair["value"] == pytest.approx((gold[pair["a"]] - gold[pair["b"]]).mean()) and pair["value"] >= 0


def test_budgets(root, summary, finished):
    """RLOO: answers x their logged mean length, twice. DPO: the tokens of the texts, each with its end."""
    rows = [row for row in read_metrics(root / "rloo" / "0") if "tokens_per_second" in row]
    told = summary["methods"]["rloo"]["budget"]
    assert (told["answers"], told["passes"], told["tied"]) == (64, 2, None)
    other = [row for row in read_metrics(root / "rloo" / "1") if "tokens_per_second" in row]
    assert told["sampled"] == pytest.approx(np.mean([16 * sum(r["response_length"] for r in x) for x in (rows, other)]))
    assert told["learnt"] == pytest.approx(2 * told["sampled"])
    told = summary["methods"]["dpo"]["budget"]
    assert told["answers"] == 64 and told["decided"] + told["tied"] == 32
    tokenizer = loaded(finished / "sft", backend="cpu").tokenizer
    texts = [
        text
        for seed in SEEDS
        for r in preferences.read_jsonl_rankings(root / "verdicts" / str(seed) / "rankings.jsonl")[:32]
        for text in r.responses
    ]
    assert told["sampled"] == pytest.approx(sum(len(tokenizer.encode(text)) + 1 for text in texts) / 2)


def test_the_page_holds_what_it_shows(root, summary):
    page = (root / "contest.html").read_text()
    assert page.count("<svg") == 2 and "<script" not in page and "http" not in page.replace("http://www.w3.org", "")
    for sentence in results.conclusion_sentences(summary):
        assert sentence.split(":")[0] in page
    assert all(f"<td>{name}</td>" in page for name in ("start", *METHODS))


def estimate(low, high):
    return {"value": (low + high) / 2, "low": low, "high": high}


def test_sentences_say_what_an_interval_allows():
    methods = {
        name: {"gain": gain, "where": results.interval_position(gain)}
        for name, gain in (("a", estimate(0.1, 0.3)), ("b", estimate(-0.1, 0.3)), ("c", estimate(-0.5, -0.1)))
    }
    pairs = [
        {"a": a, "b": b, **gain, "where": results.interval_position(gain)}
        for a, b, gain in (("a", "b", estimate(-0.1, 0.3)), ("a", "c", estimate(0.2, 0.8)))
    ]
    assert results.conclusion_sentences({"methods": methods, "pairs": pairs, "seeds": [0]}) == [
        "a: +0.20 [+0.10, +0.30]; its interval lies above zero: it beats the start.",
        "b: +0.10 [−0.10, +0.30]; its interval includes zero: no difference from the start can be shown.",
        "c: −0.30 [−0.50, −0.10]; its interval lies below zero: it is worse than the start.",
        "Inside the noise: a and b (+0.10 [−0.10, +0.30]).",
        "Outside the noise: a and c (+0.50 [+0.20, +0.80]).",
        "With a single seed the intervals say nothing of what another seed would give.",
    ]


@pytest.mark.parametrize(
    "override, message",
    [
        ("methods=('ppo','pppo')", "methods has 'pppo', which the config does not define; choose among .*ppo"),
        ("methods=('ppo','ppo')", "methods is ppo, ppo: name at least one, each once"),
        ("methods=()", "methods is empty: name at least one"),
        ("dpo.stage.name=dop", "dpo.stage.name is 'dop'; choose one of pretrain"),
        ("dpo.stage.name=sft", r"dpo \(stage sft\) trains no policy from rewards or rankings"),
        ("dpo.stage.name=reward", r"dpo \(stage reward\) trains no policy"),
        ("seeds=()", "seeds is empty: give at least one"),
        ("seeds=(0,0)", "seeds is 0, 0: give at least one, each once"),
        ("seeds=(-1,)", "config.seeds is -1; it must be at least 0"),
        ("rollouts=0", "config.rollouts is 0; it must be at least 1"),
        ("rollouts=72", "rloo learns from 64 answers .*the contest's `rollouts` are 72: choose numbers that divide"),
        ("evaluate.rater=rul", "evaluate.rater is 'rul'; choose one of rule"),
        ("evaluate.rows_at_once=0", "evaluate.rows_at_once is 0; it must be at least 1"),
        (
            "prompts.held_out_from=0.05",
            "prompts.held_out_from is 0.05; it must be below prompts.held_out, which is 0.05",
        ),
        ("init_from=nowhere", "there is no workdir nowhere"),
        ("reward_model=nowhere", "there is no workdir nowhere"),
        ("rloo.data.max_new=33", "reward was trained on rows of 64 tokens, but a prompt and .* may have 66 here"),
        ("evaluate.max_new=32", "reward was trained on rows of 64 tokens, but a prompt and .* may have 65 here"),
        ("verdicts.rank.max_new=32", "reward was trained on rows of 64 tokens, but a prompt and .* may have 65 here"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(finished, tmp_path, monkeypatch, override, message):
    enter_small_world(monkeypatch.setattr)
    monkeypatch.setattr(loop, "run_training_loop", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match=message):
        study.run_methods_study(contest_config(finished, override), tmp_path / "contest")


@pytest.mark.parametrize(
    "key, value",
    [
        ("rloo.init_from", "elsewhere"),
        ("rloo.data.held_out", 0.1),
        ("rloo.data.reward_model", "another"),
        ("dpo.data.held_out", 0.1),
        ("verdicts.rank.rater", "rule"),
        ("verdicts.rank.held_out", 0.1),
    ],
)
def test_nobody_has_another_start_judge_or_part_of_the_data(finished, key, value):
    config = contest_config(finished).unlock()
    *path, last = key.split(".")
    inside = functools.reduce(lambda tree, name: tree[name], path, config)
    del inside[last]  # in our config it follows the contest's
    inside[last] = value
    with pytest.raises(UserError, match=f"{key} is {value}, the contest's is .*: all methods must have the same"):
        study.method_entries(config)


def test_schedules_are_as_long_as_their_runs(finished):
    config = contest_config(finished, "rollouts=128")
    for name in ("ppo", "grpo", "rloo", "best_of_n"):
        method = config[name]
        assert method.train.steps == 8 and method.stage.epochs == 2
        assert method.optimizer.total_steps == 8 * 2 * method.stage.minibatch_count
    assert config.dpo.optimizer.total_steps == config.dpo.train.steps == 16
    assert config.verdicts.rank.prompts == 64


def test_a_stage_whose_answers_cannot_be_counted_is_refused(finished):
    config = contest_config(finished, "methods=('rloo',)").unlock()
    config.rloo.data.resample_rounds = 1
    with pytest.raises(UserError, match="rloo.data.resample_rounds draws answers beyond the budget: set it to 0"):
        study.method_entries(config)


def test_the_same_folder_refuses_another_contest(root, finished):
    with pytest.raises(UserError, match="was made with another config .*give another --workdir"):
        study.run_methods_study(contest_config(finished, "rollouts=128"), root)

"""Parts of a long result: each is made once however often it is begun, and a kill costs the one in the making."""

import json

import numpy as np
import pytest
from runs import EXPERIMENTS, finished, small, stage_config

from lm import rewards
from lm.core.config import call_with_options, load_config
from lm.core.errors import UserError
from lm.data import preferences
from lm.evaluate import measurements, models
from lm.evaluate.policies import held_out_prompts
from lm.feedback import auto_rank
from lm.runs.partial_results import PartialResults
from lm.runs.workdir import load_trained_model as loaded, read_json, read_metrics
from lm.studies.methods import study
from lm.studies.overoptimization import measure
from lm.train import loop, tokenizer_stage

__all__ = ["finished", "small"]


def test_what_is_whole_is_kept_and_what_is_torn_is_made_again(tmp_path):
    made = []

    def once(parts: PartialResults, name: str):
        return parts.once(name, lambda: made.append(name) or {"text": f"é\u2028 of {name}", "of": (1, 2)})

    first = PartialResults(tmp_path / "parts.jsonl")
    assert once(first, "a") == once(first, "a") == {"text": "é\u2028 of a", "of": [1, 2]}
    once(first, "b")
    whole = (tmp_path / "parts.jsonl").read_bytes()
    (tmp_path / "parts.jsonl").write_bytes(whole[:-3])
    second = PartialResults(tmp_path / "parts.jsonl")
    assert once(second, "a") == {"text": "é\u2028 of a", "of": [1, 2]} and made == ["a", "b"]
    once(second, "b")
    assert made == ["a", "b", "b"] and (tmp_path / "parts.jsonl").read_bytes() == whole
    second.remove()
    assert not (tmp_path / "parts.jsonl").exists()
    once(second, "a")
    assert made == ["a", "b", "b", "a"]


@pytest.mark.parametrize("text", ["[1, 2\n", '{"a": 1}\n', "3\n"])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "parts.jsonl").write_text(text)
    with pytest.raises(UserError, match="parts.jsonl is not what an interrupted start leaves .*: remove it"):
        PartialResults(tmp_path / "parts.jsonl")


class Killed(BaseException):
    """What no program catches."""


def killing(function, at: int, asked: list):
    """`function`, which notes its calls in `asked` and dies in that of number `at`."""

    def called(*args, **options):
        asked.append(args)
        if len(asked) == at + 1:
            raise Killed
        return function(*args, **options)

    return called


@pytest.mark.parametrize("where, at, left", [("held_out_losses", 1, (2, 2)), ("sampled_answers", 2, (1, 0))])
def test_an_evaluation_goes_on_with_the_model_it_had_come_to(finished, small, tmp_path, monkeypatch, where, at, left):
    """Of three models: killed as the second reads, and as the third, which has read, answers."""
    answers, losses, workdir = [], [], tmp_path / "evaluate"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(measurements, where, killing(getattr(measurements, where), at, []))
        models.run_evaluation(stage_config(finished, "evaluate"), workdir)
    assert not (workdir / "answers.jsonl").exists()
    for name, calls in (("sampled_answers", answers), ("held_out_losses", losses)):
        monkeypatch.setattr(measurements, name, killing(getattr(measurements, name), 100, calls))
    summary = models.run_evaluation(stage_config(finished, "evaluate"), workdir)
    assert (len(answers), len(losses)) == left
    assert {**summary, "seconds": 0} == {**read_json(finished / "evaluate" / "summary.json"), "seconds": 0}
    assert (workdir / "answers.jsonl").read_bytes() == (finished / "evaluate" / "answers.jsonl").read_bytes()
    assert not (workdir / models.PARTIAL_FILE).exists()


def test_another_run_in_the_place_of_a_model_is_evaluated_anew(finished, small, tmp_path, monkeypatch):
    workdir, calls = tmp_path / "evaluate", []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(models, "write_answers", killing(None, 0, []))
        models.run_evaluation(stage_config(finished, "evaluate"), workdir)
    load_as_it_is = models.load_policy

    def other(path, **options):
        found = load_as_it_is(path, **options)
        return found._replace(summary={**found.summary, "seconds": 0}) if found.stage == "sft" else found

    monkeypatch.setattr(models, "load_policy", other)
    monkeypatch.setattr(measurements, "sampled_answers", killing(measurements.sampled_answers, 100, calls))
    models.run_evaluation(stage_config(finished, "evaluate"), workdir)
    assert [trained.stage for trained, *_ in calls] == ["sft"]


def test_answers_that_no_rater_has_seen_are_kept(finished, small, tmp_path, monkeypatch):
    """Of four chunks of 32 prompts the rater dies over the last: its answers are not drawn again."""
    workdir, drawn = tmp_path / "rank", []
    rule, answerer = rewards.REWARDS["rule"], auto_rank.batch_answerer
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setitem(rewards.REWARDS, "rule", killing(rule, 3, []))
        auto_rank.run_auto_rank(stage_config(finished, "rank"), workdir)
    assert len(preferences.read_jsonl_rankings(workdir / auto_rank.RANKINGS_FILE)) == 96
    monkeypatch.setattr(
        auto_rank, "batch_answerer", lambda *args, **options: killing(answerer(*args, **options), 100, drawn)
    )
    auto_rank.run_auto_rank(stage_config(finished, "rank"), workdir)
    assert drawn == [] and not (workdir / auto_rank.UNRANKED_FILE).exists()
    found, before = (
        preferences.read_jsonl_rankings(root / auto_rank.RANKINGS_FILE) for root in (workdir, finished / "rank")
    )
    assert [r._replace(time="") for r in found] == [r._replace(time="") for r in before]


def test_answers_of_a_contest_outlive_a_judge_that_dies(finished, small, tmp_path, monkeypatch):
    config = load_config(
        f"{EXPERIMENTS / 'contest.py'}:tiny", [f"init_from={finished}/sft", f"reward_model={finished}/reward"]
    )
    start, calls = loaded(finished / "sft", backend="cpu"), []
    questions = call_with_options(held_out_prompts, config.prompts, start.tokenizer, name="prompts")
    answerer = study.policy_answerer
    monkeypatch.setattr(
        study, "policy_answerer", lambda *args, **options: killing(answerer(*args, **options), 100, calls)
    )

    def proxy(examples, texts):
        return np.float32([len(text) for text in texts])

    def answers(judge, workdir):
        monkeypatch.setattr(study, "reward_from_workdirs", lambda *_, **limits: judge)
        given = start, questions, config.reward_model, 64
        recorded = call_with_options(study.answer_recorder, config.evaluate, *given, name="evaluate")
        return recorded(workdir / "start" / "0", 0)

    with pytest.raises(Killed):
        answers(killing(proxy, 0, []), tmp_path)
    rows = answers(proxy, tmp_path)
    assert len(calls) == 1  # asked once, by the start that the judge's death ended
    again = answers(proxy, tmp_path / "other")
    assert rows == again == read_metrics(tmp_path / "start" / "0" / "answers.jsonl")
    assert [file.name for file in (tmp_path / "start" / "0").iterdir()] == ["answers.jsonl"]


def test_a_pool_and_a_measurement_go_on_with_the_draw_they_had_come_to(finished, small, tmp_path, monkeypatch):
    """Of four draws to a pool the third is killed; of the two of a policy the proxy dies over the second."""
    config = load_config(f"{EXPERIMENTS / 'overoptimization.py'}:tiny", [f"init_from={finished}/sft"])
    start = loaded(finished / "sft", backend="cpu")
    questions = call_with_options(held_out_prompts, config.prompts, start.tokenizer, name="prompts")
    options = {**config.evaluate.to_dict(), "samples": 4, "draws": 2}

    def lab(name: str, at: int, calls: list) -> measure.GoldEvaluator:
        (tmp_path / name).mkdir(exist_ok=True)
        found = call_with_options(measure.GoldEvaluator, options, tmp_path / name, start, questions, 0, name="evaluate")
        found._ask = killing(found._ask, at, calls)
        return found

    straight = lab("straight", 100, []).answer_pool()
    with pytest.raises(Killed):
        lab("killed", 2, []).answer_pool()
    calls: list = []
    texts, gold = lab("killed", 100, calls).answer_pool()
    assert len(calls) == 2 and texts == straight[0] and gold.tolist() == straight[1].tolist()
    assert [file.name for file in (tmp_path / "killed").iterdir()] == ["pool.jsonl"]

    def proxy(examples, texts):
        return np.float32([len(text) for text in texts])

    whole = lab("straight", 100, []).policy_scores(start, proxy, 4, PartialResults(tmp_path / "whole.jsonl"))
    with pytest.raises(Killed):
        lab("killed", 100, []).policy_scores(
            start, killing(proxy, 1, []), 4, PartialResults(tmp_path / "measured.jsonl")
        )
    again = lab("killed", 0, []).policy_scores(
        start, proxy, 4, PartialResults(tmp_path / "measured.jsonl")
    )  # dies if it is asked
    assert json.dumps(again) == json.dumps(whole)


def test_a_vocabulary_that_is_learnt_outlives_a_kill_while_it_is_measured(finished, small, tmp_path, monkeypatch):
    workdir, learnt = tmp_path / "tokenizer", []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tokenizer_stage, "load_tokenizer", killing(None, 0, []))
        loop.train_stage(stage_config(finished, "tokenizer"), workdir)
    monkeypatch.setattr(tokenizer_stage, "train_tokenizer", killing(tokenizer_stage.train_tokenizer, 100, learnt))
    summary = loop.train_stage(stage_config(finished, "tokenizer"), workdir)
    assert learnt == []
    assert {**summary, "seconds": 0} == {**read_json(finished / "tokenizer" / "summary.json"), "seconds": 0}
    assert (workdir / "tokenizer.model").read_bytes() == (finished / "tokenizer" / "tokenizer.model").read_bytes()
    assert not (workdir / "vocabulary.parts.jsonl").exists()

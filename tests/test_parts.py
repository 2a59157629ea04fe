"""Parts of a long result: each is made once however often it is begun, and a kill costs the one in the making."""

import json

import numpy as np
import pytest
from runs import EXPERIMENTS, finished, small, stage_config

from lm import contest, evaluate, train, verdicts, vocabulary
from lm.config import call, load
from lm.data import rankings
from lm.errors import UserError
from lm.lab import climbs
from lm.parts import Parts
from lm.unseen import asked
from lm.workdir import load as loaded, read_json, read_metrics

__all__ = ["finished", "small"]


def test_what_is_whole_is_kept_and_what_is_torn_is_made_again(tmp_path):
    made = []

    def once(parts: Parts, name: str):
        return parts.once(name, lambda: made.append(name) or {"text": f"é\u2028 of {name}", "of": (1, 2)})

    first = Parts(tmp_path / "parts.jsonl")
    assert once(first, "a") == once(first, "a") == {"text": "é\u2028 of a", "of": [1, 2]}
    once(first, "b")
    whole = (tmp_path / "parts.jsonl").read_bytes()
    (tmp_path / "parts.jsonl").write_bytes(whole[:-3])
    second = Parts(tmp_path / "parts.jsonl")
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
        Parts(tmp_path / "parts.jsonl")


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


@pytest.mark.parametrize("where, at, left", [("losses_of", 1, (2, 2)), ("answers_of", 2, (1, 0))])
def test_an_evaluation_goes_on_with_the_model_it_had_come_to(finished, small, tmp_path, monkeypatch, where, at, left):
    """Of three models: killed as the second reads, and as the third, which has read, answers."""
    answers, losses, workdir = [], [], tmp_path / "evaluate"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(evaluate, where, killing(getattr(evaluate, where), at, []))
        evaluate.run(stage_config(finished, "evaluate"), workdir)
    assert not (workdir / "answers.jsonl").exists()
    for name, calls in (("answers_of", answers), ("losses_of", losses)):
        monkeypatch.setattr(evaluate, name, killing(getattr(evaluate, name), 100, calls))
    summary = evaluate.run(stage_config(finished, "evaluate"), workdir)
    assert (len(answers), len(losses)) == left
    assert {**summary, "seconds": 0} == {**read_json(finished / "evaluate" / "summary.json"), "seconds": 0}
    assert (workdir / "answers.jsonl").read_bytes() == (finished / "evaluate" / "answers.jsonl").read_bytes()
    assert not (workdir / evaluate.PARTS).exists()


def test_another_run_in_the_place_of_a_model_is_evaluated_anew(finished, small, tmp_path, monkeypatch):
    workdir, calls = tmp_path / "evaluate", []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(evaluate, "write_answers", killing(None, 0, []))
        evaluate.run(stage_config(finished, "evaluate"), workdir)
    load_as_it_is = evaluate.load

    def other(path, **options):
        found = load_as_it_is(path, **options)
        return found._replace(summary={**found.summary, "seconds": 0}) if found.stage == "sft" else found

    monkeypatch.setattr(evaluate, "load", other)
    monkeypatch.setattr(evaluate, "answers_of", killing(evaluate.answers_of, 100, calls))
    evaluate.run(stage_config(finished, "evaluate"), workdir)
    assert [trained.stage for trained, *_ in calls] == ["sft"]


def test_answers_that_no_rater_has_seen_are_kept(finished, small, tmp_path, monkeypatch):
    """Of two chunks of 32 prompts the rater dies over the second: its answers are not drawn again."""
    workdir, drawn = tmp_path / "rank", []
    rule, answerer = verdicts.REWARDS["rule"], verdicts.answerer
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setitem(verdicts.REWARDS, "rule", killing(rule, 1, []))
        verdicts.run(stage_config(finished, "rank"), workdir)
    assert len(rankings.read(workdir / verdicts.RANKINGS)) == 32
    monkeypatch.setattr(verdicts, "answerer", lambda *args, **options: killing(answerer(*args, **options), 100, drawn))
    verdicts.run(stage_config(finished, "rank"), workdir)
    assert drawn == [] and not (workdir / verdicts.UNRANKED).exists()
    found, before = (rankings.read(root / verdicts.RANKINGS) for root in (workdir, finished / "rank"))
    assert [r._replace(time="") for r in found] == [r._replace(time="") for r in before]


def test_answers_of_a_contest_outlive_a_judge_that_dies(finished, small, tmp_path, monkeypatch):
    config = load(
        f"{EXPERIMENTS / 'contest.py'}:tiny", [f"init_from={finished}/sft", f"reward_model={finished}/reward"]
    )
    start, calls = loaded(finished / "sft", backend="cpu"), []
    questions = call(asked, config.prompts, start.tokenizer, name="prompts")
    answerer = contest.answerer
    monkeypatch.setattr(contest, "answerer", lambda *args, **options: killing(answerer(*args, **options), 100, calls))

    def proxy(contexts, texts):
        return np.float32([len(text) for text in texts])

    options = {**config.evaluate.to_dict()}
    with pytest.raises(Killed):
        contest.examined(start, questions, killing(proxy, 0, []), **options)(tmp_path / "start" / "0", 0)
    rows = contest.examined(start, questions, proxy, **options)(tmp_path / "start" / "0", 0)
    assert len(calls) == 1  # asked once, by the start that the judge's death ended
    again = contest.examined(start, questions, proxy, **options)(tmp_path / "other" / "start" / "0", 0)
    assert rows == again == read_metrics(tmp_path / "start" / "0" / "answers.jsonl")
    assert [file.name for file in (tmp_path / "start" / "0").iterdir()] == ["answers.jsonl"]


def test_a_pool_and_a_measurement_go_on_with_the_draw_they_had_come_to(finished, small, tmp_path, monkeypatch):
    """Of four draws to a pool the third is killed; of the two of a policy the proxy dies over the second."""
    config = load(f"{EXPERIMENTS / 'overoptimisation.py'}:tiny", [f"init_from={finished}/sft"])
    start = loaded(finished / "sft", backend="cpu")
    questions = call(asked, config.prompts, start.tokenizer, name="prompts")
    options = {**config.evaluate.to_dict(), "samples": 4, "draws": 2}

    def lab(name: str, at: int, calls: list) -> climbs.Lab:
        (tmp_path / name).mkdir(exist_ok=True)
        found = climbs.Lab(tmp_path / name, start, questions, 0, **options)
        found._ask = killing(found._ask, at, calls)
        return found

    straight = lab("straight", 100, []).pool()
    with pytest.raises(Killed):
        lab("killed", 2, []).pool()
    calls: list = []
    texts, gold = lab("killed", 100, calls).pool()
    assert len(calls) == 2 and texts == straight[0] and gold.tolist() == straight[1].tolist()
    assert [file.name for file in (tmp_path / "killed").iterdir()] == ["pool.jsonl"]

    def proxy(contexts, texts):
        return np.float32([len(text) for text in texts])

    whole = lab("straight", 100, []).measured(start, proxy, 4, Parts(tmp_path / "whole.jsonl"))
    with pytest.raises(Killed):
        lab("killed", 100, []).measured(start, killing(proxy, 1, []), 4, Parts(tmp_path / "measured.jsonl"))
    again = lab("killed", 0, []).measured(start, proxy, 4, Parts(tmp_path / "measured.jsonl"))  # dies if it is asked
    assert json.dumps(again) == json.dumps(whole)


def test_a_vocabulary_that_is_learnt_outlives_a_kill_while_it_is_measured(finished, small, tmp_path, monkeypatch):
    workdir, learnt = tmp_path / "tokenizer", []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(vocabulary.tokenizers, "load", killing(None, 0, []))
        train.run(stage_config(finished, "tokenizer"), workdir)
    monkeypatch.setattr(vocabulary.tokenizers, "train", killing(vocabulary.tokenizers.train, 100, learnt))
    summary = train.run(stage_config(finished, "tokenizer"), workdir)
    assert learnt == []
    assert {**summary, "seconds": 0} == {**read_json(finished / "tokenizer" / "summary.json"), "seconds": 0}
    assert (workdir / "tokenizer.model").read_bytes() == (finished / "tokenizer" / "tokenizer.model").read_bytes()
    assert not (workdir / "vocabulary.parts.jsonl").exists()

"""The chain of stages: killed anywhere, it ends in the same bits; finished, it does nothing more."""

import json
import signal
import time
from pathlib import Path

import pytest
from runs import EXPERIMENTS, TRAINED, assert_same_run, finished, small, started

from lm.core.config import load_config
from lm.core.errors import UserError
from lm.data import preferences
from lm.pipeline import runner
from lm.runs.workdir import read_json, read_metrics

__all__ = ["finished", "small"]

KILLS = {  # by what has appeared in the run folder
    "while pretraining compiles, before any checkpoint": lambda run: (run / "pretrain" / "metrics.jsonl").exists(),
    "in the second chunk of rankings": lambda run: (run / "rank" / "rankings.jsonl").exists(),
    "as the reward model's first checkpoint is saved": lambda run: any((run / "reward" / "checkpoints").glob("*")),
    "after a rollout of PPO": lambda run: len(read_metrics(run / "ppo" / "metrics.jsonl")) >= 2,
    "as the models are compared": lambda run: (run / "evaluate" / "config.json").exists(),
}


@pytest.fixture(scope="module")
def survived(finished, tmp_path_factory) -> Path:
    """The run folder of a pipeline that was killed at every moment of KILLS and started again each time."""
    run = tmp_path_factory.mktemp("killed") / "run"
    command = (
        "lm.pipeline.runner",
        f"--config={EXPERIMENTS / 'small_talk.py'}:tiny",
        f"--workdir={run}",
        f"--config.corpus={finished.parent / 'text'}",
    )
    for moment in KILLS.values():
        process = started(*command)
        while process.poll() is None and not moment(run):
            time.sleep(0.01)
        process.kill()
        said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
    process = started(*command)
    out, errors = process.communicate()
    assert (process.returncode, errors) == (0, ""), errors
    assert f"report: {run / 'report.html'}" in out
    return run


@pytest.mark.parametrize("stage", TRAINED)
def test_a_killed_pipeline_ends_in_the_same_bits(finished, survived, stage):
    assert_same_run(survived / stage, finished / stage)


def test_a_killed_pipeline_ends_in_the_same_tokenizer_rankings_and_answers(finished, survived):
    one, other = ((run / "tokenizer" / "tokenizer.model").read_bytes() for run in (finished, survived))
    assert one == other
    one, other = (
        [r._replace(time="") for r in preferences.read_jsonl_rankings(run / "rank" / "rankings.jsonl")]
        for run in (finished, survived)
    )
    assert one == other
    one, other = ((run / "evaluate" / "answers.jsonl").read_bytes() for run in (finished, survived))
    assert one == other
    one, other = ({**read_json(run / "evaluate" / "summary.json"), "seconds": 0} for run in (finished, survived))
    assert one == other


def test_a_finished_pipeline_does_nothing_again(survived, small):
    """Only the pipeline's record and report, the configs and the locks are written, as at every start."""

    def contents():
        return {
            path: path.read_bytes()
            for path in sorted(survived.rglob("*"))
            if path.is_file() and path.name not in ("pipeline.json", "report.html", ".lock")
        }

    before = contents()
    config = load_config(f"{EXPERIMENTS / 'small_talk.py'}:tiny", [f"root={survived}"])
    text = read_json(survived / "pretrain" / "config.json")["data"]["corpus"]
    with config.unlocked():
        config.corpus = text
    runner.run_pipeline(config)
    assert contents() == before


def test_the_record(finished):
    record = read_json(finished / "pipeline.json")
    assert (
        record["stages"]
        == list(record["seconds"])
        == ["tokenizer", "pretrain", "sft", "rank", "reward", "ppo", "evaluate"]
    )


def test_a_kill_as_the_record_is_written_is_no_foreign_folder(tmp_path):
    (tmp_path / "pipeline.json.tmp").write_text('{"stag')
    record = runner.pipeline_record(tmp_path, ["a", "b"])
    assert record == read_json(tmp_path / "pipeline.json") == {"stages": ["a", "b"], "seconds": {}}
    assert runner.pipeline_record(tmp_path, ["a", "b"]) == record


def test_folders_that_are_not_this_pipeline_s(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="thesis is not a pipeline's folder: it holds thesis.tex but no pipeline.json"):
        runner.pipeline_record(tmp_path / "thesis", ["a"])
    with pytest.raises(UserError, match="cannot make the folder .*thesis.tex: File exists; give another --workdir"):
        runner.pipeline_record(tmp_path / "thesis" / "thesis.tex", ["a"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pipeline.json").write_text(json.dumps({"stages": ["a", "b"]}))
    with pytest.raises(
        UserError, match="run has stages a, b, the config a: give another --workdir, or remove this one"
    ):
        runner.pipeline_record(tmp_path / "run", ["a"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["pipeline.json", "run", "thesis", "thesis.tex"]


def test_a_slash_at_the_end_makes_no_other_config(monkeypatch):
    configs = []
    monkeypatch.setattr(runner, "run_pipeline", configs.append)
    for workdir in ("some/run", "some/run/"):
        runner.program([f"--config={EXPERIMENTS / 'small_talk.py'}", f"--workdir={workdir}"])
    assert configs[0].to_dict() == configs[1].to_dict()
    assert configs[0].sft.init_from == "some/run/pretrain"

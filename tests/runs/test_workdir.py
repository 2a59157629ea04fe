"""Run folders: one config, one process, and files that are whole at every moment."""

import json
import os
import subprocess
import sys

import pytest

from lm.core.errors import UserError
from lm.runs.workdir import open_workdir, read_json, read_metrics, write_text

CONFIG = {"model": {"width": 8, "betas": (0.9, 0.95)}, "train": {"steps": 10}, "mesh": {"data": 1}}


def changed(**model) -> dict:
    return CONFIG | {"model": CONFIG["model"] | model}


def test_creates_the_folder_with_its_config(tmp_path):
    with open_workdir(tmp_path / "runs" / "a", CONFIG) as workdir:
        assert workdir.config_changes == []
        assert workdir.read_summary() is None
        assert workdir.checkpoints_path == tmp_path / "runs" / "a" / "checkpoints"
    assert read_json(tmp_path / "runs" / "a" / "config.json")["model"] == {"width": 8, "betas": [0.9, 0.95]}
    with open_workdir(tmp_path / "runs" / "a", CONFIG) as workdir:  # tuples have become lists, and that is no change
        assert workdir.config_changes == []


def test_harmless_differences_are_listed_and_kept(tmp_path):
    open_workdir(tmp_path, CONFIG).close()
    new = CONFIG | {"train": {"steps": 20, "log": 5}, "mesh": {}}
    with open_workdir(tmp_path, new) as workdir:
        assert workdir.config_changes == ["train.steps: 10 -> 20", "train.log: absent -> 5", "mesh.data: 1 -> absent"]
    assert read_json(tmp_path / "config.json") == json.loads(json.dumps(new))


def test_other_differences_are_refused_and_change_nothing(tmp_path):
    with open_workdir(tmp_path, CONFIG) as workdir:
        workdir.append_metrics({"step": 0})
    with pytest.raises(UserError) as error:
        open_workdir(tmp_path, changed(width=16, a=1, b=2, c=3) | {"train": {"steps": 20}})
    assert str(error.value) == (
        f"{tmp_path} was made with another config (model.width: 8 -> 16, model.a: absent -> 1, "
        "model.b: absent -> 2 and 1 more): give another --workdir, or remove this one"
    )
    open_workdir(tmp_path, CONFIG).close()  # neither the lock nor the new config stayed behind


def test_a_folder_without_results_takes_a_mended_config(tmp_path):
    open_workdir(tmp_path, CONFIG).close()
    for unfinished in ("checkpoints", "tensorboard"):
        (tmp_path / unfinished).mkdir()
    for begun in ("record.json", "code-0.diff", "trackers.json"):
        (tmp_path / begun).write_text("{}")
    with open_workdir(tmp_path, changed(width=16)) as workdir:
        assert workdir.config_changes == ["model.width: 8 -> 16"]
    assert read_json(tmp_path / "config.json")["model"]["width"] == 16


def test_harmless_is_a_whole_key(tmp_path):
    with open_workdir(tmp_path, {"training": 1, "sft": {"train": 1}}) as workdir:
        workdir.append_metrics({"step": 0})
    with pytest.raises(UserError, match="training: 1 -> 2"):
        open_workdir(tmp_path, {"training": 2, "sft": {"train": 1}})
    with open_workdir(tmp_path, {"training": 1, "sft": {"train": 2}}, changeable_keys=("sft.train",)) as workdir:
        assert workdir.config_changes == ["sft.train: 1 -> 2"]


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path} is not a run's folder: it holds thesis.tex but no config.json"):
        open_workdir(tmp_path, CONFIG)
    with pytest.raises(UserError, match="thesis.tex: File exists"):
        open_workdir(tmp_path / "thesis.tex", CONFIG)


def test_folder_of_a_run_killed_at_once_is_taken_up(tmp_path):
    (tmp_path / ".lock").write_text("1\n")
    (tmp_path / "config.json.tmp").write_text('{"mod')
    open_workdir(tmp_path, CONFIG).close()
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.json"]


def test_second_process_is_refused_until_the_first_is_killed(tmp_path):
    code = (
        "import sys, time; from lm.runs.workdir import open_workdir; w = open_workdir(sys.argv[1], {}); "
        "print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(UserError, match=f"{tmp_path} is in use by process {process.pid}: wait for it, or"):
            open_workdir(tmp_path, {})
        process.kill()
    open_workdir(tmp_path, {}).close()


def test_metrics_are_appended_truncated_and_read(tmp_path):
    with open_workdir(tmp_path, CONFIG) as workdir:
        assert read_metrics(tmp_path) == []
        for step in (1, 2, 3):
            workdir.append_metrics({"step": step, "loss": 1 / step})
        with workdir.metrics_path.open("a") as stream:
            stream.write('{"step": 2, "lo')  # killed while writing
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
        workdir.truncate_after(2)
        workdir.append_metrics({"step": 3, "loss": 0.25})
        assert read_metrics(workdir.metrics_path) == [
            {"step": 1, "loss": 1.0},
            {"step": 2, "loss": 0.5},
            {"step": 3, "loss": 0.25},
        ]


def test_damaged_metrics_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step"\n{"step": 2}\n')
    with pytest.raises(UserError, match="metrics.jsonl is not JSON lines .*: move it away"):
        read_metrics(tmp_path)


def test_summary_round_trip(tmp_path):
    with open_workdir(tmp_path, CONFIG) as workdir:
        workdir.write_summary({"loss": 1.5})
        assert workdir.read_summary() == {"loss": 1.5}
    assert ".tmp" not in "".join(os.listdir(tmp_path))


def test_a_failed_write_leaves_the_old_text(tmp_path, monkeypatch):
    write_text(tmp_path / "summary.json", "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot write .*summary.json: No space left on device; make room"):
        write_text(tmp_path / "summary.json", "new")
    assert (tmp_path / "summary.json").read_text() == "old"


def test_missing_or_broken_json_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read .*config.json: No such file or directory; give the folder of"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not JSON"):
        open_workdir(tmp_path, CONFIG)


def test_a_run_from_before_a_key_goes_on_under_it(tmp_path):
    """What the key does by default is what the run did; anything else is another config."""
    before = {"model": {"width": 8}}
    with open_workdir(tmp_path / "run", before):
        (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    with open_workdir(tmp_path / "run", {**before, "marker_embedding": ""}) as workdir:
        assert workdir.config_changes == []
    (tmp_path / "run" / "config.json").write_text(json.dumps(before))
    with (
        pytest.raises(UserError, match='marker_embedding: "" -> "x"'),
        open_workdir(tmp_path / "run", {**before, "marker_embedding": "x"}),
    ):
        pass

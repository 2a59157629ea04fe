"""Weights & Biases and MLflow: asked for by name, continued, never in the way of training."""

import sys
from types import SimpleNamespace

import pytest
from runs import EXPERIMENTS

from lm.core.config import load_config
from lm.core.errors import UserError
from lm.runs import trackers
from lm.runs.console import MetricWriters
from lm.runs.trackers import Tracker, open_trackers, tracker_packages
from lm.runs.workdir import read_json
from lm.train import loop


@pytest.fixture
def run(tmp_path):
    """run(log): what lm train does when asked for these trackers; the folder must stay as it was if it refuses."""

    def of(log, name="pretrain"):
        config = load_config(f"{EXPERIMENTS / name}.py:tiny")
        with pytest.raises(UserError) as refused:
            loop.train_stage(config, tmp_path / "run", log=log)
        assert not (tmp_path / "run").exists()
        return str(refused.value)

    return of


def test_an_unknown_name_is_one_line(run):
    assert run("tensorbord,wandb") == "--log=tensorbord,wandb: 'tensorbord' is no tracker; choose among wandb, mlflow"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_line(run, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # an import of it raises
    assert run(name) == f"--log={name} needs a package that is not here: pip install {name}"


def test_the_tokenizer_takes_no_steps(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    assert run("wandb", "tokenizer") == "stage tokenizer takes no steps: leave --log and --profile out"


def test_none_is_asked_for():
    assert tracker_packages("") == {}


@pytest.fixture
def made_up(monkeypatch):
    """Two trackers that note what happens to them."""
    events = []

    def opening(name):
        def open_one(package, path, config, id):
            events.append((name, "open", id))
            note = lambda what: lambda *args: events.append((name, what, *args))
            return Tracker(name, id or f"{name}-1", note("write"), note("close"))

        return open_one

    monkeypatch.setattr(trackers, "TRACKERS", {name: opening(name) for name in ("one", "two")})
    return events


def test_ids_are_kept_so_that_a_resumed_run_continues(made_up, tmp_path):
    open_trackers({"one": None}, tmp_path, {})
    open_trackers({"one": None, "two": None}, tmp_path, {})
    open_trackers({"two": None}, tmp_path, {})
    assert [id for _, _, id in made_up] == [None, "one-1", None, "two-1"]
    assert read_json(tmp_path / "trackers.json") == {"one": "one-1", "two": "two-1"}


def test_without_trackers_nothing_is_left(tmp_path):
    assert open_trackers({}, tmp_path, {}) == [] and list(tmp_path.iterdir()) == []


def test_one_that_cannot_begin_is_one_line_and_the_others_are_closed(made_up, monkeypatch, tmp_path):
    def refuse(*_):
        raise RuntimeError("no API key\n  configured")

    monkeypatch.setitem(trackers.TRACKERS, "two", refuse)
    said = "--log=two cannot begin: no API key configured; mend that, or leave two out of --log"
    with pytest.raises(UserError, match=said):
        open_trackers({"one": None, "two": None}, tmp_path, {})
    assert made_up[-1] == ("one", "close") and not (tmp_path / "trackers.json").exists()


def test_writers_write_to_all(made_up, tmp_path):
    with MetricWriters(tmp_path, trackers=open_trackers({"one": None, "two": None}, tmp_path, {})) as writers:
        writers.write(3, {"loss": 1.5})
    assert made_up[2:] == [
        ("one", "write", 3, {"loss": 1.5}),
        ("two", "write", 3, {"loss": 1.5}),
        ("one", "close"),
        ("two", "close"),
    ]
    assert any(b"loss" in file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())


def test_one_that_fails_is_told_of_once_and_left_behind(tmp_path, capsys):
    """The network goes at step 2; the other goes on, and fails to close, which is no reason to fail either."""
    seen = []

    def lost(step, values):
        seen.append(step)
        if step == 2:
            raise ConnectionError("unreachable")

    def close():
        raise OSError("disk full")

    pair = [Tracker("a", "1", lost, close), Tracker("b", "2", lambda step, values: seen.append(-step), close)]
    with MetricWriters(tmp_path, trackers=pair) as writers:
        for step in (1, 2, 3):
            writers.write(step, {"loss": 1.0})
    assert seen == [1, -1, 2, -2, -3]
    assert capsys.readouterr().err.splitlines() == [
        "warning: a gets no more metrics (ConnectionError: unreachable); metrics.jsonl has them",
        "warning: b gets no more metrics (OSError: disk full); metrics.jsonl has them",
    ]


CONFIG = {"optimizer": {"learning_rate": 0.5}, "tuple": [1, 2]}


def two_starts(name, workdir):
    """A run that is written to at step 1, and again at 1 and 2 by the process that takes it up; its id, both times."""
    ids = []
    for last in (1, 2):
        tracker = open_trackers(tracker_packages(name), workdir, CONFIG | {"steps": last})[0]
        with MetricWriters(workdir, trackers=[tracker]) as writers:
            for step in range(1, last + 1):
                writers.write(step, {"loss": 1.0 / step, "held_out/loss": 2.0 / step})
        ids.append(tracker.id)
    return ids


@pytest.mark.peer
def test_mlflow_without_a_network(tmp_path, monkeypatch, capfd):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny brings no database
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    first, second = two_starts("mlflow", tmp_path)
    assert first == second
    client = mlflow.MlflowClient()
    run = client.get_run(first)
    assert run.data.params == {"optimizer.learning_rate": "0.5", "tuple": "[1, 2]", "steps": "1"}
    assert run.data.metrics == {"loss": 0.5, "held_out/loss": 1.0} and run.info.status == "FINISHED"
    assert {m.step for m in client.get_metric_history(first, "loss")} == {1, 2}
    assert "no more metrics" not in capfd.readouterr().err


@pytest.mark.peer
def test_wandb_without_a_network(tmp_path, monkeypatch, capfd):
    """Its files hold records one after the other; names and values stand in them as JSON."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    first, second = two_starts("wandb", tmp_path)
    assert first == second
    files = sorted(tmp_path.glob(f"wandb/offline-run-*-{first}/run-{first}.wandb"))
    assert files
    written = b"".join(file.read_bytes() for file in files)
    assert b"learning_rate" in written and b"held_out/loss" in written
    assert "no more metrics" not in capfd.readouterr().err

"""record.json: every start, the code it ran, and no failure of git or disk that would stop a run."""

import json
import shutil
import subprocess

import jax
import pytest
from runs import finished, small, stage_config

from lm.runs import metadata
from lm.runs.workdir import read_json, read_run_starts
from lm.train import loop

__all__ = ["finished", "small"]


@pytest.fixture
def checkout(tmp_path):
    """A git repository with one commit that tracks lm/__init__.py; checkout(command): git's answer there."""
    folder = tmp_path / "checkout"
    (folder / "lm").mkdir(parents=True)
    (folder / "lm" / "__init__.py").write_text("one\n")

    def git(*command):
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        return subprocess.run(["git", "-C", folder, *who, *command], check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    git.folder = folder
    return git


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def no_measurement(monkeypatch):
    monkeypatch.setattr(metadata, "peak_flops", lambda: (1e9, "made up"))


def test_a_start(workdir, checkout, monkeypatch):
    """The code's revision, not the current directory's, which is another repository's."""
    monkeypatch.setattr(metadata, "CODE_ROOT", checkout.folder)
    monkeypatch.setattr(metadata.sys, "orig_argv", ["/usr/bin/python3", "-m", "lm", "train", "--workdir=my run"])
    start = metadata.record_start(workdir, seed=7)
    assert read_json(workdir / "record.json") == [start]
    assert start["revision"] == checkout("rev-parse", "HEAD").strip()
    assert (start["dirty"], start["diff"], start["seed"]) == (False, None, 7)
    assert start["command"] == "python3 -m lm train '--workdir=my run'"
    assert start["versions"]["jax"] == jax.__version__ and {*metadata.RECORDED_PACKAGES, "python"} == set(
        start["versions"]
    )
    assert (start["backend"], start["device"], start["devices"]) == ("cpu", "cpu", 8)
    assert start["peak"] == {"flops_per_second": 1e9, "source": "made up"}
    assert start["time"].endswith("+00:00")


def test_each_start_keeps_the_changes_it_ran_with(workdir, checkout, monkeypatch):
    """The second start is of changed code: its difference turns the revision into that code. The third is clean."""
    monkeypatch.setattr(metadata, "CODE_ROOT", checkout.folder)
    metadata.record_start(workdir, seed=0)
    (checkout.folder / "lm" / "__init__.py").write_text("two\n")
    (checkout.folder / "untracked.py").write_text("")
    metadata.record_start(workdir, seed=0)
    checkout("checkout", "-q", ".")
    metadata.record_start(workdir, seed=0)
    starts = read_run_starts(workdir)
    assert [(start["dirty"], start["diff"]) for start in starts] == [
        (False, None),
        (True, "code-1.diff"),
        (False, None),
    ]
    checkout("apply", str(workdir / "code-1.diff"))
    assert (checkout.folder / "lm" / "__init__.py").read_text() == "two\n"


def test_a_long_difference_is_cut_and_says_so(monkeypatch):
    monkeypatch.setattr(metadata, "MAX_DIFF_BYTES", 10)
    assert metadata.truncated_diff("12345\n78") == "12345\n78"
    assert metadata.truncated_diff("12345\n7890\n") == "12345\n[5 of 11 bytes left out here]\n"
    assert metadata.truncated_diff("x" * 11) == "[11 of 11 bytes left out here]\n"


def test_without_git_or_checkout_it_says_so(tmp_path, workdir, checkout, monkeypatch):
    unknown = {"revision": None, "dirty": None, "diff": None}
    assert metadata.code_revision(workdir) == (unknown, "")
    inside = checkout.folder / "venv"  # installed within another project's checkout, which does not track it
    (inside / "lm").mkdir(parents=True)
    assert metadata.code_revision(inside) == (unknown, "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert metadata.code_revision(checkout.folder) == (unknown, "")
    assert (
        metadata.record_start(workdir, seed=0)["revision"] is None and read_run_starts(workdir)[0]["revision"] is None
    )


def test_the_peak_is_measured_once_on_a_machine(workdir, monkeypatch):
    measured = []
    monkeypatch.setattr(metadata, "peak_flops", lambda: measured.append(1) or (float(len(measured)), "made up"))
    assert [metadata.record_start(workdir, seed=0)["peak"]["flops_per_second"] for _ in range(2)] == [1, 1]
    monkeypatch.setattr(metadata.socket, "gethostname", lambda: "another")
    assert metadata.record_start(workdir, seed=0)["peak"]["flops_per_second"] == 2


def test_no_run_fails_for_its_record(workdir, capsys):
    (workdir / "record.json").write_text("[{")
    assert metadata.record_start(workdir, seed=0)["peak"]["flops_per_second"] is None
    assert (workdir / "record.json").read_text() == "[{"
    said = capsys.readouterr().err
    assert said.startswith("warning: where this run comes from is not recorded: ") and said.count("\n") == 1


def test_a_run_and_its_resumption_are_two_starts(finished, small, tmp_path):
    shutil.copytree(finished.parent / "snapshots" / "pretrain" / "batch 6", tmp_path / "run")
    summary = loop.train_stage(stage_config(finished, "pretrain"), tmp_path / "run")
    first, second = read_run_starts(tmp_path / "run")
    assert first["time"] <= second["time"] and first["seed"] == second["seed"] == 0
    assert summary["mfu"] > 0
    (start,) = json.loads((finished / "tokenizer" / "record.json").read_text())
    assert start["backend"] == "cpu"

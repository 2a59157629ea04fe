"""Resume = never stopped: whatever a kill leaves, the same command ends in the same bits (correctness.md, rule 13)."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import ROOT, TRAINED, assert_same_run, finished, saved, settings, small, stage_config, started

from lm.report import run
from lm.runs.checkpoint import restore_params
from lm.runs.console import SigtermExit
from lm.runs.workdir import load_trained_model, read_json, read_metrics
from lm.train import loop

__all__ = ["finished", "small"]


def moments(stage: str) -> list[str]:
    return [*(["batch 1", "batch 3"] if stage == "ppo" else ["batch 2", "batch 6"]), "saving", "evaluation"]


def at_batch(monkeypatch, number: int, event) -> None:
    """Has `event()` happen when the loop asks for this batch."""
    fetched = loop.device_batch
    monkeypatch.setattr(
        loop, "device_batch", lambda r, state, i: (event() if i == number else None, fetched(r, state, i))[1]
    )


@pytest.mark.parametrize(
    "stage, moment",
    [
        pytest.param(
            stage,
            moment,
            marks=[pytest.mark.slow] * (stage not in ("pretrain", "ppo") or (stage, moment) == ("ppo", "batch 1")),
        )
        for stage in TRAINED
        for moment in moments(stage)
    ],
)
def test_what_a_kill_leaves_continues_to_the_same_bits(finished, small, tmp_path, stage, moment):
    """Before the first checkpoint, between two (the first still being written), in the middle of the last save, and in
    the last evaluation."""
    killed = shutil.copytree(finished.parent / "snapshots" / stage / moment, tmp_path / stage)
    assert not (killed / "summary.json").exists()
    loop.train_stage(stage_config(finished, stage), killed)
    assert_same_run(killed, finished / stage)


@pytest.mark.parametrize(
    "stage, moment",
    [
        ("pretrain", "batch:1"),
        pytest.param("sft", "saving:4", marks=pytest.mark.slow),
        pytest.param("reward", "batch:6", marks=pytest.mark.slow),
        pytest.param("ppo", "saving:4", marks=pytest.mark.slow),  # as the snapshot of ppo while saving
    ],
)
def test_sigkill(finished, small, tmp_path, stage, moment):
    config = f"--config={ROOT}/experiments/{stage}.py:tiny"
    workdir = tmp_path / stage
    process = started("lm.train.loop", config, f"--workdir={workdir}", *settings(finished, stage), moment=moment)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (workdir / "summary.json").exists()
    loop.train_stage(stage_config(finished, stage), workdir)
    assert_same_run(workdir, finished / stage)


def batches_learnt_from(monkeypatch) -> list[int]:
    """The number of every batch that is asked for from now on."""
    asked, fetched = [], loop.device_batch
    monkeypatch.setattr(loop, "device_batch", lambda r, state, i: asked.append(i) or fetched(r, state, i))
    return asked


@pytest.mark.parametrize("stage, steps", [pytest.param("pretrain", 8, marks=pytest.mark.slow), ("ppo", 4)])
def test_sigkill_in_the_last_evaluation_costs_no_step(finished, small, tmp_path, monkeypatch, stage, steps):
    """All steps are saved when it begins; given again, the command makes up for the scores alone."""
    config, workdir = f"--config={ROOT}/experiments/{stage}.py:tiny", tmp_path / stage
    process = started(
        "lm.train.loop", config, f"--workdir={workdir}", *settings(finished, stage), moment="evaluation:1"
    )
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    last = read_metrics(workdir)[-1]
    assert last["step"] == steps and "tokens_per_second" in last
    asked = batches_learnt_from(monkeypatch)
    loop.train_stage(stage_config(finished, stage), workdir)
    assert asked == []
    assert_same_run(workdir, finished / stage)


@pytest.mark.parametrize("stage, every", [pytest.param("sft", 4, marks=pytest.mark.slow), ("ppo", 2)])
def test_an_evaluation_on_the_way_is_made_up_for(finished, small, tmp_path, monkeypatch, stage, every):
    """It falls on a saved step, and a kill falls into it: that step is not learned again, its scores are the same."""

    def config():
        found = stage_config(finished, stage).unlock()
        found.train.evaluate_every = every
        return found

    loop.train_stage(config(), tmp_path / "straight")
    evaluated = loop.held_out_metrics

    def interrupted(r, evaluate, state):
        if int(state.step):
            shutil.copytree(tmp_path / "run", tmp_path / "killed")  # as it lies there when the evaluation begins
            raise KeyboardInterrupt
        return evaluated(r, evaluate, state)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "held_out_metrics", interrupted)
        loop.train_stage(config(), tmp_path / "run")
    asked = batches_learnt_from(monkeypatch)
    loop.train_stage(config(), tmp_path / "killed")
    assert asked == list(range(every, 2 * every))
    assert_same_run(tmp_path / "killed", tmp_path / "straight")


def test_a_page_that_a_kill_took_is_made_up_for(finished, small, tmp_path, monkeypatch):
    """Between the summary and the page; a second start leaves a page that is there alone."""
    workdir, pages = shutil.copytree(finished / "sft", tmp_path / "sft"), []
    monkeypatch.setattr(run, "write_run_page", lambda path: pages.append(path))
    loop.train_stage(stage_config(finished, "sft"), workdir)
    assert pages == []
    (workdir / "report.html").unlink()
    loop.train_stage(stage_config(finished, "sft"), workdir)
    assert pages == [workdir]


def test_sigkill_in_the_middle_of_an_update_of_ppo(finished, small, tmp_path):
    """From the checkpoint of step 2 on, in the first minibatch of the second epoch of step 3."""
    workdir = shutil.copytree(finished.parent / "snapshots" / "ppo" / "saving", tmp_path / "ppo")
    process = started(
        "lm.train.loop",
        f"--config={ROOT}/experiments/ppo.py:tiny",
        f"--workdir={workdir}",
        *settings(finished, "ppo"),
        moment="update:3",
    )
    out, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert f"continues from step 2 of {workdir}" in out
    assert read_metrics(workdir)[-1]["step"] == 2
    loop.train_stage(stage_config(finished, "ppo"), workdir)
    assert_same_run(workdir, finished / "ppo")


def test_sigkill_of_the_program_as_it_is(finished, tmp_path):
    """No small world: `python -m lm train` on the one device of a laptop, killed at whatever moment this is.

    Held against an undisturbed run of its own: XLA shares a matrix product out to as many threads as there are devices
    or cores, and the sum's rounding follows.
    """
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")

    def start(workdir):
        command = [
            sys.executable,
            "-m",
            "lm.train.loop",
            f"--config={ROOT}/experiments/pretrain.py:tiny",
            f"--workdir={workdir}",
            *settings(finished, "pretrain"),
        ]
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags}, stdout=subprocess.DEVNULL)

    assert start(tmp_path / "undisturbed").wait(120) == 0
    process = start(tmp_path / "killed")
    wait_for(tmp_path / "killed" / "metrics.jsonl", 1, process)
    process.kill()
    process.wait()
    assert start(tmp_path / "killed").wait(120) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "undisturbed")


def wait_for(metrics: Path, rows: int, process: subprocess.Popen) -> None:
    while process.poll() is None and len(read_metrics(metrics)) < rows:
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it could be stopped"


def test_sigterm_saves_the_step_and_exits_with_143(finished, tmp_path):
    process = started(
        "lm.train.loop",
        f"--config={ROOT}/experiments/pretrain.py:tiny",
        f"--workdir={tmp_path / 'run'}",
        *settings(finished, "pretrain"),
        "--config.train.steps=1000000",
        "--config.train.log_every=1",
        "--config.train.save_every=1000000",
    )
    wait_for(tmp_path / "run" / "metrics.jsonl", 3, process)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors == "stopped by SIGTERM and saved: the same command continues\n"
    assert [step.name for step in (tmp_path / "run" / "checkpoints").iterdir()] == [
        str(read_metrics(tmp_path / "run")[-1]["step"])
    ]


@pytest.mark.parametrize(
    "stage, batch",
    [
        pytest.param("pretrain", 5, marks=pytest.mark.slow),
        ("reward", 7),
        pytest.param("ppo", 2, marks=pytest.mark.slow),
    ],
)
def test_sigterm_continues_to_the_same_bits(finished, small, tmp_path, monkeypatch, stage, batch):
    """Batch 7 is the reward model's last: then there is nothing left to do but the summary."""
    workdir = tmp_path / stage
    with monkeypatch.context() as patch, pytest.raises(SigtermExit):
        at_batch(patch, batch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        loop.train_stage(stage_config(finished, stage), workdir)
    assert (workdir / "checkpoints" / str(batch + 1)).is_dir()
    assert not (workdir / "summary.json").exists()
    loop.train_stage(stage_config(finished, stage), workdir)
    assert saved(workdir) == saved(finished / stage)
    assert read_json(workdir / "summary.json")["held_out"] == read_json(finished / stage / "summary.json")["held_out"]


def test_ctrl_c_continues_to_the_same_bits(finished, small, tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_batch(patch, 6, interrupt)
        loop.train_stage(stage_config(finished, "sft"), tmp_path / "sft")
    loop.train_stage(stage_config(finished, "sft"), tmp_path / "sft")
    assert_same_run(tmp_path / "sft", finished / "sft")


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(finished, small, tmp_path, capsys):
    workdir = shutil.copytree(finished / "sft", tmp_path / "sft")
    (workdir / "summary.json").unlink()
    torn = max((workdir / "checkpoints" / "8" / "params").rglob("*"), key=lambda file: file.stat().st_size)
    os.truncate(torn, torn.stat().st_size // 2)
    loop.train_stage(stage_config(finished, "sft"), workdir)
    said = capsys.readouterr()
    assert (
        said.err.startswith(f"warning: checkpoint {workdir}/checkpoints/8 is damaged (params/")
        and said.err.count("\n") == 1
    )
    assert f"continues from step 4 of {workdir}" in said.out
    assert_same_run(workdir, finished / "sft")


@pytest.mark.parametrize("moment, first", [("batch 2", 0), ("saving", 5)])
def test_tensorboard_forgets_only_what_is_written_again(finished, small, tmp_path, monkeypatch, moment, first):
    """It drops what earlier files say from `purge_step` on; the row of the restored step 4 stays."""

    def writers(path, purge_step, trackers):
        raise RuntimeError(f"purge {purge_step}")

    monkeypatch.setattr(loop, "MetricWriters", writers)
    workdir = shutil.copytree(finished.parent / "snapshots" / "pretrain" / moment, tmp_path / "pretrain")
    with pytest.raises(RuntimeError, match=f"purge {first}$"):
        loop.train_stage(stage_config(finished, "pretrain"), workdir)
    assert [row["step"] for row in read_metrics(workdir)] == list(range(0, first, 4))


def test_more_steps_continue_a_finished_run(finished, small, tmp_path, capsys):
    """PPO's learning rate is constant, so 2 steps and then 2 more are the 4 of the finished run."""
    loop.train_stage(stage_config(finished, "ppo", "train.steps=2"), tmp_path / "ppo")
    capsys.readouterr()
    summary = loop.train_stage(stage_config(finished, "ppo"), tmp_path / "ppo")
    said = capsys.readouterr().out
    for change in ("train.steps: 2 -> 4", "optimizer.total_steps: 8 -> 16"):  # 2 epochs of 2 minibatches a step
        assert f"{tmp_path / 'ppo'}: config changed since the last start: {change}\n" in said
    assert summary["steps"] == 4
    assert saved(tmp_path / "ppo") == saved(finished / "ppo")
    again = loop.train_stage(stage_config(finished, "ppo"), tmp_path / "ppo")
    assert again == summary  # now it is finished


def test_averaged_weights_are_what_is_scored_and_loaded(finished, small, tmp_path):
    """Interrupted or not, the same bits; the live weights are those of the run without an average, within rounding."""
    averaging = ("optimizer.ema_decay=0.9", "data.ramp=((2,4),)")
    straight, stopped = (tmp_path / name for name in ("straight", "stopped"))
    summary = loop.train_stage(stage_config(finished, "pretrain", *averaging), straight)
    shutil.copytree(straight, stopped)  # what a kill after the checkpoint of step 4 would leave
    shutil.rmtree(stopped / "checkpoints" / "8")
    (stopped / "summary.json").unlink()
    loop.train_stage(stage_config(finished, "pretrain", *averaging), stopped)
    assert saved(straight) == saved(stopped)
    live, average = (restore_params(straight / "checkpoints", name)[0] for name in ("live", "params"))
    jax.tree.map(np.testing.assert_array_equal, live, restore_params(stopped / "checkpoints", "live")[0])
    jax.tree.map(np.testing.assert_array_equal, average, load_trained_model(straight, backend="cpu").params)

    plain = loop.train_stage(stage_config(finished, "pretrain", *averaging[1:]), tmp_path / "plain")
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)  # another program, compiled for itself
    jax.tree.map(close, live, load_trained_model(tmp_path / "plain", backend="cpu").params)
    assert summary["before"] == plain["before"] and summary["held_out"] != plain["held_out"]

    onwards = (f"init_from={straight}", "train.steps=1", "optimizer.warmup_steps=0")
    after = loop.train_stage(stage_config(finished, "pretrain", *onwards), tmp_path / "onwards")
    assert after["before"] == summary["held_out"]


def test_fewer_steps_end_an_unfinished_run(finished, small, tmp_path):
    """A run of 8 steps, killed after its checkpoint of step 4, is told that 4 are enough: those 4 are scored."""
    workdir = shutil.copytree(finished.parent / "snapshots" / "pretrain" / "saving", tmp_path / "pretrain")
    summary = loop.train_stage(stage_config(finished, "pretrain", "train.steps=4"), workdir)
    assert summary["steps"] == 4
    assert read_metrics(workdir)[-1]["step"] == 4
    end = read_json(finished / "pretrain" / "summary.json")["held_out"]["loss"]
    assert end < summary["held_out"]["loss"] < summary["before"]["loss"]


def test_the_tokenizer_is_learnt_again_to_the_same_bytes(finished, tmp_path):
    config = stage_config(finished, "tokenizer")
    for _ in range(2):
        loop.train_stage(config, tmp_path / "tokenizer")
        assert (tmp_path / "tokenizer" / "tokenizer.model").read_bytes() == (
            finished / "tokenizer" / "tokenizer.model"
        ).read_bytes()
        (tmp_path / "tokenizer" / "summary.json").unlink()  # as if killed before it was written

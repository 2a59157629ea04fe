"""The loop: what a stage leaves behind, and the same numbers on one device and on a mesh of eight."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from runs import CLOCK, EXPERIMENTS, TRAINED, finished, made_dialogues, saved, settings, small, stage_config

from lm.core import sharding
from lm.core.errors import UserError
from lm.core.metrics import Mean
from lm.data import conversations, sources
from lm.model.params import flops_per_token
from lm.optim import optimizers
from lm.runs.checkpoint import restore_params
from lm.runs.logger import MetricsLogger
from lm.runs.timing import PhaseTimer
from lm.runs.workdir import load_trained_model, open_workdir, read_json, read_metrics
from lm.stages.pretraining import pretrain
from lm.stages.rl import ppo
from lm.tokenizer import encode_chat, encode_prompt, load_tokenizer
from lm.train import config, loop

__all__ = ["finished", "small"]


@pytest.fixture
def eight(small, monkeypatch):
    """The small world with the whole mesh."""
    monkeypatch.setattr(config, "make_mesh", sharding.make_mesh)


def assert_close(one, other) -> None:
    """One device's run and a mesh's, which adds up in another order: float32 rounding, 6e-8 of a number at each sum.

    Metrics are held to 1e-4 of their size, or 2e-6 where they are differences of nearly equal numbers. Adam divides a
    gradient by its own size, so an entry whose gradient is itself rounding may move by a whole learning rate (at most
    3e-3): parameters are held to 5e-4 everywhere, and to 1e-5 on the mean.
    """
    rows, others = (
        [{k: v for k, v in row.items() if k not in CLOCK} for row in read_metrics(run)] for run in (one, other)
    )
    assert [list(row) for row in rows] == [list(row) for row in others]
    for row, against in zip(rows, others):
        for name, value in row.items():
            assert value == pytest.approx(against[name], rel=1e-4, abs=2e-6), (row["step"], name)
    params, others = (restore_params(run / "checkpoints")[0] for run in (one, other))
    gaps = jax.tree.map(lambda a, b: np.abs(a - b), params, others)
    assert max(gap.max() for gap in jax.tree.leaves(gaps)) < 5e-4
    assert max(gap.mean() for gap in jax.tree.leaves(gaps)) < 1e-5


def some_by_default(*default: str):
    """One test item a stage; those beside `default` repeat its kind and are slow."""
    return pytest.mark.parametrize(
        "stage", [pytest.param(stage, marks=[pytest.mark.slow] * (stage not in default)) for stage in TRAINED]
    )


@some_by_default("reward")
def test_a_mesh_over_the_data_gives_one_device_s_numbers(finished, eight, tmp_path, stage):
    summary = loop.train_stage(stage_config(finished, stage), tmp_path / stage)
    assert summary["device"].startswith("8 x ")
    assert_close(tmp_path / stage, finished / stage)


@some_by_default("ppo")
def test_a_mesh_of_all_axes_takes_up_what_one_device_began(finished, eight, tmp_path, stage):
    """The first half of the run is one device's; its checkpoint is restored onto data 2, fsdp 2, tensor 2."""
    workdir = shutil.copytree(finished.parent / "snapshots" / stage / "saving", tmp_path / stage)
    loop.train_stage(stage_config(finished, stage, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"), workdir)
    assert_close(workdir, finished / stage)


@pytest.mark.parametrize("stage", TRAINED)
def test_what_a_stage_leaves_behind(finished, stage):
    workdir, config = finished / stage, stage_config(finished, stage)
    summary, rows = read_json(workdir / "summary.json"), read_metrics(workdir)
    steps, every = config.train.steps, config.train.log_every
    assert [row["step"] for row in rows] == [0, *range(every, steps + 1, every), steps]  # scored, logged ..., scored
    assert [any(name.startswith("held_out/") for name in row) for row in rows] == [
        True,
        *[False] * (steps // every),
        True,
    ]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    for name in ("tokens", "seconds"):
        assert [row[name] for row in rows] == sorted(row[name] for row in rows)
    assert summary["before"] == {
        k.removeprefix("held_out/"): v for k, v in rows[0].items() if k.startswith("held_out/")
    }
    assert summary["held_out"] == {
        k.removeprefix("held_out/"): v for k, v in rows[-1].items() if k.startswith("held_out/")
    }
    assert summary["tokens"] == rows[-1]["tokens"] > 0
    passes = config.stage.epochs if stage == "ppo" else 1
    per_token = flops_per_token(load_trained_model(workdir, backend="cpu").model_config, summary["about"]["length"])
    assert summary["model_flops"] == passes * per_token * summary["tokens"]
    assert sorted(folder.name for folder in (workdir / "checkpoints").iterdir()) == [str(steps // 2), str(steps)]
    assert list((workdir / "tensorboard").iterdir())
    assert json.loads((workdir / "config.json").read_text())["stage"]["name"] == stage
    fingerprint = load_tokenizer(workdir / "tokenizer.model").fingerprint
    assert fingerprint == summary["fingerprint"] == restore_params(workdir / "checkpoints")[1]["fingerprint"]


def test_stages_learn(finished):
    """Pretraining and SFT lower the held-out loss, from about that of a uniform guess: log 512 = 6.24."""
    raw, sft = (read_json(finished / stage / "summary.json") for stage in ("pretrain", "sft"))
    assert raw["before"]["loss"] == pytest.approx(math.log(512), abs=0.5)
    assert raw["held_out"]["loss"] < raw["before"]["loss"] - 0.2
    assert sft["held_out"]["loss"] < sft["before"]["loss"] - 0.2
    reward, policy = (read_json(finished / stage / "summary.json")["before"] for stage in ("reward", "ppo"))
    assert reward["loss"] == pytest.approx(math.log(2)) and reward["accuracy"] == 0.5  # the head starts at zero
    assert policy["kl"] == 0 and policy["ratio"] == 1 and policy["clip_fraction"] == 0  # the policy is the reference


def test_what_is_too_long_is_skipped_and_counted(finished):
    """A row of 64 tokens takes excerpts of up to 65, as the last is a target only; a prompt of PPO has 32 at most."""
    tokenizer = load_tokenizer(finished / "tokenizer" / "tokenizer.model")
    said = [
        conversations.Conversation(
            name, [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        )
        for name, turns in made_dialogues()
    ]
    train_side, _ = sources.split_held_out(said, 0.05)
    about = read_json(finished / "sft" / "summary.json")["about"]
    assert about["conversations"] == len(train_side)
    assert about["skipped"] == sum(len(encode_chat(tokenizer, c.messages).ids) > 65 for c in train_side) > 0
    contexts, _ = sources.split_held_out(conversations.prompt_contexts(said, turns=3), 0.05)
    about = read_json(finished / "ppo" / "summary.json")["about"]
    assert about["skipped"] == sum(len(encode_prompt(tokenizer, c.messages)) > 32 for c in contexts) > 0
    assert about["prompts"] == len(contexts) - about["skipped"]


def test_ppo_adds_up_its_rewards_and_logs_each(finished, small, tmp_path):
    """An ensemble of one model twice, and two penalties; a part of weight 0 is left out; a cut answer loses 1."""
    weights = {"model": 2, "length": 0, "punctuation": 0.5, "repetition": 1}
    weights = [f"data.rewards.{name}={weight}" for name, weight in weights.items()]
    twice = [f"data.reward_model={finished}/reward,{finished}/reward", "data.pessimism=1"]
    loop.train_stage(stage_config(finished, "ppo", "train.steps=1", *weights, *twice), tmp_path / "ppo")
    row = read_metrics(tmp_path / "ppo")[1]
    parts = {name: row[f"reward/{name}"] for name in ("model", "punctuation", "repetition")}
    assert not {"reward/length", "reward/toxicity"} & set(row) and parts["punctuation"] < 0
    expected = 2 * parts["model"] + 0.5 * parts["punctuation"] + parts["repetition"] - (1 - row["stopped"])
    assert row["reward"] == pytest.approx(expected, abs=1e-5)


def test_scores_on_the_way_and_fewer_checkpoints(finished, small, tmp_path):
    config = stage_config(finished, "pretrain")
    config.train = {"steps": 5, "save_every": 2, "keep": 1, "log_every": 3, "evaluate_every": 2}
    loop.train_stage(config, tmp_path / "run")
    rows = [(row["step"], "loss" in row) for row in read_metrics(tmp_path / "run")]
    # A line of means before every save too, so that a resumed run finds its tokens and seconds there.
    assert rows == [(0, False), (2, True), (2, False), (3, True), (4, True), (4, False), (5, True), (5, False)]
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["5"]


def test_options_that_the_file_does_not_list_do_what_they_say_and_are_in_the_workdir(
    finished, small, tmp_path, monkeypatch
):
    given = {}

    def adamw(*, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8):
        given.update(b1=b1, b2=b2)
        return optimizers.adamw(b1=b1, b2=b2, eps=eps)

    monkeypatch.setitem(optimizers.OPTIMIZERS, "adamw", adamw)
    options = ["train.steps=4", "train.evaluate_every=2", "train.keep=1", "optimizer.b2=0.5", "model.remat=block"]
    flags = [*settings(finished, "sft"), *(f"--config.{option}" for option in options)]
    loop.program([f"--config={EXPERIMENTS / 'sft.py'}:tiny", f"--workdir={tmp_path / 'run'}", *flags])
    config = read_json(tmp_path / "run" / "config.json")
    assert config["train"] == {"steps": 4, "log_every": 4, "save_every": 4, "evaluate_every": 2, "keep": 1}
    assert (config["optimizer"]["b2"], config["optimizer"]["total_steps"], config["model"]) == (
        0.5,
        4,
        {"remat": "block"},
    )
    assert given == {"b1": 0.9, "b2": 0.5}
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "held_out/loss" in row] == [0, 2, 4]
    assert load_trained_model(tmp_path / "run", backend="cpu").model_config.remat == "block"


def test_a_run_that_began_without_such_an_option_goes_on(finished, small, tmp_path, capsys):
    workdir = shutil.copytree(finished.parent / "snapshots" / "sft" / "batch 6", tmp_path / "sft")
    argv = [f"--config={EXPERIMENTS / 'sft.py'}:tiny", f"--workdir={workdir}"]
    argv += [f"--config.init_from={read_json(workdir / 'config.json')['init_from']}"]
    with pytest.raises(UserError, match="was made with another config .optimizer.b2: absent -> 0.5.:"):
        loop.program([*argv, "--config.optimizer.b2=0.5"])
    loop.program([*argv, "--config.train.keep=1"])  # it may keep less, as the schedule may be another
    assert "config changed since the last start: train.keep: absent -> 1" in capsys.readouterr().out.replace("\n", " ")
    assert [folder.name for folder in (workdir / "checkpoints").iterdir()] == ["8"]
    assert saved(workdir) == saved(finished / "sft")


def test_a_sampler_of_another_distribution_than_the_loss_is_refused(finished, small, tmp_path):
    config = stage_config(finished, "ppo")
    config.data.temperature = 0.7
    with pytest.raises(UserError, match="stage.temperature is 1.0, but data.temperature is 0.7: "):
        loop.train_stage(config, tmp_path / "run")
    config.stage.temperature = 0.7
    config.train.steps = 1
    assert loop.train_stage(config, tmp_path / "run")["steps"] == 1


@pytest.fixture
def log(tmp_path):
    """log(stage) over a fresh workdir, whose lines go nowhere but into metrics.jsonl."""

    class Nowhere:
        def write(self, *_):
            pass

        update = write

    workdirs = []

    def of(stage):
        workdirs.append(open_workdir(tmp_path / "run", {}))
        return MetricsLogger(stage, workdirs[-1], Nowhere(), Nowhere(), PhaseTimer())

    yield of
    for workdir in workdirs:
        workdir.close()


def test_a_line_is_one_mean_over_its_steps(log, tmp_path):
    """(1 + 5) / (1 + 3) = 1.5, where the mean of the two means 1 and 5 / 3 would be 4 / 3."""
    lines = log(pretrain.PRETRAIN)
    lines.add_step(1, {"loss": Mean(np.float32(1), np.float32(1))}, 10)
    lines.add_step(2, {"loss": Mean(np.float32(5), np.float32(3))}, 20)
    lines.flush()
    lines.add_step(3, {"loss": Mean(np.float32(2), np.float32(1))}, 30)
    lines.flush()
    assert [(row["step"], row["loss"], row["tokens"]) for row in read_metrics(tmp_path / "run")] == [
        (2, 1.5, 30),
        (3, 2.0, 60),
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_step_that_is_not_finite_is_named(log, tmp_path, bad):
    lines = log(pretrain.PRETRAIN)
    for step, total in ((4, 1.0), (5, bad), (6, bad)):
        lines.add_step(step, {"loss": Mean(np.float32(total), np.float32(1))}, 1)
    with pytest.raises(
        UserError, match=f"pretrain: loss is {bad} at step 5; the last good checkpoint stays in .*/checkpoints: lower"
    ):
        lines.flush()
    with pytest.raises(UserError, match=f"pretrain: held_out/loss is {bad} at step 8; "):
        lines.write_row(8, {"held_out/loss": bad})
    assert read_metrics(tmp_path / "run") == []


def test_a_metric_over_its_limit_stops_the_run(log):
    lines = log(ppo.PPO)
    gap = ppo.PPO.metric_limits["sampler_gap"]
    lines.add_step(1, {"sampler_gap": Mean(np.float32(gap * 0.9), np.float32(1))}, 1)
    lines.flush()
    lines.add_step(2, {"sampler_gap": Mean(np.float32(gap * 1.1), np.float32(1))}, 1)
    with pytest.raises(
        UserError,
        match="ppo: sampler_gap is 0.055 by step 2, over its limit of 0.05: see metric_limits in lm/stages/rl/ppo.py",
    ):
        lines.flush()


ZERO = Mean(np.float32(0), np.float32(1))  # of every line of a stage that samples


def test_a_kl_that_stays_below_zero_is_said_once(log, capsys):
    """Noise is no advice: below 0 in four lines, then above it. Five lines on end are said, and no sixth again."""
    lines = log(ppo.PPO)

    def note(*values):
        for value in values:
            lines.add_step(1, {"kl": Mean(np.float32(value * 4), np.float32(4)), "sampler_gap": ZERO}, 1)
            lines.flush()
        return capsys.readouterr().err

    assert note(-0.5, -0.5, -0.5, -0.5, 0.2, -0.5, -0.5, -0.5, -0.005, -0.5, -0.5, -0.5, -0.5) == ""
    said = note(-0.5)
    assert said.startswith("warning: ppo: kl is -0.5 by step 1: a KL is never below 0") and said.count("\n") == 1
    assert note(-0.5, 0.1, -0.5, -0.5, -0.5, -0.5, -0.5, -0.5) == ""


@pytest.mark.parametrize("name, stage", [("loss", pretrain.PRETRAIN), ("policy_loss", ppo.PPO)])
def test_a_batch_from_which_nothing_is_learnt_is_said_once(log, capsys, name, stage):
    lines = log(stage)
    for step, weight in ((1, 3.0), (2, 0.0), (3, 2.0), (4, 0.0)):
        lines.add_step(step, {name: Mean(np.float32(weight), np.float32(weight)), "sampler_gap": ZERO}, 1)
    lines.flush()
    said = capsys.readouterr().err
    assert "every weight of the batch of step 2 is 0, so nothing is learned from it: look at" in said
    assert said.count("\n") == 1
    lines.add_step(5, {name: Mean(np.float32(0), np.float32(0)), "sampler_gap": ZERO}, 1)
    lines.flush()
    assert capsys.readouterr().err == ""

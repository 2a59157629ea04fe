"""lm.sweep.vmapped: runs trained as one program are the runs that lm train makes alone, within rounding."""

import json

import jax
import numpy as np
import pytest
from runs import EXPERIMENTS, enter_small_world, finished, saved, settings, small, stage_config

from lm.core.errors import UserError
from lm.runs.console import SigtermExit
from lm.runs.workdir import load_trained_model, read_json, read_metrics
from lm.sweep import controller, vmapped
from lm.train import loop

__all__ = ["finished", "small"]


def assert_alike(one, other, tolerance: float = 2e-4) -> None:
    """The same rows of metrics and the same parameters, within what other roundings come to in a few steps."""
    rows = [read_metrics(workdir) for workdir in (one, other)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for a, b in zip(*rows):
        assert a.keys() == b.keys()
        for name in a:
            if name.endswith(("loss", "reward", "kl", "learning_rate", "beta")) and not name.startswith("seconds"):
                assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), name
    params = [load_trained_model(workdir, backend="cpu").params for workdir in (one, other)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), *params)


@pytest.fixture(scope="module")
def pretrained(finished, tmp_path_factory):
    """Two pretrainings as one program, with another rate and another seed: (configs, workdirs, summaries)."""
    folder, changes = tmp_path_factory.mktemp("vmapped"), [("1e-3", 0), ("1e-2", 1)]
    configs = [stage_config(finished, "pretrain", f"optimizer.learning_rate={r}", f"seed={s}") for r, s in changes]
    paths = [folder / f"run{i}" for i in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        enter_small_world(patch.setattr)
        summaries = vmapped.train_vmapped(configs, paths)
    return configs, paths, summaries


def test_pretraining_with_rates_and_seeds(pretrained, tmp_path, small):
    configs, paths, summaries = pretrained
    assert [summary["held_out"]["loss"] for summary in summaries] == [
        read_json(path / "summary.json")["held_out"]["loss"] for path in paths
    ]
    assert all((path / "report.html").exists() for path in paths)
    loop.train_stage(configs[1], tmp_path / "alone")
    assert_alike(paths[1], tmp_path / "alone")
    rates = [row["learning_rate"] for path in paths for row in read_metrics(path) if row["step"] == 4 and "loss" in row]
    assert rates == pytest.approx([rates[0], 10 * rates[0]])


@pytest.mark.slow
def test_ppo_with_coefficients_and_temperatures(finished, tmp_path, small):
    """Coefficients of the loss, and a temperature, which sampler and loss share."""
    changes = [("stage.beta=0.05",), ("stage.beta=0.3", "stage.clip=0.1", "stage.temperature=0.7")]
    ppo = [stage_config(finished, "ppo", *each) for each in changes]
    paths = [tmp_path / f"run{i}" for i in range(2)]
    vmapped.train_vmapped(ppo, paths)
    loop.train_stage(ppo[1], tmp_path / "alone")
    assert_alike(paths[1], tmp_path / "alone")
    betas = [[row["beta"] for row in read_metrics(path) if "beta" in row][0] for path in paths]
    assert betas == pytest.approx([0.05, 0.3])
    shown = [json.loads(line) for line in (paths[1] / "rollouts.jsonl").read_text().splitlines()]
    assert {row["step"] for row in shown} == {1, 3, 4} and all(row["tokens"] > 0 for row in shown)


def test_it_goes_on_where_it_stopped(pretrained, tmp_path, small, monkeypatch):
    configs, through, _ = pretrained
    fetched, halves = loop.device_batch, [tmp_path / f"half{i}" for i in range(2)]

    def stop_before_the_sixth(r, state, i):
        if i == 5:
            raise SigtermExit
        return fetched(r, state, i)

    monkeypatch.setattr(loop, "device_batch", stop_before_the_sixth)
    with pytest.raises(SigtermExit):
        vmapped.train_vmapped(configs, halves)
    monkeypatch.setattr(loop, "device_batch", fetched)
    vmapped.train_vmapped(configs, halves)
    for whole, half in zip(through, halves):
        assert saved(whole) == saved(half)


def test_a_member_that_fails_stops_nobody(finished, tmp_path, small):
    configs = [stage_config(finished, "pretrain", f"optimizer.learning_rate={rate}") for rate in ("1e-2", "1e30")]
    good, bad = vmapped.train_vmapped(configs, [tmp_path / "good", tmp_path / "bad"])
    assert isinstance(bad, UserError) and "lower optimizer.learning_rate" in str(bad)
    assert good["steps"] == configs[0].train.steps
    loop.train_stage(configs[0], tmp_path / "alone")
    assert_alike(tmp_path / "good", tmp_path / "alone")


@pytest.mark.parametrize(
    "change, error",
    [
        ("model.width=64", "runs that differ in model.width .32, 64. need programs of their own"),
        ("train.steps=4", "runs that differ in optimizer.total_steps .8, 4. need"),
    ],
)
def test_other_differences_are_refused(finished, tmp_path, change, error):
    configs = [stage_config(finished, "pretrain"), stage_config(finished, "pretrain", change)]
    with pytest.raises(UserError, match=error):
        vmapped.train_vmapped(configs, [tmp_path / "a", tmp_path / "b"])
    assert not list(tmp_path.iterdir())


def test_an_option_that_only_some_set_is_refused(finished, tmp_path, small):
    configs = [stage_config(finished, "pretrain") for _ in range(2)]
    with configs[1].unlocked():
        configs[1].optimizer.b2 = 0.9
    assert vmapped.structure_key(configs[0]) != vmapped.structure_key(configs[1])  # a sweep runs them apart
    with pytest.raises(UserError, match="optimizer.b2 is set in some runs only: set it in all"):
        vmapped.train_vmapped(configs, [tmp_path / "a", tmp_path / "b"])


@pytest.mark.slow
def test_an_option_that_the_file_does_not_list(finished, tmp_path, small):
    flags = [*settings(finished, "pretrain"), "--config.train.steps=2", "--config.optimizer.warmup_steps=0"]
    path, grid = f"{EXPERIMENTS / 'pretrain.py'}:tiny", ["--grid", "optimizer.b2=0.9,0.5"]
    controller.program([f"--config={path}", f"--workdir={tmp_path / 's'}", *flags, *grid, "--vectorised"])
    told = [read_json(path) for path in sorted((tmp_path / "s" / "trials").glob("*.json"))]
    assert [(one["state"], one["overrides"]) for one in told] == [("complete", {"optimizer.b2": b}) for b in (0.9, 0.5)]
    loop.program([f"--config={path}", f"--workdir={tmp_path / 'alone'}", *flags, "--config.optimizer.b2=0.5"])
    assert_alike(tmp_path / "s" / "trials" / "0001", tmp_path / "alone")
    assert told[0]["value"] != told[1]["value"]


def test_a_number_that_decides_what_is_computed_is_refused(finished, tmp_path, small):
    configs = [stage_config(finished, "pretrain", f"optimizer.clip_norm={norm}") for norm in (0.0, 1.0)]
    with pytest.raises(UserError, match="optimizer.clip_norm: some value decides what is computed"):
        vmapped.train_vmapped(configs, [tmp_path / "a", tmp_path / "b"])


def test_a_vectorised_sweep(finished, tmp_path, small, capsys):
    flags = [
        "--config=experiments/pretrain.py:tiny",
        f"--workdir={tmp_path / 's'}",
        f"--config.tokenizer={finished / 'tokenizer'}",
        f"--config.data.corpus={finished.parent / 'text'}",
        "--config.train.steps=2",
        "--config.optimizer.warmup_steps=0",
        "--grid",
        "model.layers=1,2",
        "optimizer.learning_rate=1e-3,1e30",
        "--vectorised",
    ]
    controller.program(flags)
    said = capsys.readouterr().out
    assert said.count("2 trials together") == 2  # a program for each depth
    told = [read_json(path) for path in sorted((tmp_path / "s" / "trials").glob("*.json"))]
    assert [one["state"] for one in told] == ["complete", "failed"] * 2
    assert told[0]["value"] == read_metrics(tmp_path / "s" / "trials" / "0000")[-1]["held_out/loss"]
    assert "lower optimizer.learning_rate" in told[1]["error"]
    controller.program(flags)
    assert "trials together" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, error",
    [
        (["--pruner=median"], "--vectorised runs trials as one program: leave --pruner out"),
        (["--jobs=2"], "leave --jobs out"),
        (["--search=tpe", "--trials=2", "--space", "optimizer.learning_rate=0:1"], "leave --search=tpe out"),
        (["--at_once=0"], "at_once is 0"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, flags, error):
    with pytest.raises(UserError, match=error):
        controller.program(
            ["--config=experiments/pretrain.py:tiny", f"--workdir={tmp_path / 's'}", "--vectorised", *flags]
        )
    with pytest.raises(UserError, match="this is a pipeline's: sweep one of its stages"):
        controller.program(["--config=experiments/quickstart.py:tiny", f"--workdir={tmp_path / 's'}", "--vectorised"])

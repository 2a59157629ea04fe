"""Profiles: the steps that were asked for, in a file that Perfetto opens."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest
from runs import finished, small, stage_config

from lm.core.errors import UserError
from lm.runs.profiler import StepProfiler, profile_steps
from lm.train import loop

__all__ = ["finished", "small"]


def events(folder, name):
    (file,) = folder.rglob("perfetto_trace.json.gz")
    with gzip.open(file) as stream:
        return [event for event in json.load(stream)["traceEvents"] if event.get("name") == name]


def test_steps():
    assert list(profile_steps("10:12")) == [10, 11, 12] and list(profile_steps("3:3")) == [3]


@pytest.mark.parametrize("text", ["10", "10:", ":3", "a:b", "13:10", "0:4", "-1:3", "1:2:3", "1.5:2"])
def test_a_malformed_range_is_one_line(text, tmp_path):
    with pytest.raises(UserError, match=f"--profile={text} is no range of steps: give the first and the last, such as"):
        loop.train_stage(stage_config(tmp_path, "pretrain"), tmp_path / "run", profile=text)
    assert not (tmp_path / "run").exists()


def test_a_run_traces_its_steps(finished, small, tmp_path, capsys):
    """Steps 3 and 4 of 8, with their phases and their execution; the numbers are those of a run that is not traced."""
    loop.train_stage(stage_config(finished, "pretrain"), tmp_path / "run", profile="3:4")
    found = events(tmp_path / "run" / "profile", "step")
    assert sorted(event["args"]["step_num"] for event in found) == ["3", "4"]
    assert len(events(tmp_path / "run" / "profile", "data")) == len(events(tmp_path / "run" / "profile", "update")) == 2
    assert events(tmp_path / "run" / "profile", "PjitFunction(update)")
    assert f"profile: {tmp_path}/run/profile/" in capsys.readouterr().out
    loop.train_stage(stage_config(finished, "pretrain"), tmp_path / "run", profile="3:4")
    assert f"{tmp_path / 'run'} has finished: there is nothing to log or to trace\n" in capsys.readouterr().out


def test_an_error_within_ends_the_trace_and_keeps_it(tmp_path):
    with pytest.raises(KeyError), StepProfiler(range(1, 9), tmp_path / "profile") as trace:
        trace.begin_step(1)
        trace.end_step(1, jnp.ones(1))
        trace.begin_step(2)
        raise KeyError
    assert len(events(tmp_path / "profile", "step")) == 2
    with StepProfiler(range(1, 2), tmp_path / "again") as trace:  # another may begin
        trace.begin_step(1)
        trace.end_step(1, jnp.ones(1))


def test_steps_outside_the_range_are_not_traced(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr(jax.profiler, "start_trace", refuse)
    with StepProfiler(range(5, 6), tmp_path / "profile") as trace:
        trace.begin_step(4)
        trace.end_step(4, None)
        trace.begin_step(6)
        trace.end_step(6, None)
    assert not (tmp_path / "profile").exists()
    assert capsys.readouterr().err == "warning: --profile=5:5: this process took none of these steps\n"


def test_a_profile_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, capsys):
    stop = jax.profiler.stop_trace

    def full():
        stop()
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(jax.profiler, "stop_trace", full)
    with StepProfiler(range(1, 2), tmp_path / "profile") as trace:
        trace.begin_step(1)
        trace.end_step(1, jnp.ones(1))
    assert capsys.readouterr().err.startswith(
        f"warning: the profile could not be written to {tmp_path}/profile: No space"
    )

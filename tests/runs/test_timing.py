"""Seconds by phase: a clock that is set by hand, the way a run's phases add up, what waits for devices."""

import shutil
import statistics
import time
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np
import pytest
from runs import finished, small, stage_config

from lm.core.types import TrainState
from lm.runs.logger import phase_seconds
from lm.runs.timing import OTHER_PHASE, PHASES, TRAINING_PHASES, PhaseTimer
from lm.runs.workdir import read_json, read_metrics
from lm.stages.context import StageContext
from lm.train import loop

__all__ = ["finished", "small"]


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def passing(seconds):
        now[0] += seconds

    return passing


def test_time_belongs_to_the_innermost_phase(clock):
    """1 before, data 2 + 8 around a rollout of 4, 16 after; an error within gives its 32 to update all the same."""
    phases = PhaseTimer()
    clock(1)
    with phases("data"):
        clock(2)
        with phases("rollout"):
            clock(4)
        clock(8)
    clock(16)
    with pytest.raises(KeyError), phases("update"):
        clock(32)
        raise KeyError
    assert phases.seconds() == {**dict.fromkeys(PHASES, 0), "data": 10, "rollout": 4, "update": 32, OTHER_PHASE: 17}
    assert list(phases.seconds()) == [*PHASES, OTHER_PHASE]


def test_all_of_an_evaluation_is_eval(clock):
    """1 of rollout for training, then 2 + 4 + 8 of an evaluation that samples and rewards too: training took 1."""
    phases = PhaseTimer()
    with phases("data"), phases("rollout"):
        clock(1)
    with phases("eval"):
        clock(2)
        with phases("update"), phases("rollout"):
            clock(4)
        with phases("reward"):
            clock(8)
    assert phases.seconds() == {**dict.fromkeys(PHASES, 0), "rollout": 1, "eval": 14, OTHER_PHASE: 0}
    assert phases.training() == 1


def test_an_open_phase_is_counted_until_now(clock):
    phases = PhaseTimer()
    with phases("save"):
        clock(3)
        assert phases.seconds()["save"] == 3
        clock(2)
    assert phases.seconds()["save"] == 5


def test_what_no_phase_claims_is_the_rest_of_the_seconds():
    row = {"seconds": 10.0, "seconds/data": 1.0, "seconds/update": 6.0, "loss": 3.0}
    assert phase_seconds(row) == {**dict.fromkeys(PHASES, 0.0), "data": 1.0, "update": 6.0, OTHER_PHASE: 3.0}


def test_sampling_waits_for_the_update_first():
    """The clock's hand stands on update while the parameters are waited for, on rollout within."""
    hands = []

    @contextmanager
    def phase(name):
        hands.append(f"+{name}")
        yield
        hands.append(f"-{name}")

    state = TrainState(step=0, params=jnp.ones(1), opt_state=(), key=None, frozen={})
    with StageContext(None, None, 0, None, None, phase).sampling_phase(state):
        hands.append("drawn")
    assert hands == ["+update", "-update", "+rollout", "drawn", "-rollout"]
    with StageContext(None, None, 0, None, None).sampling_phase(state):  # nobody measures
        pass


@pytest.mark.parametrize("stage, busy", [("pretrain", "data update eval save"), ("ppo", " ".join(PHASES))])
def test_phases_of_a_run(finished, stage, busy):
    summary, rows = read_json(finished / stage / "summary.json"), read_metrics(finished / stage)
    spent = summary["seconds_by_phase"]
    assert list(spent) == [*PHASES, OTHER_PHASE]
    assert {name for name in PHASES if spent[name] > 0} == set(busy.split())
    assert sum(spent.values()) == pytest.approx(summary["seconds"])
    for name in PHASES:
        column = [row[f"seconds/{name}"] for row in rows]
        assert column == sorted(column) and column[-1] <= spent[name]
    assert all(phase_seconds(row)[OTHER_PHASE] > 0 for row in rows)


@pytest.mark.parametrize("stage", ["pretrain", "ppo"])
def test_speed_is_tokens_over_seconds_of_training(finished, stage):
    """From line to line, whatever was evaluated and saved in between; the summary takes over the median."""
    rows = read_metrics(finished / stage)
    trained = [sum(row[f"seconds/{name}"] for name in TRAINING_PHASES) for row in rows]
    tokens, seconds = (np.diff(each) for each in ([row["tokens"] for row in rows], trained))
    lines = np.array(["tokens_per_second" in row for row in rows[1:]])
    told = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    assert told == pytest.approx(tokens[lines] / seconds[lines], rel=1e-3)
    assert len(told) > 1 and seconds[~lines] == pytest.approx(0, abs=1e-2)
    assert read_json(finished / stage / "summary.json")["tokens_per_second"] == statistics.median(told[1:])


def test_a_slow_evaluation_changes_no_speed(finished, small, tmp_path, monkeypatch):
    """A second after every step: each line's speed is above what it would be with that second in it."""
    evaluated = loop.held_out_metrics

    def slow(r, evaluate, state):
        with r.phases("eval"), r.phases("rollout"):
            time.sleep(1)
        return evaluated(r, evaluate, state)

    monkeypatch.setattr(loop, "held_out_metrics", slow)
    config = stage_config(finished, "pretrain").unlock()
    config.train.update(steps=3, log_every=1, evaluate_every=1, save_every=1)
    loop.train_stage(config, tmp_path / "pretrain")
    lines = [row for row in read_metrics(tmp_path / "pretrain") if "tokens_per_second" in row]
    tokens = np.diff([0, *(row["tokens"] for row in lines)])
    assert all(row["tokens_per_second"] > n for row, n in zip(lines[1:], tokens[1:], strict=True))


def test_a_resumed_run_goes_on_counting(finished, small, tmp_path):
    """Every phase begins where the first two steps left it, and gains by the third, save for the scores at its end."""
    shutil.copytree(finished.parent / "snapshots" / "ppo" / "saving", tmp_path / "ppo")  # from step 2
    before = phase_seconds(next(row for row in read_metrics(tmp_path / "ppo") if row["step"] == 2))
    summary = loop.train_stage(stage_config(finished, "ppo"), tmp_path / "ppo")
    added = phase_seconds(next(row for row in read_metrics(tmp_path / "ppo") if row["step"] == 3))
    for name, seconds in before.items():
        assert seconds < added[name] or name == "eval" and seconds == added[name], name
        assert seconds < summary["seconds_by_phase"][name], name

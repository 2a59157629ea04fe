"""The study of a sweep: however a trial comes to its end, the record of it is that of an undisturbed one."""

import math
import os
import signal
import time
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from lm.core.errors import UserError
from lm.runs.workdir import read_metrics
from lm.sweep import space, study as studies
from lm.sweep.study import NUMBER, OPTUNA_SAMPLERS, Study, current_trials
from tests.sweep.test_controller import file, stand_in, started, swept, until

__all__ = ["file", "stand_in"]

SEARCH = ("--search=tpe", "--trials=5", "--space", "rate=log:1e-4:1", "layers=1:8", "fate=well,silent")
KNOWING = "sampler = lambda seed: __import__('optuna').samplers.TPESampler(seed=seed, n_startup_trials=2)"
PATCH = f"{KNOWING}; from lm.sweep.study import OPTUNA_SAMPLERS; OPTUNA_SAMPLERS['tpe'] = sampler"
METRIC = "--metric=loss"  # which the silent ones log too


@pytest.fixture
def knowing(monkeypatch):
    """TPE that learns from the third trial on, not from the eleventh: in it a trial's record decides later draws."""
    monkeypatch.setitem(OPTUNA_SAMPLERS, "tpe", lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=2))


def trials_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="s", storage=f"sqlite:///{folder / 's' / 'study.db'}").trials


def records(folder: Path) -> dict[int, tuple]:
    """What samplers and pruners learn of each trial."""
    return {number: record(trial) for number, trial in current_trials(trials_of(folder)).items()}


def record(trial: optuna.trial.FrozenTrial) -> tuple:
    return trial.state.name, trial.value, trial.params, trial.distributions, trial.intermediate_values


def test_a_search_draws_what_optuna_draws(file, tmp_path, knowing):
    """Its own loop over the same objective: a worker's later draws know what came of its earlier ones."""
    swept(file, tmp_path / "s", "--search=tpe", "--trials=6", "--space", "rate=log:1e-4:1", METRIC)
    plain = optuna.create_study(direction="minimize")
    for number in range(6):
        plain.sampler = OPTUNA_SAMPLERS["tpe"](number)
        trial = plain.ask()
        plain.tell(trial, (math.log10(trial.suggest_float("rate", 1e-4, 1, log=True)) + 2) ** 2 + 1 / 4)
    assert [trial.params for trial in trials_of(tmp_path)] == [trial.params for trial in plain.trials]
    assert [trial.value for trial in trials_of(tmp_path)] == pytest.approx([trial.value for trial in plain.trials])


@pytest.mark.parametrize("end", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_trial_that_was_killed_and_resumed_teaches_the_same(file, tmp_path, knowing, end):
    """Killed with its worker, or given back, in the third of five trials: the later two are drawn as if never."""
    flags = (*SEARCH, "--config.train.steps=8", METRIC)
    swept(file, tmp_path / "straight" / "s", *flags)
    process = started(file, tmp_path / "stopped" / "s", *flags, patch=PATCH, hold="0002:5")
    third = tmp_path / "stopped" / "s" / "trials" / "0002"
    until(lambda: len(read_metrics(third)) == 5)
    os.kill(process.pid, end)
    process.wait()
    swept(file, tmp_path / "stopped" / "s", *flags)
    straight, stopped = records(tmp_path / "straight"), records(tmp_path / "stopped")
    assert stopped == straight
    assert [len(trials_of(tmp_path / name)) for name in ("straight", "stopped")] == [5, 5]  # nothing is there twice
    for state, value, params, distributions, intermediate in straight.values():
        assert state == "COMPLETE" and params.keys() == distributions.keys() == {"rate", "layers", "fate"}
        assert intermediate.keys() == set(range(1, 9)) and value == intermediate[8]


def test_a_failed_trial_that_is_tried_again_teaches_the_same(file, tmp_path):
    """Two of the draws fail at first; drawn at random, as what failed cannot teach those that came after it."""
    flags = ["--search=random", "--trials=4", "--space", "rate=log:1e-4:1", "fate=well,once"]
    swept(file, tmp_path / "failed" / "s", *flags)
    states = [state for state, *_ in records(tmp_path / "failed").values()]
    assert 0 < states.count("FAIL") < 4
    swept(file, tmp_path / "failed" / "s", *flags, "--retry_failed")
    assert len(trials_of(tmp_path / "failed")) == 4 + states.count("FAIL")  # what failed stays beside its second try
    for number in range(4):  # nothing to fail at: what "once" leaves behind is there already
        (tmp_path / "straight" / "s" / "trials" / f"{number:04}").mkdir(parents=True)
        (tmp_path / "straight" / "s" / "trials" / f"{number:04}" / "failed").touch()
    (tmp_path / "straight" / "s" / "sweep.json").write_text("{}")
    swept(file, tmp_path / "straight" / "s", *flags)
    assert records(tmp_path / "failed") == records(tmp_path / "straight")


def study(folder: Path, url: str, pruner: str = "none") -> Study:
    (folder / "workers").mkdir(parents=True, exist_ok=True)
    return Study(folder, url, "s", direction="minimize", sampler="tpe", pruner=pruner, steps=16, seed=0)


def test_a_trial_that_a_machine_took_over_teaches_the_same(tmp_path, monkeypatch):
    """The other machine has died: no sign of life, and its locks are out of sight."""
    monkeypatch.setattr(studies, "GRACE_SECONDS", 1)
    monkeypatch.setattr(studies, "HEARTBEAT_SECONDS", 1)
    values, found = {1: 3.0, 2: 2.0}, {}
    ranges = {"rate": FloatDistribution(1e-4, 1, log=True)}
    for name in ("straight", "taken"):
        url = f"sqlite:///{tmp_path / f'{name}.db'}"
        if name == "taken":
            gone = study(tmp_path / "gone", url)
            gone.add_trials({}, space.search_trials(1, [0]))
            gone.claim(ranges).report_value(1, values[1])
            time.sleep(3)
        with study(tmp_path / name, url) as living:
            living.add_trials({}, space.search_trials(1, [0]))
            claim = living.claim(ranges)
            for step, value in values.items():
                claim.report_value(step, value)
            claim.mark_complete(2.0, 1.0)
            assert living.claim(ranges) is None and [one.state for one in living.trial_statuses()] == ["complete"]
        trials = optuna.load_study(study_name="s", storage=url).trials
        found[name] = {number: record(trial) for number, trial in current_trials(trials).items()}
    assert len(trials) == 2 and trials[0].state == TrialState.FAIL
    assert found["taken"] == found["straight"] and found["taken"][0][2].keys() == {"rate"}


def test_a_kill_between_two_draws_changes_neither(tmp_path, monkeypatch):
    """The second parameter would be drawn first by a sampler that begins anew."""
    ranges = {"rate": FloatDistribution(1e-4, 1, log=True), "decay": FloatDistribution(0, 1)}
    drawn, found = studies.sampled_overrides, {}

    def torn(trial, given):
        drawn(trial, {"rate": given["rate"]})
        raise KeyboardInterrupt

    for name in ("straight", "torn"):
        url = f"sqlite:///{tmp_path / f'{name}.db'}"
        if name == "torn":
            killed = study(tmp_path / name, url)
            killed.add_trials({}, space.search_trials(1, [0]))
            monkeypatch.setattr(studies, "sampled_overrides", torn)
            with pytest.raises(KeyboardInterrupt):
                killed.claim(ranges)
            monkeypatch.setattr(studies, "sampled_overrides", drawn)
            killed._place.close()  # as the kernel does when a process dies
        with study(tmp_path / name, url) as living:
            living.add_trials({}, space.search_trials(1, [0]))
            found[name] = dict(living.claim(ranges).optuna_trial.params)
    assert found["torn"] == found["straight"] and len(found["torn"]) == 2


def test_a_pruned_trial_is_pruned_however_often_it_is_killed(file, tmp_path, monkeypatch):
    """Four good trials, and a bad one that dies with its worker before the pruner looks, then while it is stopped."""
    flags = ["--grid", "rate=0.01,0.011,0.012,0.013,0.9", "--pruner=median", METRIC]
    flags += ["--config.train.steps=20"]
    monkeypatch.setenv("HOLD", "0004:8")
    swept(file, tmp_path / "straight" / "s", *flags)
    bad = tmp_path / "stopped" / "s" / "trials" / "0004"
    process = started(file, tmp_path / "stopped" / "s", *flags, hold="0004:3")
    until(lambda: len(read_metrics(bad)) == 3)
    process.kill()
    process.wait()
    # Running._stop: the pruner has spoken, the process is to save itself, and the worker dies.
    die = (
        "from lm.sweep.trials import TrialProcess; import os; TrialProcess._stop = lambda self: os.kill(os.getpid(), 9)"
    )
    process = started(file, tmp_path / "stopped" / "s", *flags, patch=die, hold="0004:8")
    assert process.wait() == -signal.SIGKILL
    assert records(tmp_path / "stopped")[4][0] == "RUNNING"
    swept(file, tmp_path / "stopped" / "s", *flags)
    straight, stopped = records(tmp_path / "straight"), records(tmp_path / "stopped")
    assert stopped == straight
    assert [state for state, *_ in straight.values()] == ["COMPLETE"] * 4 + ["PRUNED"]
    _, value, _, _, intermediate = straight[4]
    assert max(intermediate) == 5 and value == intermediate[5]  # a quarter of the steps: where the pruner looks first


def test_asha_does_not_count_a_failure_that_was_tried_again(tmp_path):
    """Past step 1 of 16, a sixteenth, only the best quarter goes on: two of eight. The value of a trial that failed and
    was tried again, counted twice, would take both places."""
    with study(tmp_path / "s", f"sqlite:///{tmp_path / 'study.db'}", pruner="asha") as s:
        s.add_trials({}, space.trials_of_points([{"rate": str(i)} for i in range(8)], [0]))
        first = s.claim({})
        assert not first.report_value(1, 1.0)
        first.mark_failed("the disk is full", 1.0)
        s.retry_failed()
        again = s.claim({})
        assert again.trial.number == 0  # it comes before those that have not been tried
        assert not again.report_value(1, 1.0)
        seen = studies.CurrentStudy(s._study).get_trials()
        assert [trial.user_attrs[NUMBER] for trial in seen] == list(range(8))
        assert sum("completed_rung_0" in trial.system_attrs for trial in seen) == 1
        # 1, 5, 5, 5, 5, 5, 5, 4: the best two are 1 and 4. With 1 twice they would be 1 and 1.
        for _ in range(6):
            assert s.claim({}).report_value(1, 5.0)
        assert not s.claim({}).report_value(1, 4.0)


def test_a_finished_study_takes_more_trials(file, tmp_path, knowing):
    """Four trials and then two more are the six of a study that began with six: TPE remembers the four."""
    flags = [flag for flag in SEARCH if not flag.startswith("--trials")] + [METRIC]
    swept(file, tmp_path / "straight" / "s", *flags, "--trials=6")
    swept(file, tmp_path / "grown" / "s", *flags, "--trials=4")
    assert len(trials_of(tmp_path / "grown")) == 4
    assert len(swept(file, tmp_path / "grown" / "s", *flags, "--trials=6")) == 6
    assert records(tmp_path / "grown") == records(tmp_path / "straight")
    swept(file, tmp_path / "grown" / "s", *flags, "--trials=6")  # nothing is left to do
    assert len(trials_of(tmp_path / "grown")) == 6
    with pytest.raises(UserError, match="has 6 trials, and this command leaves out 2 of them: name these too"):
        swept(file, tmp_path / "grown" / "s", *flags, "--trials=4")


def test_a_finished_grid_takes_more_values_and_seeds(file, tmp_path):
    """What was there keeps its number, whatever stands before it now."""
    before = swept(file, tmp_path / "s", "--grid", "rate=0.1")
    runs = swept(file, tmp_path / "s", "--grid", "rate=0.01,0.1", "--seeds=2")
    assert [(run["number"], run["overrides"]["rate"], run["seed"]) for run in runs] == [
        (0, 0.1, 0),
        (1, 0.01, 0),
        (2, 0.01, 1),
        (3, 0.1, 1),
    ]
    assert runs[0] == before[0] and all(run["state"] == "complete" for run in runs)


def test_what_a_kill_left_out_of_a_growing_study_is_entered(tmp_path, monkeypatch):
    with study(tmp_path / "s", f"sqlite:///{tmp_path / 'study.db'}") as s:
        s.add_trials({}, space.search_trials(2, [0]))
        enqueue, entered = s._study.enqueue_trial, []

        def killed(*args, **options):
            if entered:
                raise KeyboardInterrupt
            entered.append(enqueue(*args, **options))

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(s._study, "enqueue_trial", killed)
            s.add_trials({}, space.search_trials(5, [0]))
        assert [one.number for one in s.trial_statuses()] == [0, 1, 2]
        s.add_trials({}, space.search_trials(5, [0]))
        assert [one.number for one in s.trial_statuses()] == [0, 1, 2, 3, 4]
        s.add_trials({}, space.search_trials(5, [0]))
        assert len(s._study.trials) == 5


def test_two_machines_that_add_the_same_trials_run_each_once(tmp_path):
    """Neither saw the other's when it added its own: the first of each number counts."""
    with study(tmp_path / "s", f"sqlite:///{tmp_path / 'study.db'}") as s:
        s.add_trials({}, space.trials_of_points([{"rate": "1"}, {"rate": "2"}], [0]))
        s._study.enqueue_trial({}, user_attrs=dict(s._study.trials[1].user_attrs))
        for number in range(2):
            claim = s.claim({})
            assert claim.trial.number == number
            claim.mark_complete(float(number), 1.0)
        assert s.claim({}) is None
        assert [(one.number, one.state, one.value) for one in s.trial_statuses()] == [
            (0, "complete", 0.0),
            (1, "complete", 1.0),
        ]

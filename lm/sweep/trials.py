"""A trial as a process of its own: it is started, watched, stopped if it is hopeless, and its outcome is stored.

A trial that runs out of memory then harms no other. Each run has its workdir and its log in FOLDER/trials; its outcome
is written beside them, for people and for lm compare.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lm.compare.read import TRIALS_DIR
from lm.compare.statistics import direction_by_name
from lm.core.config import flatten, to_dict
from lm.core.errors import UserError
from lm.runs.workdir import LOCK_FILE, is_unlocked, read_metrics, write_text
from lm.stages import STAGES, is_stage_name, named_stage
from lm.sweep.space import SEED_KEY, ConfigSource, Trial, typed_overrides
from lm.sweep.study import TrialClaim

STOP_SECONDS = 120  # seconds that a stopped run has for saving
HELD_OUT_PREFIX = "held_out/"
OUT_OF_MEMORY_TEXTS = ("RESOURCE_EXHAUSTED", "MemoryError", "std::bad_alloc", "Out of memory", "out of memory")


class TrialGoal(NamedTuple):
    """How a config is run, and which of its numbers judges a trial."""

    module: str  # the program
    part: str  # the folder, within the trial's, in which the number is logged; "" for itself
    metric: str  # its last value judges a trial
    watched: str  # the values that show a hopeless trial: the metric, or its value in training
    direction: str
    steps: int  # of a whole trial

    @classmethod
    def from_config(cls, config: ConfigDict, metric: str, direction: str) -> "TrialGoal":
        """metric: "" for the first that the stage shows; "STAGE:METRIC" names a stage of a pipeline."""
        part, colon, name = metric.rpartition(":")
        if "stages" in config:
            trained = [stage for stage in config.stages if "stage" in config[stage]]
            part = part or trained[-1]
            if part not in trained:
                raise UserError(
                    f"--metric {metric}: {part} is no stage of the config; choose among {', '.join(trained)}"
                )
            module, stage = "lm.pipeline.runner", config[part]
        elif "stage" in config and not colon:
            module, stage = "lm.train.loop", config
        elif colon:
            raise UserError(f"--metric {metric}: the config is of a single stage; write {name}")
        else:
            raise UserError(
                "lm sweep varies configs of lm train and lm pipeline, and this is neither: see its `Command:`"
            )
        if not is_stage_name(stage.stage.name):
            raise UserError(f"stage {stage.stage.name} logs nothing to compare: sweep one of {', '.join(STAGES)}")
        name = name or HELD_OUT_PREFIX + named_stage(stage.stage.name).shown_metrics[0]
        often = "evaluate_every" in stage.train and stage.train.evaluate_every
        watched = name if often else name.removeprefix(HELD_OUT_PREFIX)
        return cls(module, part, name, watched, direction or direction_by_name(name), stage.train.steps)


class TrialProcess:
    """A claimed trial while it runs: its seeds one after another, each a process."""

    def __init__(
        self, claim: TrialClaim, source: ConfigSource, goal: TrialGoal, root: Path, devices: Mapping[str, str]
    ):
        self.claim, self._source, self._goal, self._root, self._devices = claim, source, goal, root, devices
        self._left, self._values, self._spent = list(claim.trial.seeds), [], 0.0
        self._told = claim.told  # the last (step, value) that was reported to the study
        self._start_next_seed()

    def poll(self) -> bool:
        """Checks the trial. Returns True once it is over and its outcome is in the study.

        Raises UserError if the run succeeded but did not log the metric: then no other trial will.
        """
        self.claim.heartbeat()
        if self.claim.hopeless:
            return self._is_pruned()
        code = self._process.poll()
        if code is None:
            if self._is_hopeless():
                self.claim.give_up()
                self._stop()
                return self._is_pruned()
            return False
        if code:
            error = failure_reason(self._log.read_text(errors="replace"), code)
            self._record_outcome("failed", None, error)
            self.claim.mark_failed(error, self._spent)
            return True
        while self._is_hopeless():  # reports the last values; it is too late to prune
            pass
        self._values.append(last_metric_value(self.workdir, self._goal))
        self._record_outcome("complete", self._values[-1], None)
        if self._left:
            self._start_next_seed()
            return False
        self.claim.mark_complete(sum(self._values) / len(self._values), self._spent)
        return True

    def stop_and_release(self) -> None:
        """Stops the process, which saves its state, and lets the trial wait for another worker."""
        if not self.claim.hopeless:
            self._stop()
        self.claim.release()

    def _is_pruned(self) -> bool:
        """Records that the trial ended where the pruner stopped it, however far its process ran after that."""
        _, value = self._told
        self._record_outcome("pruned", value, None)
        self.claim.mark_pruned(value, self._spent)
        return True

    def _start_next_seed(self) -> None:
        self._seed = self._left.pop(0)
        name = f"{self.claim.trial.number:04}" + (f"-{self._seed}" if len(self.claim.trial.seeds) > 1 else "")
        self.workdir = self._root / TRIALS_DIR / name
        self._log = self._root / TRIALS_DIR / f"{name}.log"
        self._started = time.monotonic()
        if self.claim.hopeless:
            return
        wait_until_free(self.workdir)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                trial_command(self._source, self._goal.module, self.claim.trial.overrides, self._seed, self.workdir),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._devices},
            )

    def _is_hopeless(self) -> bool:
        """Reports the new values of the first seed to the study. Returns whether its pruner stops the trial."""
        if self._values:
            return False
        for row in logged_rows(self.workdir, self._goal):
            if self._goal.watched in row and (self._told is None or row["step"] > self._told[0]):
                self._told = row["step"], row[self._goal.watched]
                if self.claim.report_value(*self._told):
                    return True
        return False

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _record_outcome(self, state: str, value: float | None, error: str | None) -> None:
        """Writes the outcome of the run that just ended beside its workdir."""
        seconds = time.monotonic() - self._started
        self._spent += seconds
        write_outcome(
            self.workdir, self._source, self._goal, self.claim.trial, self._seed, state, value, error, seconds
        )


def logged_rows(workdir: Path, goal: TrialGoal) -> list[dict[str, Any]]:
    """The rows that a run has logged in the goal's folder; none while that folder does not exist."""
    return read_metrics(workdir / goal.part) if (workdir / goal.part).is_dir() else []


def last_metric_value(workdir: Path, goal: TrialGoal) -> float:
    """The metric's last value in a run that has ended. UserError if it logged none."""
    rows = logged_rows(workdir, goal)
    values = [row[goal.metric] for row in rows if goal.metric in row]
    if not values:
        logged = sorted({name for row in rows for name in row} - {"step", "seconds", "tokens", "tokens_per_second"})
        raise UserError(f"{workdir} logged no {goal.metric}: give --metric, one of {', '.join(logged) or 'nothing'}")
    return float(values[-1])


def write_outcome(
    workdir: Path,
    source: ConfigSource,
    goal: TrialGoal,
    trial: Trial,
    seed: int,
    state: str,
    value: float | None,
    error: str | None,
    seconds: float,
) -> None:
    """Writes the outcome of a run beside its workdir."""
    outcome = {
        "number": trial.number,
        "overrides": typed_overrides(source, trial.overrides),
        "seed": seed,
        "state": state,
        "value": value,
        "error": error,
        "seconds": seconds,
        "workdir": str(Path(workdir.name) / goal.part),
    }
    write_text(workdir.with_name(f"{workdir.name}.json"), json.dumps(outcome, indent=2) + "\n")


def trial_command(
    source: ConfigSource, module: str, overrides: Mapping[str, str], seed: int, workdir: Path
) -> list[str]:
    """The command line of one run: every seed of the config becomes `seed`."""
    seeds = [key for key in flatten(to_dict(source.config(overrides))) if key.split(".")[-1] == SEED_KEY]
    changes = [*source.overrides, *(f"{k}={v}" for k, v in overrides.items()), *(f"{key}={seed}" for key in seeds)]
    flags = [f"--config={source.name}", f"--workdir={workdir}", *(f"--config.{change}" for change in changes)]
    return [sys.executable, "-m", "lm.sweep.child", module, *flags]


def failure_reason(log: str, code: int) -> str:
    """One line with the reason why a run ended with `code`: its error, the signal that ended it, or its last line."""
    lines = [line.strip() for line in log.split("\n") if line.strip()]
    if code == -signal.SIGKILL:
        return "killed (signal 9), as the system does when memory runs out: a smaller batch or model, or fewer --jobs"
    if code < 0:
        return f"ended by signal {-code}"
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    last = (errors or lines or [f"ended with status {code}"])[-1][:300]
    return f"out of memory: {last}" if any(word in log for word in OUT_OF_MEMORY_TEXTS) else last


def wait_until_free(workdir: Path) -> None:
    """Waits until no run holds the workdir: a run whose worker was killed may still be saving."""
    started = time.monotonic()
    while not all(map(is_unlocked, workdir.glob(f"**/{LOCK_FILE}"))) and time.monotonic() - started < STOP_SECONDS:
        time.sleep(0.2)

"""The study: a sweep's plan, its claims and its results, in a database that any number of machines share.

A trial waits until a worker claims it, then runs, and ends complete, pruned or failed. A worker that dies loses its
claim: its trial waits again, with the same number and overrides, and continues in its folder. However often that
happens, the study's final record of the trial (parameters, intermediate values, state, value) is that of an undisturbed
trial, so samplers and pruners learn the same.
"""

import fcntl
import json
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, ProgrammingError, SQLAlchemyError

from lm.core.errors import UserError
from lm.runs.workdir import is_unlocked
from lm.sweep.space import Trial, distribution_value, extended_trials, sampled_overrides

NUMBER, SEEDS, OVERRIDES, ERROR, SECONDS, WORKER = "number", "seeds", "overrides", "error", "seconds", "worker"
HOPELESS_KEY = "hopeless"  # of a trial: its pruner has stopped it, but its process may still be saving
PLAN_KEY, READY_KEY = "plan", "ready"  # of the study: what is tried; whether all trials have been entered
TRIALS_KEY = "trials"  # of the plan: [number, overrides, seeds] of each
WORKERS_DIR = "workers"  # of a sweep's folder: the locks of those who work in it
HEARTBEAT_SECONDS, GRACE_SECONDS = (
    15,
    120,
)  # seconds between two heartbeats; seconds without one after which a worker elsewhere counts as dead
POLL_SECONDS = 0.2  # seconds between two checks of what another worker must do first
STATE_NAMES = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


class TrialStatus(NamedTuple):
    """The study's record of a trial."""

    number: int
    state: str  # one of the values of STATE_NAMES
    overrides: Mapping[str, str]  # empty until they are chosen
    seeds: Sequence[int]
    value: float | None
    step: int | None  # of the last intermediate value
    seconds: float | None
    error: str | None
    worker: str | None


class Study:
    """Optuna's study as a queue of trials, for one worker. Leaving the context manager gives up the worker's place."""

    def __init__(
        self, folder: Path, url: str, name: str, *, direction: str, sampler: str, pruner: str, steps: int, seed: int
    ):
        """url: of a database, as SQLAlchemy writes it. steps: of a whole trial. UserError if it cannot be reached."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self._folder, self._sampler, self._seed = folder, sampler, seed
        self.worker = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        with database_errors(url), self._queue_lock():
            self._storage = open_with_retries(lambda: _storage(url))
            try:
                self._study = optuna.create_study(storage=self._storage, study_name=name, direction=direction)
                self._first = True  # of all workers: the database lets one create it
            except optuna.exceptions.DuplicatedStudyError:
                self._study = optuna.load_study(storage=self._storage, study_name=name)
                self._first = False
            self._study.pruner = OPTUNA_PRUNERS[pruner](steps)
        self._place = self._worker_lock_path(self.worker).open("w")
        fcntl.flock(self._place, fcntl.LOCK_EX)

    def __enter__(self) -> "Study":
        return self

    def __exit__(self, *exception) -> None:
        self._place.close()
        self._worker_lock_path(self.worker).unlink(missing_ok=True)
        self._storage.remove_session()

    def add_trials(self, plan: Mapping[str, Any], trials: Sequence[Trial]) -> None:
        """Enters the trials that are not there yet. The first worker does it; the others wait, and do it if that worker
        has died.

        UserError if the study has another plan, or trials that are not among these.
        """
        plan, waited = json.loads(json.dumps(plan)), 0.0
        while not self._first and READY_KEY not in self._study.user_attrs and waited < GRACE_SECONDS:
            time.sleep(POLL_SECONDS)
            waited += POLL_SECONDS
        with self._queue_lock():
            attributes = self._study.user_attrs
            begun = json.loads(attributes[PLAN_KEY]) if PLAN_KEY in attributes else {**plan, TRIALS_KEY: []}
            trials = self._checked_plan(begun, plan, trials)
            text = json.dumps({**plan, TRIALS_KEY: [[t.number, t.overrides, list(t.seeds)] for t in trials]})
            if PLAN_KEY not in attributes:
                self._study.set_user_attr(PLAN_KEY, text)  # first, so that workers that join now can compare their plan
            entered = {trial.number for trial in self.trial_statuses()}
            for trial in trials:
                if trial.number not in entered:
                    self._study.enqueue_trial({}, user_attrs=_attributes(trial))
            if begun[TRIALS_KEY] and len(trials) > len(begun[TRIALS_KEY]):
                self._study.set_user_attr(
                    PLAN_KEY, text
                )  # last: after a kill before it, the same command adds the rest
            if READY_KEY not in attributes:
                self._study.set_user_attr(READY_KEY, True)

    def _checked_plan(self, begun: Mapping[str, Any], plan: Mapping[str, Any], trials: Sequence[Trial]) -> list[Trial]:
        """The trials of the plan that the study was begun with, and those that are new in `trials`."""
        name, keys = self._study.study_name, {**begun, **plan}.keys() - {TRIALS_KEY}
        other = [key for key in keys if key not in begun or key not in plan or begun[key] != plan[key]]
        if other:
            raise UserError(
                f"the study {name} was begun with another {', '.join(sorted(other))}: "
                "give another --workdir, or --study=NAME"
            )
        old = [Trial(number, overrides, tuple(seeds)) for number, overrides, seeds in begun[TRIALS_KEY]]
        both, lost = extended_trials(old, trials)
        if lost:
            raise UserError(
                f"the study {name} has {len(old)} trials, and this command leaves out {lost} of them: name these too "
                "(it may add more), give another --workdir, or --study=NAME"
            )
        return both

    def claim(self, space: Mapping[str, BaseDistribution]) -> "TrialClaim | None":
        """A waiting trial that is now this worker's, its overrides chosen; None if none waits."""
        with self._queue_lock():
            self._release_dead_workers()
            trials = current_trials(self._study.get_trials(deepcopy=False))
            for number in sorted(n for n, trial in trials.items() if trial.state == TrialState.WAITING):
                trial_id = self._trial_id(trials[number])
                self._storage.record_heartbeat(trial_id)  # so that others find a claim that a kill cuts short
                if self._is_taken(trial_id):
                    return self._claim_trial(trials[number], trial_id, space)
        return None

    def _is_taken(self, trial_id: int) -> bool:
        """Sets a waiting trial running. False if another machine was quicker: the database decides."""
        try:
            return self._storage.set_trial_state_values(trial_id, state=TrialState.RUNNING)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False

    def _claim_trial(self, frozen: FrozenTrial, trial_id: int, space: Mapping[str, BaseDistribution]) -> "TrialClaim":
        attributes = frozen.user_attrs
        if OVERRIDES in attributes:  # chosen before: samplers learn from parameters, which a copy of a trial lacks
            for key in space.keys() - frozen.params.keys():
                internal = space[key].to_internal_repr(distribution_value(space[key], attributes[OVERRIDES][key]))
                self._storage.set_trial_param(trial_id, key, internal, space[key])
        # Loaded anew: outside of Study.ask a sampler knows for good only the trials that it read first.
        study = optuna.load_study(
            study_name=self._study.study_name,
            storage=self._storage,
            sampler=OPTUNA_SAMPLERS[self._sampler](self._seed + attributes[NUMBER]),
            pruner=self._study.pruner,
        )
        study.get_trials(deepcopy=False)  # its cache must know the trial before it is written to
        trial = optuna.Trial(study, trial_id)
        trial.set_user_attr(WORKER, self.worker)
        if OVERRIDES not in attributes:
            trial.set_user_attr(OVERRIDES, sampled_overrides(trial, space))
        claimed_trial = Trial(attributes[NUMBER], trial.user_attrs[OVERRIDES], tuple(attributes[SEEDS]))
        last_report = max(frozen.intermediate_values.items(), default=None)
        return TrialClaim(claimed_trial, trial, trial_id, self, last_report, HOPELESS_KEY in attributes)

    def trial_statuses(self) -> list[TrialStatus]:
        """The state of every trial, by number."""
        trials = current_trials(self._study.get_trials(deepcopy=False))
        return [_trial_status(trials[number]) for number in sorted(trials)]

    def retry_failed(self) -> None:
        """Lets every failed trial wait again."""
        with self._queue_lock():
            for trial in current_trials(self._study.get_trials(deepcopy=False)).values():
                if trial.state == TrialState.FAIL:
                    _enqueue_again(self._study, trial)

    def _release_dead_workers(self) -> None:
        """Takes back the trials of dead workers: of this folder those whose lock is free, of others the silent ones."""
        fail_stale_trials(self._study)
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        held = [
            (trial, self._worker_lock_path(trial.user_attrs[WORKER])) for trial in running if WORKER in trial.user_attrs
        ]
        dead = {place for place in {place for _, place in held} if place.exists() and is_unlocked(place)}
        for trial, place in held:
            if place in dead:
                self.release(self._trial_id(trial))
        for place in dead:
            place.unlink(missing_ok=True)

    def release(self, trial_id: int) -> None:
        """Lets a running trial wait again, with all values that it reported."""
        trial = self._storage.get_trial(trial_id)
        with suppress(optuna.exceptions.UpdateFinishedTrialError):  # it is over, or another machine considered us dead
            if OVERRIDES in trial.user_attrs or not trial.params:
                self._storage.set_trial_state_values(trial_id, state=TrialState.WAITING)
            elif self._storage.set_trial_state_values(trial_id, state=TrialState.FAIL):
                _enqueue_again(self._study, trial)  # a kill came between two of its draws: all of them are made again

    def heartbeat(self, trial_id: int) -> None:
        self._storage.record_heartbeat(trial_id)

    def finish(self, trial_id: int, state: TrialState, value: float | None) -> None:
        self._storage.set_trial_state_values(trial_id, state=state, values=None if value is None else [value])

    def _worker_lock_path(self, worker: str) -> Path:
        return self._folder / WORKERS_DIR / f"{worker}.lock"

    def _trial_id(self, trial: FrozenTrial) -> int:
        study = self._storage.get_study_id_from_name(self._study.study_name)
        return self._storage.get_trial_id_from_study_id_trial_number(study, trial.number)

    def _queue_lock(self) -> AbstractContextManager[None]:
        """SQLite lets two workers read that a trial waits, and both then take it."""
        return locked_queue(self._folder)


class TrialClaim(NamedTuple):
    """A trial that this worker runs."""

    trial: Trial
    optuna_trial: optuna.Trial
    id: int
    study: Study
    told: tuple[int, float] | None  # the last intermediate value that an earlier worker reported, with its step
    hopeless: bool  # the pruner gave it up before, and its worker died before it had stopped the run

    def report_value(self, step: int, value: float) -> bool:
        """Records an intermediate value. Returns whether the pruner calls the trial hopeless."""
        self.optuna_trial.report(value, step)
        return self.optuna_trial.should_prune()

    def give_up(self) -> None:
        """Records the pruner's answer, because it does not repeat it for the same values."""
        self.optuna_trial.set_user_attr(HOPELESS_KEY, True)

    def heartbeat(self) -> None:
        self.study.heartbeat(self.id)

    def mark_complete(self, value: float, seconds: float) -> None:
        self._finish(TrialState.COMPLETE, value, seconds, None)

    def mark_pruned(self, value: float, seconds: float) -> None:
        self._finish(TrialState.PRUNED, value, seconds, None)

    def mark_failed(self, error: str, seconds: float) -> None:
        self._finish(TrialState.FAIL, None, seconds, error)

    def release(self) -> None:
        self.study.release(self.id)

    def _finish(self, state: TrialState, value: float | None, seconds: float, error: str | None) -> None:
        self.optuna_trial.set_user_attr(SECONDS, seconds)
        if error is not None:
            self.optuna_trial.set_user_attr(ERROR, error)
        self.study.finish(self.id, state, value)


@contextmanager
def locked_queue(folder: Path) -> Iterator[None]:
    """One worker of a sweep's folder at a time."""
    with (folder / WORKERS_DIR / ".queue").open("w") as queue:
        fcntl.flock(queue, fcntl.LOCK_EX)
        yield


def _storage(url: str) -> RDBStorage:
    return RDBStorage(
        url,
        engine_kwargs={"connect_args": {"timeout": 60}} if make_url(url).get_backend_name() == "sqlite" else {},
        heartbeat_interval=HEARTBEAT_SECONDS,
        grace_period=GRACE_SECONDS,
        heartbeat_stale_trial_callback=_enqueue_again,
    )


def open_with_retries(open_storage: Callable[[], RDBStorage]) -> RDBStorage:
    """open_storage(), tried again where another machine is making the same tables at this moment."""
    for _ in range(10):
        try:
            return open_storage()
        except (IntegrityError, ProgrammingError, optuna.exceptions.StorageInternalError) as error:
            if not any(isinstance(each, (IntegrityError, ProgrammingError)) for each in (error, error.__cause__)):
                raise
            time.sleep(0.5)
    return open_storage()


@contextmanager
def database_errors(url: str) -> Iterator[None]:
    """Turns an error of the database into one line, without its password."""
    try:
        try:
            shown = make_url(url).render_as_string(hide_password=True)
        except ArgumentError:
            raise UserError(f"--storage {url} is no database URL: write postgresql://USER@HOST/NAME") from None
        yield
    except (NoSuchModuleError, ImportError) as error:
        raise UserError(f"--storage {shown}: no driver for it is installed ({error})") from error
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise UserError(f"--storage {shown} cannot be reached ({reason}): start it, or correct the URL") from error


def _attributes(trial: Trial) -> dict[str, Any]:
    overrides = {} if trial.overrides is None else {OVERRIDES: trial.overrides}
    return {NUMBER: trial.number, SEEDS: trial.seeds, **overrides}


def _enqueue_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Enters a failed trial again. The failed one stays in the record."""
    kept = {key: trial.user_attrs[key] for key in (NUMBER, SEEDS, OVERRIDES) if key in trial.user_attrs}
    study.enqueue_trial({}, user_attrs=kept)


def current_trials(trials: Sequence[FrozenTrial]) -> dict[int, FrozenTrial]:
    """The trial of each number that counts: the first that has not failed, else the last. So a failure that was
    tried again does not count, nor does a trial that two machines entered at the same moment."""
    by_number: dict[int, FrozenTrial] = {}
    for trial in trials:
        number = trial.user_attrs[NUMBER]
        if number not in by_number or by_number[number].state == TrialState.FAIL:
            by_number[number] = trial
    return by_number


class CurrentStudy:
    """A study as a pruner sees it: without trials that do not count."""

    def __init__(self, study: optuna.Study):
        self._study = study

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def get_trials(self, deepcopy: bool = True, states: Sequence[TrialState] | None = None) -> list[FrozenTrial]:
        trials = current_trials(self._study.get_trials(deepcopy=deepcopy)).values()
        return [trial for trial in trials if states is None or trial.state in states]


class SuccessiveHalving(optuna.pruners.SuccessiveHalvingPruner):
    """Optuna's pruner, which compares with failed trials too, but not with those that were tried again."""

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        return super().prune(CurrentStudy(study), trial)


def _trial_status(trial: FrozenTrial) -> TrialStatus:
    attributes = trial.user_attrs
    steps = sorted(trial.intermediate_values)
    value = trial.value if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) else None
    if value is None and steps:
        value = trial.intermediate_values[steps[-1]]
    known = {key: attributes[key] if key in attributes else None for key in (SECONDS, ERROR, WORKER)}
    return TrialStatus(
        attributes[NUMBER],
        STATE_NAMES[trial.state],
        attributes[OVERRIDES] if OVERRIDES in attributes else {},
        attributes[SEEDS],
        value,
        steps[-1] if steps else None,
        known[SECONDS],
        known[ERROR],
        known[WORKER],
    )


OPTUNA_SAMPLERS = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
# By the steps of a whole trial. ASHA: past a sixteenth and past a quarter of them, only the best quarter continues (Li
# et al. 2018, arXiv 1810.05934). Median: past a quarter, a trial continues if it is better than half of the others were
# at that step (Golovin et al. 2017). Earlier values, from the warm-up, predict little.
OPTUNA_PRUNERS = {
    "none": lambda steps: optuna.pruners.NopPruner(),
    "asha": lambda steps: SuccessiveHalving(min_resource=max(steps // 16, 1)),
    "median": lambda steps: optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=steps // 4),
}

"""The study: what a sweep plans, who has taken what, what came of it; in a database that any number of machines share.

A trial waits until a worker claims it, runs, and is complete, pruned or failed. A worker that dies loses its claim: its
trial waits again, under the same number and with the same overrides, and goes on in its folder.
"""

import fcntl
import json
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, ProgrammingError, SQLAlchemyError

from lm.errors import UserError
from lm.sweeps.space import Trial, drawn
from lm.workdir import free

NUMBER, SEEDS, OVERRIDES, ERROR, SECONDS, WORKER = "number", "seeds", "overrides", "error", "seconds", "worker"
PLAN, READY = "plan", "ready"  # of the study: what is tried; whether all trials have been entered
BEAT, GRACE = 15, 120  # seconds between two signs of life; after which a worker elsewhere counts as dead
POLL = 0.2  # seconds between two looks for what another worker does first
STATES = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


class Told(NamedTuple):
    """What the study knows of a trial."""

    number: int
    state: str  # one of STATES
    overrides: Mapping[str, str]  # empty while nobody has chosen them
    seeds: Sequence[int]
    value: float | None
    step: int | None  # of the last intermediate value
    seconds: float | None
    error: str | None
    worker: str | None


class Study:
    """Optuna's study as a queue of trials, for one worker. Leaving it as a context manager gives up its place."""

    def __init__(
        self, folder: Path, url: str, name: str, *, direction: str, sampler: str, pruner: str, steps: int, seed: int
    ):
        """url: of a database, as SQLAlchemy writes it. steps: of a whole trial. UserError if it cannot be reached."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self._folder, self._sampler, self._seed = folder, sampler, seed
        self.worker = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        with reaching(url), self._alone():
            self._storage = patiently(lambda: _storage(url))
            try:
                self._study = optuna.create_study(storage=self._storage, study_name=name, direction=direction)
                self._first = True  # of all workers: the database lets one create it
            except optuna.exceptions.DuplicatedStudyError:
                self._study = optuna.load_study(storage=self._storage, study_name=name)
                self._first = False
            self._study.pruner = PRUNERS[pruner](steps)
        self._place = self._place_of(self.worker).open("w")
        fcntl.flock(self._place, fcntl.LOCK_EX)

    def __enter__(self) -> "Study":
        return self

    def __exit__(self, *exception) -> None:
        self._place.close()
        self._place_of(self.worker).unlink(missing_ok=True)
        self._storage.remove_session()

    def enter(self, plan: Mapping[str, Any], trials: Sequence[Trial]) -> None:
        """Enters the trials, once for all workers: the first does, the others wait, and do it if that one has died.

        UserError if the study has another plan.
        """
        text, waited = json.dumps(plan, sort_keys=True), 0.0
        while not self._first and READY not in self._study.user_attrs and waited < GRACE:
            time.sleep(POLL)
            waited += POLL
        with self._alone():
            attributes = self._study.user_attrs
            if PLAN in attributes and attributes[PLAN] != text:
                old = json.loads(attributes[PLAN])
                keys = [key for key in {**old, **plan} if key not in old or key not in plan or old[key] != plan[key]]
                raise UserError(
                    f"the study {self._study.study_name} was begun with another {', '.join(sorted(keys))}: "
                    "give another --workdir, or --study=NAME"
                )
            if READY in attributes:
                return
            self._study.set_user_attr(PLAN, text)
            entered = {trial.number for trial in self.told()}
            for trial in trials:
                if trial.number not in entered:
                    self._study.enqueue_trial({}, user_attrs=_attributes(trial))
            self._study.set_user_attr(READY, True)

    def claim(self, space: Mapping[str, BaseDistribution]) -> "Claim | None":
        """A waiting trial that is now this worker's, its overrides chosen; None if none waits."""
        with self._alone():
            self._bury()
            for waiting in self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                # Another machine may have been quicker: the database says so.
                if not self._storage.set_trial_state_values(self._id(waiting), state=TrialState.RUNNING):
                    continue
                number = waiting.user_attrs[NUMBER]
                self._study.sampler = SAMPLERS[self._sampler](self._seed + number)
                trial = optuna.Trial(self._study, self._id(waiting))
                trial.set_user_attr(WORKER, self.worker)
                if OVERRIDES not in waiting.user_attrs:
                    trial.set_user_attr(OVERRIDES, drawn(trial, space))
                self._storage.record_heartbeat(self._id(waiting))
                attributes = trial.user_attrs
                return Claim(
                    Trial(number, attributes[OVERRIDES], tuple(attributes[SEEDS])), trial, self._id(waiting), self
                )
        return None

    def told(self) -> list[Told]:
        """Every trial as it stands, by number."""
        newest = {trial.user_attrs[NUMBER]: trial for trial in self._study.get_trials(deepcopy=False)}
        return [_told(newest[number]) for number in sorted(newest)]

    def retry_failed(self) -> None:
        """Lets every failed trial wait again."""
        with self._alone():
            newest = {trial.user_attrs[NUMBER]: trial for trial in self._study.get_trials(deepcopy=False)}
            for trial in newest.values():
                if trial.state == TrialState.FAIL:
                    _waits_again(self._study, trial)

    def _bury(self) -> None:
        """Takes back the trials of dead workers: of this folder those whose lock is free, of others the silent ones."""
        fail_stale_trials(self._study)
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        held = [(trial, self._place_of(trial.user_attrs[WORKER])) for trial in running if WORKER in trial.user_attrs]
        dead = {place for place in {place for _, place in held} if place.exists() and free(place)}
        for trial, place in held:
            if place in dead:
                self.release(self._id(trial))
        for place in dead:
            place.unlink(missing_ok=True)

    def release(self, trial_id: int) -> None:
        """Lets a running trial wait again."""
        if self._storage.set_trial_state_values(trial_id, state=TrialState.FAIL):
            _waits_again(self._study, self._storage.get_trial(trial_id))

    def beat(self, trial_id: int) -> None:
        self._storage.record_heartbeat(trial_id)

    def finish(self, trial_id: int, state: TrialState, value: float | None) -> None:
        self._storage.set_trial_state_values(trial_id, state=state, values=None if value is None else [value])

    def _place_of(self, worker: str) -> Path:
        return self._folder / "workers" / f"{worker}.lock"

    def _id(self, trial: FrozenTrial) -> int:
        study = self._storage.get_study_id_from_name(self._study.study_name)
        return self._storage.get_trial_id_from_study_id_trial_number(study, trial.number)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One worker of this folder at a time: SQLite lets two read that a trial waits, and both then take it."""
        with (self._folder / "workers" / ".queue").open("w") as queue:
            fcntl.flock(queue, fcntl.LOCK_EX)
            yield


class Claim(NamedTuple):
    """A trial that this worker runs."""

    trial: Trial
    optuna: optuna.Trial
    id: int
    study: Study

    def report(self, step: int, value: float) -> bool:
        """Notes an intermediate value; whether the pruner calls the trial hopeless."""
        self.optuna.report(value, step)
        return self.optuna.should_prune()

    def beat(self) -> None:
        self.study.beat(self.id)

    def complete(self, value: float, seconds: float) -> None:
        self._over(TrialState.COMPLETE, value, seconds, None)

    def pruned(self, value: float, seconds: float) -> None:
        self._over(TrialState.PRUNED, value, seconds, None)

    def failed(self, error: str, seconds: float) -> None:
        self._over(TrialState.FAIL, None, seconds, error)

    def released(self) -> None:
        self.study.release(self.id)

    def _over(self, state: TrialState, value: float | None, seconds: float, error: str | None) -> None:
        self.optuna.set_user_attr(SECONDS, seconds)
        if error is not None:
            self.optuna.set_user_attr(ERROR, error)
        self.study.finish(self.id, state, value)


def _storage(url: str) -> RDBStorage:
    return RDBStorage(
        url,
        engine_kwargs={"connect_args": {"timeout": 60}} if make_url(url).get_backend_name() == "sqlite" else {},
        heartbeat_interval=BEAT,
        grace_period=GRACE,
        heartbeat_stale_trial_callback=_waits_again,
    )


def patiently(open_storage: Callable[[], RDBStorage]) -> RDBStorage:
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
def reaching(url: str) -> Iterator[None]:
    """Turns what a database refuses into one line, without its password."""
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
        raise UserError(f"--storage {shown} cannot be reached ({reason}): start it, or mend the URL") from error


def _attributes(trial: Trial) -> dict[str, Any]:
    chosen = {} if trial.overrides is None else {OVERRIDES: trial.overrides}
    return {NUMBER: trial.number, SEEDS: trial.seeds, **chosen}


def _waits_again(study: optuna.Study, trial: FrozenTrial) -> None:
    kept = {key: trial.user_attrs[key] for key in (NUMBER, SEEDS, OVERRIDES) if key in trial.user_attrs}
    study.enqueue_trial(trial.params, user_attrs=kept)


def _told(trial: FrozenTrial) -> Told:
    attributes = trial.user_attrs
    steps = sorted(trial.intermediate_values)
    value = trial.value if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) else None
    if value is None and steps:
        value = trial.intermediate_values[steps[-1]]
    known = {key: attributes[key] if key in attributes else None for key in (SECONDS, ERROR, WORKER)}
    return Told(
        attributes[NUMBER],
        STATES[trial.state],
        attributes[OVERRIDES] if OVERRIDES in attributes else {},
        attributes[SEEDS],
        value,
        steps[-1] if steps else None,
        known[SECONDS],
        known[ERROR],
        known[WORKER],
    )


SAMPLERS = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
# By the steps of a whole trial. ASHA: past a sixteenth and past a quarter of them, only the best quarter goes on (Li et
# al. 2018, arXiv 1810.05934). Median: past a quarter, whoever is better than half of the others were there (Golovin et
# al. 2017). Before, a warm-up says little of what comes.
PRUNERS = {
    "none": lambda steps: optuna.pruners.NopPruner(),
    "asha": lambda steps: optuna.pruners.SuccessiveHalvingPruner(min_resource=max(steps // 16, 1)),
    "median": lambda steps: optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=steps // 4),
}

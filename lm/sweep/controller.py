"""Runs many settings and seeds of one config, each as a trial in its own process.

    python -m lm sweep --config=experiments/width_sweep.py --workdir=runs/widths --seeds=3
    python -m lm sweep --config=experiments/sft.py --workdir=runs/sft --grid optimizer.learning_rate=3e-4,1e-3 --seeds=3

Without --grid and --search it runs what the file's sweep() returns. The study is stored in WORKDIR/study.db, or at
--storage, a database URL at which any number of machines join with the same command. After a kill, give it again:
finished trials are not repeated, interrupted ones continue. With more --trials, values or --seeds it adds the new ones.
WORKDIR/trials has the runs; `python -m lm compare WORKDIR` compares them.

    python -m lm sweep --config=experiments/ppo.py --workdir=runs/betas --grid stage.beta=0.05,0.1,0.2,0.4 --vectorised
    python -m lm sweep --config=experiments/pretrain.py --workdir=runs/tpe --search=tpe --trials=20 --pruner=median \\
        --space optimizer.learning_rate=log:1e-4:3e-2 model.width=64,128
"""

import json
import shlex
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.compare.read import SWEEP_FILE, TRIALS_DIR
from lm.compare.statistics import MAXIMIZE, MINIMIZE
from lm.core.config import config_help, parsed_flags, split_overrides, to_dict
from lm.core.errors import UserError, check_at_least
from lm.runs.console import SigtermExit, on_sigterm, print_table, run_program, say, warn
from lm.runs.workdir import CONFIG_FILE, TEMPORARY_SUFFIX, write_text
from lm.sweep.board import TrialBoard, overrides_text, state_counts_text, trial_table
from lm.sweep.config_functions import config_functions
from lm.sweep.launch import LAUNCHERS, device_environments
from lm.sweep.space import (
    ConfigSource,
    Trial,
    config_sweep_points,
    grid_points,
    search_space,
    search_trials,
    trials_of_points,
    typed_overrides,
)
from lm.sweep.study import OPTUNA_PRUNERS, OPTUNA_SAMPLERS, WORKERS_DIR, Study, TrialStatus, locked_queue
from lm.sweep.trials import TrialGoal, TrialProcess
from lm.sweep.vmapped_trials import run_vmapped_trials

POLL_SECONDS = 0.5  # seconds between two checks of the running trials
SEARCH_METHODS = (*OPTUNA_SAMPLERS, "grid")
FLAGS = {
    "config": dict(required=True, metavar="FILE[:ARG]", help="what to vary; --config.KEY=VALUE changes every trial"),
    "workdir": dict(required=True, metavar="DIR", help="the sweep's folder; the same command continues, or joins"),
    "grid": dict(nargs="+", metavar="KEY=V1,V2", help="every combination of these values"),
    "search": dict(
        choices=SEARCH_METHODS, help="draw trials from --space: Optuna's TPE or at random; grid: every combination"
    ),
    "space": dict(nargs="+", metavar="KEY=LOW:HIGH", help="or KEY=log:LOW:HIGH, or KEY=V1,V2"),
    "trials": dict(type=int, metavar="N", help="trials that a search draws"),
    "seeds": dict(type=int, default=1, metavar="N", help="runs of every setting, with seeds 0 to N-1 (default 1)"),
    "metric": dict(
        default="", metavar="NAME", help="its last value judges a trial; default: the stage's own, held out"
    ),
    "direction": dict(default="", choices=(MINIMIZE, MAXIMIZE), help="default: by the metric's name"),
    "pruner": dict(
        default="none",
        choices=list(OPTUNA_PRUNERS),
        help="stops trials whose logged values are hopeless (default none)",
    ),
    "storage": dict(default="", metavar="URL", help="the study's database; default: sqlite in WORKDIR"),
    "study": dict(default="", metavar="NAME", help="its name there; default: WORKDIR's"),
    "jobs": dict(type=int, metavar="N", help="trials at once here; default: one for each accelerator, one on a CPU"),
    "vectorised": dict(action="store_true", help="trials that differ in seeds and numbers only as one vmapped program"),
    "at_once": dict(type=int, default=16, metavar="N", help="trials in one vmapped program at most (default 16)"),
    "launcher": dict(default="local", choices=("local", *LAUNCHERS), help="where workers run (default local)"),
    "workers": dict(type=int, default=1, metavar="N", help="workers that a launcher starts (default 1)"),
    "options": dict(nargs="+", default=[], metavar="KEY=VALUE", help="of the launcher, e.g. timeout_min=60 num_gpus=1"),
    "retry_failed": dict(action="store_true", help="run failed trials again"),
    "dry_run": dict(action="store_true", help="print the trials and stop"),
}


def program(argv: list[str]) -> None:
    overrides, rest = split_overrides(argv)
    flags = parsed_flags(rest, __doc__, FLAGS, epilog=config_help(argv, config_functions))
    source = ConfigSource(flags.config, tuple(overrides))
    goal = TrialGoal.from_config(source.config({}), flags.metric, flags.direction)
    trials, space = trials_and_space(flags, source)
    if flags.dry_run:
        print_plan(trials, space)
        return
    statuses = run_sweep(flags, source, goal, trials, space, argv)
    if not any(one.state in ("complete", "waiting", "running") for one in statuses):
        root = Path(flags.workdir)
        raise UserError(
            f"no trial was completed: see {root / TRIALS_DIR}; the first: {statuses[0].error or statuses[0].state}"
        )


def run_sweep(
    flags: Namespace,
    source: ConfigSource,
    goal: TrialGoal,
    trials: Sequence[Trial],
    space: Mapping[str, Any],
    argv: Sequence[str],
) -> list[TrialStatus]:
    """Runs the trials, or joins other workers, and returns the state of each trial. argv: the arguments of a
    launcher's workers."""
    root = sweep_folder(flags, source, goal)
    with open_study(flags, root, goal) as study:
        study.add_trials(sweep_plan(flags, source, goal, space), trials)
        if flags.retry_failed:
            study.retry_failed()
        keys = swept_keys(trials, space)
        if flags.vectorised:
            run_vmapped_trials(study, source, goal, root, at_once=flags.at_once)
        elif flags.launcher == "local":
            run_trials(study, source, goal, root, space, device_environments(flags.jobs), TrialBoard(study, keys))
        else:
            watch_workers(launch_workers(flags, argv, root), TrialBoard(study, keys))
        statuses = study.trial_statuses()
    print_trials(statuses, goal, root, keys)
    return statuses


def trials_and_space(flags: Namespace, source: ConfigSource) -> tuple[list[Trial], Mapping[str, Any]]:
    """The trials, and the space from which a sampler draws their overrides (empty where they are known)."""
    check_at_least(1, "lm.sweep.controller", seeds=flags.seeds, workers=flags.workers)
    seeds, space = range(flags.seeds), {}
    if flags.vectorised:
        check_vectorisable(flags, source)
    if flags.search and flags.grid:
        raise UserError("--grid and --search: give one of the two")
    if flags.search and not flags.space:
        raise UserError(f"--search={flags.search} needs --space, such as --space optimizer.learning_rate=log:1e-4:1e-2")
    if flags.space and not flags.search:
        raise UserError("--space needs --search=tpe, random or grid")
    if flags.search in OPTUNA_SAMPLERS:
        if flags.trials is None:
            raise UserError(f"--search={flags.search} needs --trials=N")
        check_at_least(1, "lm.sweep.controller", trials=flags.trials)
        return search_trials(flags.trials, seeds), search_space(flags.space, source)
    points = grid_points(flags.space or flags.grid) if flags.space or flags.grid else config_sweep_points(source)
    if not points:
        raise UserError(f"{flags.config}: sweep() returns nothing to try")
    for point in points:
        typed_overrides(source, point)
    return trials_of_points(points, seeds), space


def check_vectorisable(flags: Namespace, source: ConfigSource) -> None:
    """UserError for options that trials in one program cannot have."""
    if "stages" in source.config({}):
        raise UserError("--vectorised runs configs of lm train, and this is a pipeline's: sweep one of its stages")
    check_at_least(1, "lm.sweep.controller", at_once=flags.at_once)
    for name, plain in (("jobs", None), ("launcher", "local"), ("pruner", "none")):
        if getattr(flags, name) != plain:
            raise UserError(f"--vectorised runs trials as one program: leave --{name} out")
    if flags.search in OPTUNA_SAMPLERS:
        raise UserError(f"--vectorised needs to know all trials beforehand: leave --search={flags.search} out")


def sweep_folder(flags: Namespace, source: ConfigSource, goal: TrialGoal) -> Path:
    """The sweep's folder, created and marked. UserError for a folder of something else."""
    root = Path(flags.workdir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        own = {WORKERS_DIR, TRIALS_DIR, SWEEP_FILE + TEMPORARY_SUFFIX}  # of a worker that starts at the same moment
        foreign = {entry.name for entry in root.iterdir()} - own
        if foreign and not (root / SWEEP_FILE).exists():
            raise UserError(
                f"{root} is not a sweep's folder: it holds {min(foreign)} but no {SWEEP_FILE}; give another --workdir"
            )
        for name in (TRIALS_DIR, WORKERS_DIR):
            (root / name).mkdir(exist_ok=True)
        with locked_queue(root):
            if not (root / SWEEP_FILE).exists():
                write_text(root / SWEEP_FILE, json.dumps({**goal._asdict(), "name": flags.config}, indent=2) + "\n")
                write_text(root / CONFIG_FILE, json.dumps(to_dict(source.config({})), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot make the folder {root}: {error.strerror}; give another --workdir") from error
    return root


def open_study(flags: Namespace, root: Path, goal: TrialGoal) -> Study:
    url = flags.storage or f"sqlite:///{(root / 'study.db').resolve()}"
    name = flags.study or root.resolve().name
    sampler = flags.search if flags.search in OPTUNA_SAMPLERS else "random"
    return Study(
        root, url, name, direction=goal.direction, sampler=sampler, pruner=flags.pruner, steps=goal.steps, seed=0
    )


def sweep_plan(flags: Namespace, source: ConfigSource, goal: TrialGoal, space: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that must be the same for all who join, except the trials: more of them may be added."""
    return {
        "config": to_dict(source.config({})),
        "metric": goal.metric,
        "direction": goal.direction,
        "pruner": flags.pruner,
        "search": flags.search or "",
        "space": {key: str(distribution) for key, distribution in space.items()},
    }


def run_trials(
    study: Study,
    source: ConfigSource,
    goal: TrialGoal,
    root: Path,
    space: Mapping[str, Any],
    devices: Sequence[dict],
    board: TrialBoard,
) -> None:
    """Runs waiting trials, one on each share of the devices, until none waits. If stopped, it releases its trials."""
    running: dict[int, TrialProcess] = {}
    with on_sigterm() as stopping, board:
        try:
            while True:
                for slot in sorted(set(range(len(devices))) - set(running)):
                    claim = study.claim(space)
                    if claim is None:
                        break
                    running[slot] = TrialProcess(claim, source, goal, root, devices[slot])
                board.update()
                if not running:
                    return
                time.sleep(POLL_SECONDS)
                for slot in [slot for slot, each in running.items() if each.poll()]:
                    del running[slot]
                    board.update(now=True)
                if stopping():
                    raise SigtermExit
        finally:
            for each in running.values():
                each.stop_and_release()


def launch_workers(flags: Namespace, argv: Sequence[str], root: Path) -> Callable[[], int]:
    """Starts workers elsewhere, each with this command without the options of the launcher."""
    if not flags.storage:
        warn("--launcher without --storage: SQLite on a network disk is not safe; name a PostgreSQL URL")
    options = dict(option.partition("=")[::2] for option in flags.options)
    own, dropped = [], False
    for argument in argv:
        if argument.startswith("--"):
            dropped = argument.split("=")[0] in ("--launcher", "--workers", "--options", "--retry_failed")
        if not dropped:
            own.append(argument)
    say(f"{flags.workers} workers by {flags.launcher}: python -m lm sweep {shlex.join(own)}")
    return LAUNCHERS[flags.launcher](own, flags.workers, root, options)


def watch_workers(running_count: Callable[[], int], board: TrialBoard) -> None:
    """Shows the study until every worker is over."""
    with board:
        while running_count():
            board.update()
            time.sleep(POLL_SECONDS)
        board.update(now=True)


def print_plan(trials: Sequence[Trial], space: Mapping[str, Any]) -> None:
    """Prints the trials that would run."""
    if space:
        print_table(
            f"{len(trials)} trials to draw",
            ["", "from"],
            [[key, str(distribution)] for key, distribution in space.items()],
        )
        return
    keys = swept_keys(trials, space)
    print_table(
        f"{len(trials)} trials",
        ["trial", "seed", *keys],
        [[trial.number, *trial.seeds, *(trial.overrides.get(key, "") for key in keys)] for trial in trials],
    )


def swept_keys(trials: Sequence[Trial], space: Mapping[str, Any]) -> list[str]:
    """The keys that differ from trial to trial."""
    return list(space or dict.fromkeys(key for trial in trials for key in trial.overrides))


def print_trials(trials: Sequence[TrialStatus], goal: TrialGoal, root: Path, keys: Sequence[str]) -> None:
    """The trials, the best first; those that failed with their errors."""
    sign = 1 if goal.direction == MINIMIZE else -1
    done = [one for one in trials if one.state == "complete"]
    best, rest = sorted(done, key=lambda one: sign * one.value), [one for one in trials if one not in done]
    say(f"\n{state_counts_text(trials)}; {goal.metric}, {'low' if goal.direction == 'minimize' else 'high'} is good")
    print_table("", *trial_table([*best, *rest], keys))
    for one in trials:
        if one.state == "failed":
            say(f"trial {one.number} failed: {one.error}")
    means = {overrides_text(one.overrides): mean_value(done, one.overrides) for one in best}
    if means:
        name, value = min(means.items(), key=lambda item: sign * item[1])
        say(f"best on average: {name}: {goal.metric} {value:.4g}")
    say(f"runs: {root / TRIALS_DIR}\ncompare: python -m lm compare {root}")


def mean_value(trials: Sequence[TrialStatus], overrides: Mapping[str, str]) -> float:
    return statistics.mean(one.value for one in trials if one.overrides == overrides)


if __name__ == "__main__":
    run_program(program)

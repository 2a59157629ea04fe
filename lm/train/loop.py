"""Trains one stage: tokenizer, pretraining, SFT, reward model, DPO, PPO and others.

    python -m lm train --config=experiments/pretrain.py --workdir=runs/pretrain
    python -m lm train --config=experiments/pretrain.py --workdir=runs/pretrain --config.optimizer.learning_rate=1e-3

The same command continues an interrupted run from its last checkpoint. --log=wandb,mlflow sends metrics there too;
--profile=10:13 traces the steps from 10 to 13, counted as in metrics.jsonl, into WORKDIR/profile, for ui.perfetto.dev.

Every subtree of the config is the keyword arguments of one function (lm.train.config lists them), and each of them may
be set, whether the config file has it or not. --config=FILE --help lists them all.
"""

import bisect
import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lm.core.config import call_with_options, flags_and_config, require_entries, to_dict
from lm.core.errors import UserError, check_at_least
from lm.core.imports import own_code_files
from lm.core.metrics import Metrics, metric_sum
from lm.core.options import option_value
from lm.core.sharding import put_batch
from lm.core.types import Tokens, TrainState
from lm.optim.combinators import inference_state
from lm.optim.ema import averaged_params
from lm.report import run
from lm.runs import metadata, profiler
from lm.runs.checkpoint import Checkpoints
from lm.runs.console import MetricWriters, Progress, SigtermExit, print_table, run_program, say, warn
from lm.runs.logger import MetricsLogger
from lm.runs.summary import run_summary
from lm.runs.timing import PhaseTimer
from lm.runs.trackers import open_trackers, tracker_packages
from lm.runs.workdir import PROFILE_DIR, Workdir, open_workdir, read_metrics
from lm.stages import named_stage
from lm.stages.context import Batches
from lm.train.config import CONFIG_KEYS, TrainingSchedule, train_functions
from lm.train.host import SINGLE_RUN_HOST, RunHost
from lm.train.over_optimization import OverOptimization, best_rated_step, check_watched_rating, over_optimization
from lm.train.resume import checkpoint_tree, restored_state
from lm.train.setup import TrainingSetup, training_setup
from lm.train.source_metrics import source_metrics

FLAGS = {
    "workdir": dict(required=True, metavar="DIR", help="the run's own folder; the same command continues it"),
    "log": dict(default="", metavar="NAMES", help="wandb, mlflow or both, with a comma: where metrics go too"),
    "profile": dict(default="", metavar="FIRST:LAST", help="the steps to trace into WORKDIR/profile"),
}


def train_stage(
    config: ConfigDict, path: str | Path, *, log: str = "", profile: str = "", host: RunHost = SINGLE_RUN_HOST
) -> dict[str, Any]:
    """Trains one stage in its workdir, or continues it, and returns the summary that it leaves there.

    log: trackers, as --log names them. profile: a range of steps, as --profile does.
    """
    check_training_config(config)
    name = config.stage.name
    packages, traced = tracker_packages(log), profiler.profile_steps(profile) if profile else range(0)
    if name == "tokenizer" and (packages or traced):
        raise UserError("stage tokenizer takes no steps: leave --log and --profile out")
    # A schedule may be stretched with the run: the change is named, as any is.
    with open_workdir(path, to_dict(config), changeable_keys=("train", "mesh", "optimizer.total_steps")) as workdir:
        for difference in workdir.config_changes:
            say(f"{path}: config changed since the last start: {difference}")
        summary = workdir.read_summary()
        if summary is None or has_steps_left(config, summary):
            if name != "tokenizer":
                summary = run_training_loop(config, workdir, packages=packages, traced=traced, host=host)
            else:
                metadata.record_start(workdir.path, seed=config.seed)
                summary = call_with_options(train_functions(config)["data"].function, config.data, workdir, name="data")
            workdir.write_summary(summary)
            run.write_run_page(workdir.path)
        else:
            if run.is_outdated(workdir.path):  # a kill came between the summary and the page
                run.write_run_page(workdir.path)
            if packages or traced:
                say(f"{path} has finished: there is nothing to log or to trace")
        print_stage_summary(name, summary)
        return summary


def has_steps_left(config: ConfigDict, summary: Mapping[str, Any]) -> bool:
    """Whether the config asks a finished run for more steps. One that its gauge stopped is done while it has one."""
    if "train" not in config or summary["steps"] >= config.train.steps:
        return False
    return "over_optimization" not in summary or not option_value(
        train_functions(config)["train"], config.train, "watched_rating"
    )


def check_training_config(config: ConfigDict) -> None:
    """UserError unless it is a config of lm train."""
    if "stage" not in config or "name" not in config.stage:
        raise UserError(
            "the config has no stage.name: is it a config of lm train? (lm pipeline runs experiments/quickstart.py)"
        )
    name = config.stage.name
    if name != "tokenizer":
        named_stage(name)
    require_entries(config, ("seed", "stage", "data") if name == "tokenizer" else CONFIG_KEYS, "lm train")
    check_at_least(0, "config", seed=config.seed)


def print_stage_summary(title: str, summary: Mapping[str, Any]) -> None:
    """The results of a stage, as a table."""
    flat = {
        **{f"held-out {k}": v for k, v in summary.get("held_out", {}).items()},
        **{k: summary[k] for k in ("bytes_per_token", "tokens", "seconds") if k in summary},
    }
    start = summary.get("before", {})
    rows = [[name, start.get(name.removeprefix("held-out "), ""), value] for name, value in flat.items()]
    print_table(title, ["", "before", "after"], [[n, f"{b:.4g}" if b != "" else "", f"{v:.4g}"] for n, b, v in rows])
    if "over_optimization" in summary:
        say(f"{title}: {summary['over_optimization']['message']}")


def run_training_loop(
    config: ConfigDict, workdir: Workdir, *, packages: Mapping[str, Any], traced: range, host: RunHost
) -> dict[str, Any]:
    """The loop. Batch i depends on (seed, i) and, where it is sampled, on the state, so nothing else is remembered.

    packages: of the trackers (lm.runs.trackers.tracker_packages). traced: steps to profile. host: the process that runs
    the loop.
    """
    schedule = call_with_options(train_functions(config)["train"].function, config.train, name="train")
    name, phases = config.stage.name, PhaseTimer()
    with Progress(name, schedule.steps) as progress:
        r = training_setup(config, workdir, phases, host)
        print_dataset_info(name, r.batches)
        start = metadata.record_start(workdir.path, seed=config.seed, own_files=own_code_files(to_dict(config)))
        best_step = lambda: best_rated_step(read_metrics(workdir.metrics_path), schedule.watched_rating)
        pinned = best_step if schedule.watched_rating else lambda: None
        with (
            Checkpoints(workdir.checkpoints_path, keep=schedule.keep, pinned=pinned, warn=warn) as checkpoints,
            jax.set_mesh(r.mesh),
        ):
            with host.checkpoint_turn(checkpoints):
                done, state = restored_state(checkpoints, r)
            first = done + 1 if done else 0  # the row to write next: a fresh start is scored before its first step
            workdir.truncate_after(first - 1)
            if done:
                say(f"{name}: continues from step {done} of {workdir.path}")
            step, evaluate = compiled_steps(r, host)
            trackers = open_trackers(packages, workdir.path, to_dict(config))
            with (
                host.stop_signal() as is_stopping,
                MetricWriters(workdir.path, purge_step=first, trackers=trackers) as writers,
                profiler.StepProfiler(traced, workdir.path / PROFILE_DIR) as profile,
            ):
                log = MetricsLogger(r.stage, workdir, writers, progress, phases)
                stage_run = StageRun(name, r, schedule, workdir, host, checkpoints, log, step, evaluate)
                stopped = score_start(stage_run, state, done)
                if not stopped:
                    stopped = take_steps(stage_run, state, done, profile, is_stopping)
                with phases("save"):
                    checkpoints.wait()
                    if stopped:
                        checkpoints.remove_after(stopped.best_step)
                if is_stopping():
                    raise SigtermExit
    return stage_summary(config, r, workdir, log.seconds_by_phase(), start["peak"]["flops_per_second"], stopped)


class StageRun(NamedTuple):
    """What the loop works with while a stage runs."""

    name: str  # of the stage
    setup: TrainingSetup
    schedule: TrainingSchedule
    workdir: Workdir
    host: RunHost
    checkpoints: Checkpoints
    log: MetricsLogger
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]  # compiled; it donates the state
    evaluate: Callable[[TrainState, Any], Metrics]  # compiled

    def save(self, step: int, state: TrainState) -> None:
        with self.setup.phases("save"), self.host.checkpoint_turn(self.checkpoints):
            tree = self.host.materialize(checkpoint_tree(state))
            self.checkpoints.save(step, tree, self.setup.checkpoint_metadata)

    def append_rollouts(self, step: int, state: TrainState, batch: Any) -> None:
        """Rows of the batch of this step for people to read, where it was sampled and the step is to be saved."""
        count, table = self.schedule.logged_rollouts, self.setup.batches.rollout_table
        if table and count and ((step - 1) % self.schedule.save_every == 0 or step == self.schedule.steps):
            with self.setup.phases("save"):
                self.workdir.append_rollouts(step, table(inference_state(state), batch, count))


def score_start(stage_run: StageRun, state: TrainState, done: int) -> OverOptimization | None:
    """Scores a fresh start, or a saved state whose evaluation was interrupted. What speaks for stopping at once, of
    what was logged before a kill came."""
    schedule = stage_run.schedule
    if not done and schedule.watched_rating:
        stage_run.save(0, state)  # the start may turn out to be the best
    if not stage_run.log.has_held_out_scores and schedule.scores(done):
        scores = held_out_metrics(stage_run.setup, stage_run.evaluate, state)
        stage_run.log.write_row(done, scores)
        if not done:
            check_start_metrics(stage_run.setup, scores)
    if not schedule.watched_rating:
        return None
    check_watched_rating(read_metrics(stage_run.workdir.metrics_path), schedule.watched_rating, stage_run.name)
    return found_over_optimization(schedule, stage_run.workdir)


def take_steps(
    stage_run: StageRun, state: TrainState, done: int, profile: profiler.StepProfiler, is_stopping: Callable[[], bool]
) -> OverOptimization | None:
    """The steps from `done` to the last, or to a signal to stop, or to over-optimization, which is returned."""
    phases, schedule = stage_run.setup.phases, stage_run.schedule
    for i in range(done, schedule.steps):
        profile.begin_step(i + 1)
        batch, tokens = device_batch(stage_run.setup, state, i)
        stage_run.append_rollouts(i + 1, state, batch)
        with phases("update"):
            state, metrics = stage_run.step(state, batch)
        profile.end_step(i + 1, metrics)
        stage_run.log.add_step(i + 1, metrics, tokens)
        stop = is_stopping()
        is_saved = schedule.saves(i + 1) or stop
        if (i + 1) % schedule.log_every == 0 or is_saved:
            stage_run.log.flush()
        if is_saved:
            stage_run.save(i + 1, state)
        if stop:
            return None
        if schedule.scores(i + 1):
            with phases("save"):
                stage_run.checkpoints.wait()  # a kill in the evaluation must not cost the steps before it
            stage_run.log.write_row(i + 1, held_out_metrics(stage_run.setup, stage_run.evaluate, state))
            if stopped := found_over_optimization(schedule, stage_run.workdir):
                return stopped
    return None


def found_over_optimization(schedule: TrainingSchedule, workdir: Workdir) -> OverOptimization | None:
    """What speaks for stopping now, of what was logged; it is told. None while all is well."""
    if not schedule.watched_rating:
        return None
    rows = read_metrics(workdir.metrics_path)
    verdict = over_optimization(rows, schedule.watched_rating, errors=schedule.watched_errors)
    if verdict:
        warn(f"{workdir.path}: {verdict.message}")
    return verdict


def compiled_steps(r: TrainingSetup, host: RunHost) -> tuple[Callable, Callable]:
    """The compiled (state, batch) -> (state, metrics) and -> metrics."""

    def update(scalars, state, batch):
        return r.build_update(scalars).update(state, batch)

    def evaluate(scalars, state, batch):
        return r.build_update(scalars).evaluate(state, batch)

    step = host.jit(update, donate_argnums=1, out_shardings=(r.shardings, None))
    scalars = dict(host.traced_scalars)
    return functools.partial(step, scalars), functools.partial(host.jit(evaluate), scalars)


def print_dataset_info(name: str, batches: Batches) -> None:
    """One line: what a stage has prepared, and the rule for what does not fit a row."""
    about = batches.dataset_info.items()
    numbers = ", ".join(f"{key} {n:,.4g}" if isinstance(n, float) else f"{key} {n:,}" for key, n in about)
    say(f"{name}: {numbers}{f'; {batches.truncation}' if batches.truncation else ''}")


def device_batch(r: TrainingSetup, state: TrainState, i: int):
    """Batch i on the devices, and how many real tokens it holds."""
    with r.phases("data"):
        batch = r.batches.train(inference_state(state), i)
        rows = jax.tree.leaves(batch, is_leaf=lambda x: isinstance(x, Tokens))
        tokens = sum(int(np.sum(np.asarray(x.segments) > 0)) for x in rows if isinstance(x, Tokens))
        return put_batch(batch, r.mesh), tokens


def held_out_metrics(r: TrainingSetup, evaluate, state: TrainState) -> dict[str, float]:
    """The stage's summary of its metrics over every held-out batch, as "held_out/NAME"; of averaged weights, if any.

    With several sources, each source and each kind has the metrics that the stage shows, too: "loss/SOURCE".
    """
    with r.phases("update"):
        jax.block_until_ready(state.params)  # steps that still run are not the evaluation's time
    state = state.replace(params=averaged_params(state.opt_state) or state.params)
    parts = r.batches.held_out_parts
    ends = list(itertools.accumulate(part.batches for part in parts))
    totals: dict[int, Metrics] = {}  # by part; all in the first where there are none
    with r.phases("eval"):
        for number, batch in enumerate(r.batches.held_out(inference_state(state))):
            metrics = jax.device_get(dict(evaluate(state, put_batch(batch, r.mesh))))
            part = bisect.bisect_right(ends, number)
            totals[part] = metric_sum(totals[part], metrics) if part in totals else metrics
    if not totals:
        raise UserError(
            f"{r.checkpoint_metadata['stage']}: the held-out side holds no whole batch: "
            "raise data.held_out, or lower the batch"
        )
    scores = {
        **r.stage.summary(functools.reduce(metric_sum, totals.values()), r.batches.dataset_info),
        **source_metrics(r.stage, r.batches.dataset_info, [(part, totals[i]) for i, part in enumerate(parts)]),
    }
    return {f"held_out/{name}": value for name, value in scores.items()}


def check_start_metrics(r: TrainingSetup, before: Mapping[str, float]) -> None:
    """UserError unless the held-out metrics `before` the first step have the values of stage.start_metrics.

    A policy that is still its own reference has ratio 1 and KL 0, and the loss of preferences is log 2.
    """
    for name, (value, tolerance) in r.stage.start_metrics.items():
        measured = before[f"held_out/{name}"]
        if not abs(measured - value) <= tolerance:
            raise UserError(
                f"{r.checkpoint_metadata['stage']}: held-out {name} is {measured:.4g} before the first step; "
                f"it must be {value:.4g} "
                f"within {tolerance}: policy and reference, or sampler and trainer, are not the same distribution "
                f"(see start_metrics in {r.stage.path})"
            )


def stage_summary(
    config: ConfigDict,
    r: TrainingSetup,
    workdir: Workdir,
    seconds: Mapping[str, float],
    peak: float | None,
    stopped: OverOptimization | None,
) -> dict[str, Any]:
    """What a finished stage leaves behind: held-out scores before and after, size, tokens, FLOPs, seconds.

    stopped: why it ended before its last step; then the scores after are those of the best one.
    """
    return {
        "stage": config.stage.name,
        "parameters": r.parameters,
        **run_summary(
            read_metrics(workdir.metrics_path),
            flops_per_token=r.flops_per_token,
            seconds=seconds,
            peak=peak,
            result_step=stopped.best_step if stopped else None,
        ),
        **({"over_optimization": {**stopped._asdict(), "message": stopped.message}} if stopped else {}),
        "about": dict(r.batches.dataset_info),
        "fingerprint": r.checkpoint_metadata["fingerprint"],
    }


def program(argv: list[str]) -> None:
    flags, config = flags_and_config(argv, __doc__, FLAGS, train_functions)
    train_stage(config, flags.workdir, log=flags.log, profile=flags.profile)


if __name__ == "__main__":
    run_program(program)

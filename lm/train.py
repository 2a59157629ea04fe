"""The one loop: a config, a stage's Update, batches as a function of the step, and a workdir that outlives any kill.

    python -m lm.train --config=experiments/pretrain.py --workdir=runs/pretrain --config.optimizer.learning_rate=1e-3

Give the same command again to continue. --log=wandb,mlflow sends metrics there too; --profile=10:13 traces the steps
from 10 to 13, counted as in metrics.jsonl, into WORKDIR/profile, for ui.perfetto.dev.

Every subtree of the config is the keyword arguments of one function (lm.train_config says of which), and each of them
may be set, whether the config file lists it or not. --config=FILE --help lists them all.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lm import metrics as means, optim, record, runpage, trace, trackers as tracking
from lm.checkpoint import Checkpoints
from lm.config import arguments, call, require, to_dict
from lm.console import Interrupted, Progress, Writers, main, say, table, warn
from lm.data.batches import stop_unless_cut
from lm.errors import UserError, at_least
from lm.host import ALONE, Host
from lm.inherited import agreed_shape, agreed_tokenizer, base_of, dated, inherited_params, reward_from, teacher_from
from lm.log import Log
from lm.model import Config, Model, lora, make
from lm.model.params import count, flops_per_token, specs
from lm.options import setting
from lm.phases import Phases
from lm.sharding import put_batch, state_shardings
from lm.stages import STAGES, TAUGHT
from lm.stages.context import Batches, Context
from lm.summary import summed_up
from lm.train_config import ENTRIES, stop_unless_equal, subtrees
from lm.types import Tokens, TrainState
from lm.update import Update, seen
from lm.workdir import PROFILE, Trained, Workdir, load, open_workdir, read_metrics

FLAGS = {
    "workdir": dict(required=True, metavar="DIR", help="the run's own folder; the same command continues it"),
    "log": dict(default="", metavar="NAMES", help="wandb, mlflow or both, with a comma: where metrics go too"),
    "profile": dict(default="", metavar="FIRST:LAST", help="the steps to trace into WORKDIR/profile"),
}


# The stage's update, with some of the config's numbers, by dotted key, replaced by others.
Build = Callable[[Mapping[str, Any]], Update]


class Run(NamedTuple):
    """Everything the loop works with, put together from a config."""

    stage: Any  # the module
    build: Build
    batches: Batches
    mesh: jax.sharding.Mesh
    shardings: Any  # of the TrainState
    state: TrainState  # as it starts: resuming replaces all of it but the frozen networks
    meta: Mapping[str, Any]  # what a checkpoint says of itself
    flops_per_token: float  # model FLOPs of learning from one token of a batch; sampling and scoring not counted
    phases: Phases


def run(
    config: ConfigDict, path: str | Path, *, log: str = "", profile: str = "", host: Host = ALONE
) -> dict[str, Any]:
    """Trains one stage in its workdir, or takes up where it stopped, and returns the summary it leaves there.

    log: trackers, as --log names them. profile: a range of steps, as --profile does.
    """
    if "stage" not in config or "name" not in config.stage:
        raise UserError(
            "the config has no stage.name: is it a config of lm.train? (lm.pipeline runs experiments/quickstart.py)"
        )
    name = config.stage.name
    if name not in ("tokenizer", *STAGES):
        raise UserError(f"stage.name is {name!r}; choose one of tokenizer, {', '.join(STAGES)}")
    require(config, ("seed", "stage", "data") if name == "tokenizer" else ENTRIES, "lm.train")
    at_least(0, "config", seed=config.seed)
    packages, traced = tracking.named(log), trace.steps(profile) if profile else range(0)
    if name == "tokenizer" and (packages or traced):
        raise UserError("stage tokenizer takes no steps: leave --log and --profile out")
    # A schedule may be stretched with the run: the change is named, as any is.
    with open_workdir(path, to_dict(config), harmless=("train", "mesh", "optimizer.total_steps")) as workdir:
        for difference in workdir.differences:
            say(f"{path}: config changed since the last start: {difference}")
        summary = workdir.summary()
        if summary is None or "train" in config and summary["steps"] < config.train.steps:
            if name in STAGES:
                summary = train(config, workdir, packages=packages, traced=traced, host=host)
            else:
                record.note(workdir.path, seed=config.seed)
                summary = call(subtrees(config)["data"].function, config.data, workdir, name="data")
            workdir.write_summary(summary)
            runpage.write(workdir.path)
        else:
            if runpage.is_outdated(workdir.path):  # a kill came between the summary and the page
                runpage.write(workdir.path)
            if packages or traced:
                say(f"{path} has finished: there is nothing to log or to trace")
        report(name, summary)
        return summary


def report(title: str, summary: Mapping[str, Any]) -> None:
    """What a stage came to, as a table."""
    flat = {
        **{f"held-out {k}": v for k, v in summary.get("held_out", {}).items()},
        **{k: summary[k] for k in ("bytes_per_token", "tokens", "seconds") if k in summary},
    }
    start = summary.get("before", {})
    rows = [[name, start.get(name.removeprefix("held-out "), ""), value] for name, value in flat.items()]
    table(title, ["", "before", "after"], [[n, f"{b:.4g}" if b != "" else "", f"{v:.4g}"] for n, b, v in rows])


def prepare(config: ConfigDict, workdir: Workdir, phases: Phases, host: Host) -> Run:
    """From a config to a Run: tokenizer, model, optimizer, stage, batches, mesh, starting state."""
    name, backend, functions = config.stage.name, jax.default_backend(), subtrees(config)
    stop_unless_equal(config, functions)
    start = host.once(
        config.init_from, lambda: load(config.init_from, backend=backend, warn=warn) if config.init_from else None
    )
    tokenizer = dated(agreed_tokenizer(config.tokenizer, start), workdir)
    shape = agreed_shape(config, tokenizer, start)
    model = make(shape.on(backend))

    teachers = {}
    if name in TAUGHT and "teacher" in config.stage:
        teachers["teacher"] = teacher_from(config.stage.teacher, tokenizer)
    build = functools.partial(built, config, model, teachers)
    build(host.scalars)  # what it refuses is told before the data are read

    def lent(paths, pessimism, longest):
        made = lambda: reward_from(paths, tokenizer, pessimism, longest=longest, jit=host.jit)
        return host.once((paths, pessimism, longest), made)

    context = Context(model, tokenizer, config.seed, host.jit, lent, phases if host.timed else nullcontext)
    data = json.dumps([config.seed, to_dict(config.data)])
    with phases("data"):
        batches = host.once(data, lambda: call(functions["data"].function, config.data, context, name="data"))
    if "ramp" in config.data and "microbatches" in config.stage:
        stop_unless_cut(config.data.ramp, config.stage.microbatches)

    mesh = call(host.mesh or functions["mesh"].function, config.mesh, name="mesh")
    params, base = inherited_params(start, config), {}
    if shape.lora_rank:
        base = base_of(shape, params.pop("lm"), workdir, host.turn)
    state, shardings = initial_state(build, model, config.seed, params, base, teachers, mesh, host)
    meta = {"stage": name, "fingerprint": tokenizer.fingerprint, "model": dataclasses.asdict(shape)}
    passes = setting(functions["stage"], config.stage, "epochs", 1)  # over each batch
    flops = passes * flops_per_token(model.config, batches.about["length"])
    return Run(STAGES[name], build, batches, mesh, shardings, state, meta, flops, phases)


def built(config: ConfigDict, model: Model, teachers: Mapping[str, Trained], scalars: Mapping[str, Any]) -> Update:
    """The stage's update with the config's optimizer; `scalars`, by dotted key, in the place of its own numbers."""

    def options(subtree: str) -> dict[str, Any]:
        own = {key.removeprefix(f"{subtree}."): v for key, v in scalars.items() if key.startswith(f"{subtree}.")}
        return {**config[subtree].to_dict(), **own}

    functions = subtrees(config)
    optimizer = call(functions["optimizer"].function, options("optimizer"), name="optimizer")
    networks = {name: teacher.model for name, teacher in teachers.items()}
    stage = {key: value for key, value in {**options("stage"), **networks}.items() if key != "name"}
    return call(functions["stage"].function, stage, model, optimizer, name="stage")


def initial_state(
    build: Build, model: Model, seed: int, params, base, teachers: Mapping[str, Trained], mesh, host: Host
) -> tuple[TrainState, Any]:
    """The starting state, each leaf created where its sharding wants it, and those shardings.

    params: what is inherited; the decoder is drawn where it is not among them. `base`, if there is one, and `teachers`
    go to state.frozen; teachers may be of another shape than the model.
    """
    init_key, key = jax.random.split(jax.random.key(seed))

    def init(scalars, init_key, key, params, frozen):
        return build(scalars).init(key, params if "lm" in params else {"lm": model.init(init_key), **params}, frozen)

    given = (
        dict(host.scalars),
        init_key,
        key,
        params,
        {name: teacher.params["lm"] for name, teacher in teachers.items()} | ({lora.BASE: base} if base else {}),
    )
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(init, *given)
        shardings = state_shardings(mesh, shapes, model.axes)
        theirs = {
            name: state_shardings(mesh, shapes.frozen[name], teacher.model.axes) for name, teacher in teachers.items()
        }
        shardings = shardings.replace(frozen={**shardings.frozen, **theirs})
        return host.jit(init, out_shardings=shardings)(*given), shardings


def train(
    config: ConfigDict, workdir: Workdir, *, packages: Mapping[str, Any], traced: range, host: Host
) -> dict[str, Any]:
    """The loop. Batch i depends on (seed, i) and, where it is sampled, on the state: no more need be remembered.

    packages: of the trackers (lm.trackers.named). traced: steps to profile. host: the process that it runs in.
    """
    schedule, phases = call(subtrees(config)["train"].function, config.train, name="train"), Phases()
    with Progress(config.stage.name, schedule.steps) as progress:
        r = prepare(config, workdir, phases, host)
        introduce(config.stage.name, r.batches.about)
        start = record.note(workdir.path, seed=config.seed)
        with Checkpoints(workdir.checkpoints, keep=schedule.keep, warn=warn) as checkpoints, jax.set_mesh(r.mesh):
            with host.turn(checkpoints):
                done, state = resumed(checkpoints, r)
            first = done + 1 if done else 0  # the row to write next: a fresh start is scored before its first step
            workdir.truncate(first - 1)
            if done:
                say(f"{config.stage.name}: continues from step {done} of {workdir.path}")
            step, evaluate = programs(r, host)
            trackers = tracking.opened(packages, workdir.path, to_dict(config))
            with (
                host.stopping() as stopping,
                Writers(workdir.path, purge_step=first, trackers=trackers) as writers,
                trace.Trace(traced, workdir.path / PROFILE) as profile,
            ):
                log = Log(r.stage, workdir, writers, progress, phases)
                if not log.scored and schedule.scores(done):  # after a kill in the evaluation of a saved state, too
                    scores = held_out(r, evaluate, state)
                    log.write(done, scores)
                    if not done:
                        stop_unless_fresh(r, scores)
                for i in range(done, schedule.steps):
                    profile.begin(i + 1)
                    batch, tokens = fetched(r, state, i)
                    if r.batches.table and (i % schedule.save_every == 0 or i + 1 == schedule.steps):
                        with phases("save"):
                            workdir.append_rollouts(i + 1, r.batches.table(seen(state), batch, schedule.samples))
                    with phases("update"):
                        state, metrics = step(state, batch)
                    profile.end(i + 1, metrics)
                    log.note(i + 1, metrics, tokens)
                    stop = stopping()
                    due = (i + 1) % schedule.save_every == 0 or i + 1 == schedule.steps or stop
                    if (i + 1) % schedule.log_every == 0 or due:
                        log.flush()
                    if due:
                        with phases("save"), host.turn(checkpoints):
                            checkpoints.save(i + 1, host.real(saved(state)), r.meta)
                    if stop:
                        break
                    if schedule.scores(i + 1):
                        with phases("save"):
                            checkpoints.wait()  # a kill in the evaluation must not cost the steps before it
                        log.write(i + 1, held_out(r, evaluate, state))
                with phases("save"):
                    checkpoints.wait()
                if stopping():
                    raise Interrupted
    return summary_of(config, r, workdir, log.seconds(), start["peak"]["flops_per_second"])


def programs(r: Run, host: Host) -> tuple[Callable, Callable]:
    """The compiled (state, batch) -> (state, metrics) and -> metrics."""

    def update(scalars, state, batch):
        return r.build(scalars).update(state, batch)

    def evaluate(scalars, state, batch):
        return r.build(scalars).evaluate(state, batch)

    step = host.jit(update, donate_argnums=1, out_shardings=(r.shardings, None))
    given = dict(host.scalars)
    return functools.partial(step, given), functools.partial(host.jit(evaluate), given)


def introduce(name: str, about: Mapping[str, Any]) -> None:
    """One line: what a stage has prepared."""
    numbers = (f"{key} {n:,.4g}" if isinstance(n, float) else f"{key} {n:,}" for key, n in about.items())
    say(f"{name}: {', '.join(numbers)}")


def fetched(r: Run, state: TrainState, i: int):
    """Batch i on the devices, and how many real tokens it holds."""
    with r.phases("data"):
        batch = r.batches.train(seen(state), i)
        rows = jax.tree.leaves(batch, is_leaf=lambda x: isinstance(x, Tokens))
        tokens = sum(int(np.sum(np.asarray(x.segments) > 0)) for x in rows if isinstance(x, Tokens))
        return put_batch(batch, r.mesh), tokens


def held_out(r: Run, evaluate, state: TrainState) -> dict[str, float]:
    """The stage's summary of its metrics over every held-out batch, as "held_out/NAME"; of averaged weights, if any."""
    with r.phases("update"):
        jax.block_until_ready(state.params)  # what the devices still have to do is not the evaluation's
    state = state.replace(params=optim.average(state.opt_state) or state.params)
    total = None
    with r.phases("eval"):
        for batch in r.batches.held_out(seen(state)):
            found = jax.device_get(dict(evaluate(state, put_batch(batch, r.mesh))))
            total = found if total is None else means.add(total, found)
    if total is None:
        raise UserError(
            f"{r.meta['stage']}: the held-out side holds no whole batch: raise data.held_out, or lower the batch"
        )
    return {f"held_out/{name}": value for name, value in r.stage.summary(total, r.batches.about).items()}


def stop_unless_fresh(r: Run, before: Mapping[str, float]) -> None:
    """UserError unless the held-out metrics `before` the first step are what stage.START says they must be: a policy
    that is still its own reference has ratio 1 and no KL, and preferences cost log 2."""
    for name, (value, tolerance) in r.stage.START.items():
        found = before[f"held_out/{name}"]
        if not abs(found - value) <= tolerance:
            raise UserError(
                f"{r.meta['stage']}: held-out {name} is {found:.4g} before the first step; it must be {value:.4g} "
                f"within {tolerance}: policy and reference, or sampler and trainer, are not the same distribution "
                f"(see START in lm/stages/{r.meta['stage']}.py)"
            )


def saved(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds: all but the frozen networks, which every start builds again.

    "params" is for whoever loads the run: averaged weights where there are any; then "live" are those being trained.
    """
    average = optim.average(state.opt_state)
    return {
        "params": average or state.params,
        "live": state.params if average else {},
        "opt_state": optim.with_average(state.opt_state, {}),
        "counts": {"step": state.step, "key": state.key},
        "memory": state.memory,
    }


def resumed(checkpoints: Checkpoints, r: Run) -> tuple[int, TrainState]:
    """(batches done, state) of the newest whole checkpoint, or (0, the starting state)."""
    found = checkpoints.restore(saved(r.state))
    if found is None:
        return 0, r.state
    done, tree, meta = found
    if meta["fingerprint"] != r.meta["fingerprint"]:
        raise UserError(
            f"{checkpoints.directory} was trained with tokenizer and template {meta['fingerprint'][:8]}, but "
            f"this run has {r.meta['fingerprint'][:8]}: give another --workdir, or remove this one"
        )
    opt_state = optim.with_average(tree["opt_state"], tree["params"])
    params = tree["live"] or tree["params"]
    return done, r.state.replace(params=params, opt_state=opt_state, memory=tree["memory"], **tree["counts"])


def summary_of(
    config: ConfigDict, r: Run, workdir: Workdir, seconds: Mapping[str, float], peak: float | None
) -> dict[str, Any]:
    """What a finished stage leaves behind: held-out scores before and after, size, tokens, FLOPs, seconds."""
    return {
        "stage": config.stage.name,
        "parameters": count(specs(Config(**r.meta["model"]))),
        **summed_up(read_metrics(workdir.metrics), flops_per_token=r.flops_per_token, seconds=seconds, peak=peak),
        "about": dict(r.batches.about),
        "fingerprint": r.meta["fingerprint"],
    }


def program(argv: list[str]) -> None:
    flags, config = arguments(argv, __doc__, FLAGS, subtrees)
    run(config, flags.workdir, log=flags.log, profile=flags.profile)


if __name__ == "__main__":
    main(program)

"""The one loop: a config, a stage's Update, batches as a function of the step, and a workdir that outlives any kill.

    python -m lm.train --config=experiments/pretrain.py --workdir=runs/pretrain --config.optimizer.learning_rate=1e-3

Give the same command again to continue. Every subtree of the config is the keyword arguments of one function:
model (lm.model.Config), optimizer (lm.optim.make), stage (make of lm.stages.NAME), data (batches of the same),
mesh (lm.sharding.make_mesh) and train (`Schedule` here).
"""

import dataclasses
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lm import metrics as means, optim, tokenizer as tokenizers
from lm.checkpoint import Checkpoints
from lm.config import arguments, call, require, to_dict
from lm.console import Interrupted, Progress, Writers, main, on_sigterm, say, table, warn
from lm.data import corpus as corpora
from lm.data.batches import stop_unless_cut
from lm.errors import UserError, at_least
from lm.log import Log
from lm.model import Config, Model, make
from lm.model.params import count, flops_per_token, specs
from lm.rewards import Reward
from lm.rewards.model import ensemble
from lm.sharding import make_mesh, put_batch, state_shardings
from lm.stages import JUDGES, STAGES, TAUGHT
from lm.stages.context import Batches, Context
from lm.tokenizer import Tokenizer
from lm.types import Tokens, TrainState
from lm.update import Update
from lm.workdir import Trained, Workdir, load, load_reward, open_workdir, read_metrics

FLAGS = {"workdir": dict(required=True, metavar="DIR", help="the run's own folder; the same command continues it")}
SUBTREES = ("seed", "tokenizer", "init_from", "model", "optimizer", "stage", "data", "mesh", "train")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a run is and how often it does what; counted in batches."""

    steps: int
    log_every: int = 10
    evaluate_every: int = 0  # held-out score; 0: at the start and the end only
    save_every: int = 100
    keep: int = 2  # newest checkpoints that stay
    samples: int = 16  # rows of a sampled batch that rollouts.jsonl shows, at the start and at every save

    def __post_init__(self):
        at_least(1, "train", steps=self.steps, log_every=self.log_every, save_every=self.save_every, keep=self.keep)
        at_least(0, "train", evaluate_every=self.evaluate_every, samples=self.samples)


class Run(NamedTuple):
    """Everything the loop works with, put together from a config."""

    stage: Any  # the module
    update: Update
    batches: Batches
    mesh: jax.sharding.Mesh
    shardings: Any  # of the TrainState
    state: TrainState  # as it starts: resuming replaces all of it but the frozen networks
    meta: Mapping[str, Any]  # what a checkpoint says of itself
    flops_per_token: float  # model FLOPs of learning from one token of a batch; sampling and scoring not counted


def run(config: ConfigDict, path: str | Path) -> dict[str, Any]:
    """Trains one stage in its workdir, or takes up where it stopped, and returns the summary it leaves there."""
    if "stage" not in config or "name" not in config.stage:
        raise UserError(
            "the config has no stage.name: is it a config of lm.train? (lm.pipeline runs experiments/quickstart.py)"
        )
    name = config.stage.name
    if name not in ("tokenizer", *STAGES):
        raise UserError(f"stage.name is {name!r}; choose one of tokenizer, {', '.join(STAGES)}")
    require(config, ("seed", "stage", "data") if name == "tokenizer" else SUBTREES, "lm.train")
    at_least(0, "config", seed=config.seed)
    # A schedule may be stretched with the run: the change is named, as any is.
    with open_workdir(path, to_dict(config), harmless=("train", "mesh", "optimizer.total_steps")) as workdir:
        for difference in workdir.differences:
            say(f"{path}: config changed since the last start: {difference}")
        summary = workdir.summary()
        if summary is None or "train" in config and summary["steps"] < config.train.steps:
            summary = (
                train(config, workdir) if name in STAGES else call(fit_tokenizer, config.data, workdir, name="data")
            )
            workdir.write_summary(summary)
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


def fit_tokenizer(
    workdir: Workdir, *, corpus: str, held_out: float = 0.02, vocab_size: int = 2048, max_bytes: int = 32_000_000
) -> dict[str, Any]:
    """Trains the tokenizer on the documents that are not held out; reports bytes per token on those that are."""
    at_least(1, "data", vocab_size=vocab_size, max_bytes=max_bytes)
    start = time.monotonic()
    seen, unseen = corpora.split(corpora.documents(corpus), held_out)
    say(f"tokenizer: {len(seen)} documents to learn from, {len(unseen)} held out")
    tokenizer = tokenizers.train((document.text for document in seen), vocab_size=vocab_size, max_bytes=max_bytes)
    tokenizer.save(workdir.tokenizer)
    size = sum(len(document.text.encode()) for document in unseen)
    ids = tokenizer.encode_all(document.text for document in unseen)
    return {
        "stage": "tokenizer",
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": size / sum(map(len, ids)),
        "held_out_bytes": size,
        "seconds": time.monotonic() - start,
        "fingerprint": tokenizer.fingerprint,
    }


def prepare(config: ConfigDict, workdir: Workdir) -> Run:
    """From a config to a Run: tokenizer, model, optimizer, stage, batches, mesh, starting state."""
    name, backend = config.stage.name, jax.default_backend()
    stage = STAGES[name]
    start = load(config.init_from, backend=backend, warn=warn) if config.init_from else None
    tokenizer = agreed_tokenizer(config.tokenizer, start)
    tokenizer.save(workdir.tokenizer)
    inherited = dataclasses.asdict(start.shape) if start else {"vocab_size": tokenizer.vocab_size}
    shape = call(Config, {**inherited, **config.model.to_dict()}, name="model")
    if shape.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size is {shape.vocab_size}, but the tokenizer has {tokenizer.vocab_size} pieces: leave it out"
        )
    if start and specs(shape) != specs(start.shape):
        raise UserError(f"config.model changes the shape of the model in {config.init_from}: leave its sizes out")
    model = make(shape.on(backend))

    optimizer = call(optim.make, config.optimizer, name="optimizer")
    options = {key: value for key, value in config.stage.to_dict().items() if key != "name"}
    teachers = {}
    if name in TAUGHT and "teacher" in options:
        teachers["teacher"] = teacher_from(options["teacher"], tokenizer)
        options["teacher"] = teachers["teacher"].model
    update = call(stage.make, options, model, optimizer, name="stage")
    lent = lambda paths, pessimism: reward_from(paths, tokenizer, pessimism)
    context = Context(model, tokenizer, config.seed, jax.jit, lent)
    batches = call(stage.batches, config.data, context, name="data")
    if "ramp" in config.data and "microbatches" in options:
        stop_unless_cut(config.data.ramp, options["microbatches"])

    mesh = call(make_mesh, config.mesh, name="mesh")
    state, shardings = initial_state(update, model, config.seed, start.params if start else None, teachers, mesh)
    meta = {"stage": name, "fingerprint": tokenizer.fingerprint, "model": dataclasses.asdict(shape)}
    passes = options["epochs"] if "epochs" in options else 1  # over each batch
    flops = passes * flops_per_token(model.config, batches.about["length"])
    return Run(stage, update, batches, mesh, shardings, state, meta, flops)


def agreed_tokenizer(path: str, start) -> Tokenizer:
    """The tokenizer of config.tokenizer (a file or workdir), the starting checkpoint's, or both, which must agree."""
    if not path and start is None:
        raise UserError("neither config.tokenizer nor config.init_from is set: one of them must bring the tokenizer")
    if not path:
        return start.tokenizer
    file = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
    tokenizer = Tokenizer.load(file)
    if start and start.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{start.path} was trained with tokenizer and template {start.tokenizer.fingerprint[:8]}, but "
            f"config.tokenizer {path} is {tokenizer.fingerprint[:8]}: leave config.tokenizer empty"
        )
    return tokenizer


def reward_from(paths: str, tokenizer: Tokenizer, pessimism: float) -> Reward:
    """The reward model of a finished workdir, or the ensemble of several, whose names are separated by commas."""
    members = [one_reward(path.strip(), tokenizer) for path in paths.split(",")]
    return ensemble(members, pessimism=pessimism) if len(members) > 1 else members[0]


def one_reward(path: str, tokenizer: Tokenizer) -> Reward:
    """The reward model of a finished workdir that shares our tokenizer, centred."""
    judge, reward = load_reward(path, backend=jax.default_backend(), centred=True, jit=jax.jit, warn=warn)
    if judge.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{path} was trained with tokenizer and template {judge.tokenizer.fingerprint[:8]}, but this run "
            f"has {tokenizer.fingerprint[:8]}: train a reward model from the same tokenizer"
        )
    return reward


def teacher_from(path: str, tokenizer: Tokenizer) -> Trained:
    """What a workdir has learnt, for a student that shares its tokenizer."""
    teacher = load(path, backend=jax.default_backend(), warn=warn)
    if teacher.stage in JUDGES:
        raise UserError(f"stage.teacher {path} is a reward model, which scores answers and writes none: name a policy")
    if teacher.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"stage.teacher {path} was trained with tokenizer and template {teacher.tokenizer.fingerprint[:8]}, but "
            f"this run has {tokenizer.fingerprint[:8]}, and a teacher with another vocabulary cannot be followed token "
            "by token: take a student with the teacher's tokenizer, or another teacher"
        )
    return teacher


def initial_state(
    update: Update, model: Model, seed: int, params, teachers: Mapping[str, Trained], mesh
) -> tuple[TrainState, Any]:
    """The starting state, each leaf created where its sharding wants it, and those shardings.

    `teachers` go to state.frozen by their names; they may be of another shape than the model.
    """
    init_key, key = jax.random.split(jax.random.key(seed))

    def init(params, frozen):
        return update.init(key, params or {"lm": model.init(init_key)}, frozen)

    given = params, {name: teacher.params["lm"] for name, teacher in teachers.items()}
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(init, *given)
        shardings = state_shardings(mesh, shapes, model.axes)
        theirs = {
            name: state_shardings(mesh, shapes.frozen[name], teacher.model.axes) for name, teacher in teachers.items()
        }
        shardings = shardings.replace(frozen={**shardings.frozen, **theirs})
        return jax.jit(init, out_shardings=shardings)(*given), shardings


def train(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """The loop. Batch i depends on (seed, i) and, where it is sampled, on the state: no more need be remembered."""
    schedule = call(Schedule, config.train, name="train")
    with Progress(config.stage.name, schedule.steps) as progress:
        r = prepare(config, workdir)
        say(
            f"{config.stage.name}: "
            + ", ".join(
                f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value:,}"
                for name, value in r.batches.about.items()
            )
        )
        with Checkpoints(workdir.checkpoints, keep=schedule.keep, warn=warn) as checkpoints, jax.set_mesh(r.mesh):
            done, state = resumed(checkpoints, r)
            first = done + 1 if done else 0  # the row to write next: a fresh start is scored before its first step
            workdir.truncate(first - 1)
            if done:
                say(f"{config.stage.name}: continues from step {done} of {workdir.path}")
            step = jax.jit(r.update.update, donate_argnums=0, out_shardings=(r.shardings, None))
            evaluate = jax.jit(r.update.evaluate)
            with on_sigterm() as stopping, Writers(workdir.path, purge_step=first) as writers:
                log = Log(r.stage, workdir, writers, progress)
                if not log.scored and (not done or done >= schedule.steps):  # of a run cut short by fewer steps, too
                    before = held_out(r, evaluate, state)
                    log.write(done, before)
                    if not done:
                        stop_unless_fresh(r, before)
                for i in range(done, schedule.steps):
                    batch, tokens = fetched(r, state, i)
                    if r.batches.table and (i % schedule.save_every == 0 or i + 1 == schedule.steps):
                        workdir.append_rollouts(i + 1, r.batches.table(state, batch, schedule.samples))
                    state, metrics = step(state, batch)
                    log.note(i + 1, metrics, tokens)
                    last, stop = i + 1 == schedule.steps, stopping()
                    due = (i + 1) % schedule.save_every == 0 or last or stop
                    if (i + 1) % schedule.log_every == 0 or due:
                        log.flush()
                    if last or schedule.evaluate_every and (i + 1) % schedule.evaluate_every == 0:
                        log.write(i + 1, held_out(r, evaluate, state))
                    if due:
                        checkpoints.save(i + 1, saved(state), r.meta)
                    if stop:
                        break
                checkpoints.wait()
                if stopping():
                    raise Interrupted
    return summary_of(config, r, workdir)


def fetched(r: Run, state: TrainState, i: int):
    """Batch i on the devices, and how many real tokens it holds."""
    batch = r.batches.train(state, i)
    rows = jax.tree.leaves(batch, is_leaf=lambda x: isinstance(x, Tokens))
    tokens = sum(int(np.sum(np.asarray(x.segments) > 0)) for x in rows if isinstance(x, Tokens))
    return put_batch(batch, r.mesh), tokens


def held_out(r: Run, evaluate, state: TrainState) -> dict[str, float]:
    """The stage's summary of its metrics over every held-out batch, as "held_out/NAME"; of averaged weights, if any."""
    state = state.replace(params=optim.average(state.opt_state) or state.params)
    total = None
    for batch in r.batches.held_out(state):
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


def summary_of(config: ConfigDict, r: Run, workdir: Workdir) -> dict[str, Any]:
    """What a finished stage leaves behind: held-out scores before and after, size, tokens, FLOPs, seconds."""
    rows = read_metrics(workdir.metrics)
    scored = [{k.removeprefix("held_out/"): v for k, v in row.items() if k.startswith("held_out/")} for row in rows]
    scored = [row for row in scored if row]
    rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    return {
        "stage": config.stage.name,
        "steps": rows[-1]["step"],
        "parameters": count(specs(Config(**r.meta["model"]))),
        "tokens": rows[-1]["tokens"],
        "seconds": rows[-1]["seconds"],
        "tokens_per_second": statistics.median(rates[1:] or rates),  # the first interval holds compilation
        "model_flops": r.flops_per_token * rows[-1]["tokens"],
        "before": scored[0],
        "held_out": scored[-1],
        "about": dict(r.batches.about),
        "fingerprint": r.meta["fingerprint"],
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def program(argv: list[str]) -> None:
    flags, config = arguments(argv, __doc__, FLAGS)
    run(config, flags.workdir)


if __name__ == "__main__":
    main(program, long=True)

"""From a config to everything the training loop works with: model, optimizer, stage, batches, starting state."""

import functools
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from lm.core.config import call_with_options, to_dict
from lm.core.options import option_value
from lm.core.sharding import state_shardings
from lm.core.types import TrainState
from lm.data.batches import check_ramp_microbatches
from lm.model import Model, lora
from lm.model.params import flops_per_token, param_count, param_specs
from lm.optim.update import Update
from lm.rewards.load import reward_from_workdirs
from lm.runs.console import warn
from lm.runs.timing import PhaseTimer
from lm.runs.workdir import TrainedModel, Workdir, load_trained_model, with_run_date
from lm.stages import named_stage
from lm.stages.context import Batches, StageContext
from lm.stages.stage import Stage
from lm.train.config import check_equal_options, train_functions
from lm.train.host import RunHost
from lm.train.warm_start import (
    inherited_params,
    lora_base_params,
    model_for_run,
    teacher_from_workdir,
    tokenizer_for_run,
    with_marker_embeddings,
)

# The stage's update, with some of the config's numbers, by dotted key, replaced by others.
UpdateBuilder = Callable[[Mapping[str, Any]], Update]


class TrainingSetup(NamedTuple):
    """Everything the loop works with, put together from a config."""

    stage: Stage
    build_update: UpdateBuilder
    batches: Batches
    mesh: jax.sharding.Mesh
    shardings: Any  # of the TrainState
    initial_state: TrainState  # as it starts: resuming replaces all of it but the frozen networks
    checkpoint_metadata: Mapping[str, Any]  # what a checkpoint says of itself
    parameters: int  # of the decoder, a frozen base included
    # model FLOPs of learning from one token of a batch; sampling and scoring not counted; None: a custom model
    flops_per_token: float | None
    phases: PhaseTimer
    context: StageContext  # what the batches are made from: model, tokenizer


def training_setup(config: ConfigDict, workdir: Workdir, phases: PhaseTimer, host: RunHost) -> TrainingSetup:
    """From a config to a TrainingSetup: tokenizer, model, optimizer, stage, batches, mesh, starting state."""
    name, backend, functions = config.stage.name, jax.default_backend(), train_functions(config)
    check_equal_options(config, functions)
    start = host.make_once(
        config.init_from,
        lambda: load_trained_model(config.init_from, backend=backend, warn=warn) if config.init_from else None,
    )
    tokenizer = with_run_date(tokenizer_for_run(config.tokenizer, start), workdir)
    model, shape, entries = model_for_run(config, tokenizer, start, backend)

    stage, teachers = named_stage(name), {}
    if stage.has_teacher and "teacher" in config.stage:
        teachers["teacher"] = teacher_from_workdir(config.stage.teacher, tokenizer)
    build = functools.partial(stage_update, config, model, teachers)
    build(host.traced_scalars)  # raises its errors before the data are read

    def shared_reward(paths, pessimism, longest):
        made = lambda: reward_from_workdirs(paths, tokenizer, pessimism, longest=longest, jit=host.jit)
        return host.make_once((paths, pessimism, longest), made)

    context = StageContext(
        model, tokenizer, config.seed, host.jit, shared_reward, phases if host.is_timed else nullcontext
    )
    data = json.dumps([config.seed, to_dict(config.data)])
    with phases("data"):
        batches = host.make_once(
            data, lambda: call_with_options(functions["data"].function, config.data, context, name="data")
        )
    if "ramp" in config.data and "microbatches" in config.stage:
        check_ramp_microbatches(config.data.ramp, config.stage.microbatches)

    mesh = call_with_options(host.make_mesh or functions["mesh"].function, config.mesh, name="mesh")
    params, base = inherited_params(start, config), {}
    if "marker_embedding" in config and config.marker_embedding:
        params["lm"] = with_marker_embeddings(params["lm"], tokenizer, config.marker_embedding)
    if shape.lora_rank:
        base = lora_base_params(shape, params.pop("lm"), workdir, host.checkpoint_turn)
    state, shardings = initial_state(build, model, config.seed, params, base, teachers, mesh, host)
    meta = {"stage": name, "fingerprint": tokenizer.fingerprint, "model": entries}
    if "name" in entries:
        size, flops = sum(leaf.size for leaf in jax.tree.leaves(state.params["lm"])), None
    else:
        passes = option_value(functions["stage"], config.stage, "epochs", 1)  # over each batch
        size = param_count(param_specs(shape))
        flops = passes * flops_per_token(model.config, batches.dataset_info["length"])
    return TrainingSetup(stage, build, batches, mesh, shardings, state, meta, size, flops, phases, context)


def stage_update(
    config: ConfigDict, model: Model, teachers: Mapping[str, TrainedModel], scalars: Mapping[str, Any]
) -> Update:
    """The stage's update with the config's optimizer; `scalars`, by dotted key, replace its own numbers."""

    def options(subtree: str) -> dict[str, Any]:
        own = {key.removeprefix(f"{subtree}."): v for key, v in scalars.items() if key.startswith(f"{subtree}.")}
        return {**config[subtree].to_dict(), **own}

    functions = train_functions(config)
    optimizer = call_with_options(functions["optimizer"].function, options("optimizer"), name="optimizer")
    networks = {name: teacher.model for name, teacher in teachers.items()}
    stage = {key: value for key, value in {**options("stage"), **networks}.items() if key != "name"}
    return call_with_options(functions["stage"].function, stage, model, optimizer, name="stage")


def initial_state(
    build: UpdateBuilder,
    model: Model,
    seed: int,
    params,
    base,
    teachers: Mapping[str, TrainedModel],
    mesh,
    host: RunHost,
) -> tuple[TrainState, Any]:
    """The starting state, each leaf created where its sharding wants it, and those shardings.

    params: what is inherited; the decoder is drawn where it is not among them. `base`, if there is one, and `teachers`
    go to state.frozen; teachers may be of another shape than the model.
    """
    init_key, key = jax.random.split(jax.random.key(seed))

    def init(scalars, init_key, key, params, frozen):
        return build(scalars).init(key, params if "lm" in params else {"lm": model.init(init_key), **params}, frozen)

    given = (
        dict(host.traced_scalars),
        init_key,
        key,
        params,
        {name: teacher.params["lm"] for name, teacher in teachers.items()} | ({lora.FROZEN_BASE: base} if base else {}),
    )
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(init, *given)
        shardings = state_shardings(mesh, shapes, model.logical_axes)
        theirs = {
            name: state_shardings(mesh, shapes.frozen[name], teacher.model.logical_axes)
            for name, teacher in teachers.items()
        }
        shardings = shardings.replace(frozen={**shardings.frozen, **theirs})
        return host.jit(init, out_shardings=shardings)(*given), shardings

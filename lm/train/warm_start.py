"""What a run takes from other workdirs: tokenizer, shape, base of adapters, reward models, teacher.

All of them must have the same token ids.
"""

import dataclasses
import readline  # noqa: F401  gives input() its line editing and history
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lm.core.config import call_with_options
from lm.core.errors import UserError
from lm.core.types import Params
from lm.data.preferences import OVERALL_ONLY, ordered_axes
from lm.model import Model, ModelConfig, make_model
from lm.model.imported import check_same_params, imported_model, takes_vocab_size
from lm.model.params import param_specs
from lm.model.quantization import quantized_params
from lm.rewards.load import reward_axes
from lm.runs.checkpoint import Checkpoints, checkpoint_steps, restore_params
from lm.runs.console import warn
from lm.runs.workdir import (
    CHECKPOINTS_DIR,
    CONFIG_FILE,
    PIPELINE_FILE,
    TOKENIZER_FILE,
    TrainedModel,
    Workdir,
    load_trained_model,
    making_command,
    read_json,
)
from lm.stages import REWARD_MODEL_STAGES
from lm.tokenizer import Tokenizer, load_tokenizer


def tokenizer_for_run(path: str, start) -> Tokenizer:
    """The tokenizer of config.tokenizer (a file or workdir), the starting checkpoint's, or both, which must agree."""
    if not path and start is None:
        raise UserError("neither config.tokenizer nor config.init_from is set: one of them must bring the tokenizer")
    if not path:
        return start.tokenizer
    file = Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise UserError(f"no tokenizer at {path}: train one, or name its workdir{making_command(Path(path))}")
    tokenizer = load_tokenizer(file)
    if start and start.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{start.path} was trained with tokenizer and template {start.tokenizer.fingerprint[:8]}, but "
            f"config.tokenizer {path} is {tokenizer.fingerprint[:8]}: leave config.tokenizer empty"
        )
    return tokenizer


def teacher_from_workdir(path: str, tokenizer: Tokenizer) -> TrainedModel:
    """What a workdir has learned, for a student that shares its tokenizer."""
    teacher = load_policy(path, backend=jax.default_backend(), warn=warn, name="stage.teacher ")
    if teacher.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"stage.teacher {path} was trained with tokenizer and template {teacher.tokenizer.fingerprint[:8]}, but "
            f"this run has {tokenizer.fingerprint[:8]}, and a teacher with another vocabulary cannot be followed token "
            "by token: take a student with the teacher's tokenizer, or another teacher"
        )
    return teacher


class RunModel(NamedTuple):
    """The model of a run."""

    model: Model
    config: ModelConfig  # every "auto" still open; of a custom model, its own description
    entries: dict[str, Any]  # as checkpoints keep it: the fields of `config`, or {"name": "file.py:make", **options}


def model_for_run(config: ConfigDict, tokenizer: Tokenizer, start: TrainedModel | None, backend: str) -> RunModel:
    """The model that config.model asks for: lm's decoder or, with a `name`, a custom one; that of `start`, if there is
    one. UserError for a model that cannot take the parameters of `start`, or has too few ids."""
    if "name" in config.model and config.model.name or start and start.own_model:
        return own_model_for_run(config, tokenizer, start)
    shape = model_config_for_run(config, tokenizer, start)
    return RunModel(make_model(shape.for_backend(backend)), shape, dataclasses.asdict(shape))


def own_model_for_run(config: ConfigDict, tokenizer: Tokenizer, start: TrainedModel | None) -> RunModel:
    if start and not start.own_model:
        raise UserError(f"model.name is set, but {config.init_from} holds lm's own decoder: leave one of the two out")
    entries = {**(start.own_model if start else {}), **_given_entries(config)}
    if takes_vocab_size(entries["name"]) and "vocab_size" not in entries:
        entries["vocab_size"] = tokenizer.vocab_size
    model = imported_model(entries)
    if model.config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model {entries['name']} has {model.config.vocab_size} ids, but the tokenizer has {tokenizer.vocab_size} "
            "pieces: give it an option vocab_size, which is set to that number"
        )
    if start:
        check_same_params(model, start.params["lm"], entries["name"], start.path)
    if "base_width" in config.optimizer and config.optimizer.base_width:
        raise UserError("optimizer.base_width scales the matrices of lm's own decoder: leave it out with model.name")
    return RunModel(model, model.config, entries)


def model_config_for_run(config: ConfigDict, tokenizer: Tokenizer, start: TrainedModel | None) -> ModelConfig:
    """The model that config.model asks for, its sizes those of `start` where there is one, which it may not change."""
    inherited = dataclasses.asdict(start.model_config) if start else {"vocab_size": tokenizer.vocab_size}
    shape = call_with_options(ModelConfig, {**inherited, **_given_entries(config)}, name="model")
    if shape.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size is {shape.vocab_size}, but the tokenizer has {tokenizer.vocab_size} pieces: leave it out"
        )
    if start and param_specs(shape) != param_specs(start.model_config):
        raise UserError(f"config.model changes the shape of the model in {config.init_from}: leave its sizes out")
    if shape.lora_rank and not start:
        raise UserError("model.lora_rank needs a model to adapt: set config.init_from")
    optimizers = config.optimizer.base_width if "base_width" in config.optimizer else 0
    if optimizers and shape.lora_rank:
        raise UserError("optimizer.base_width scales the steps of whole matrices, not of adapters: leave it out")
    if ("base_width" in config.optimizer or "base_width" in config.model) and optimizers != shape.base_width:
        raise UserError(f"optimizer.base_width is {optimizers}, model.base_width {shape.base_width}: muP needs both")
    return shape


def _given_entries(config: ConfigDict) -> dict[str, Any]:
    """What config.model says; an empty name says nothing."""
    return {key: value for key, value in config.model.to_dict().items() if key != "name" or value}


def inherited_params(start: TrainedModel | None, config: ConfigDict) -> Params:
    """What a run takes from `start`: {"lm": ...}, and "value" where both stages mean the same by it.

    A reward model's head is an axis each, a policy's is the value of a state. UserError for a policy from a reward
    model, whose decoder no longer writes, and for a reward model from one of other axes.
    """
    if "marker_embedding" in config and config.marker_embedding and start is None:
        raise UserError("marker_embedding is set, but nothing was learned that markers could start as: set init_from")
    judges = config.stage.name in REWARD_MODEL_STAGES
    batch_axes, learned = (
        ordered_axes(config[side].axes if "axes" in config[side] else OVERALL_ONLY) for side in ("data", "stage")
    )
    if judges and batch_axes != learned:
        raise UserError(
            f"stage.axes are {learned}, but data.axes, which the batches bring, {batch_axes}: give both the same"
        )
    if start is None:
        return {}
    if start.stage not in REWARD_MODEL_STAGES:
        return {name: params for name, params in start.params.items() if name == "lm" or not judges}
    if not judges:
        raise UserError(
            f"config.init_from {start.path} is a reward model, which scores answers and writes none: name the policy "
            "that it was made from"
        )
    if list(batch_axes) != list(reward_axes(start)):
        raise UserError(
            f"config.init_from {start.path} has learned the axes {', '.join(reward_axes(start))}, data.axes are "
            f"{', '.join(batch_axes)}: name the same, or start from the policy that it was made from"
        )
    return dict(start.params)


def with_marker_embeddings(lm: Params, tokenizer: Tokenizer, text: str) -> Params:
    """The decoder with the markers of the chat template (roles, end of a message) as the last token of `text`.

    Pretraining never sees the markers: their rows are the random ones of the start. A token that stands where they will
    stand, such as the end of a line, knows what to do there; what the model does after it, it does after them at once.
    UserError where the tokenizer's markers are not its own tokens, or `text` is none.
    """
    ids, like = tokenizer.marker_ids, tokenizer.encode(text)
    if not ids or "embedding" not in lm:
        raise UserError(
            "marker_embedding is set, but this run's tokenizer or model is not lm's own, whose markers pretraining "
            "never sees: leave it out"
        )
    if not like:
        raise UserError(f"marker_embedding is {text!r}, which holds no token: give a text such as a line's end")
    markers, lm = jnp.array(ids), dict(lm)
    lm["embedding"] = jnp.asarray(lm["embedding"]).at[markers].set(lm["embedding"][like[-1]])
    if "head" in lm:  # else the output matrix is the embedding
        head = jnp.asarray(lm["head"])
        lm["head"] = head.at[:, markers].set(head[:, like[-1:]])
    return lm


def lora_base_params(shape: ModelConfig, lm: Params, workdir: Workdir, checkpoint_turn: Callable) -> Params:
    """The frozen base of adapters: the inherited decoder in shape.lora_base_dtype.

    The workdir keeps a copy of it, written once. Later starts read that copy, whatever has become of the run that it
    came from. checkpoint_turn: the RunHost's, in which checkpoints are written.
    """
    if checkpoint_steps(workdir.base_path):
        return restore_params(workdir.base_path, warn=warn)[0]
    with Checkpoints(workdir.base_path, keep=1, warn=warn) as base_checkpoint:
        base = quantized_params(shape.lora_base_dtype, lm)
        with checkpoint_turn(base_checkpoint):
            base_checkpoint.save(0, {"params": base}, {})
        return base


def load_policy(path: str | Path, *, backend: str, warn: Callable[[str], None] = print, name: str = "") -> TrainedModel:
    """As `load_trained_model`, of a run that writes answers. UserError for a reward model; `name`: where the path was
    given."""
    trained = load_trained_model(path, backend=backend, warn=warn)
    if trained.stage in REWARD_MODEL_STAGES:
        raise UserError(f"{name}{path} is a reward model, which scores answers and writes none: name a policy")
    return trained


def policy_folder(path: Path) -> Path:
    """`path` itself or, if it is a pipeline's, the workdir of the last stage in it with a checkpoint of a policy."""
    if not (path / PIPELINE_FILE).exists():
        return path
    for name in reversed(read_json(path / PIPELINE_FILE)["stages"]):
        saved = any(step.name.isdigit() for step in (path / name / CHECKPOINTS_DIR).glob("*"))
        if saved and read_json(path / name / CONFIG_FILE)["stage"]["name"] not in REWARD_MODEL_STAGES:
            return path / name
    raise UserError(f"{path} holds no trained model yet: let lm pipeline reach the first checkpoint of pretrain")

"""What a run takes from other workdirs: its tokenizer, its shape, the base of its adapters, its judges, its teacher.

All must share ids.
"""

import dataclasses
from collections.abc import Callable
from datetime import date
from pathlib import Path

import jax
from ml_collections import ConfigDict

from lm.checkpoint import Checkpoints, restore_params
from lm.config import call
from lm.console import warn
from lm.errors import UserError
from lm.model import Config
from lm.model.params import specs
from lm.model.quantised import stored
from lm.rewards import Reward
from lm.rewards.model import ensemble
from lm.stages import JUDGES
from lm.tokenizer import Tokenizer, load as load_tokenizer
from lm.types import Params
from lm.workdir import Trained, Workdir, load, load_reward


def agreed_tokenizer(path: str, start) -> Tokenizer:
    """The tokenizer of config.tokenizer (a file or workdir), the starting checkpoint's, or both, which must agree."""
    if not path and start is None:
        raise UserError("neither config.tokenizer nor config.init_from is set: one of them must bring the tokenizer")
    if not path:
        return start.tokenizer
    file = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
    tokenizer = load_tokenizer(file)
    if start and start.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{start.path} was trained with tokenizer and template {start.tokenizer.fingerprint[:8]}, but "
            f"config.tokenizer {path} is {tokenizer.fingerprint[:8]}: leave config.tokenizer empty"
        )
    return tokenizer


def dated(tokenizer: Tokenizer, workdir: Workdir) -> Tokenizer:
    """The tokenizer as this run has it from its first start on, kept in the workdir.

    A template that tells the date tells one for all starts of a run, or its ids would change overnight: the date that
    came with the tokenizer, from the run or the converted model that this one starts from, else that of the first
    start. Whatever loads the run gets that date with it; lm.chat alone, which talks to somebody now, tells today's.
    """
    if tokenizer.shows_date:
        kept = load_tokenizer(workdir.tokenizer).date if workdir.tokenizer.exists() else ""
        tokenizer = tokenizer.dated(kept or tokenizer.date or date.today().isoformat())
    tokenizer.save(workdir.tokenizer)
    return tokenizer


def reward_from(paths: str, tokenizer: Tokenizer, pessimism: float, *, jit=jax.jit) -> Reward:
    """The reward model of a finished workdir, or the ensemble of several, whose names are separated by commas."""
    members = [one_reward(path.strip(), tokenizer, jit) for path in paths.split(",")]
    return ensemble(members, pessimism=pessimism) if len(members) > 1 else members[0]


def one_reward(path: str, tokenizer: Tokenizer, jit) -> Reward:
    """The reward model of a finished workdir that shares our tokenizer, centred."""
    judge, reward = load_reward(path, backend=jax.default_backend(), centred=True, jit=jit, warn=warn)
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


def agreed_shape(config: ConfigDict, tokenizer: Tokenizer, start: Trained | None) -> Config:
    """The model that config.model asks for, its sizes those of `start` where there is one, which it may not change."""
    inherited = dataclasses.asdict(start.shape) if start else {"vocab_size": tokenizer.vocab_size}
    shape = call(Config, {**inherited, **config.model.to_dict()}, name="model")
    if shape.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size is {shape.vocab_size}, but the tokenizer has {tokenizer.vocab_size} pieces: leave it out"
        )
    if start and specs(shape) != specs(start.shape):
        raise UserError(f"config.model changes the shape of the model in {config.init_from}: leave its sizes out")
    if shape.lora_rank and not start:
        raise UserError("model.lora_rank needs a model to adapt: set config.init_from")
    optimizers = config.optimizer.base_width if "base_width" in config.optimizer else 0
    if optimizers and shape.lora_rank:
        raise UserError("optimizer.base_width scales the steps of whole matrices, not of adapters: leave it out")
    if ("base_width" in config.optimizer or "base_width" in config.model) and optimizers != shape.base_width:
        raise UserError(f"optimizer.base_width is {optimizers}, model.base_width {shape.base_width}: muP needs both")
    return shape


def base_of(shape: Config, lm: Params, workdir: Workdir, turn: Callable) -> Params:
    """What adapters are laid on: the inherited decoder as shape.lora_base keeps it.

    The workdir keeps it beside them, once, and from its second start on goes by its own copy, whatever has become of
    the run that it came from. turn: the Host's, in which checkpoints are written.
    """
    with Checkpoints(workdir.base, keep=1, warn=warn) as kept:
        if kept.steps():
            return restore_params(workdir.base, warn=warn)[0]
        base = stored(shape.lora_base, lm)
        with turn(kept):
            kept.save(0, {"params": base}, {})
        return base

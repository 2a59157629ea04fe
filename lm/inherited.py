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
from lm.stages.ranked import ONE_AXIS, in_order
from lm.tokenizer import Tokenizer, load as load_tokenizer
from lm.types import Params
from lm.workdir import Trained, Workdir, axes_of, load_policy, load_reward, same_axes


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


def reward_from(paths: str, tokenizer: Tokenizer, pessimism: float, *, longest: int, jit=jax.jit) -> Reward:
    """The reward model of a finished workdir, or the ensemble of several, whose names are separated by commas.

    longest: tokens of the longest prompt and answer that it will be given (see rewards.model.row_length). UserError for
    one that does not read so many, or not these ids, and for members that have learnt different axes.
    """
    judges, members = zip(*(one_reward(path.strip(), tokenizer, longest, jit) for path in paths.split(",")))
    same_axes(judges)
    return ensemble(members, pessimism=pessimism) if len(members) > 1 else members[0]


def one_reward(path: str | Path, tokenizer: Tokenizer, longest: int, jit=jax.jit) -> tuple[Trained, Reward]:
    """The reward model of a finished workdir that shares our tokenizer and reads our rows whole, centred."""
    judge, reward = load_reward(path, backend=jax.default_backend(), centred=True, jit=jit, warn=warn)
    if judge.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{path} was trained with tokenizer and template {judge.tokenizer.fingerprint[:8]}, but this run "
            f"has {tokenizer.fingerprint[:8]}: train a reward model from the same tokenizer"
        )
    stop_unless_read(f"{path} was trained on", judge.summary["about"]["length"], longest)
    return judge, reward


def stop_unless_read(judge: str, length: int, longest: int) -> None:
    """UserError, which begins with `judge`, for a judge of rows of `length` tokens that is to read `longest`."""
    if longest > length:
        raise UserError(
            f"{judge} rows of {length} tokens, but a prompt and its answer may have {longest} here, which it would "
            f"read cut: lower prompt_length or max_new by {longest - length} in all, or train it with "
            f"--config.data.length={longest}"
        )


def teacher_from(path: str, tokenizer: Tokenizer) -> Trained:
    """What a workdir has learnt, for a student that shares its tokenizer."""
    teacher = load_policy(path, backend=jax.default_backend(), warn=warn, name="stage.teacher ")
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


def inherited_params(start: Trained | None, config: ConfigDict) -> Params:
    """What a run takes from `start`: {"lm": ...}, and "value" where both stages mean the same by it.

    A reward model's head is an axis each, a policy's is the value of a state. UserError for a policy from a reward
    model, whose decoder has unlearnt to write, and for a reward model from one of other axes.
    """
    judges = config.stage.name in JUDGES
    given, learnt = (in_order(config[side].axes if "axes" in config[side] else ONE_AXIS) for side in ("data", "stage"))
    if judges and given != learnt:
        raise UserError(f"stage.axes are {learnt}, but data.axes, which the batches bring, {given}: give both the same")
    if start is None:
        return {}
    if start.stage not in JUDGES:
        return {name: params for name, params in start.params.items() if name == "lm" or not judges}
    if not judges:
        raise UserError(
            f"config.init_from {start.path} is a reward model, which scores answers and writes none: name the policy "
            "that it was made from"
        )
    if list(given) != list(axes_of(start)):
        raise UserError(
            f"config.init_from {start.path} has learnt the axes {', '.join(axes_of(start))}, data.axes are "
            f"{', '.join(given)}: name the same, or start from the policy that it was made from"
        )
    return dict(start.params)


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

"""What a run takes from other workdirs: its tokenizer, the base of its adapters, its reward models, its teacher.

All must share ids.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from lm.checkpoint import Checkpoints
from lm.console import warn
from lm.errors import UserError
from lm.model import Config, lora
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


def based(shape: Config, params: Mapping[str, Any], workdir: Workdir) -> Params:
    """What adapters are laid on: the inherited decoder, which the workdir keeps beside them, once."""
    if "lm" not in params:
        raise UserError("model.lora_rank needs a model to adapt: set config.init_from")
    base = lora.stored(shape, params["lm"])
    with Checkpoints(workdir.base, keep=1, warn=warn) as kept:
        kept.save(0, {"params": base}, {})
    return base

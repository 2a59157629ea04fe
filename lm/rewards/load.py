"""Reward models of finished workdirs as rewards: one, or an ensemble that agrees on its axes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from lm.core.errors import UserError
from lm.data.preferences import OVERALL_ONLY, ordered_axes
from lm.rewards import Reward
from lm.rewards.reward_model import reward_ensemble, reward_from_model
from lm.runs.console import warn
from lm.runs.workdir import CONFIG_FILE, TrainedModel, load_trained_model, read_json
from lm.tokenizer import Tokenizer


def load_reward_model(
    path: str | Path, *, backend: str, normalized: bool, jit, warn: Callable[[str], None] = print
) -> tuple[TrainedModel, Reward]:
    """A finished reward model, and its total score as a reward: the weighted sum of its axes.

    normalized: minus the mean, over the standard deviation of the held-out answers; otherwise as learned, so that
    differences of scores are the logits of preferring one answer to another. UserError for any other workdir.
    """
    trained = load_trained_model(path, backend=backend, warn=warn)
    found = trained.summary["held_out"] if "held_out" in trained.summary else {}
    if "value" not in trained.params or "score_mean" not in found:
        raise UserError(f"{path} is no finished reward model (it is {trained.stage}): train stage reward there first")
    reward = reward_from_model(
        trained.model,
        trained.params,
        trained.tokenizer,
        weights=list(reward_axes(trained).values()),
        offset=found["score_mean"] if normalized else 0.0,
        scale=found["score_deviation"] if normalized else 1.0,
        length=trained.summary["about"]["length"],
        rows_at_once=64,
        jit=jit,
        name=str(path),
        warn=warn,
    )
    return trained, reward


def reward_axes(judge: TrainedModel) -> dict[str, float]:
    """The axes that a reward model has learned, in the order of its heads, and the weight of each in its total
    score."""
    data = read_json(judge.path / CONFIG_FILE)["data"]
    return ordered_axes(data["axes"] if "axes" in data else OVERALL_ONLY)


def check_same_axes(judges: Sequence[TrainedModel]) -> None:
    """UserError unless all learned the same axes with the same weights: otherwise their scores are not comparable."""
    first, *others = [(judge.path, reward_axes(judge)) for judge in judges]
    for path, axes in others:
        if axes != first[1]:
            said = [", ".join(f"{axis} {weight:g}" for axis, weight in each.items()) for each in (first[1], axes)]
            raise UserError(
                f"{first[0]} counts the axes {said[0]}, but {path} counts {said[1]}: an ensemble needs judges of the "
                "same axes, train them with one data.axes"
            )


def reward_from_workdirs(paths: str, tokenizer: Tokenizer, pessimism: float, *, longest: int, jit=jax.jit) -> Reward:
    """The reward model of a finished workdir, or the ensemble of several, whose names are separated by commas.

    longest: tokens of the longest prompt and answer that it will be given (see
    lm.rewards.reward_model.reward_row_length). UserError for one that does not read so many, or not these ids, and for
    members that learned different axes.
    """
    judges, members = zip(*(reward_from_workdir(path.strip(), tokenizer, longest, jit) for path in paths.split(",")))
    check_same_axes(judges)
    return reward_ensemble(members, pessimism=pessimism) if len(members) > 1 else members[0]


def reward_from_workdir(
    path: str | Path, tokenizer: Tokenizer, longest: int, jit=jax.jit
) -> tuple[TrainedModel, Reward]:
    """The reward model of a finished workdir that has this tokenizer and reads rows of `longest` tokens, centred."""
    judge, reward = load_reward_model(path, backend=jax.default_backend(), normalized=True, jit=jit, warn=warn)
    if judge.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{path} was trained with tokenizer and template {judge.tokenizer.fingerprint[:8]}, but this run "
            f"has {tokenizer.fingerprint[:8]}: train a reward model from the same tokenizer"
        )
    check_reward_length(f"{path} was trained on", judge.summary["about"]["length"], longest)
    return judge, reward


def check_reward_length(judge: str, length: int, longest: int) -> None:
    """UserError, which begins with `judge`, for a judge of rows of `length` tokens that is to read `longest`."""
    if longest > length:
        raise UserError(
            f"{judge} rows of {length} tokens, but a prompt and its answer may have {longest} here, which it would "
            f"read cut: lower prompt_length or max_new by {longest - length} in all, or train it with "
            f"--config.data.length={longest}"
        )

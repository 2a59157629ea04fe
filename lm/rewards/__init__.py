"""A reward is a host function (examples, texts) -> f32[B]: what each answer in `texts` to its example is worth."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lm.core.errors import UserError
from lm.rewards.penalties import length_reward, punctuation_reward, refusal_reward, repetition_reward, toxicity_reward
from lm.rewards.rule import rule_reward
from lm.rewards.verifiers.arithmetic import arithmetic_reward

Reward = Callable[[Sequence[Sequence[Mapping[str, str]]], Sequence[str]], np.ndarray]

# Those that need nothing but the text.
REWARDS: Mapping[str, Reward] = {
    "rule": rule_reward,
    "toxicity": toxicity_reward,
    "length": length_reward,
    "repetition": repetition_reward,
    "refusal": refusal_reward,
    "form": punctuation_reward,
    "arithmetic": arithmetic_reward,
}


def weighted_reward(
    parts: Mapping[str, tuple[float, Reward]],
) -> Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]:
    """(examples, texts) -> the weighted sum f32[B] of the parts, and each part as it is."""

    def total(examples, texts):
        each = {name: checked_rewards(name, reward, examples, texts) for name, (_, reward) in parts.items()}
        return sum(weight * each[name] for name, (weight, _) in parts.items()), each

    return total


def checked_rewards(name: str, reward: Reward, examples, texts) -> np.ndarray:
    """What the reward says, f32[B]. UserError names a reward that raises, miscounts, or says what is no number."""
    way_out = "mend it; the same command continues from the last checkpoint"
    try:
        found = np.asarray(reward(examples, texts), np.float32)
    except UserError:
        raise
    except Exception as error:
        fault = f"raised {type(error).__name__} ({error}) on {len(texts)} answers, the first {texts[0]!r:.80}"
        raise UserError(f"reward {name} {fault}: {way_out}") from error
    if found.shape != (len(texts),):
        raise UserError(
            f"reward {name} gave shape {found.shape} for {len(texts)} answers, not one number each: {way_out}"
        )
    wrong = np.flatnonzero(~np.isfinite(found))
    if len(wrong):
        fault = f"{found[wrong[0]]} for {len(wrong)} of {len(texts)} answers, the first {texts[wrong[0]]!r:.80}"
        raise UserError(f"reward {name} is {fault}: {way_out}")
    return found

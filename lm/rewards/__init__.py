"""A reward is a host function (examples, texts) -> f32[B]: what each answer in `texts` to its example is worth."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lm.rewards.penalties import form, length, refusal, repetition, toxicity
from lm.rewards.rule import rule

Reward = Callable[[Sequence[Sequence[Mapping[str, str]]], Sequence[str]], np.ndarray]

# Those that need nothing but the text.
REWARDS: Mapping[str, Reward] = {
    "rule": rule,
    "toxicity": toxicity,
    "length": length,
    "repetition": repetition,
    "refusal": refusal,
    "form": form,
}


def weighed(parts: Mapping[str, tuple[float, Reward]]) -> Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]:
    """(examples, texts) -> the weighted sum f32[B] of the parts, and each part as it is."""

    def total(examples, texts):
        each = {name: np.asarray(reward(examples, texts), np.float32) for name, (_, reward) in parts.items()}
        return sum(weight * each[name] for name, (weight, _) in parts.items()), each

    return total

"""A reward is a host function (examples, texts) -> f32[B]: what each answer in `texts` to its example is worth."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lm.rewards.rule import rule

Reward = Callable[[Sequence[Sequence[Mapping[str, str]]], Sequence[str]], np.ndarray]

REWARDS: Mapping[str, Reward] = {"rule": rule}  # those that need nothing but the text

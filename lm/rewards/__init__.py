"""What an answer is worth: a reward is a host function `(examples, texts) -> f32[B]`.

examples[i] is the row that answer i belongs to, a dict: `messages`, the conversation before the answer, and every other
field of the row (`answer`, `tests`, whatever the file holds). texts[i] is the answer. A function of one's own, named
"file.py:function" or "package.module:function", may also be async, be asked for one answer at a time, or give a number
for each token: lm.rewards.call says how. Built-in rewards have a name in REWARDS; those over the field `answer` live in
lm.rewards.verifiers, and the next one of its kind goes there.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from lm.core.config import RENAMED_KEYS
from lm.core.errors import UserError
from lm.core.imports import import_function, is_import_path
from lm.data.conversations import Example
from lm.rewards.assistant import assistant_reward
from lm.rewards.assistant_held_out import assistant_held_out_reward
from lm.rewards.call import Reward, RewardForm, WeightedRewards, reward_form, weighted_reward
from lm.rewards.penalties import length_reward, punctuation_reward, refusal_reward, repetition_reward, toxicity_reward
from lm.rewards.rule import rule_reward
from lm.rewards.verifiers import VERIFIERS
from lm.rewards.verifiers.arithmetic import arithmetic_reward

__all__ = ["REWARDS", "Example", "Reward", "RewardForm", "WeightedRewards", "named_rater", "named_reward"]
__all__ += ["reward_form", "reward_weights", "weighted_reward"]

REWARDS: Mapping[str, Reward] = {
    "rule": rule_reward,
    "assistant": assistant_reward,
    "assistant_held_out": assistant_held_out_reward,
    "toxicity": toxicity_reward,
    "length": length_reward,
    "repetition": repetition_reward,
    "refusal": refusal_reward,
    "punctuation": punctuation_reward,
    "arithmetic": arithmetic_reward,
    **VERIFIERS,
}


def reward_weights(rewards: Mapping[str, float] | str, option: str) -> dict[str, float]:
    """The weight of each reward, by name, of a mapping or of text such as "rule=1.0,my_rewards.py:accuracy=2.0".

    The text is for names with a dot, which a ConfigDict does not take as a key. UserError, which names `option`, for
    what is no weight.
    """
    if not isinstance(rewards, str):
        return dict(rewards)
    found: dict[str, float] = {}
    for entry in filter(None, (each.strip() for each in rewards.split(","))):
        name, equals, text = entry.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = float("nan")
        if not equals or not name.strip() or not np.isfinite(weight):
            raise UserError(f"{option} has {entry!r}: write NAME=WEIGHT, such as rule=1.0, with commas between several")
        if name.strip() in found:
            raise UserError(f"{option} names {name.strip()} twice: give it one weight")
        found[name.strip()] = weight
    return found


def named_reward(name: str, option: str, others: Sequence[str] = ()) -> Reward:
    """The built-in reward of this name, or the function that "file.py:function" names.

    option: where the name stands, for UserErrors. others: what may stand there too, for the message.
    """
    if is_import_path(name):
        reward = import_function(name, option)
        reward_form(reward, name)
        return reward
    if name not in REWARDS:
        known = ", ".join((*REWARDS, *others))
        renamed = f", which is called {RENAMED_KEYS['rewards', name]} now" if ("rewards", name) in RENAMED_KEYS else ""
        raise UserError(
            f"{option} is {name!r}{renamed}; choose one of {known}, or a function of yours, file.py:function"
        )
    return REWARDS[name]


def named_rater(name: str, option: str, others: Sequence[str] = ()) -> Reward:
    """As `named_reward`, in the plain form (examples, texts) -> f32[B], whatever form the function has."""
    reward = named_reward(name, option, others)
    if reward_form(reward, name).per_token:
        raise UserError(f"{option} {name!r} gives a number for each token: name a reward of whole answers")
    worth = weighted_reward({name: (1.0, reward)})
    return lambda examples, texts: worth(examples, texts).total

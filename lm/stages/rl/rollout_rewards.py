"""What sampled answers are worth: a weighted sum of rewards, penalties for length, and what is logged beside it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lm.core.errors import UserError, check_at_least
from lm.core.types import Tokens
from lm.losses.advantages import overlong_penalty
from lm.rewards import Reward, named_reward, reward_form, reward_weights, weighted_reward
from lm.stages.context import StageContext
from lm.stages.rl.multi_turn import SampledAnswers

REWARD_MODEL_NAME = "model"  # the name of the learnt reward among `rewards`
REWARD_MODEL_ONLY: Mapping[str, float] = {REWARD_MODEL_NAME: 1.0}


class RewardOptions(NamedTuple):
    """What an answer is worth: the sum of `rewards`, less the penalties for its length.

    `rewards` have names and weights, or are text, "rule=1.0,my_rewards.py:accuracy=2.0": "model" is the reward model of
    the workdir `reward_model`, the others are lm.rewards.REWARDS, or functions of one's own, file.py:function or
    package.module:function (lm.rewards tells their forms); where there are several, each is logged as reward/NAME. A
    reward per token goes to Rollouts.token_rewards: PPO and REINFORCE++ leave it with its token, all others sum it over
    the answer.
    """

    reward_model: str = ""  # a workdir; of several, with commas: their mean less `pessimism` standard deviations
    rewards: Mapping[str, float] | str = REWARD_MODEL_ONLY  # by name and weight; "model": the reward model
    pessimism: float = 0.0  # standard deviations of an ensemble's scores
    rater: str = ""  # a reward that is logged as score/NAME but never learned from
    reward_timeout: float = 0.0  # seconds that one call of a function of one's own may take; 0: no limit
    truncation_penalty: float = 1.0  # taken from the reward of an answer that the limit cut off
    overlong_buffer: int = 0  # an answer within so many tokens of the limit loses a share of 1 (overlong_penalty)


# Answers -> their reward f32[B], what of it belongs to single tokens f32[B,T] (None: nothing), and what is logged
# beside it, by name: the parts of the reward where there are several, the rater's score.
AnswerRewards = Callable[[SampledAnswers], tuple[np.ndarray, np.ndarray | None, dict[str, np.ndarray]]]


def answer_rewards(context: StageContext, options: RewardOptions, *, length: int, limit: int) -> AnswerRewards:
    """The rewards of rows of up to `length` tokens, of which up to `limit` are sampled, with the penalties."""
    check_at_least(0, "data", overlong_buffer=options.overlong_buffer)
    parts = reward_parts(
        context, reward_weights(options.rewards, "data.rewards"), options.reward_model, options.pessimism, length
    )
    without_penalties = rollout_rewards(context, parts, options.rater, options.reward_timeout)

    def rewards(answers: SampledAnswers):
        total, token_rewards, scores = without_penalties(answers)
        total = total - options.truncation_penalty * ~answers.stopped
        if options.overlong_buffer:
            penalty = overlong_penalty(answers.lengths, limit=limit, buffer=options.overlong_buffer)
            total = total + np.asarray(penalty)
        return np.asarray(total, np.float32), token_rewards, scores

    return rewards


def rollout_rewards(
    context: StageContext, parts: Mapping[str, tuple[float, Reward]], rater: str, timeout: float
) -> AnswerRewards:
    """The weighted sum of `parts`, and the score of the `rater`."""
    check_at_least(0, "data", reward_timeout=timeout)
    raters = {rater: (0.0, named_reward(rater, "data.rater"))} if rater else {}
    reward_sum, rater_scores = (weighted_reward(each, timeout=timeout) for each in (parts, raters))
    needs_tokens = any(reward_form(reward, name).per_token for name, (_, reward) in {**parts, **raters}.items())

    def rewards(answers: SampledAnswers):
        tokens = [context.tokenizer.pieces(ids) for ids in answers.last_ids] if needs_tokens else ()
        total, by_name, token_rewards = reward_sum(answers.examples, answers.texts, tokens)
        scores_by_name = rater_scores(answers.examples, answers.texts, tokens).parts
        labels = reward_labels(parts) if len(parts) > 1 else {}
        scores = {f"reward/{label}": by_name[name] for name, label in labels.items()}
        scores |= {f"score/{label}": scores_by_name[name] for name, label in reward_labels(raters).items()}
        if token_rewards is not None:
            token_rewards = answer_token_rewards(answers.tokens, token_rewards)
        return total, token_rewards, scores

    return rewards


def answer_token_rewards(tokens: Tokens, token_rewards: Sequence[np.ndarray]) -> np.ndarray:
    """f32[B,T]: the rewards of each answer's tokens at the positions that predict them, the last sampled ones of a
    row."""
    weights = np.asarray(tokens.weights)
    rewards = np.zeros(weights.shape, np.float32)
    for row, values in enumerate(token_rewards):
        sampled = np.flatnonzero(weights[row] > 0)
        rewards[row, sampled[len(sampled) - len(values) :]] = values
    return rewards


def reward_labels(names: Iterable[str]) -> dict[str, str]:
    """What each reward is called in metrics: itself, or the function of a file; whole where two would be alike."""
    short = {name: name.rpartition(":")[2] for name in names}
    return {name: label if list(short.values()).count(label) == 1 else name for name, label in short.items()}


def reward_parts(
    context: StageContext, rewards: Mapping[str, float], reward_model: str, pessimism: float, longest: int
) -> dict[str, tuple[float, Reward]]:
    """Weight and function of each reward whose weight is not 0. UserError for a name that is none."""
    functions = {
        name: named_reward(name, "the name in data.rewards", (REWARD_MODEL_NAME,))
        for name in rewards
        if name != REWARD_MODEL_NAME
    }
    if not any(rewards.values()):
        raise UserError(
            f"data.rewards gives no reward a weight: there is nothing to learn; set e.g. {REWARD_MODEL_NAME} to 1.0"
        )
    return {
        name: (
            weight,
            context.load_reward_model(reward_model, pessimism, longest)
            if name == REWARD_MODEL_NAME
            else functions[name],
        )
        for name, weight in rewards.items()
        if weight
    }

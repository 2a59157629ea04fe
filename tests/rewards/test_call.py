"""Rewards of every form give the same numbers, and one that goes wrong is one line with the row."""

import asyncio
import time

import numpy as np
import pytest

from lm.core.errors import UserError
from lm.rewards import named_rater, named_reward, reward_weights, weighted_reward
from lm.rewards.call import RewardForm, reward_form

EXAMPLES = [{"messages": [{"role": "user", "content": f"What is {i} + 1?"}], "answer": str(i + 1)} for i in range(3)]
TEXTS = ["1", "5", "3"]
TOKENS = [["1", "<end>"], ["5"], ["3", "<end>"]]
RIGHT = [1, 0, 1]


def batch(examples, texts):
    return [float(example["answer"] == text) for example, text in zip(examples, texts)]


def one(example, text):
    return example["answer"] == text


async def async_batch(examples, texts):
    return batch(examples, texts)


async def async_one(example, text):
    await asyncio.sleep(0)
    return one(example, text)


class Judge:
    async def __call__(self, example, text):
        return one(example, text)


@pytest.mark.parametrize("reward", [batch, one, async_batch, async_one, Judge(), lambda e, t: np.array(batch(e, t))])
def test_every_form_gives_the_same(reward):
    total, parts, on_tokens = weighted_reward({"mine": (2.0, reward)})(EXAMPLES, TEXTS)
    np.testing.assert_array_equal(total, 2 * np.array(RIGHT))
    np.testing.assert_array_equal(parts["mine"], RIGHT)
    assert total.dtype == np.float32 and on_tokens is None


def test_async_calls_wait_together():
    """Six calls of a fifth of a second, of two rewards, take little longer than one; in a running loop, too."""

    async def slow(example, text):
        await asyncio.sleep(0.2)
        return one(example, text)

    async def notebook():
        return weighted_reward({"a.py:f": (1.0, slow), "b.py:f": (1.0, slow)}, timeout=5.0)(EXAMPLES, TEXTS)

    start = time.monotonic()
    np.testing.assert_array_equal(asyncio.run(notebook()).total, 2 * np.array(RIGHT))
    assert time.monotonic() - start < 1.0


def per_token(example, text, tokens):
    return [0.5] + [0.0] * (len(tokens) - 1) if text == "5" else [float(i) for i in range(len(tokens))]


def padded_per_token(examples, texts, tokens):
    found = np.zeros((len(texts), 4))
    for i, row in enumerate(zip(examples, texts, tokens)):
        found[i, : len(row[2])] = per_token(*row)
    return found


async def async_per_token(example, text, tokens):
    return per_token(example, text, tokens)


@pytest.mark.parametrize("reward", [per_token, padded_per_token, async_per_token])
def test_a_reward_per_token(reward):
    """By hand: rows [0, 1], [0.5], [0, 1] of tokens, times 2; their sums beside the other reward."""
    found = weighted_reward({"batch": (1.0, batch), "tokens": (2.0, reward)})(EXAMPLES, TEXTS, TOKENS)
    np.testing.assert_array_equal(found.parts["tokens"], [1, 0.5, 1])
    np.testing.assert_array_equal(found.total, [1 + 2, 0 + 1, 1 + 2])
    for values, expected in zip(found.token_rewards, ([0, 2], [1], [0, 2]), strict=True):
        np.testing.assert_array_equal(values, expected)


def test_two_rewards_per_token_add_up():
    parts = {"a": (1.0, per_token), "b": (-2.0, padded_per_token)}
    found = weighted_reward(parts)(EXAMPLES, TEXTS, TOKENS)
    np.testing.assert_array_equal(np.concatenate(found.token_rewards), [0, -1, -0.5, 0, -1])
    np.testing.assert_array_equal(found.total, [-1, -0.5, -1])


def test_forms_are_told_by_the_signature():
    assert reward_form(batch, "it") == RewardForm(per_answer=False, per_token=False, is_async=False)
    assert reward_form(async_per_token, "it") == RewardForm(per_answer=True, per_token=True, is_async=True)
    assert reward_form(lambda *given: None, "it") == RewardForm(False, False, False)
    for wrong in (lambda: 0, lambda text: 0, lambda examples, texts, third: 0, lambda examples, texts, *, must: 0):
        with pytest.raises(UserError, match=r"reward it takes \(.*\), but a reward is a function \(examples, texts\)"):
            reward_form(wrong, "it")


def raising(examples, texts):
    return [1 / (int(text) - 5) for text in texts]


def raising_one(example, text):
    raise KeyError("tests")


async def raising_async(example, text):
    return raising([example], [text])[0]


def raising_together(examples, texts):
    if len(texts) > 1:
        raise OSError("too many\nat once")
    return [0.0]


ROW = r"row 2 of 3 \('What is 1 \+ 1\?', answered '5'\)"
FAULTS = [
    (raising, rf"reward mine raised ZeroDivisionError: .* \(test_call.py, line \d+\) on {ROW}: mend it; the same"),
    (raising_one, r"raised KeyError: 'tests' \(test_call.py, line \d+\) on row 1 of 3 \('What is 0 \+ 1\?', answered"),
    (raising_async, rf"raised ZeroDivisionError: .* on {ROW}: mend it"),
    (raising_together, r"raised OSError: too many at once \(.*\) on a batch of 3 rows, the first row 1 of 3"),
    (lambda e, t: np.zeros(4), r"reward mine gave shape \(4,\) for 3 answers, not one number each: mend it"),
    (lambda e, t: np.zeros((3, 2)), r"gave shape \(3, 2\) .*; a reward per token has a third parameter `tokens`: mend"),
    (lambda e, t: 1.0, r"reward mine gave shape \(\) for 3 answers"),
    (lambda e, t: ["a", "b", "c"], r"reward mine gave \['a', 'b', 'c'\] for 3 answers, no numbers: mend it"),
    (lambda e, t: [[1], [1, 2], []], r"reward mine gave \[\[1\], \[1, 2\], \[\]\] for 3 answers, no numbers"),
    (lambda e, t: [0, np.nan, 1], rf"reward mine is nan for {ROW}: mend it"),
    (lambda e, t: [0, None, None], rf"reward mine is nan for {ROW} and 1 more: mend it"),
    (lambda e, t: [0, 1e39, 1], rf"reward mine is inf for {ROW}"),
    (lambda e, t, tokens: [[0, 0], [0]], r"reward mine gave 2 rows for 3 answers, not one of numbers each"),
    (lambda e, t, tokens: 3.0, r"reward mine gave float, no rows, for 3 answers"),
    (lambda e, t, tokens: [[0, 0], [0, 1], [0, 0]], rf"reward mine gave shape \(2,\) for the 1 tokens of {ROW}"),
    (lambda e, t, tokens: [[0, 0], [np.inf], [0, 0]], rf"reward mine is inf for token 1 \('5'\) of {ROW}"),
]  # fmt: skip


@pytest.mark.parametrize("reward, message", FAULTS)
def test_a_reward_that_fails_is_one_line_with_the_row(reward, message):
    with pytest.raises(UserError, match=message) as caught:
        weighted_reward({"mine": (1.0, reward)})(EXAMPLES, TEXTS, TOKENS)
    assert "\n" not in str(caught.value)


def sleeping(examples, texts):
    time.sleep(3)


def sleeping_one(example, text):
    time.sleep(3 if text == "5" else 0)
    return 0.0


async def sleeping_async(example, text):
    await asyncio.sleep(3 if text == "5" else 0)
    return 0.0


@pytest.mark.parametrize(
    "reward, row", [(sleeping, r"a batch of 3 rows, the first row 1 of 3"), (sleeping_one, ROW), (sleeping_async, ROW)]
)
def test_a_reward_has_its_time(reward, row):
    start = time.monotonic()
    with pytest.raises(
        UserError, match=rf"reward my.py:f has not answered within data.reward_timeout, 0.1 s, on {row}"
    ):
        weighted_reward({"my.py:f": (1.0, reward)}, timeout=0.1)(EXAMPLES, TEXTS)
    assert time.monotonic() - start < 2


def test_an_async_function_that_blocks_is_late_too():
    async def blocking(examples, texts):
        time.sleep(4)

    with pytest.raises(
        UserError, match="reward my.py:f has not answered within data.reward_timeout, 0.1 s, on a batch"
    ):
        weighted_reward({"my.py:f": (1.0, blocking)}, timeout=0.1)(EXAMPLES, TEXTS)


def test_the_library_s_own_have_no_limit():
    def slow(examples, texts):
        time.sleep(0.2)
        return batch(examples, texts)

    assert weighted_reward({"model": (1.0, slow)}, timeout=0.01)(EXAMPLES, TEXTS).total.tolist() == RIGHT


def test_rewards_by_name(tmp_path, monkeypatch):
    (tmp_path / "named_rewards.py").write_text(
        "def accuracy(example, text):\n    return example['answer'] == text\n\n"
        "def dense(example, text, tokens):\n    return [0.0] * len(tokens)\n\nANSWER = 42\n"
    )
    monkeypatch.chdir(tmp_path)
    assert named_rater("named_rewards.py:accuracy", "rater")(EXAMPLES, TEXTS).tolist() == RIGHT
    assert named_rater("exact", "rater")(EXAMPLES, TEXTS).tolist() == RIGHT
    assert reward_form(named_reward("named_rewards.py:dense", "rewards"), "it").per_token
    with pytest.raises(
        UserError, match="rater 'named_rewards.py:dense' gives a number for each token: name a reward of"
    ):
        named_rater("named_rewards.py:dense", "rater")
    with pytest.raises(
        UserError, match="rater is 'rul'; choose one of rule, .*, or a function of yours, file.py:function"
    ):
        named_rater("rul", "rater")
    with pytest.raises(UserError, match="reward dense gives a number for each token, but here answers are texts only"):
        weighted_reward({"dense": (1.0, per_token)})(EXAMPLES, TEXTS)


def test_weights_as_text():
    assert reward_weights("rule=1.0, my_rewards.py:accuracy=2e0", "it") == {"rule": 1.0, "my_rewards.py:accuracy": 2.0}
    assert reward_weights({"rule": 0.5}, "it") == {"rule": 0.5} and reward_weights("", "it") == {}
    for wrong, message in [
        ("rule", "it has 'rule': write NAME=WEIGHT, such as rule=1.0"),
        ("rule=much", "it has 'rule=much'"),
        ("rule=nan", "it has 'rule=nan'"),
        ("=1.0", "it has '=1.0'"),
        ("rule=1,rule=2", "it names rule twice"),
    ]:
        with pytest.raises(UserError, match=message):
            reward_weights(wrong, "it")

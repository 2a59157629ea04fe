import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.errors import UserError
from lm.losses.advantages import (
    centered_group_advantages,
    gae,
    group_advantages,
    kl_rewards,
    last_token_mask,
    leave_one_out_advantages,
    overlong_penalty,
    rewards_by_group,
    rewards_to_go,
    whiten,
)


def row(*values):
    return jnp.array([values], jnp.float32)


def test_last_token_is_the_last_of_positive_weight():
    weights = jnp.array([[0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0], [0.5, 0, 2, 0]])
    np.testing.assert_array_equal(last_token_mask(weights), [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]])


def test_reward_stands_at_the_last_real_token():
    """Rule 4. -0.5 * kl on every sampled token; the row's reward, 3, joins the last sampled one: -0.5 * 2 + 3 = 2."""
    got = kl_rewards(jnp.array([3.0]), row(9, 1, 2, 9), row(0, 1, 1, 0), beta=0.5)
    np.testing.assert_allclose(got, row(0, -0.5, 2, 0))


def test_gae_by_hand():
    """gamma 0.9, lambda 0.5; the value after the last token is 0 (rule 4).

    delta_2 = 2 + 0.9 * 0 + 1 = 3            A_2 = 3
    delta_1 = 0 + 0.9 * (-1) - 1 = -1.9      A_1 = -1.9 + 0.45 * 3 = -0.55
    delta_0 = 1 + 0.9 * 1 - 0.5 = 1.4        A_0 = 1.4 - 0.45 * 0.55 = 1.1525
    """
    advantages, returns = gae(row(1, 0, 2), row(0.5, 1, -1), row(1, 1, 1), gamma=0.9, lam=0.5)
    np.testing.assert_allclose(advantages, row(1.1525, -0.55, 3), rtol=1e-6)
    np.testing.assert_allclose(returns, row(1.6525, 0.45, 2), rtol=1e-6)  # A + V, before any whitening


def test_lambda_one_is_the_discounted_return_minus_the_value():
    # returns 1 + 0.9 * (0 + 0.9 * 2) = 2.62, 0.9 * 2 = 1.8, 2
    advantages, returns = gae(row(1, 0, 2), row(0.5, 1, -1), row(1, 1, 1), gamma=0.9, lam=1.0)
    np.testing.assert_allclose(returns, row(2.62, 1.8, 2), rtol=1e-6)
    np.testing.assert_allclose(advantages, row(2.12, 0.8, 3), rtol=1e-6)


def test_rewards_of_single_tokens_stay_with_them():
    """A row worth 5, of which 2 and 0.5 belong to its first two sampled tokens: the last gets the other 2.5; what
    stands on a prompt counts nothing. No token rewards is the same as zeros."""
    weights, kl = row(0, 1, 1, 1, 0), row(9, 0.1, 0.2, 0.3, 9)
    found = kl_rewards(jnp.array([5.0]), kl, weights, beta=1.0, token_rewards=row(7, 2, 0.5, 0, 7))
    np.testing.assert_allclose(found, row(0, 2 - 0.1, 0.5 - 0.2, 2.5 - 0.3, 0), rtol=1e-6)
    zeros, none = (kl_rewards(jnp.array([5.0]), kl, weights, beta=1.0, token_rewards=x) for x in (0 * kl, None))
    np.testing.assert_array_equal(zeros, none)


def test_lambda_zero_is_the_one_step_error():
    advantages, _ = gae(row(1, 0, 2), row(0.5, 1, -1), row(1, 1, 1), gamma=0.9, lam=0.0)
    np.testing.assert_allclose(advantages, row(1.4, -1.9, 3), rtol=1e-6)


def test_a_gap_in_the_mask_is_stepped_over():
    """A tool's output between sampled tokens: the same numbers as without it, and nothing on it."""
    advantages, returns = gae(row(1, 50, 60, 0, 2), row(0.5, 70, 80, 1, -1), row(1, 0, 0, 1, 1), gamma=0.9, lam=0.5)
    np.testing.assert_allclose(advantages, row(1.1525, 0, 0, -0.55, 3), rtol=1e-6)
    np.testing.assert_allclose(returns, row(1.6525, 0, 0, 0.45, 2), rtol=1e-6)


def test_garbage_in_prompt_and_padding_does_not_leak():
    nan = jnp.nan
    clean = gae(row(1, 0, 2), row(0.5, 1, -1), row(1, 1, 1))
    dirty = gae(row(nan, 1, 0, 2, 1e30), row(1e30, 0.5, 1, -1, nan), row(0, 1, 1, 1, 0))
    for a, b in zip(clean, dirty):
        np.testing.assert_array_equal(jnp.pad(a, ((0, 0), (1, 1))), b)


def test_a_row_without_sampled_tokens_is_all_zero():
    for x in gae(row(1, 2), row(3, 4), row(0, 0)):
        np.testing.assert_array_equal(x, row(0, 0))


def test_whiten():
    """Rule 4: mean 0 and deviation 1 over the masked tokens of the whole batch, not of each row."""
    x, weights = jnp.array([[1.0, 2, 99], [5, 8, 99]]), jnp.array([[1.0, 1, 0], [1, 1, 0]])
    # mean 4, variance (9 + 4 + 1 + 16) / 4 = 7.5
    np.testing.assert_allclose(whiten(x, weights), np.array([[-3, -2, 0], [1, 4, 0]]) / 7.5**0.5, rtol=1e-5)
    np.testing.assert_array_equal(whiten(row(3, 3), row(1, 1)), row(0, 0))  # all alike: nothing to learn, no NaN
    np.testing.assert_array_equal(whiten(row(3, 4), row(0, 0)), row(0, 0))


REWARDS = jnp.array([1.0, 2.0, 6.0, 0.1, 0.1, 0.1])  # two groups of three, the second all alike


def test_advantages_within_a_group():
    # mean 3: -2, -1, 3; sample variance (4 + 1 + 9) / 2 = 7; the mean of the others is 4, 3.5, 1.5
    np.testing.assert_allclose(centered_group_advantages(REWARDS, 3), [-2, -1, 3, 0, 0, 0], rtol=1e-6)
    root = np.sqrt(7) + 1e-4
    np.testing.assert_allclose(group_advantages(REWARDS, 3), [-2 / root, -1 / root, 3 / root, 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(leave_one_out_advantages(REWARDS, 3), [1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("advantage", [centered_group_advantages, group_advantages, leave_one_out_advantages])
def test_equal_rewards_give_exactly_nothing(advantage):
    """Rule 5. The mean of three float32 0.1 is not 0.1; over a deviation of 0 + 1e-4 that would be 7e-5."""
    for value in (0.1, 1 / 3, 1e6 + 0.1, -7.7):
        np.testing.assert_array_equal(advantage(jnp.full(6, value, jnp.float32), 3), np.zeros(6))


def test_a_group_of_one_has_nothing_to_compare():
    with pytest.raises(UserError, match="data.group is 1: this stage compares answers to one prompt; give it at least"):
        rewards_by_group(REWARDS, 1)


def test_rewards_to_go_under_the_mask():
    # the gap of weight 0 is stepped over and gets nothing
    np.testing.assert_allclose(rewards_to_go(row(1, 2, 9, 4), row(1, 1, 0, 1)), row(7, 6, 0, 4))


def test_overlong_answers_pay_towards_the_limit():
    # limit 10, buffer 4: free up to 6, then a quarter a token, -1 at the limit
    lengths = jnp.array([0, 6, 7, 9, 10, 12])
    np.testing.assert_allclose(overlong_penalty(lengths, limit=10, buffer=4), [0, 0, -0.25, -0.75, -1, -1])

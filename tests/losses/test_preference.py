"""Losses of preferences: by hand, at their limits, their gradients, and the policies at which they are least."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.losses.preference import dpo_loss, ipo_loss, kto_loss, log_odds, odds_ratio_loss, simpo_loss
from lm.losses.ranking import bradley_terry_loss


def slope(loss, *at):
    """d loss / d first argument."""
    return float(jax.grad(loss)(*map(jnp.float32, at)))


def test_dpo():
    # -log sigmoid(0.7 + 0.3) = log(1 + e^-1) = 0.313262; equal rewards give log 2; far apart it is linear, not infinite
    got = dpo_loss(jnp.array([0.7, 0.5, -100.0]), jnp.array([-0.3, 0.5, 100.0]))
    np.testing.assert_allclose(got, [0.313262, math.log(2), 200.0], rtol=1e-5)
    # the gradient is -sigmoid(-d): one half where policy = reference, all of it on a verdict that is far from learned
    np.testing.assert_allclose([slope(dpo_loss, 0.0, 0.0), slope(dpo_loss, -100.0, 0.0)], [-0.5, -1.0])


def test_dpo_with_smoothing():
    # 0.9 * 0.313262 + 0.1 * (0.313262 + 1) = 0.413262; policy = reference costs log 2, whatever the smoothing
    smoothed = functools.partial(dpo_loss, label_smoothing=0.1)
    np.testing.assert_allclose(
        smoothed(jnp.array([1.0, 0.5]), jnp.array([0.0, 0.5])), [0.413262, math.log(2)], rtol=1e-5
    )
    # least at sigmoid(d) = 0.9, d = log 9; beyond, the loss pulls back
    np.testing.assert_allclose(slope(smoothed, math.log(9), 0.0), 0.0, atol=1e-6)
    assert slope(smoothed, 4.0, 0.0) > 0 > slope(smoothed, 1.0, 0.0)
    # a verdict that may be wrong still pulls with 1 - smoothing; `flipped` of bradley_terry lets go of it instead
    np.testing.assert_allclose(slope(smoothed, -50.0, 0.0), -0.9, rtol=1e-6)
    assert abs(slope(functools.partial(bradley_terry_loss, flip_probability=0.1), -50.0, 0.0)) < 1e-6


def test_dpo_as_beta_goes_to_zero_is_the_plain_difference_of_log_probs():
    """-log sigmoid(beta d) = log 2 - beta d / 2 + O(beta^2): raise one, lower the other, by however much already."""
    by_beta = lambda logprob: dpo_loss(1e-4 * logprob, 0.0) / 1e-4
    np.testing.assert_allclose([slope(by_beta, x) for x in (-5.0, 0.0, 5.0)], [-0.5] * 3, rtol=1e-3)


def test_ipo():
    # beta 0.5 asks for a lead of 1: (0.7 - 0.2 - 1)^2 = 0.25; policy = reference: 1 / (4 beta^2) = 1
    half = functools.partial(ipo_loss, beta=0.5)
    np.testing.assert_allclose(half(jnp.array([0.7, 0.3]), jnp.array([0.2, 0.3])), [0.25, 1.0], rtol=1e-6)
    np.testing.assert_allclose(ipo_loss(jnp.float32(0.0), 0.0, beta=0.1), 25.0, rtol=1e-6)
    # slope 2 (d - 1): none at the lead asked for, backwards beyond it
    np.testing.assert_allclose([slope(half, x, 0.0) for x in (0.0, 1.0, 1.5)], [-2.0, 0.0, 1.0])


def test_kto():
    # beta (r - z) = 0.5 * (3 - 1) = 1: desirable 1 - sigmoid(1) = 0.268941, undesirable 1 - sigmoid(-1) = 0.731059
    got = kto_loss(jnp.array([3.0, 3.0]), jnp.float32(1.0), jnp.array([True, False]), beta=0.5)
    np.testing.assert_allclose(got, [0.268941, 0.731059], rtol=1e-5)
    weighed = kto_loss(
        jnp.array([3.0, 3.0]),
        jnp.float32(1.0),
        jnp.array([True, False]),
        beta=0.5,
        desirable_weight=2.0,
        undesirable_weight=0.5,
    )
    np.testing.assert_allclose(weighed, [2 * 0.268941, 0.5 * 0.731059], rtol=1e-5)


@pytest.mark.parametrize("desirable, sign", [(True, -1), (False, 1)])
def test_kto_pulls_most_at_the_reference_point_and_not_at_all_far_from_it(desirable, sign):
    loss = lambda r: kto_loss(r, 2.0, desirable, beta=0.5)
    np.testing.assert_allclose(slope(loss, 2.0), sign * 0.5 / 4)  # beta sigmoid'(0)
    np.testing.assert_allclose([slope(loss, -98.0), slope(loss, 102.0)], [0, 0], atol=1e-7)


def test_log_odds():
    # p = 0.5, 0.9 and 0.2: odds 1, 9 and 1/4
    got = log_odds(jnp.log(jnp.array([0.5, 0.9, 0.2])))
    np.testing.assert_allclose(got, [0.0, math.log(9), -math.log(4)], atol=1e-6)
    # d/dm log(p / (1 - p)) = 1 / (1 - p); where p is 1 to rounding, the value is finite and its slope is none
    np.testing.assert_allclose(slope(log_odds, math.log(0.9)), 10.0, rtol=1e-5)
    np.testing.assert_allclose(log_odds(jnp.array([0.0, -500.0])), [-math.log(1e-6), -500.0], rtol=1e-4)
    assert slope(log_odds, 0.0) == 0 and slope(log_odds, -500.0) == 1


def test_orpo():
    # odds of p = 0.5 and 0.2 are 1 and 1/4: -log sigmoid(log 4) = -log(4 / 5) = 0.223144; equal answers give log 2
    got = odds_ratio_loss(jnp.log(jnp.array([0.5, 0.3])), jnp.log(jnp.array([0.2, 0.3])))
    np.testing.assert_allclose(got, [0.223144, math.log(2)], rtol=1e-5)


def test_simpo():
    # 2 * (-0.7 + 1.5) - 1 = 0.6: log(1 + e^-0.6) = 0.437488; equal means still lack gamma: log(1 + e) = 1.313262
    asked = functools.partial(simpo_loss, beta=2.0, gamma=1.0)
    np.testing.assert_allclose(asked(jnp.array([-0.7, -1.0]), jnp.array([-1.5, -1.0])), [0.437488, 1.313262], rtol=1e-5)
    # as beta goes to 0 nothing is compared: -log sigmoid(-gamma), and no gradient
    unscaled = functools.partial(simpo_loss, beta=0.0, gamma=1.0)
    np.testing.assert_allclose(unscaled(jnp.float32(-1.0), -2.0), 1.313262, rtol=1e-5)
    assert slope(unscaled, -1.0, -2.0) == 0


# Rule 16: five answers to one prompt are all there is, so that what a loss asks for can be written down.

REFERENCE = jax.nn.log_softmax(jnp.array([0.3, -1.2, 0.8, 0.1, -0.4]))
DRAWN = jax.nn.softmax(jnp.array([0.5, 0.2, -0.9, 0.4, 0.0]))  # how often each is shown: not by the reference
BETA = 0.3


def population(loss, beats, logits):
    """E loss(log-ratio of the winner, of the loser): both drawn by DRAWN, beats[i, j] the probability that i wins."""
    ratio = jax.nn.log_softmax(logits) - REFERENCE
    return jnp.sum(DRAWN[:, None] * DRAWN[None, :] * beats * loss(ratio[:, None], ratio[None, :]))


def test_dpo_is_least_at_the_optimum_of_reward_less_kl():
    """Verdicts are Bradley-Terry with reward r: no gradient at p* = p_ref exp(r / beta) / Z, which RLHF would find."""
    r = jnp.array([1.0, -0.5, 0.2, 0.9, -1.3])
    loss = functools.partial(
        population, lambda a, b: dpo_loss(BETA * a, BETA * b), jax.nn.sigmoid(r[:, None] - r[None, :])
    )
    optimum = jax.nn.log_softmax(REFERENCE + r / BETA)
    objective = lambda logits: (
        jnp.exp(jax.nn.log_softmax(logits)) @ (r - BETA * (jax.nn.log_softmax(logits) - REFERENCE))
    )
    np.testing.assert_allclose(jax.grad(objective)(optimum), 0.0, atol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(optimum), 0.0, atol=1e-6)
    assert jnp.max(jnp.abs(jax.grad(loss)(REFERENCE))) > 0.01
    for name, key in ((f"draw {i}", jax.random.key(i)) for i in range(5)):
        assert loss(optimum + 0.3 * jax.random.normal(key, (5,))) > loss(optimum), name


def test_ipo_is_least_at_the_optimum_of_win_rate_less_kl():
    """Any preferences, cycles too: no gradient at p* = p_ref exp(P(wins) / beta) / Z (Azar et al. 2023, theorem 3)."""
    draw = np.random.default_rng(0).uniform(size=(5, 5))
    beats = jnp.asarray(np.triu(draw, 1) + np.tril(1 - draw.T, -1) + 0.5 * np.eye(5), jnp.float32)
    loss = functools.partial(population, functools.partial(ipo_loss, beta=BETA), beats)
    optimum = jax.nn.log_softmax(REFERENCE + beats @ DRAWN / BETA)
    np.testing.assert_allclose(jax.grad(loss)(optimum), 0.0, atol=1e-6)
    assert jnp.max(jnp.abs(jax.grad(loss)(REFERENCE))) > 0.01


def test_where_one_side_always_wins_ipo_stops_and_dpo_does_not():
    """P = 1: DPO's gradient only fades with the lead, IPO's is zero at 1 / (2 beta) and turns."""
    leads = jnp.array([0.0, 1.0, 5.0, 20.0])
    assert jnp.all(jax.vmap(jax.grad(lambda d: dpo_loss(BETA * d, 0.0)))(leads) < 0)
    assert jnp.sign(jax.vmap(jax.grad(lambda d: ipo_loss(d, 0.0, beta=0.1)))(leads)).tolist() == [-1, -1, 0, 1]

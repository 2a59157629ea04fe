"""Unreduced losses: by hand, at their limits, and by enumerating a vocabulary of 4."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.losses import policy, ranking

LOGITS = jnp.array([0.3, -1.2, 0.8, 0.1])
REFERENCE = jnp.array([-0.5, 0.4, 0.9, -0.2])


def exact_kl(p_logits, q_logits):
    p, q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    return jnp.sum(jnp.exp(p) * (p - q))


def expected(logits, of_token):
    """E of of_token(log p, log q) over tokens drawn from p = softmax(logits); drawing itself has no gradient."""
    logprobs, reference = jax.nn.log_softmax(logits), jax.nn.log_softmax(REFERENCE)
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(logprobs)) * of_token(logprobs, reference))


def test_bradley_terry():
    # -log sigmoid(2 - 1) = log(1 + e^-1) = 0.313262; equal scores give log 2; far apart it is linear, not infinite
    got = ranking.bradley_terry_loss(jnp.array([2.0, 0.5, -100.0]), jnp.array([1.0, 0.5, 100.0]))
    np.testing.assert_allclose(got, [0.313262, math.log(2), 200.0], rtol=1e-6)


def test_bradley_terry_with_a_margin_and_wrong_verdicts():
    # d = 2 - 1 - 0.5 = 0.5; sigmoid 0.622459; 0.9 * 0.622459 + 0.1 * 0.377541 = 0.597967; -log = 0.514219
    got = ranking.bradley_terry_loss(jnp.array([2.0]), jnp.array([1.0]), margin=0.5, flip_probability=0.1)
    np.testing.assert_allclose(got, [0.514219], rtol=1e-5)
    # however far on the wrong side the scores are, a verdict that may be wrong costs -log 0.1 and pulls no more
    far = lambda x: ranking.bradley_terry_loss(x, 0.0, flip_probability=0.1)
    np.testing.assert_allclose(far(-50.0), -math.log(0.1), rtol=1e-6)
    assert abs(jax.grad(far)(-50.0)) < 1e-6 and jax.grad(lambda x: ranking.bradley_terry_loss(x, 0.0))(-50.0) == -1


RANKS = jnp.array([[2, 1, 3, 0]])
SCORES = jnp.array([[0.5, 1.0, -0.5, 9.0]])


def test_plackett_luce():
    # best is 1: log(1 + e^-0.5 + e^-1.5) = 0.604126; then 0 before 2: log(1 + e^-1) = 0.313262; the last has no choice
    got = ranking.plackett_luce_loss(SCORES, RANKS)
    np.testing.assert_allclose(got, [[0.313262, 0.604126, 0.0, 0.0]], rtol=1e-4)
    assert jax.grad(lambda s: ranking.plackett_luce_loss(s, RANKS).sum())(SCORES)[0, 3] == 0  # no such answer


def test_plackett_luce_is_a_distribution_over_orders():
    orders = [[1, 2, 3], [1, 3, 2], [2, 1, 3], [2, 3, 1], [3, 1, 2], [3, 2, 1]]
    scores = jnp.tile(SCORES[:, :3], (6, 1))
    each = jnp.exp(-ranking.plackett_luce_loss(scores, jnp.array(orders)).sum(axis=1))
    np.testing.assert_allclose(each.sum(), 1, rtol=1e-6)


def test_plackett_luce_of_two_is_bradley_terry():
    got = ranking.plackett_luce_loss(jnp.array([[0.3, 1.1], [0.3, 1.1]]), jnp.array([[1, 2], [2, 1]])).sum(axis=1)
    np.testing.assert_allclose(got, ranking.bradley_terry_loss(jnp.array([0.3, 1.1]), jnp.array([1.1, 0.3])), rtol=1e-6)


def test_plackett_luce_of_a_tie_compares_its_members_with_the_worse_only():
    got = ranking.plackett_luce_loss(SCORES[:, :3], jnp.array([[1, 1, 2]]))
    np.testing.assert_allclose(got, [[math.log(1 + math.exp(-1.0)), math.log(1 + math.exp(-1.5)), 0]], rtol=1e-5)


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [
        (1.0, 2.0, -2.0, -2.0),  # policy = old: -A, and the gradient of -ratio A is -ratio A
        (1.1, 2.0, -2.2, -2.2),  # inside the clip
        (1.5, 2.0, -2.4, 0.0),  # min(3.0, 1.2 * 2) = 2.4: past the clip in the direction of gain, no gradient
        (1.5, -2.0, 3.0, 3.0),  # min(-3.0, -2.4) = -3.0: going the wrong way is never clipped
        (0.5, 2.0, -1.0, -1.0),  # min(1.0, 0.8 * 2) = 1.0
        (0.5, -2.0, 1.6, 0.0),  # min(-1.0, 0.8 * -2) = -1.6
    ],
)
def test_clipped_surrogate(ratio, advantage, loss, slope):
    """Rule 4: the clip; d/d logprob of -ratio A is -ratio A, and zero beyond the clip."""

    def of_logprob(logprob):
        return policy.clipped_surrogate(policy.token_ratio(logprob, -3.0), advantage, clip_low=0.2, clip_high=0.2)

    np.testing.assert_allclose(jax.value_and_grad(of_logprob)(jnp.log(ratio) - 3.0), [loss, slope], rtol=1e-5)


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [
        (1.25, 2.0, -2.5, -2.5),  # clip-higher: 1.25 is inside 1 + 0.28
        (1.5, 2.0, -2.56, 0.0),  # 1.28 * 2
        (2.0, -2.0, 4.0, 4.0),  # below the dual clip
        (5.0, -2.0, 6.0, 0.0),  # max(-10, 3 * -2) = -6: a bad token that became likely costs no more, and pulls no more
        (5.0, 2.0, -2.56, 0.0),  # the dual clip is for bad tokens only
    ],
)
def test_clip_higher_and_dual_clip(ratio, advantage, loss, slope):
    def of_logprob(logprob):
        return policy.clipped_surrogate(
            policy.token_ratio(logprob, -3.0), advantage, clip_low=0.2, clip_high=0.28, dual_clip=3.0
        )

    np.testing.assert_allclose(jax.value_and_grad(of_logprob)(jnp.log(ratio) - 3.0), [loss, slope], rtol=1e-5)


def test_sequence_ratio_is_the_geometric_mean_of_a_row():
    # log-ratios 0.2, -0.1, 0.5 and one of weight 0: exp(0.6 / 3) = 1.221403; one token: its own; no token: 1
    logprobs = jnp.array([[0.2, -0.1, 0.5, 9.0], [0.0, 0.3, 0.0, 0.0], [7.0, 7.0, 7.0, 7.0]])
    weights = jnp.array([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    got = policy.sequence_ratio(logprobs, jnp.zeros((3, 4)), weights)
    np.testing.assert_allclose(got, np.repeat([[1.221403], [1.349859], [1.0]], 4, axis=1), rtol=1e-6)


def test_truncated_reinforce_cuts_the_weight_and_keeps_the_gradient():
    # weight min(ratio, 3): ratio 2 -> 2, ratio 5 -> 3; gradient -weight * A whatever the ratio, log p only its carrier
    of_logprob = lambda x, ratio: policy.truncated_reinforce_loss(x, ratio, 2.0, clip_high=2.0)
    np.testing.assert_allclose(jax.grad(of_logprob)(-1.0, 2.0), -4.0)
    np.testing.assert_allclose(jax.grad(of_logprob)(-1.0, 5.0), -6.0)
    assert jax.grad(of_logprob, argnums=1)(-1.0, 2.0) == 0


@pytest.mark.parametrize(
    "value, old, target, loss, slope",
    [
        (1.0, 1.0, 2.0, 0.5, -1.0),  # 0.5 * (1 - 2)^2, gradient v - R
        (1.1, 1.0, 2.0, 0.405, -0.9),  # inside the clip: 0.5 * 0.81
        (1.5, 1.0, 2.0, 0.32, 0.0),  # max(0.25, (1.2 - 2)^2 = 0.64) / 2: moved enough towards R, no gradient
        (0.5, 1.0, 2.0, 1.125, -1.5),  # max(2.25, (0.8 - 2)^2 = 1.44) / 2: moved away, full gradient
    ],
)
def test_clipped_value(value, old, target, loss, slope):
    """Rule 4: 0.5 * max((v - R)^2, (clip(v, v_old - e, v_old + e) - R)^2)."""
    got = jax.value_and_grad(policy.clipped_value_loss)(value, old, target, clip=0.2)
    np.testing.assert_allclose(got, [loss, slope], rtol=1e-5)


def test_log_ratio_is_bounded_before_exp():
    """Rule 7."""
    got = policy.log_ratio(jnp.array([0.0, -1.0, -500.0]), jnp.array([-500.0, -3.0, 0.0]))
    np.testing.assert_array_equal(got, [20.0, 2.0, -20.0])
    far = policy.kl_k3(jnp.array([-500.0, 0.0]), jnp.array([0.0, -500.0]))
    assert jnp.all(jnp.isfinite(far)) and jnp.isfinite(policy.clipped_surrogate(policy.token_ratio(0.0, -500.0), 1.0))


def test_kl_by_hand():
    # p = 0.5, q = 0.25: k1 = log 2; k3 = 0.5 - 1 - log 0.5 = 0.193147
    p, q = jnp.log(0.5), jnp.log(0.25)
    np.testing.assert_allclose([policy.kl_k1(p, q), policy.kl_k3(p, q)], [math.log(2), math.log(2) - 0.5], rtol=1e-6)
    assert policy.kl_k1(p, p) == 0 and policy.kl_k3(p, p) == 0  # rule 6: policy = reference


def test_kl_k3_is_never_negative():
    """Rule 7, rounding included: log-ratios from 1e-9 to 30, both signs."""
    log = np.geomspace(1e-9, 30, 4000, dtype=np.float32)
    assert jnp.all(policy.kl_k3(jnp.concatenate([log, -log]), jnp.zeros(8000)) >= 0)


@pytest.mark.parametrize("estimator", [policy.kl_k1, policy.kl_k3])
def test_kl_estimators_are_unbiased(estimator):
    """Rule 7: the expectation over the whole vocabulary is the exact KL."""
    np.testing.assert_allclose(expected(LOGITS, estimator), exact_kl(LOGITS, REFERENCE), rtol=1e-5)


def test_kl_k1_in_the_reward_has_the_gradient_of_the_kl():
    """Rules 7 and 16. REINFORCE with k1 held constant: E[k1 * grad log p] is the gradient of KL(p, q)."""
    in_reward = lambda logits: expected(logits, lambda p, q: jax.lax.stop_gradient(policy.kl_k1(p, q)) * p)
    exact = jax.grad(exact_kl)(LOGITS, REFERENCE)
    assert jnp.max(jnp.abs(exact)) > 0.1
    np.testing.assert_allclose(jax.grad(in_reward)(LOGITS), exact, atol=1e-6)


def test_kl_k1_as_a_loss_has_no_gradient_at_all():
    """Rule 7: E[grad log p] = 0, whatever the reference."""
    np.testing.assert_allclose(jax.grad(lambda x: expected(x, policy.kl_k1))(LOGITS), 0.0, atol=1e-6)


def test_kl_k3_as_a_loss_has_the_gradient_of_the_reverse_kl():
    """Rule 7: E[grad (q/p - log q/p)] = -sum q grad log p, which is the gradient of KL(q, p), not of KL(p, q)."""
    as_loss = jax.grad(lambda x: expected(x, policy.kl_k3))(LOGITS)
    np.testing.assert_allclose(as_loss, jax.grad(exact_kl, argnums=1)(REFERENCE, LOGITS), atol=1e-6)
    assert jnp.max(jnp.abs(as_loss - jax.grad(exact_kl)(LOGITS, REFERENCE))) > 0.05

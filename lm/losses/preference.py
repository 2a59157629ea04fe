"""Losses of a policy on preferences among given answers, unreduced and elementwise: arrays of any one shape."""

import jax
import jax.numpy as jnp

Array = jax.Array


def dpo_loss(chosen: Array, rejected: Array, *, label_smoothing: float = 0.0) -> Array:
    """-(1 - smoothing) log sigmoid(d) - smoothing log sigmoid(-d), with d = chosen - rejected.

    `chosen` and `rejected` are implicit rewards beta * (log p - log p_ref), each log p a sum over the answer's tokens.
    Rafailov et al. 2023, eq. 7, arXiv 2305.18290. smoothing is `label_smoothing` (cDPO), the share of preferences that
    are wrong: the loss is least at a finite d = log((1 - smoothing) / smoothing) (Mitchell 2023, "A note on DPO with
    noisy preferences and relationship to IPO"). `flip_probability` of lm.losses.ranking.bradley_terry_loss only bounds
    what one wrong preference costs.
    """
    d = chosen - rejected
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(d) - label_smoothing * jax.nn.log_sigmoid(-d)


def ipo_loss(chosen: Array, rejected: Array, *, beta: float) -> Array:
    """(d - 1 / (2 beta))^2, with d = chosen - rejected: a lead to reach, and not to exceed.

    Both are log(p / p_ref) as a *mean* over the answer's tokens. Azar et al. 2023, eq. 17, arXiv 2310.12036, has the
    sum (its answers are single actions); the mean is TRL's choice, agreed with the paper's authors, and ours: with sums
    the same lead would be near for long answers and far for short ones. beta 0.5 asks for a lead of 1 nat a token.
    """
    return jnp.square(chosen - rejected - 1 / (2 * beta))


def kto_loss(
    rewards: Array,
    baseline: Array,
    desirable: Array,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Array:
    """lambda_D (1 - sigmoid(beta (r - z))) of a desirable answer, lambda_U (1 - sigmoid(beta (z - r))) of any other.

    r is log(p / p_ref) summed over the answer's tokens; z (`baseline`) stands for KL(p, p_ref) and has no gradient;
    `desirable` is bool. Ethayarajh et al. 2024, eq. 8, arXiv 2402.01306.
    """
    lead = beta * (rewards - baseline)
    good, bad = jax.nn.sigmoid(-lead), jax.nn.sigmoid(lead)  # 1 - sigmoid(x) = sigmoid(-x), which does not cancel
    return jnp.where(desirable, desirable_weight * good, undesirable_weight * bad)


def log_odds(mean_logprob: Array) -> Array:
    """log(p / (1 - p)) of an answer's p = exp(mean log-prob of its tokens).

    p = 1 would be infinite, and is reached by rounding: a mean above -1e-6 counts as -1e-6.
    """
    m = jnp.minimum(mean_logprob, -1e-6)
    return m - jax.nn.log1mexp(-m)


def odds_ratio_loss(chosen_mean: Array, rejected_mean: Array) -> Array:
    """-log sigmoid(log odds(chosen) - log odds(rejected)), from means of log-probs over each answer's tokens.

    Hong et al. 2024, eq. 7, arXiv 2403.07691.
    """
    return -jax.nn.log_sigmoid(log_odds(chosen_mean) - log_odds(rejected_mean))


def simpo_loss(chosen_mean: Array, rejected_mean: Array, *, beta: float, gamma: float) -> Array:
    """-log sigmoid(beta (chosen - rejected) - gamma), from means of log-probs over each answer's tokens.

    Meng et al. 2024, eq. 6, arXiv 2405.14734. `gamma` is the lead that is asked for, in the units of the reward
    beta * mean log-prob.
    """
    return -jax.nn.log_sigmoid(beta * (chosen_mean - rejected_mean) - gamma)

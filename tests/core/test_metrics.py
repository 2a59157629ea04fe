import jax.numpy as jnp
import numpy as np

from lm.core import metrics
from lm.core.metrics import Mean, mean, row_mean, row_sum, scalar_metric


def test_mean_divides_once_at_the_very_end():
    """Rule 1. One token of loss 4 and three of loss 0: 4 / 4 = 1; the mean of the means would be (4 + 0) / 2 = 2."""
    a = mean(jnp.array([4.0]), jnp.ones(1))
    b = mean(jnp.zeros(3), jnp.ones(3))
    assert (a + b).value() == 1.0
    assert (a.value() + b.value()) / 2 == 2.0


def test_weights():
    # (2 * 1 + 6 * 3) / (1 + 3) = 5
    assert mean(jnp.array([2.0, 6.0]), jnp.array([1.0, 3.0])).value() == 5.0
    # a coefficient scales the term and leaves what it is divided by
    assert (0.5 * Mean(jnp.float32(8), jnp.float32(4))) == Mean(jnp.float32(4), jnp.float32(4))
    assert scalar_metric(7).value() == 7.0 and scalar_metric(7).weight == 1.0


def test_weight_zero_equals_deleting_the_token():
    values, weights = jnp.array([3.0, jnp.nan, 5.0, jnp.inf]), jnp.array([1.0, 0.0, 3.0, 0.0])
    assert mean(values, weights) == mean(values[::2], weights[::2])


def test_nothing_counted_is_zero_not_nan():
    assert mean(jnp.array([jnp.nan]), jnp.zeros(1)).value() == 0.0


def test_three_averages_of_tokens_in_rows():
    """Rule 5. Rows of 1 and of 3 tokens, and an empty one that counts for nothing: values 4; 1, 2, 3.

    Tokens: (4 + 6) / 4 = 2.5. Rows: (4 + 2) / 2 = 3. Sums over a constant of 3: (4/3 + 6/3) / 2 = 5/3.
    """
    values = jnp.array([[4.0, jnp.nan, 9.0], [1.0, 2.0, 3.0], [9.0, 9.0, 9.0]])
    weights = jnp.array([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert mean(values, weights).value() == 2.5
    assert row_mean(values, weights).value() == 3.0
    np.testing.assert_allclose(row_sum(values, weights, length=3).value(), 5 / 3, rtol=1e-6)
    halves = [row_mean(values[rows], weights[rows]) for rows in (slice(0, 1), slice(1, 3))]
    assert (halves[0] + halves[1]).value() == 3.0  # cut into microbatches and summed


def test_add_and_values():
    a = {"x": Mean(jnp.float32(1), jnp.float32(2)), "y": scalar_metric(1)}
    total = metrics.metric_values(metrics.metric_sum(a, a | {"x": Mean(jnp.float32(2), jnp.float32(2))}))
    assert total == {"x": 0.75, "y": 1.0}  # (1 + 2) / (2 + 2), (1 + 1) / 2
    assert all(type(value) is float for value in total.values())
    np.testing.assert_equal(metrics.metric_values({}), {})

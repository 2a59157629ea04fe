"""Rule 6: the one distribution that sampler and losses share. Rule 14: top-p keeps the token that crosses p."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.model.logits import row_sampling_logits, sampling_logits, values_at_ids

PROBS = [0.1, 0.5, 0.15, 0.25]


def probs(logits, **options):
    return jax.nn.softmax(sampling_logits(jnp.asarray(logits, jnp.float32), **options), axis=-1)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, PROBS),
        ({"top_k": 4}, PROBS),
        ({"top_k": 9}, PROBS),  # more than there are: all
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),  # 0.5 and 0.25 over 0.75
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_p": 0.3}, [0, 1, 0, 0]),  # the first alone reaches it
        ({"top_p": 0.6}, [0, 2 / 3, 0, 1 / 3]),  # 0.5 < 0.6: 0.25 crosses and stays
        ({"top_p": 0.8}, [0, 5 / 9, 1 / 6, 5 / 18]),  # 0.75 < 0.8: 0.15 crosses and stays; over 0.9
        ({"top_p": 1e-6}, [0, 1, 0, 0]),  # never empty
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),  # top-p is of what top-k left: 2/3 reaches 0.6
        ({"min_p": 0.6}, [0, 1, 0, 0]),  # at least 0.6 x 0.5 = 0.3
        ({"min_p": 0.4}, [0, 2 / 3, 0, 1 / 3]),  # at least 0.2
        ({"min_p": 0.25}, [0, 5 / 9, 1 / 6, 5 / 18]),  # at least 0.125; over 0.9
        ({"min_p": 1e-6}, PROBS),
        ({"min_p": 1.0}, [0, 1, 0, 0]),  # never empty
        ({"top_p": 0.8, "min_p": 0.4}, [0, 2 / 3, 0, 1 / 3]),  # 0.15 is in the set of top-p, but under 0.2
        ({"temperature": 0.5, "min_p": 0.3}, [0, 1, 0, 0]),  # of the sharpened ones: 12.5 < 0.3 x 50
        ({"temperature": 2.0, "min_p": 0.6}, [0, 1 / (1 + 0.5**0.5), 0, 1 / (1 + 2**0.5)]),  # roots 0.707, 0.5, 0.387
        ({"temperature": 0.5}, [2 / 69, 50 / 69, 4.5 / 69, 12.5 / 69]),  # squares 0.01 0.25 0.0225 0.0625 over 0.345
        ({"temperature": 0.5, "top_p": 0.74}, [0, 0.8, 0, 0.2]),  # of the sharpened ones: 0.7246 < 0.74; 50 to 12.5
    ],
)
def test_support_and_probabilities_by_hand(options, expected):
    np.testing.assert_allclose(probs(np.log(PROBS), **options), expected, atol=1e-6)


def test_ties_with_the_kth_stay():
    np.testing.assert_allclose(probs([1.0, 2.0, 1.0, 0.0], top_k=2) > 0, [True, True, True, False])
    np.testing.assert_allclose(probs([2.0, 1.0, 2.0, 0.0], min_p=1.0), [0.5, 0, 0.5, 0])


def test_temperature_zero_is_argmax_the_first_of_equals():
    logits = jnp.array([[1.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    np.testing.assert_array_equal(probs(logits, temperature=0.0), [[0, 1, 0], [1, 0, 0]])


def test_rows_are_independent():
    logits = np.random.default_rng(0).normal(size=(3, 4, 7)).astype(np.float32)
    together = sampling_logits(jnp.asarray(logits), temperature=0.7, top_k=5, top_p=0.8)
    alone = sampling_logits(jnp.asarray(logits[1, 2]), temperature=0.7, top_k=5, top_p=0.8)
    np.testing.assert_array_equal(together[1, 2], alone)
    assert 1 <= int(jnp.isfinite(alone).sum()) <= 5


def test_picked_is_a_gather():
    x = jnp.array([[1.0, 2.0, -jnp.inf], [4.0, 5.0, 6.0]])
    ids = jnp.array([2, 0])
    np.testing.assert_array_equal(values_at_ids(x, ids), [-jnp.inf, 4.0])
    np.testing.assert_array_equal(jax.grad(lambda x: values_at_ids(x, ids)[1])(x), [[0, 0, 0], [1, 0, 0]])


def test_rows_with_settings_of_their_own_are_cut_as_each_alone():
    """Every combination in one batch, also of ties and of more than there are."""
    rows = [
        {"temperature": t, "top_k": k, "top_p": p, "min_p": m}
        for t in (0.7, 1.0, 2.0)
        for k in (0, 1, 3, 40)
        for p in (1.0, 0.6, 1e-6)
        for m in (0.0, 0.1, 1.0)
    ]
    draw = np.random.default_rng(0)
    logits = np.round(2 * draw.normal(size=(len(rows), 11)), 1).astype(np.float32)  # rounded: some are equal
    settings = {name: jnp.asarray([row[name] for row in rows]) for name in rows[0]}
    together = row_sampling_logits(
        logits,
        log_min_p=jnp.asarray([np.log(r["min_p"]) if r["min_p"] else -np.inf for r in rows]),
        temperature=settings["temperature"],
        top_k=settings["top_k"],
        top_p=settings["top_p"],
    )
    for row, found, options in zip(logits, together, rows):
        np.testing.assert_allclose(found, sampling_logits(jnp.asarray(row), **options), rtol=1e-6)
    assert np.isinf(together).any(axis=1).sum() > 60 and np.isfinite(together).any(axis=1).all()


def test_rows_without_a_cut_keep_all():
    logits, none = jnp.asarray([PROBS, PROBS]), jnp.zeros(2, jnp.int32)
    kept = row_sampling_logits(
        logits, temperature=jnp.array([1.0, 2.0]), top_k=none, top_p=jnp.ones(2), log_min_p=jnp.full(2, -jnp.inf)
    )
    np.testing.assert_allclose(kept, [PROBS, np.asarray(PROBS) / 2])

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import model, optim
from lm.errors import UserError

RATE = 0.01


def rates(name, *steps, total_steps=110, warmup_steps=10, final_fraction=0.1):
    schedule = optim.schedule(
        name=name, learning_rate=RATE, total_steps=total_steps, warmup_steps=warmup_steps, final_fraction=final_fraction
    )
    return [float(schedule(step)) / RATE for step in steps]


@pytest.mark.parametrize(
    "name, steps, expected",
    [
        # warm-up counts from 1: 1/10 at step 0, 2/10 at step 1, the peak at step 9; then 100 steps remain
        ("constant", [0, 1, 8, 9, 10, 109], [0.1, 0.2, 0.9, 1, 1, 1]),
        ("linear", [9, 10, 35, 60, 110], [1, 1, 0.775, 0.55, 0.1]),  # 1 - 0.9 * 25/100, 1 - 0.9 * 50/100
        ("cosine", [9, 10, 60, 110], [1, 1, 0.55, 0.1]),  # halfway cos = 0: 0.1 + 0.9 / 2
        ("wsd", [9, 10, 89, 90, 100, 110], [1, 1, 1, 1, 0.55, 0.1]),  # the last 20 of 100 fall
    ],
)
def test_schedules_by_hand(name, steps, expected):
    np.testing.assert_allclose(rates(name, *steps), expected, rtol=1e-5)


def test_without_warmup_the_first_step_is_at_the_peak():
    np.testing.assert_allclose(rates("linear", 0, 5, 10, total_steps=10, warmup_steps=0), [1, 0.55, 0.1], rtol=1e-5)


def test_bad_schedules():
    with pytest.raises(UserError, match="optimizer.schedule is 'cosin'; choose one of constant, linear, cosine, wsd"):
        rates("cosin", 0)
    with pytest.raises(UserError, match="warmup_steps 10 is not below optimizer.total_steps 10"):
        rates("cosine", 0, total_steps=10)


@pytest.mark.parametrize("tied", [True, False])
def test_decay_mask_names_exactly_the_matrices(tied, tiny_model):
    """Rule 10: no weight decay on norms and embeddings; nor on the scalar head, which starts at zero to stay small."""
    m = model.make(dataclasses.replace(tiny_model.config, tied=tied))
    params = jax.eval_shape(lambda key: {"lm": m.init(key), "value": m.init_value(key)}, jax.random.key(0))
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, yes in jax.tree_util.tree_flatten_with_path(optim.decay_mask(params))[0]
        if yes
    }
    matrices = {"query", "key", "value", "attention_out", "gate", "up", "down"}
    assert decayed == {f"lm/layers/{name}" for name in matrices} | (set() if tied else {"lm/head"})


def stepped(params, grads, **options):
    optimizer = optim.make(learning_rate=RATE, total_steps=100, schedule_name="constant", **options)
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    return optax.apply_updates(params, updates), state


def test_first_step_by_hand():
    """Adam's first step is rate * sign(g); the decay takes rate * 0.1 * w more, from the matrix alone.

    Warm-up over 4 steps: rate 0.01 / 4 = 0.0025. matrix: 2 - 0.0025 * (1 + 0.1 * 2) = 1.997; norm: 2 - 0.0025.
    """
    params = {"matrix": jnp.array([2.0]), "norm": jnp.array([2.0])}
    grads = {"matrix": jnp.array([0.3]), "norm": jnp.array([0.3])}
    new, state = stepped(params, grads, warmup_steps=4, weight_decay=0.1)
    np.testing.assert_allclose([new["matrix"][0], new["norm"][0]], [1.997, 1.9975], rtol=1e-6)
    rate = optax.tree.get(state, "learning_rate", filtering=lambda _, value: isinstance(value, jax.Array))
    np.testing.assert_allclose(rate, 0.0025, rtol=1e-6)


def moment(state):
    return optax.tree.get(state, "mu")["w"]


def test_clip_is_of_the_global_norm():
    """Gradient (3, 4) of norm 5 clipped to 1 is (0.6, 0.8); Adam's first moment is (1 - b1) = 0.1 of it."""
    params, grads = {"w": jnp.ones(2)}, {"w": jnp.array([3.0, 4.0])}
    np.testing.assert_allclose(moment(stepped(params, grads, clip_norm=1.0)[1]), [0.06, 0.08], rtol=1e-5)
    np.testing.assert_allclose(moment(stepped(params, grads, clip_norm=10.0)[1]), [0.3, 0.4], rtol=1e-5)
    np.testing.assert_allclose(moment(stepped(params, grads, clip_norm=0.0)[1]), [0.3, 0.4], rtol=1e-5)


def test_zero_gradient_moves_nothing():
    new, _ = stepped({"w": jnp.ones(2)}, {"w": jnp.zeros(2)}, weight_decay=0.0)
    np.testing.assert_array_equal(new["w"], [1, 1])

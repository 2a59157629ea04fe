"""Update: gradient, annotate, minibatches, reference, value_head, on a linear model small enough to follow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.core.errors import UserError
from lm.core.metrics import Mean, mean, scalar_metric
from lm.optim import update
from lm.optim.combinators import (
    annotate,
    combined_loss,
    frozen_reference,
    minibatches,
    refreshed_reference,
    with_moving_reference,
    with_value_head,
)
from lm.optim.update import gradient

KEY = jax.random.key(0)
SGD = optax.sgd(1.0)  # parameters move by minus the gradient


def squares(params, frozen, batch, key):
    """Weighted mean of (x . w - y)^2."""
    term = mean(jnp.square(batch["x"] @ params["lm"] - batch["y"]), batch["weight"])
    return term, {"loss": term}


def two_terms(params, frozen, batch, key):
    """The same plus 0.3 times the mean of (x . w)^2 over other weights."""
    fit, metrics = squares(params, frozen, batch, key)
    small = 0.3 * mean(jnp.square(batch["x"] @ params["lm"]), batch["other"])
    return {"fit": fit, "small": small}, metrics | {"small": small}


def batch(rows=8, seed=0):
    draw = np.random.default_rng(seed)
    return {
        "x": draw.normal(size=(rows, 3)).astype(np.float32),
        "y": draw.normal(size=rows).astype(np.float32),
        "weight": draw.uniform(0, 5, size=rows).astype(np.float32),
        "other": (draw.uniform(size=rows) > 0.6).astype(np.float32),
    }


def after(loss, batch, **options):
    """Parameters and metrics of one step of plain gradient descent from (1, 2, 3)."""
    u = gradient(loss, SGD, **options)
    state, metrics = u.update(u.init(KEY, {"lm": jnp.array([1.0, 2.0, 3.0])}, {}), batch)
    return state.params["lm"], metrics


@pytest.mark.parametrize("loss", [squares, two_terms])
@pytest.mark.parametrize("seed", [0, 1])
def test_microbatches_do_not_change_the_update(loss, seed):
    """Rule 1, two terms with different denominators included (trap 10)."""
    data = batch(seed=seed)
    one, metrics = after(loss, data)
    exact = jax.grad(
        lambda w: sum(
            t.value() for t in jax.tree.leaves(loss({"lm": w}, {}, data, KEY)[0], is_leaf=lambda x: isinstance(x, Mean))
        )
    )(jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(one, jnp.array([1.0, 2.0, 3.0]) - exact, rtol=1e-6)
    for count in (2, 4):
        many, summed = after(loss, data, microbatches=count)
        np.testing.assert_allclose(many, one, rtol=1e-6, atol=1e-6)
        for name in metrics:
            np.testing.assert_allclose(summed[name].value(), metrics[name].value(), rtol=1e-5)


def test_a_mean_of_means_would_be_another_update():
    """By hand, w = 1: row a (x 1, y 0, weight 3) has gradient 2, row b (x 1, y 3, weight 1) has 2 * (1 - 3) = -4.

    (3 * 2 - 4) / 4 = 0.5, so w becomes 0.5. Two microbatches averaged after their own division: (2 - 4) / 2 = -1.
    """
    data = {"x": jnp.ones((2, 1)), "y": jnp.array([0.0, 3.0]), "weight": jnp.array([3.0, 1.0])}
    u = gradient(squares, SGD, microbatches=2)
    state, metrics = u.update(u.init(KEY, {"lm": jnp.array([1.0])}, {}), data)
    np.testing.assert_allclose(state.params["lm"], [0.5], rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"].value(), (3 * 1 + 4) / 4)  # squares 1 and 4
    np.testing.assert_allclose(metrics["grad_norm"].value(), 0.5, rtol=1e-6)


def test_weight_zero_equals_deleting_the_row():
    data = batch()
    data["weight"][[1, 4]] = 0
    kept = {name: np.delete(x, [1, 4], axis=0) for name, x in data.items()}
    np.testing.assert_allclose(after(squares, data)[0], after(squares, kept)[0], rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_nothing_trained_gives_a_zero_gradient(count):
    """Rule 1: zero trained tokens move nothing and give no NaN."""
    w, metrics = after(squares, batch() | {"weight": np.zeros(8, np.float32)}, microbatches=count)
    np.testing.assert_array_equal(w, [1, 2, 3])
    assert metrics["loss"].value() == 0 and metrics["grad_norm"].value() == 0


def test_microbatches_are_cut_column_major():
    """Trap 7: part i takes rows i, i + count, ..., so each part spans every device that holds rows."""
    np.testing.assert_array_equal(update.batch_parts(jnp.arange(6), 2), [[0, 2, 4], [1, 3, 5]])
    with pytest.raises(UserError, match="6 rows cannot be cut into 4"):
        update.batch_parts(jnp.arange(6), 4)


def test_step_counts_and_the_key_is_never_advanced():
    """Rule 12: randomness is fold_in(key, step); the key itself stays."""
    seen = []

    def loss(params, frozen, batch, key):
        jax.debug.callback(lambda k: seen.append(tuple(k.tolist())), jax.random.key_data(key), ordered=True)
        return squares(params, frozen, batch, key)

    u = gradient(loss, SGD)
    state = u.init(KEY, {"lm": jnp.ones(3)}, {})
    for step in (1, 2):
        state, _ = u.update(state, batch())
        assert state.step == step
        np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(KEY))
    jax.effects_barrier()
    assert len(set(seen)) == 2


def test_learning_rate_is_reported():
    u = gradient(squares, optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.5, 0.0, 10)))
    state, first = u.update(u.init(KEY, {"lm": jnp.ones(3)}, {}), batch())
    _, second = u.update(state, batch())
    np.testing.assert_allclose([first["learning_rate"].value(), second["learning_rate"].value()], [0.5, 0.45])
    assert "learning_rate" not in after(squares, batch())[1]


def test_the_noise_scale_by_hand():
    """w = 0, x = 1: a row (y, weight 1) of four has gradient -2 y / 4 in the sum, and two microbatches of rows 0, 2 and
    1, 3.

    y = 1, 2, 3, 6: the parts are -(1 + 3) / 2 = -2 and -(2 + 6) / 2 = -4, together G = -6. Twice a part is a
    microbatch's own gradient: |-4|^2 and |-8|^2, in the mean 40; |G|^2 = 36.
    S = (40 - 36) / (1/2 - 1/4) = 16 and |G|^2 without noise = (4 * 36 - 2 * 40) / (4 - 2) = 32: half a row.
    """
    data = {"x": jnp.ones((4, 1)), "y": jnp.array([1.0, 2.0, 3.0, 6.0]), "weight": jnp.ones(4)}
    u = gradient(squares, SGD, microbatches=2)
    _, metrics = u.update(u.init(KEY, {"lm": jnp.array([0.0])}, {}), data)
    found = metrics["noise_scale"]
    np.testing.assert_allclose([found.total, found.weight, found.value()], [16, 32, 0.5], rtol=1e-6)
    assert "noise_scale" not in after(squares, batch())[1]


@pytest.mark.parametrize("rows, count", [(32, 2), (32, 8), (128, 4)])
def test_the_noise_scale_of_a_regression_whose_noise_is_known(rows, count):
    """y = e, x normal in three dimensions, at w = (0.5, 0, 0): a row's gradient is 2 x (x . w - e).

    Its mean G is 2 w, |G|^2 = 1. Its second moment: 4 E |x|^2 (x . w)^2 = 4 * (3 + 2) |w|^2 = 5, and 4 E |x|^2 e^2 =
    4 * 3 * 4 = 48 with noise of deviation 2. S = 5 + 48 - 1 = 52 rows. Over 1,500 steps the totals find it, whatever
    the sizes; the mean of the steps' own quotients would be no such number.
    """
    u = gradient(squares, SGD, microbatches=count)
    state = u.init(KEY, {"lm": jnp.array([0.5, 0.0, 0.0])}, {})

    def step(total, key):
        x, e = jax.random.normal(key, (rows, 3)), 2 * jax.random.normal(jax.random.fold_in(key, 1), (rows,))
        found = u.update(state, {"x": x, "y": e, "weight": jnp.ones(rows)})[1]["noise_scale"]
        return total + found, None

    total, _ = jax.jit(lambda: jax.lax.scan(step, Mean(0.0, 0.0), jax.random.split(KEY, 1500)))()
    np.testing.assert_allclose([total.total / 1500, total.weight / 1500], [52, 1], rtol=0.12)
    np.testing.assert_allclose(total.value(), 52, rtol=0.15)


def test_rows_of_unequal_weight_add_to_the_noise_scale():
    """x = 1, y = 0, w = 1: every row's gradient is 2, so there is no noise but that of the weights, here 1 or 3.

    Their coefficient of variation is 1 / 2, its square a quarter of a row; in batches as small as two rows, 4 / 14.
    """
    u = gradient(squares, SGD, microbatches=2)
    total = Mean(0.0, 0.0)
    for weights in ((1.0, 1.0), (1.0, 3.0), (3.0, 1.0), (3.0, 3.0)):
        data = {"x": jnp.ones((2, 1)), "y": jnp.zeros(2), "weight": jnp.array(weights)}
        total += u.update(u.init(KEY, {"lm": jnp.array([1.0])}, {}), data)[1]["noise_scale"]
    # |2 * 2 / 4|^2 and |2 * 6 / 4|^2: 5 in the mean; S = 2 (5 * 4 / 4 - 4) = 2 of such a batch, |G|^2 = 2 * 4 - 5 = 3
    np.testing.assert_allclose([total.total, total.weight], [2 * 2, 2 * 3 + 2 * 4], rtol=1e-6)


def test_evaluate_changes_nothing_and_scores_the_batch():
    u = gradient(squares, SGD)
    state = u.init(KEY, {"lm": jnp.array([1.0, 2.0, 3.0])}, {})
    assert u.evaluate(state, batch())["loss"] == after(squares, batch())[1]["loss"]


def test_annotate_runs_once_before_the_inner_update():
    def doubled(state, batch):
        return batch | {"y": 2 * batch["y"]}, {"step": scalar_metric(state.step)}

    u = annotate(doubled, minibatches(gradient(squares, SGD), epochs=2, count=2))
    data = batch()
    state = u.init(KEY, {"lm": jnp.ones(3)}, {})
    state, metrics = u.update(state, data)
    plain = minibatches(gradient(squares, SGD), epochs=2, count=2)
    expected, _ = plain.update(plain.init(KEY, {"lm": jnp.ones(3)}, {}), data | {"y": 2 * data["y"]})
    np.testing.assert_array_equal(state.params["lm"], expected.params["lm"])
    assert metrics["step"].value() == 0 and state.step == 4
    assert u.evaluate(state, data)["step"].value() == 4


def test_minibatches_visit_every_row_once_an_epoch():
    """The gradient of sum_i w_i over a minibatch is 1 on its rows: three epochs leave -3 everywhere, in six updates."""

    def loss(params, frozen, batch, key):
        total = Mean(jnp.sum(params["lm"][batch["row"]]), jnp.float32(1))
        return total, {"rows": Mean(jnp.float32(len(batch["row"])), jnp.float32(1))}

    u = minibatches(gradient(loss, SGD), epochs=3, count=2)
    state, metrics = u.update(u.init(KEY, {"lm": jnp.zeros(6)}, {}), {"row": jnp.arange(6)})
    np.testing.assert_array_equal(state.params["lm"], -3 * np.ones(6))
    assert state.step == 6
    assert metrics["rows"].weight == 6 and metrics["rows"].value() == 3  # Means of all six updates are summed


def orders(*, epochs, count, rows=8):
    """The rows as minibatches met them, i32[batches,epochs,rows], over two batches."""
    seen = []

    def spied(state, batch):
        jax.debug.callback(lambda x: seen.append(x), batch["row"], ordered=True)
        return state.replace(step=state.step + 1), {}

    u = minibatches(gradient(squares, SGD)._replace(update=spied), epochs=epochs, count=count)
    state = u.init(KEY, {"lm": jnp.zeros(3)}, {})
    for _ in range(2):
        state, _ = u.update(state, {"row": jnp.arange(rows)})
    jax.effects_barrier()
    return np.concatenate(seen).reshape(2, epochs, rows)


def test_no_two_draws_share_a_key(monkeypatch):
    """Rule 12: each shuffle and each microbatch's loss has a key of its own, in every step of two batches."""
    seen = []
    permutation = jax.random.permutation

    def note(key):
        jax.debug.callback(lambda k: seen.append(tuple(k.tolist())), jax.random.key_data(key), ordered=True)

    def loss(params, frozen, batch, key):
        note(key)
        return squares(params, frozen, batch, key)

    def order(key, rows):
        for subkey in (key, *jax.random.split(key)):  # a shuffle draws from the halves of its key
            note(subkey)
        return permutation(key, rows)

    monkeypatch.setattr(jax.random, "permutation", order)
    u = minibatches(gradient(loss, SGD), epochs=2, count=2)
    state = u.init(KEY, {"lm": jnp.ones(3)}, {})
    for _ in range(2):
        state, _ = u.update(state, batch())
    jax.effects_barrier()
    losses = 2 * 2 * 2 * 2  # twice a step: for its weights, and for its gradient
    assert len(seen) == losses + 2 * 2 * 3 and len(set(seen)) == losses // 2 + 2 * 2 * 3


def test_minibatches_are_shuffled_anew_each_epoch_and_each_batch():
    found = orders(epochs=2, count=4)
    np.testing.assert_array_equal(np.sort(found), np.broadcast_to(np.arange(8), (2, 2, 8)))
    assert len(np.unique(found.reshape(-1, 8), axis=0)) == 4
    np.testing.assert_array_equal(found, orders(epochs=2, count=4))  # a function of (key, step, epoch)


def test_reference_is_a_copy_that_outlives_donation():
    """Trap 3: shared buffers would be deleted by the first donated step."""
    u = frozen_reference(gradient(squares, SGD))
    for init in (u.init, jax.jit(u.init)):
        state = init(jax.random.key(0), {"lm": jnp.ones(3)}, {})
        state, _ = jax.jit(u.update, donate_argnums=0)(state, batch())
        np.testing.assert_array_equal(state.frozen["ref"], [1, 1, 1])
        assert not np.array_equal(state.params["lm"], [1, 1, 1])


def test_reference_keeps_the_one_it_is_given():
    u = frozen_reference(gradient(squares, SGD))
    np.testing.assert_array_equal(u.init(KEY, {"lm": jnp.ones(3)}, {"ref": jnp.zeros(3)}).frozen["ref"], [0, 0, 0])


def test_frozen_parameters_are_never_differentiated():
    def pulled(params, frozen, batch, key):
        term = mean(jnp.square(params["lm"] - frozen["ref"]), jnp.ones(3))
        return term, {}

    u = frozen_reference(gradient(pulled, SGD))
    state = u.init(KEY, {"lm": jnp.ones(3)}, {"ref": jnp.zeros(3)})
    state, _ = u.update(state, batch())
    np.testing.assert_allclose(state.params["lm"], [1 / 3] * 3, rtol=1e-6)  # 1 - 2 * 1 / 3
    np.testing.assert_array_equal(state.frozen["ref"], [0, 0, 0])


def test_value_head_is_added_where_there_is_none():
    u = with_value_head(lambda key: {"score": jnp.zeros(3)}, gradient(squares, SGD))
    assert set(u.init(KEY, {"lm": jnp.ones(3)}, {}).params) == {"lm", "value"}
    given = {"lm": jnp.ones(3), "value": {"score": jnp.ones(3)}}
    np.testing.assert_array_equal(u.init(KEY, given, {}).params["value"]["score"], [1, 1, 1])


def shrink(params, frozen, batch, key):
    """Mean of (x . w)^2 over other weights than `squares` has."""
    term = mean(jnp.square(batch["x"] @ params["lm"]), batch["other"])
    return {"shrink": term}, {"small": term}


def test_mix_keeps_every_denominator():
    """Trap 10: the sum of two losses, each divided by its own weight, whatever the microbatches."""
    mixed = combined_loss(fit=(1.0, squares), small=(0.3, shrink))
    expected, metrics = after(two_terms, batch())
    for count in (1, 2, 4):
        found, noted = after(mixed, batch(), microbatches=count)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(noted["loss"].value(), metrics["loss"].value(), rtol=1e-6)
        np.testing.assert_allclose(0.3 * noted["small"].value(), metrics["small"].value(), rtol=1e-6)


def test_a_renewed_reference_follows_the_policy_on_schedule():
    u = refreshed_reference(gradient(squares, SGD), every=2)
    start = np.array([1.0, 2.0, 3.0], np.float32)
    state = u.init(jax.random.key(1), {"lm": jnp.asarray(start)}, {})
    assert "ref" not in state.frozen  # what changes is remembered, and saved
    seen = []
    for _ in range(4):
        state, _ = jax.jit(u.update, donate_argnums=0)(state, batch())
        seen.append((np.asarray(state.params["lm"]), np.asarray(with_moving_reference(state).frozen["ref"])))
    np.testing.assert_array_equal(seen[0][1], start)
    for now, kept in ((seen[1][0], seen[1][1]), (seen[1][0], seen[2][1]), (seen[3][0], seen[3][1])):
        np.testing.assert_array_equal(kept, now)


def test_a_reference_that_is_never_renewed_is_frozen():
    u = refreshed_reference(gradient(squares, SGD), every=0)
    state = u.init(KEY, {"lm": jnp.array([1.0, 2.0, 3.0])}, {})
    assert not state.memory
    state, _ = u.update(state, batch())
    np.testing.assert_array_equal(with_moving_reference(state).frozen["ref"], [1, 2, 3])

"""Optimizers and schedules: steps worked by hand, which leaf gets what, averaged weights, bad options."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import model
from lm.core.config import call_with_options
from lm.core.errors import UserError
from lm.core.metrics import mean
from lm.core.sharding import make_mesh, put_batch, state_shardings
from lm.optim import optimizers
from lm.optim.ema import averaged_params, weight_average, with_averaged_params
from lm.optim.update import gradient
from lm.runs.checkpoint import Checkpoints

RATE = 0.01


def rates(name, *steps, total_steps=110, warmup_steps=10, final_fraction=0.1):
    schedule = optimizers.learning_rate_schedule(
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
        # the root of 10 / 11, 10 / 40, 10 / 90 at the 11th, 40th, 90th step
        ("inverse_sqrt", [0, 8, 9, 10, 39, 89], [0.1, 0.9, 1, (10 / 11) ** 0.5, 0.5, 1 / 3]),
    ],
)
def test_schedules_by_hand(name, steps, expected):
    np.testing.assert_allclose(rates(name, *steps), expected, rtol=1e-5)


@pytest.mark.parametrize("rest", range(2, 12))
def test_wsd_falls_in_every_run_of_two_steps_or_more(rest):
    """The steps taken are 0 ... rest - 1: the last of them lies below the peak, and the fall is a fifth, or two."""
    found = rates("wsd", *range(rest), total_steps=rest, warmup_steps=0)
    assert found[-1] == pytest.approx(0.55)  # half way from 1 to 0.1, as two steps fall
    assert found[:-1] == pytest.approx([1] * (rest - 1))


def test_without_warmup_the_first_step_is_at_the_peak():
    np.testing.assert_allclose(rates("linear", 0, 5, 10, total_steps=10, warmup_steps=0), [1, 0.55, 0.1], rtol=1e-5)
    np.testing.assert_allclose(rates("inverse_sqrt", 0, 3, 8, total_steps=9, warmup_steps=0), [1, 1 / 2, 1 / 3])


def test_bad_schedules():
    with pytest.raises(
        UserError, match="optimizer.schedule_name is 'cosin'; choose one of constant, linear, cosine, w"
    ):
        rates("cosin", 0)
    with pytest.raises(UserError, match="warmup_steps 10 is not below optimizer.total_steps 10"):
        rates("cosine", 0, total_steps=10)
    with pytest.raises(UserError, match="optimizer.warmup_steps is -1; it must be at least 0"):
        rates("cosine", 0, warmup_steps=-1)


@pytest.mark.parametrize("tied", [True, False])
def test_decay_mask_names_exactly_the_matrices(tied, tiny_model):
    """Rule 10: no weight decay on norms and embeddings; nor on the scalar head, which starts at zero to stay small."""
    m = model.make_model(dataclasses.replace(tiny_model.config, tie_embeddings=tied))
    params = jax.eval_shape(lambda key: {"lm": m.init(key), "value": m.init_value_head(key)}, jax.random.key(0))
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, yes in jax.tree_util.tree_flatten_with_path(optimizers.weight_decay_mask(params))[0]
        if yes
    }
    matrices = {"query", "key", "value", "attention_out", "gate", "up", "down"}
    assert decayed == {f"lm/layers/{name}" for name in matrices} | (set() if tied else {"lm/head"})


def stepped(params, grads, **options):
    optimizer = optimizers.make_optimizer(learning_rate=RATE, total_steps=100, schedule_name="constant", **options)

    def step(params, grads):
        updates, state = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)(params, grads)


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


def test_lion_s_first_step_by_hand():
    """sign((1 - 0.9) g) = -1, 1 and 0 where g is 0; then 2 - 0.01 * (-1 + 0.1 * 2) = 2.008, and the norm's 2.01."""
    params = {"matrix": jnp.array([2.0, 2.0, 2.0]), "norm": jnp.array([2.0])}
    grads = {"matrix": jnp.array([-3.0, 4.0, 0.0]), "norm": jnp.array([-3.0])}
    new, state = stepped(params, grads, name="lion", clip_norm=0.0)
    np.testing.assert_allclose(new["matrix"], [2.008, 1.988, 1.998], rtol=1e-6)
    np.testing.assert_allclose(new["norm"], [2.01], rtol=1e-6)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["matrix"], [-0.03, 0.04, 0], atol=1e-7)  # 1 - b2 = 0.01


def test_adafactor_s_first_step_by_hand():
    """The first second moment is g^2 itself, of rows times columns over their mean.

    Squares [[1, 4], [4, 16]] have row means 2.5, 10 and column means 2.5, 10, all over 6.25: they factor exactly, so
    every entry moves by the sign of its gradient, times the weight's root mean square, 3, times the rate.
    """
    w, g = jnp.array([[3.0, -3.0], [3.0, 3.0]]), jnp.array([[1.0, 2.0], [-2.0, 4.0]])
    options = dict(name="adafactor", min_dim_size_to_factor=2, weight_decay=0.0, clip_norm=0.0)
    new, state = stepped({"w": w}, {"w": g}, **options)
    np.testing.assert_allclose(new["w"], w - RATE * 3 * jnp.sign(g), rtol=1e-5)
    np.testing.assert_allclose(optax.tree.get(state, "v_row")["w"], [2.5, 10.0])
    # A gradient of one entry, and 1e-30 elsewhere, has rows [0.5, 0] and columns [0.5, 0]: a step of 1, whose root mean
    # square over four entries is 0.5. At most 0.1 is let through: 1 / 5.
    one = jnp.array([[7.0, 0.0], [0.0, 0.0]])
    new, _ = stepped({"w": w}, {"w": one}, clipping=0.1, **options)
    np.testing.assert_allclose(new["w"][0, 0], 3 - RATE * 3 / 5, rtol=1e-5)


@pytest.fixture(scope="module")
def everything(tiny_model):
    """Parameters of every kind: an untied head and a scalar head too."""
    untied = model.make_model(dataclasses.replace(tiny_model.config, tie_embeddings=False))
    return {"lm": untied.init(jax.random.key(0)), "value": untied.init_value_head(jax.random.key(1))}


def named(tree):
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_muon_takes_the_matrices_of_the_blocks_and_no_other(everything):
    """Trap 5: by its own rule optax would take the embedding, and leave every stacked matrix to Adam."""
    labels = named(optimizers.muon_labels(everything))
    matrices = {"query", "key", "value", "attention_out", "gate", "up", "down"}
    assert {name for name, label in labels.items() if label == "muon"} == {f"lm/layers/{name}" for name in matrices}
    assert set(labels.values()) == {"muon", "adamw"} and labels["value/score"] == labels["lm/head"] == "adamw"
    state = optimizers.make_optimizer(name="muon", learning_rate=RATE, total_steps=10).init(everything)
    moments = named(state)
    assert {name.split("nu/")[1] for name in moments if "/nu/" in name} == {
        name for name, label in labels.items() if label == "adamw"
    }


@pytest.fixture(scope="module")
def noise(everything):
    """A gradient for everything."""
    leaves, treedef = jax.tree.flatten(everything)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(treedef, [jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


def muon_update(grads):
    transform = optimizers.muon()
    return jax.jit(lambda grads: transform.update(grads, transform.init(grads), grads)[0])(grads)


def test_muon_makes_each_layer_s_update_orthogonal(noise):
    """All singular values of a layer's step come near 0.2 sqrt(longest side): Newton-Schulz leaves 0.7 to 1.2 of it."""
    update = muon_update(noise)["lm"]["layers"]
    for name in ("query", "gate", "down"):
        stacked = update[name]
        assert len(stacked) == 2
        sizes = np.linalg.svd(stacked, compute_uv=False) / (0.2 * max(stacked.shape[1:]) ** 0.5)
        assert 0.6 < sizes.min() and sizes.max() < 1.3, name
        before = np.linalg.svd(noise["lm"]["layers"][name], compute_uv=False)
        assert before.min() < before.max() / 4


def test_muon_s_step_of_a_stack_is_each_layer_s_own(noise):
    layers = {name: noise["lm"]["layers"][name] for name in ("query", "down")}
    stacked = muon_update({"layers": layers})["layers"]
    for layer in range(2):
        alone = muon_update({"layers": {name: x[layer : layer + 1] for name, x in layers.items()}})["layers"]
        for name in layers:
            np.testing.assert_allclose(stacked[name][layer], alone[name][0], atol=2e-5)


def test_what_muon_leaves_takes_adam_s_step(everything, noise):
    muon, adamw = (stepped(everything, noise, name=name)[0] for name in ("muon", "adamw"))
    for tree in ("embedding", "head", "final_norm"):
        np.testing.assert_array_equal(muon["lm"][tree], adamw["lm"][tree])
    assert not np.allclose(muon["lm"]["layers"]["query"], adamw["lm"]["layers"]["query"])


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_every_optimizer_decays_the_matrices_alone(everything, name):
    """Rule 10. Without a gradient only the decay moves anything: w - 0.01 * 0.5 * w."""
    still = jax.tree.map(jnp.zeros_like, everything)
    new, state = stepped(everything, still, name=name, weight_decay=0.5)
    decayed = named(optimizers.weight_decay_mask(everything))
    for leaf, before in named(everything).items():
        np.testing.assert_allclose(named(new)[leaf], before * (0.995 if decayed[leaf] else 1), rtol=1e-6, err_msg=leaf)
    assert {str(x.dtype) for x in jax.tree.leaves(state)} == {"float32", "int32"}


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_the_learning_rate_may_be_traced(noise, name):
    """Two runs side by side under vmap are the two runs."""
    grads = {"layers": {"key": noise["lm"]["layers"]["key"]}, "final_norm": noise["lm"]["final_norm"]}
    options = dict(name=name, total_steps=9, warmup_steps=2, schedule_name="wsd")

    def after(rate):
        optimizer = optimizers.make_optimizer(learning_rate=rate, **options)
        updates, state = optimizer.update(grads, optimizer.init(grads), grads)
        return updates, optax.tree.get(state, "learning_rate", filtering=is_array)

    peaks = jnp.array([0.1, 0.2])
    updates, rates = jax.jit(jax.vmap(after))(peaks)
    np.testing.assert_allclose(rates, peaks / 2, rtol=1e-6)
    one_by_one = jax.lax.map(after, peaks)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), updates, one_by_one)


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
def test_the_peak_of_every_schedule_may_be_traced(name):
    options = dict(name=name, total_steps=9, warmup_steps=2, final_fraction=0.1)
    found = jax.vmap(lambda peak: optimizers.learning_rate_schedule(learning_rate=peak, **options)(7))(
        jnp.array([0.1, 0.2])
    )
    np.testing.assert_allclose(
        found, [optimizers.learning_rate_schedule(learning_rate=peak, **options)(7) for peak in (0.1, 0.2)], rtol=1e-6
    )


def is_array(_, value):
    return isinstance(value, jax.Array)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_every_optimizer_on_a_mesh_and_back_from_the_disk(name, tiny_model, tiny_lm, noise, tmp_path):
    """A step over data, fsdp and tensor gives one device's parameters, and its memory is saved and restored bitwise."""

    def some(lm):
        layers = {name: lm["layers"][name] for name in ("query", "down", "mlp_norm")}
        return {"embedding": lm["embedding"], "layers": layers}

    def loss(params, frozen, batch, key):  # its gradient is noise / 3, its forward pass costs nothing to compile
        slope = some(noise["lm"])
        total = sum(jax.tree.leaves(jax.tree.map(lambda w, g: jnp.sum(w * g), params["lm"], slope)))
        term = mean(total * batch, 3 * jnp.ones_like(batch))
        return term, {"loss": term}

    options = {"min_dim_size_to_factor": 8} if name == "adafactor" else {}
    optimizer = optimizers.make_optimizer(name=name, learning_rate=RATE, total_steps=10, ema_decay=0.9, **options)
    update, batch = gradient(loss, optimizer), np.ones(8, np.float32)
    alone = jax.jit(update.init)(jax.random.key(0), {"lm": some(tiny_lm)}, {})
    expected, _ = jax.jit(update.update)(alone, batch)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        shardings = state_shardings(mesh, alone, tiny_model.logical_axes)
        step = jax.jit(update.update, out_shardings=(shardings, None))
        state, metrics = step(jax.device_put(alone, shardings), put_batch(batch, mesh))
    np.testing.assert_allclose(metrics["learning_rate"].value(), RATE, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state.params, expected.params)
    followers = [x for leaf, x in named(state.opt_state).items() if leaf.endswith("layers/query") and x.ndim == 3]
    assert len(followers) == {"adamw": 3, "lion": 2, "adafactor": 1, "muon": 2}[name]  # whole moments, and the average
    for follower in followers:
        assert follower.sharding.is_equivalent_to(state.params["lm"]["layers"]["query"].sharding, 3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"opt_state": state.opt_state}, {})
        _, tree, _ = checkpoints.restore({"opt_state": alone.opt_state})
    assert jax.tree.structure(tree["opt_state"]) == jax.tree.structure(state.opt_state)
    jax.tree.map(np.testing.assert_array_equal, tree["opt_state"], state.opt_state)


def test_the_average_by_hand():
    """Plain descent from 8 on gradients 1, 2, 4 passes 7, 5, 1; at decay 1/2 the mean is 7, (7/2 + 5) / (3/2), ..."""
    transform = optax.chain(optax.scale(-1.0), weight_average(0.5))
    params = {"w": jnp.array([8.0])}
    state = transform.init(params)
    np.testing.assert_array_equal(averaged_params(state)["w"], [8])  # before the first step: the weights themselves
    for slope, expected in ((1.0, 7), (2.0, (3.5 + 5) / 1.5), (4.0, (1.75 + 2.5 + 1) / 1.75)):
        updates, state = transform.update({"w": jnp.array([slope])}, state, params)
        np.testing.assert_array_equal(updates["w"], [-slope])
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(averaged_params(state)["w"], [expected], rtol=1e-6)


def test_the_average_changes_no_update(everything, noise):
    (plain, without), (averaged, memory) = (stepped(everything, noise, ema_decay=decay) for decay in (0.0, 0.99))
    jax.tree.map(np.testing.assert_array_equal, plain, averaged)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), averaged_params(memory), averaged)
    assert averaged_params(without) == {}
    taken = with_averaged_params(memory, {})
    assert (
        averaged_params(taken) == {} and len(jax.tree.leaves(taken)) == len(jax.tree.leaves(without)) + 1
    )  # its count
    back = with_averaged_params(taken, averaged)
    assert jax.tree.structure(back) == jax.tree.structure(memory) and averaged_params(back) is averaged


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "adam"}, "optimizer.name is 'adam'; choose one of adamw, lion, adafactor, muon"),
        (
            {"name": "adafactor", "b2": 0.9},
            "optimizer.b2 is not an option of adafactor, which has decay_rate, clipping, min_dim_size_to_factor",
        ),
        ({"beta": 0.9}, "optimizer.beta is not an option of adamw, which has b1, b2, eps"),
        (
            {"name": "muon", "iteration": 3},
            "optimizer.iteration is not an option of lm.optim.optimizers.make_optimizer; did you mean iteratio",
        ),
        ({"ema_decay": 1.0}, "optimizer.ema_decay is 1.0; it must be from 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        call_with_options(
            optimizers.make_optimizer, {"learning_rate": RATE, "total_steps": 10, **options}, name="optimizer"
        )


def test_the_signature_names_the_options_of_every_optimizer():
    known = set(inspect.signature(optimizers.make_optimizer).parameters)
    assert known > {"name", "learning_rate", "b2", "decay_rate", "beta", "iterations"} and "options" not in known

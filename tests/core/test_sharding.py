"""One code path from one device to a mesh: eight virtual devices give one device's numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from lm import model
from lm.core.errors import UserError
from lm.core.sharding import make_mesh, partition_spec, put_batch, shard, state_shardings
from lm.core.types import RankedAnswers, Rollouts
from lm.optim import optimizers
from lm.stages.pretraining import pretrain, sft
from lm.stages.reward_model import reward
from lm.stages.rl import ppo

ROWS = 16  # so that two minibatches or microbatches still have a row for each of eight devices


@pytest.fixture(scope="module")
def small():
    """Every size divides by two, so that each axis really is split; vocabulary, heads, hidden and width alike."""
    config = model.ModelConfig(
        vocab_size=32, layers=2, width=16, heads=4, kv_heads=2, head_size=4, hidden=24, context=32, query_blocks=1
    )
    return model.make_model(config.for_backend("cpu"))


def test_sizes_and_what_is_left():
    assert make_mesh(data=2, fsdp=2, tensor=2).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert make_mesh(data=-1, tensor=4).shape == {"data": 2, "fsdp": 1, "tensor": 4}
    assert make_mesh().shape == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    "wrong",
    [
        {"data": 3},
        {"data": 2},
        {"data": 16},
        {"fsdp": 3},
        {"data": -1, "fsdp": -1},
        {"data": 0},
        {"data": -2, "fsdp": -2, "tensor": 2},
    ],
)
def test_a_mesh_that_does_not_fit(wrong):
    with pytest.raises(UserError, match="does not fit 8 device.s.: the sizes must multiply to 8; set one of mesh.data"):
        make_mesh(**wrong)


def test_partition_by_hand():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert partition_spec(("vocab", "width"), (32, 16), mesh) == P("tensor", "fsdp")
    assert partition_spec(("vocab", "width"), (31, 16), mesh) == P(None, "fsdp")  # 31 does not divide: whole
    assert partition_spec(("batch", None, "heads"), (8, 5, 4), mesh) == P(("data", "fsdp"), None, "tensor")
    assert partition_spec(("batch", "width"), (8, 16), mesh) == P(("data", "fsdp"), None)  # fsdp is taken by the rows
    assert partition_spec((None, None), (8, 16), mesh) == P(None, None)
    assert partition_spec(("batch", "vocab"), (8, 32), make_mesh()) == P("data", None)


def test_shard_is_the_identity_without_a_mesh():
    """Trap 6."""
    x = jnp.ones((8, 4))
    assert shard(x, "batch", "width") is x
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        assert jax.jit(lambda x: shard(x, "batch", "heads"))(x).sharding.spec == P(("data", "fsdp"), "tensor")


def test_put_batch_splits_rows():
    mesh = make_mesh(data=4, tensor=2)
    batch = put_batch({"ids": np.zeros((8, 3)), "few": np.zeros(3), "none": None, "scalar": np.float32(1)}, mesh)
    assert batch["ids"].sharding.spec == P("data", None)
    assert batch["ids"].addressable_shards[0].data.shape == (2, 3)
    assert batch["few"].sharding.is_fully_replicated and batch["scalar"].sharding.is_fully_replicated
    assert batch["none"] is None


def tokens_of(rows, seed, n=ROWS, length=8):
    draw = np.random.default_rng(seed)
    return rows(draw.integers(1, 32, (n, length + 1)), draw.integers(4, length + 2, n), start=3)


def batch_of(stage, rows, seed):
    """Rows of a stage's batch, of unequal lengths and weights."""
    tokens = tokens_of(rows, seed)
    if stage is ppo:
        draw = np.random.default_rng(seed)
        return Rollouts(
            tokens,
            draw.normal(size=ROWS).astype(np.float32),
            {"score/rule": np.ones(ROWS, np.float32)},
            np.ones(ROWS, bool),
            -np.ones((ROWS, 8), np.float32),
        )
    if stage is reward:
        pairs = jax.tree.map(lambda a, b: np.stack([a, b], axis=1), tokens, tokens_of(rows, seed + 100))
        return RankedAnswers(pairs, np.tile(np.array([[1], [2]], np.int32), (ROWS, 1, 1)))
    return tokens


# eps 1e-5 as in rule 4: where a gradient is rounding noise, Adam with a smaller one would divide noise by noise.
OPTIMIZER = dict(learning_rate=3e-3, total_steps=20, warmup_steps=2, eps=1e-5)


def decoder(m):
    """A decoder to start from, on the host: a donated step deletes what it is given."""
    return jax.device_get(jax.jit(m.init)(jax.random.key(0)))


@pytest.fixture(scope="module")
def start(small):
    """The one that every run starts from, unless it has experts."""
    return decoder(small)


@pytest.fixture(scope="module")
def updated(small, start, rows):
    """(stage, mesh or None for one device, options of the stage) -> the state and metrics after three updates.

    Where the options balance experts, of a model that has four of them.
    """

    def run(stage, mesh, **options):
        m, lm = small, start
        if "balance_loss" in options:
            m = model.make_model(dataclasses.replace(small.config, experts=4))
            lm = decoder(m)
        update = stage.make(m, optimizers.make_optimizer(**OPTIMIZER), **options)
        state = jax.jit(update.init)(jax.random.key(0), {"lm": lm}, {})
        step, put = jax.jit(update.update), lambda batch: batch
        if mesh is not None:
            shardings = state_shardings(mesh, state, m.logical_axes)
            state = jax.device_put(state, shardings)
            step = jax.jit(update.update, donate_argnums=0, out_shardings=(shardings, None))
            put = lambda batch: put_batch(batch, mesh)
        for seed in range(3):
            state, metrics = step(state, put(batch_of(stage, rows, seed)))
        return state, jax.device_get(metrics)

    @functools.cache
    def cached(stage, sizes=None, **options):
        if sizes is None:
            return run(stage, None, **options)
        mesh = make_mesh(**dict(zip(("data", "fsdp", "tensor"), sizes)))
        with jax.set_mesh(mesh):
            return run(stage, mesh, **options)

    return cached


@pytest.mark.parametrize(
    "stage, sizes, options",
    [
        (pretrain, (8, 1, 1), {}),
        (sft, (1, 4, 2), {"microbatches": 2}),
        (reward, (2, 2, 2), {}),
        (ppo, (2, 2, 2), {}),
        (pretrain, (2, 2, 2), {"balance_loss": 0.1, "router_z_loss": 0.01}),
    ],
    ids=["pretrain-8x1x1", "sft-1x4x2", "reward-2x2x2", "ppo-2x2x2", "experts-2x2x2"],
)
def test_a_mesh_gives_one_device_s_parameters(stage, sizes, options, updated, capfd):
    """Rule 1: neither devices nor microbatches change three updates beyond float32 rounding."""
    fixed = {"minibatch_count": 2} if stage is ppo else {}
    fixed |= {name: value for name, value in options.items() if name != "microbatches"}
    state, metrics = updated(stage, sizes, **options | fixed)
    assert "ematerialization" not in capfd.readouterr().err  # trap 4, and rows that no longer span the devices
    expected, alone = updated(pretrain if stage is sft else stage, **fixed)  # sft differs in its data only
    for (path, a), b in zip(jax.tree.leaves_with_path(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=jax.tree_util.keystr(path))
    for name in alone:
        np.testing.assert_allclose(metrics[name].value(), alone[name].value(), rtol=1e-3, atol=1e-4, err_msg=name)


def test_three_updates_are_worth_comparing(updated, start):
    """The parameters move a hundred times further than the tolerance above."""
    state, _ = updated(pretrain)
    for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(state.params["lm"]), strict=True):
        assert np.abs(a - b).max() > 2e-3


def test_moments_and_references_are_sharded_like_their_parameters(updated):
    """Trap 2, after a donated step: Adam's moments and the reference are split; scalars and the key are whole."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state, _ = updated(ppo, (2, 2, 2), minibatch_count=2)
    specs = {"embedding": P("tensor", "fsdp"), "query": P(None, "fsdp", "tensor"), "down": P(None, "tensor", "fsdp")}
    moments = [optax.tree.get(state.opt_state, name)["lm"] for name in ("mu", "nu")]
    for name, spec in specs.items():
        for tree in (state.params["lm"], state.frozen["ref"], *moments):
            leaf = tree["embedding"] if name == "embedding" else tree["layers"][name]
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), name
            assert leaf.addressable_shards[0].data.size * 4 == leaf.size
    assert state.step.sharding.is_fully_replicated and state.key.sharding.is_fully_replicated
    assert state.params["value"]["score"].sharding.is_fully_replicated

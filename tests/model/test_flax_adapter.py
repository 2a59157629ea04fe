"""Flax modules as Models: what they must be, and that stages, sharding and sampling take them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from lm.core import sharding
from lm.core.errors import UserError
from lm.generate.sampler import SamplingParams, sample
from lm.generate.speculative import speculative_sample
from lm.model import flax_adapter
from lm.stages.pretraining import pretrain, sft

VOCAB, WIDTH = 17, 16


def mask(segments, *, causal=True):
    """bool[B,1,T,T]"""
    same = (segments[:, :, None] == segments[:, None]) & (segments[:, None] > 0)
    return (same & (jnp.tril(jnp.ones(same.shape[1:], bool)) if causal else True))[:, None]


class Linen(linen.Module):
    causal: bool = True

    @linen.compact
    def __call__(self, inputs, positions, segments):
        x = linen.Embed(VOCAB, WIDTH, name="embedding")(inputs) + linen.Embed(32, WIDTH, name="place_embedding")(
            positions
        )
        x += linen.MultiHeadDotProductAttention(num_heads=2)(x, mask=mask(segments, causal=self.causal))
        return linen.Dense(VOCAB)(linen.LayerNorm(name="norm")(x))


class Nnx(nnx.Module):
    def __init__(self, *, rngs):
        self.embedding = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.place_embedding = nnx.Embed(32, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, inputs, positions, segments):
        x = self.embedding(inputs) + self.place_embedding(positions)
        return self.norm(x + self.attention(x, mask=mask(segments)))

    def logits(self, x):
        return self.out(x)


class Statistics(linen.Module):
    @linen.compact
    def __call__(self, inputs, positions, segments):
        return linen.BatchNorm(use_running_average=True)(linen.Embed(VOCAB, WIDTH)(inputs))


class Dropping(nnx.Module):
    def __init__(self, *, rngs):
        self.embedding, self.dropout = nnx.Embed(VOCAB, WIDTH, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)


MODELS = {
    "linen": lambda **more: flax_adapter.model_from_linen(Linen(), context=32, **more),
    "nnx": lambda **more: flax_adapter.model_from_nnx(lambda rngs: Nnx(rngs=rngs), context=32, head="logits", **more),
}
EACH = pytest.mark.parametrize("name", MODELS)


@EACH
def test_the_pretrain_stage_learns_a_cycle(name, rows):
    """Each token follows the one before: 0, 1, ..., 6, 0, ...; guessing costs log 17 = 2.83."""
    model = MODELS[name]()
    update = pretrain.make(model, optax.adam(1e-2), microbatches=2)
    state = update.init(jax.random.key(1), {"lm": model.init(jax.random.key(0))}, {})
    batch = rows((np.arange(4)[:, None] + np.arange(13)) % 7, [13] * 4)
    step = jax.jit(update.update)
    losses = []
    for _ in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"].value()))
    assert losses[0] > 2.3 and losses[-1] < 0.3, losses
    lm, greedy = state.params["lm"], SamplingParams(4, temperature=0.0)
    asked = jnp.array([[2, 3, 0], [1, 0, 0]]), jnp.array([2, 1]), state.key
    drawn = jax.jit(lambda lm: sample(model, lm, *asked, greedy))(lm)
    assert drawn.tokens.tolist() == [[4, 5, 6, 0], [2, 3, 4, 5]], "prompts of mixed length, without a cache"
    untrained = model.init(jax.random.key(0))
    judged, told = jax.jit(lambda lm, draft: speculative_sample(model, model, lm, draft, *asked, greedy))(lm, untrained)
    assert judged.tokens.tolist() == drawn.tokens.tolist() and np.all(told.accepted < told.proposed)


@EACH
def test_sft_and_chunks_give_the_same_gradient(name, rows):
    batch = rows((np.arange(4)[:, None] + np.arange(13)) % 7, [13, 9, 7, 5], start=3)
    norms = []
    for chunk in (0, 5):
        model = MODELS[name](loss_chunk=chunk)
        update = sft.make(model, optax.sgd(0.1))
        state = update.init(jax.random.key(1), {"lm": model.init(jax.random.key(0))}, {})
        norms.append(float(jax.jit(update.update)(state, batch)[1]["grad_norm"].value()))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0.01


@EACH
def test_every_leaf_has_axes_that_split_nothing(name):
    model = MODELS[name]()
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    is_axes = lambda x: isinstance(x, tuple)
    assert jax.tree.structure(shapes) == jax.tree.structure(model.logical_axes["lm"], is_leaf=is_axes)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    shardings = sharding.state_shardings(mesh, {"params": {"lm": shapes}}, model.logical_axes)
    assert all(each.is_fully_replicated for each in jax.tree.leaves(shardings))


def test_axes_of_ones_own_split():
    axes = jax.tree.map(lambda leaf: (None,) * leaf.ndim, jax.eval_shape(MODELS["linen"]().init, jax.random.key(0)))
    axes["Dense_0"]["kernel"] = ("width", "vocab")
    model = MODELS["linen"](axes=axes)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    found = sharding.state_shardings(mesh, {"params": {"lm": shapes}}, model.logical_axes)["params"]["lm"]
    assert found["Dense_0"]["kernel"].spec[0] == "fsdp"


@EACH
def test_verified_lets_a_causal_module_pass(name):
    model = MODELS[name]()
    assert flax_adapter.verified_model(model, model.init(jax.random.key(0))) is model


def test_verified_tells_what_a_module_has_seen():
    leaking = flax_adapter.model_from_linen(Linen(causal=False), context=32)
    with pytest.raises(UserError, match="not causal: position 0 changes with the later token 1"):
        flax_adapter.verified_model(leaking, leaking.init(jax.random.key(0)))

    class Mixing(linen.Module):
        @linen.compact
        def __call__(self, inputs, positions, segments):
            return jnp.cumsum(linen.Embed(VOCAB, WIDTH)(inputs), axis=1)

    mixing = flax_adapter.model_from_linen(Mixing(), context=32)
    with pytest.raises(UserError, match="mixes segments: position 4 changes with token 0 of another segment"):
        flax_adapter.verified_model(mixing, mixing.init(jax.random.key(0)))


def test_modules_that_will_not_do():
    with pytest.raises(UserError, match=r"Statistics holds variables that are no parameters \(batch_stats\)"):
        flax_adapter.model_from_linen(Statistics(), context=32)
    with pytest.raises(UserError, match="Dropping holds variables that are no parameters"):
        flax_adapter.model_from_nnx(lambda rngs: Dropping(rngs=rngs), context=32)

    class Pooled(linen.Module):
        @linen.compact
        def __call__(self, inputs, positions, segments):
            return linen.Embed(VOCAB, WIDTH)(inputs).mean(axis=1)

    with pytest.raises(UserError, match=r"the module gives \(1, 16\)"):
        flax_adapter.model_from_linen(Pooled(), context=32)

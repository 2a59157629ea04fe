"""muP: one learning rate moves every width alike (the coordinate check of Yang et al. 2022, sec. D.1, 2203.03466)."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from lm.core.config import load_config
from lm.core.errors import UserError
from lm.core.metrics import mean
from lm.core.types import Tokens
from lm.model import ModelConfig, make_model
from lm.optim import optimizers
from lm.optim.update import gradient
from lm.train.warm_start import model_config_for_run

BASE = 16


def shaped(width: int, base: int, **options) -> ModelConfig:
    heads = width // 8
    return ModelConfig(
        vocab_size=31, layers=2, width=width, heads=heads, kv_heads=heads, head_size=8, hidden=3 * width,
        context=16, base_width=base, **options,
    ).for_backend("cpu")  # fmt: skip


def made_rows() -> Tokens:
    ids = np.random.default_rng(0).integers(4, 31, size=(8, 17))
    ones = np.ones((8, 16), np.int32)
    return Tokens(
        inputs=ids[:, :-1].astype(np.int32),
        targets=ids[:, 1:].astype(np.int32),
        weights=ones.astype(np.float32),
        positions=np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16)),
        segments=ones,
    )


def moved(width: int, base: int, steps: int = 4) -> float:
    """How far the logits have moved after some steps of Adam, as a root mean square."""
    model, rows = make_model(shaped(width, base)), made_rows()
    optimizer = optimizers.make_optimizer(
        learning_rate=0.01, total_steps=100, schedule_name="constant", weight_decay=0.0, clip_norm=0.0, base_width=base
    )

    def loss(params, frozen, batch, key):
        return {"loss": (value := mean(-model.token_logprobs(params["lm"], batch), batch.weights))}, {"loss": value}

    def logits(lm):
        return model.logits(lm, model.hidden_states(lm, rows.inputs, rows.positions, rows.segments))

    update = gradient(loss, optimizer)
    state = update.init(jax.random.key(1), {"lm": jax.jit(model.init)(jax.random.key(0))}, {})
    before, step = jax.jit(logits)(state.params["lm"]), jax.jit(update.update)
    for _ in range(steps):
        state, _ = step(state, rows)
    return float(jnp.sqrt(jnp.mean(jnp.square(jax.jit(logits)(state.params["lm"]) - before))))


def test_logits_move_no_further_the_wider_and_without_it_they_do():
    narrow, wide, without = moved(BASE, BASE), moved(8 * BASE, BASE), moved(8 * BASE, 0)
    assert 0.5 * narrow < wide < 1.2 * narrow, (narrow, wide)
    assert without > 2 * narrow, (narrow, without)


def test_at_the_base_width_nothing_is_changed():
    plain, mup = make_model(shaped(64, 0)), make_model(shaped(64, 64))
    one, other = plain.init(jax.random.key(0)), mup.init(jax.random.key(0))
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))
    x = jnp.linspace(-1, 1, 64)[None]
    np.testing.assert_array_equal(plain.logits(one, x), mup.logits(one, x))
    ones = jax.tree.map(jnp.ones_like, one)
    steps, _ = optimizers.scale_by_width(64).update(ones, optax.EmptyState(), one)
    assert all(map(np.array_equal, jax.tree.leaves(ones), jax.tree.leaves(steps)))


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_scaled(tied):
    """Width 64 of base 16: matrices of the blocks step a quarter as far, embedding, head and norms as ever; the
    embedding and the head start at 1 / sqrt(16), the logits are a quarter of the product."""
    model = make_model(shaped(64, 16, tie_embeddings=tied))
    lm = model.init(jax.random.key(0))
    assert float(jnp.std(lm["embedding"])) == pytest.approx(0.88 / 4, rel=0.05)  # cut at two deviations: 0.88 of one
    x = jnp.ones((1, 64))
    matrix = lm["embedding"].T if tied else lm["head"]
    np.testing.assert_allclose(model.logits(lm, x), x @ matrix / 4, rtol=1e-5)
    scale = optimizers.scale_by_width(16)
    ones = jax.tree.map(jnp.ones_like, {"lm": lm})
    steps, _ = scale.update(ones, scale.init(ones), {"lm": lm})
    whole = jax.tree.map(lambda leaf: float(leaf.mean()), steps["lm"])
    matrices = {"query", "key", "value", "attention_out", "gate", "up", "down"}
    assert whole.pop("layers") == {name: 0.25 if name in matrices else 1 for name in lm["layers"]}
    assert set(whole.values()) == {1.0}


def test_weight_decay_is_not_scaled():
    """A gradient of 0: the matrix shrinks by learning rate times decay at any width."""
    params = {"lm": {"embedding": jnp.ones((3, 64)), "layers": {"query": jnp.ones((1, 64, 64))}}}
    optimizer = optimizers.make_optimizer(
        learning_rate=0.01, total_steps=9, schedule_name="constant", weight_decay=0.5, clip_norm=0.0, base_width=16
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    assert after["lm"]["layers"]["query"][0, 0, 0] == pytest.approx(1 - 0.01 * 0.5)


def test_what_is_refused(monkeypatch):
    for name in ("muon", "adafactor"):
        with pytest.raises(UserError, match=f"optimizer.base_width is 16 for {name}; it must be 0, or a width for ad"):
            optimizers.make_optimizer(name=name, learning_rate=0.1, total_steps=10, base_width=16)
    with pytest.raises(UserError, match="model.base_width is -1; it must be at least 0"):
        dataclasses.replace(shaped(16, 0), base_width=-1)


def test_the_ladder_s_model_and_optimizer_agree():
    config = load_config("experiments/scaling.py", ["model.base_width=64"])
    assert config.optimizer.base_width == 64


def test_half_of_it_is_refused():
    """Said of the model alone or of the optimizer alone; a model that was trained with it may be tuned without."""
    tokenizer = SimpleNamespace(vocab_size=8)
    for model, optimizer in (({"base_width": 16}, {}), ({}, {"base_width": 16})):
        config = ConfigDict({"init_from": "", "model": model, "optimizer": optimizer})
        with pytest.raises(UserError, match=r"optimizer.base_width is \d+, model.base_width \d+: muP needs both"):
            model_config_for_run(config, tokenizer, None)
    start = SimpleNamespace(model_config=shaped(16, 16))
    config = ConfigDict({"init_from": "w", "model": {}, "optimizer": {}})
    assert model_config_for_run(config, tokenizer, start) == start.model_config

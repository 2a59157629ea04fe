"""Eight virtual CPU devices for every test, and the tiny model that most of them share."""

import os

# Before jax is imported: its backend reads these once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import pytest

from lm import model


@pytest.fixture(scope="session")
def tiny_model() -> model.Model:
    """Vocabulary 31 (odd on purpose), two query heads a kv head, float32."""
    config = model.Config(vocab_size=31, layers=2, width=16, heads=4, kv_heads=2, head_size=8, hidden=24, context=64)
    return model.make(config.on("cpu"))


@pytest.fixture(scope="session")
def tiny_lm(tiny_model):
    """Its decoder, every leaf moved off its starting value: a norm's scale of exactly 1 would hide that it is unused."""
    lm = jax.jit(tiny_model.init)(jax.random.key(0))
    leaves, treedef = jax.tree.flatten(lm)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(treedef, [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])

"""Attention's implementations compute the same: each against plain XLA, the TPU's kernel interpreted."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import finished

from lm import model
from lm.core.errors import UserError
from lm.core.sharding import make_mesh
from lm.model import kernels
from lm.model.attention import causal_attention
from lm.model.kernels import cudnn_attention, splash_attention
from lm.runs.workdir import load_trained_model

__all__ = ["finished"]
cudnn = functools.partial(cudnn_attention, implementation="xla")
splash = functools.partial(splash_attention, interpret=True)
T = 139  # odd, and no multiple of what the kernels take at a time


def arrays(*, heads=4, kv_heads=2, head_size=8, rows=2, length=T):
    draw = np.random.default_rng(0)
    q, k, v = (draw.normal(size=(rows, length, n, head_size)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    segments = np.zeros((rows, length), np.int32)
    segments[0, :60], segments[0, 60:131] = 1, 2  # two segments, then padding
    segments[1:, 5:] = 1  # a row aligned to the right
    return 3 * q, k, v, segments


def both(function, q, k, v, segments, **options):
    """Outputs of the real positions and of padding, and the gradient of a function of all of them."""

    def total(qkv):
        out = function(*qkv, segments, **options)
        return jnp.sum(jnp.sin(out)), out

    (_, out), grads = jax.jit(jax.value_and_grad(total, has_aux=True))((q, k, v))
    return out, grads


def same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize("options", [{}, {"window": 20, "scale": 0.5}], ids=["all", "window"])
def test_what_cudnn_is_asked_for(options):
    """The call that reaches cuDNN on a GPU, computed by the other implementation of the same function of JAX."""
    found = both(cudnn, *arrays(), **options)
    same(found, both(causal_attention, *arrays(), **options))
    assert not np.any(found[0][0, 131:]) and not np.any(found[0][1, :5])


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"window": 20, "scale": 0.5}], ids=["capped", "window"])
def test_the_kernel_of_tpus(options):
    found = both(splash, *arrays(), **options)
    same(found, both(causal_attention, *arrays(), **options))
    assert not np.any(found[0][0, 131:]) and not np.any(found[0][1, :5])


@pytest.mark.parametrize("kv_heads", [2, 1], ids=["split", "too few to split"])
def test_on_a_mesh_each_device_has_its_own_rows_and_heads(kv_heads):
    given = arrays(heads=4, kv_heads=kv_heads, rows=4, length=128)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        found = jax.jit(splash)(*given)
        assert {shard.data.shape for shard in found.addressable_shards} == {(1, 128, 2, 8)}
    same(found, jax.jit(causal_attention)(*given))


def test_a_scanned_stack_of_two_kinds_of_layers(tiny_model, monkeypatch):
    """One program serves layers with a window and without: it holds both kernels, and picks."""
    mixed = dataclasses.replace(tiny_model.config, window=3, global_every=2, attention_softcap=1.0, scan="yes")
    ids = np.random.default_rng(0).integers(1, 31, (2, 20)).astype(np.int32)
    segments = np.where(np.arange(20) < 17, 1, 0) * np.ones((2, 1), np.int32)
    lm = jax.jit(tiny_model.init)(jax.random.key(0))

    def states(attention):
        m = model.make_model(dataclasses.replace(mixed, attention=attention))
        return jax.jit(m.hidden_states)(lm, ids, np.broadcast_to(np.arange(20), (2, 20)), segments)

    monkeypatch.setitem(kernels.ATTENTION_KERNELS, "splash", splash)
    same(states("splash"), states("xla"))


def test_auto_is_the_platforms_kernel_where_it_can():
    c = model.ModelConfig(vocab_size=8)
    assert [c.for_backend(backend).attention for backend in ("cpu", "gpu", "tpu")] == ["xla", "cudnn", "splash"]
    for changes in ({"attention_softcap": 1.0}, {"head_size": 12}, {"head_size": 256}, {"dtype": "float32"}):
        other = dataclasses.replace(c, **changes)
        assert [other.for_backend(backend).attention for backend in ("gpu", "tpu")] == ["xla", "splash"]
    assert dataclasses.replace(c, attention="xla").for_backend("gpu").attention == "xla"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention": "flash"}, "model.attention is 'flash'; choose one of auto, xla, cudnn, splash"),
        (
            {"attention": "splash"},
            "model.attention is 'splash', which needs a TPU; this is a cpu: leave it to auto, or",
        ),
        ({"attention": "cudnn"}, "model.attention is 'cudnn', which needs an NVIDIA GPU; this is a cpu"),
        (
            {"attention": "cudnn", "attention_softcap": 50.0},
            "model.attention is 'cudnn', which has no cap for model.attention_softcap 50: leave it to auto",
        ),
        (
            {"attention": "cudnn", "head_size": 20},
            "which takes head sizes that are multiples of 8 up to 128, not .* 20",
        ),
        ({"attention": "cudnn", "dtype": "float32"}, "which computes in bfloat16, not model.dtype float32"),
    ],
)
def test_what_an_implementation_cannot_do(changes, message):
    with pytest.raises(UserError, match=message):
        model.ModelConfig(vocab_size=8, **changes).for_backend("cpu")


def test_a_run_of_another_platform_is_read_here(finished, tmp_path):
    """Trained with the TPU's kernel by name, loaded on a CPU: left to auto there, and the same on its own platform."""
    path = shutil.copytree(finished / "pretrain", tmp_path / "pretrain")
    for file in path.glob("checkpoints/*/meta/metadata"):
        told = file.read_text()
        assert '"attention": "auto"' in told
        file.write_text(told.replace('"attention": "auto"', '"attention": "splash"'))
    here, there = (load_trained_model(path, backend=backend) for backend in ("cpu", "tpu"))
    assert (here.model_config.attention, here.model.config.attention) == ("auto", "xla")
    assert (there.model_config.attention, there.model.config.attention) == ("splash", "splash")

"""Eight virtual CPU devices for every test, and the tiny model that most of them share."""

import os
import tempfile
from importlib import metadata

# A test spends its time on compiling. Level 0 without fusion emitters takes a quarter of it, and equal programs are
# compiled once a session, also in the processes that tests start. Before jax is imported: it reads all this once.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if metadata.version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # later ones do not know it, and stop at what they do not know
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker inherits all of it, the compiled programs too
    PROGRAMS = tempfile.TemporaryDirectory(prefix="programs-")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
    os.environ["LM_CACHE"] = f"{PROGRAMS.name}/lm"  # tokens of a session's own
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import numpy as np
import pytest

from lm import model
from lm.core.types import Tokens

# Longer than half a minute each. pytest-xdist hands out whole files in order: a long one that came last would leave the
# other worker idle. The first needs no finished pipeline (tests/runs.py), so that one worker makes it for both.
LONG_FILES = (
    "tests/studies/test_gradients.py",
    "tests/train/test_resume.py",
    "tests/train/test_loop.py",
    "tests/sweep/test_vmapped.py",
    "tests/stages/test_policy_gradient.py",
    "tests/sweep/test_study.py",
    "tests/stages/test_preference.py",
    "tests/studies/test_emergence.py",
    "tests/sweep/test_controller.py",
    "tests/pipeline/test_runner.py",
    "tests/studies/test_methods.py",
    "tests/stages/test_distillation.py",
    "tests/generate/test_speculative.py",
    "tests/serve/test_server.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, each file's tests in their own order."""
    order = {file: place for place, file in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.nodeid.split("::")[0], len(LONG_FILES)))


@pytest.fixture(scope="session")
def tiny_model() -> model.Model:
    """Vocabulary 31 (odd on purpose), two query heads a kv head, float32, unrolled: it compiles fastest so."""
    config = model.ModelConfig(
        vocab_size=31, layers=2, width=16, heads=4, kv_heads=2, head_size=8, hidden=24, context=64, query_blocks=1
    )
    return model.make_model(config.for_backend("cpu"))


@pytest.fixture(scope="session")
def tiny_lm(tiny_model):
    """Its decoder, every leaf moved off its starting value: a norm of exactly 1 would hide that it is unused."""
    lm = jax.jit(tiny_model.init)(jax.random.key(0))
    leaves, treedef = jax.tree.flatten(lm)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(treedef, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@pytest.fixture(scope="session")
def rows():
    """(ids i32[B,n], lengths, start=1) -> Tokens [B,n-1], one segment a row; targets from position `start` on count."""

    def of(ids, lengths, *, start=1):
        ids, slots = np.asarray(ids, np.int32), np.arange(np.shape(ids)[1])
        real = slots < np.asarray(lengths)[:, None]
        counted = real & (slots >= np.reshape(start, (-1, 1)))
        kept = real[:, 1:]  # an input counts as real while it has a target
        return Tokens(
            inputs=np.where(kept, ids[:, :-1], 0),
            targets=np.where(kept, ids[:, 1:], 0),
            weights=counted[:, 1:].astype(np.float32),
            positions=np.where(kept, slots[:-1], 0).astype(np.int32),
            segments=kept.astype(np.int32),
        )

    return of

"""What a run gets from its process: all of it if it is alone, a share if it is one of several (lm.sweep.vmapped)."""

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax

from lm.runs.checkpoint import Checkpoints
from lm.runs.console import on_sigterm


def make_unshared(key: Hashable, make: Callable[[], Any]) -> Any:
    """make(): no other run shares the result."""
    return make()


def unchanged_tree(tree: Any) -> Any:
    return tree


class RunHost(NamedTuple):
    jit: Callable[..., Callable] = jax.jit
    make_once: Callable[[Hashable, Callable[[], Any]], Any] = (
        make_unshared  # (key, make): what runs of one process may share
    )
    # "optimizer.NAME" and "stage.NAME" of the config whose numbers are traced, as they differ from run to run
    traced_scalars: Mapping[str, Any] = {}
    make_mesh: Callable[..., jax.sharding.Mesh] | None = None  # (data, fsdp, tensor); None: lm.core.sharding.make_mesh
    stop_signal: Callable[[], AbstractContextManager[Callable[[], bool]]] = on_sigterm
    materialize: Callable[[Any], Any] = unchanged_tree  # a tree with every leaf an array of its own
    checkpoint_turn: Callable[[Checkpoints], AbstractContextManager] = (
        nullcontext  # in which checkpoints are read and written
    )
    is_timed: bool = True  # whether the time that passes belongs to this run alone


SINGLE_RUN_HOST = RunHost()

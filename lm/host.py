"""What a run has of the process that it runs in: alone, all of it; among others (lm.vectorised), its share."""

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax

from lm.checkpoint import Checkpoints
from lm.console import on_sigterm


def made(key: Hashable, make: Callable[[], Any]) -> Any:
    """make(): nobody shares it."""
    return make()


def as_it_is(tree: Any) -> Any:
    return tree


class Host(NamedTuple):
    jit: Callable[..., Callable] = jax.jit
    once: Callable[[Hashable, Callable[[], Any]], Any] = made  # (key, make): what runs of one process may share
    # "optimizer.NAME" and "stage.NAME" of the config whose numbers are traced, as they differ from run to run
    scalars: Mapping[str, Any] = {}
    mesh: Callable[..., jax.sharding.Mesh] | None = None  # (data, fsdp, tensor); None: lm.sharding.make_mesh
    stopping: Callable[[], AbstractContextManager[Callable[[], bool]]] = on_sigterm
    real: Callable[[Any], Any] = as_it_is  # a tree with every leaf an array of its own
    turn: Callable[[Checkpoints], AbstractContextManager] = nullcontext  # in which checkpoints are read and written
    timed: bool = True  # whether the time that passes is this run's


ALONE = Host()

"""One code path from one device to a mesh: logical axes on arrays, a table to mesh axes, shardings for any tree."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.core.errors import UserError

# Logical axis -> mesh axes. Parameters split their width over fsdp and their heads, hidden and vocabulary over tensor;
# activations split rows over data and fsdp, and the same inner axes over tensor.
LOGICAL_AXIS_RULES: Mapping[str, Any] = {
    "batch": ("data", "fsdp"),
    "width": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "hidden": "tensor",
    "vocab": "tensor",
}


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Mesh over all devices with axes data, fsdp, tensor; one of the sizes may be -1, meaning "what is left"."""
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    count = len(jax.devices())
    fixed_sizes = [n for n in sizes.values() if n != -1]
    fixed = int(np.prod(fixed_sizes))
    if len(fixed_sizes) < 2 or min(fixed_sizes) < 1 or count % fixed or (len(fixed_sizes) == 3 and fixed != count):
        raise UserError(
            f"mesh {sizes} does not fit {count} device(s): the sizes must multiply to {count}; "
            "set one of mesh.data, mesh.fsdp, mesh.tensor to -1 to take what is left"
        )
    shape = tuple(count // fixed if n == -1 else n for n in sizes.values())
    return jax.make_mesh(shape, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))


def partition_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions carry these logical axes; a size that does not divide is not split."""
    used: set[str] = set()
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        rule = LOGICAL_AXIS_RULES.get(axis) or ()
        wanted = (rule,) if isinstance(rule, str) else tuple(rule)
        names = [name for name in wanted if mesh.shape.get(name, 1) > 1 and name not in used]
        ways = int(np.prod([mesh.shape[n] for n in names]))
        if not names or size % ways:
            entries.append(None)
            continue
        used.update(names)
        entries.append(tuple(names) if len(names) > 1 else names[0])
    return PartitionSpec(*entries)


def map_row_shards(function: Callable, x: Any, replicated: Any) -> Any:
    """function(x, replicated), a tree of [B, ...], computed by each device on its own rows of the leaves [B, ...] of x.

    For functions that mix the rows of a device, such as a sort, which would otherwise move all rows between devices.
    `replicated` is gathered where rows are split; other axes stay split. Without a mesh, or where B does not divide,
    the function itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = partition_spec(("batch",), jax.tree.leaves(x)[0].shape[:1], mesh)
    if mesh.empty or rows[0] is None:
        return function(x, replicated)
    axes = {rows[0]} if isinstance(rows[0], str) else set(rows[0])
    own = jax.shard_map(function, in_specs=(rows, PartitionSpec()), out_specs=rows, axis_names=axes, check_vma=False)
    return own(x, replicated)


def map_shards(function: Callable, *arrays: jax.Array, axes: tuple[tuple[str | None, ...], ...]) -> jax.Array:
    """function(*arrays), split as the first of them, computed by each device on its own part of every array.

    axes: the logical axes of each array. For kernels, which the compiler cannot split. Without a mesh the function
    itself.
    """
    if is_single_device():
        return function(*arrays)
    mesh = jax.sharding.get_abstract_mesh()
    specs = tuple(partition_spec(names, x.shape, mesh) for names, x in zip(axes, arrays, strict=True))
    every = set(mesh.axis_names)
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], axis_names=every, check_vma=False)(*arrays)


def is_single_device() -> bool:
    """Whether no mesh is set, as in a notebook, or one of a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """x constrained to these logical axes; the identity on a single device."""
    if is_single_device():
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, jax.sharding.get_abstract_mesh()))


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Rows of an array over data and fsdp; other axes are not split."""
    return NamedSharding(
        mesh, partition_spec(("batch",) + (None,) * (len(shape) - 1), shape, mesh) if shape else PartitionSpec()
    )


def put_batch(batch, mesh: Mesh):
    """Host arrays of a batch on the devices, split by rows. Every process passes the same arrays."""
    return jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh, np.shape(x))), batch)


def state_shardings(mesh: Mesh, state, axes: Mapping[str, Any]):
    """NamedSharding for every leaf of `state` (arrays or shapes): parameters, moments, averages, frozen copies.

    `axes` is the tree of logical axes of {"lm": ..., "value": ...}. A leaf whose path ends with a parameter's path and
    which has as many dimensions takes that parameter's sharding; any other is replicated. So Adam's moments follow
    their parameters, and the optimizer needs no mesh. A frozen net ("ref") holds the subtree of "lm".
    """
    is_axes = lambda x: isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)
    known = {
        _path_names(path)[1:]: value for path, value in jax.tree_util.tree_flatten_with_path(axes, is_leaf=is_axes)[0]
    }

    def sharding(path, leaf):
        names = _path_names(path)
        for start in range(len(names)):
            axes = known.get(names[start:])
            if axes is not None and len(axes) == len(leaf.shape):
                return NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, state)


def _path_names(path) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)

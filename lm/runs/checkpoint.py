"""Checkpoints that survive a kill, a full disk and a truncated file: written by orbax in the background, atomically.

    DIRECTORY/20/params/...      one folder per step, one item per entry of the saved dict
    DIRECTORY/20/meta/metadata   the JSON metadata and the names of the items

Orbax writes a step under a temporary name and renames it when complete, so a kill leaves no step. Damage that comes
later (a truncated copy, a half-finished deletion) is found by the sha256 of every file, which is stored in each item
before that rename; tensorstore itself would not notice all of it.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lm.core.errors import UserError

DIGESTS_FILE = "sha256.json"
META_ITEM = "meta"


class SealedPyTreeHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's pytree format, sealed by the sha256 of its files before the step gets its final name."""

    def finalize(self, directory):
        super().finalize(directory)
        digests = {str(file.relative_to(directory)): _sha256(file) for file in _files(Path(directory))}
        (Path(directory) / DIGESTS_FILE).write_text(json.dumps(digests, indent=1))


@ocp.args.register_with_handler(SealedPyTreeHandler, for_save=True)
@dataclasses.dataclass
class SealedPyTreeSave(ocp.args.PyTreeSave):
    """Names SealedPyTreeHandler as the format to save in."""


@ocp.args.register_with_handler(SealedPyTreeHandler, for_restore=True)
@dataclasses.dataclass
class SealedPyTreeRestore(ocp.args.PyTreeRestore):
    """Names SealedPyTreeHandler as the format to restore from."""


@dataclasses.dataclass
class NewestAndPinned:
    """Which steps orbax keeps: the newest `count`, and the one that `pinned` names, if any."""

    count: int
    pinned: Callable[[], int | None]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        pinned, first = self.pinned(), len(checkpoints) - self.count
        return [i >= first or each.step == pinned for i, each in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints of one run, as a context manager; leaving it waits for the last save.

        keep: newest steps that are kept, and with them the one that `pinned` names when asked. warn: called with
    one line about every damaged step that is skipped.     Saving raises `UserError` when the system refuses a
    write; as saving is asynchronous, that may be at the next call.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 2,
        pinned: Callable[[], int | None] = lambda: None,
        warn: Callable[[str], None] = print,
    ):
        self.directory = Path(directory).absolute()
        self._keep, self._pinned = keep, pinned
        self._warn = warn
        with self._saving_lock():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = self._open_manager()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        with self._saving_lock():
            self._manager.close()

    def save(self, step: int, tree: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts to write `tree`, a dict of pytrees of arrays and typed PRNG keys, and `meta`, which is JSON.

        The arrays may be donated as soon as this returns. An existing step is not written again.
        """
        self.wait()
        if step in self.steps():
            return
        items = {name: part for name, part in tree.items() if jax.tree.leaves(part)}  # orbax refuses empty items
        saves = {name: SealedPyTreeSave(jax.tree.map(_key_data, part)) for name, part in items.items()}
        saves[META_ITEM] = ocp.args.JsonSave({"items": sorted(items), META_ITEM: dict(meta)})
        with self._saving_lock():
            self._manager.save(step, args=ocp.args.Composite(**saves), force=True)

    def wait(self) -> None:
        """Returns when everything is on the disk."""
        with self._saving_lock():
            self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        return checkpoint_steps(self.directory)

    def restore(self, like: Mapping[str, Any]) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """(step, tree, meta) of the newest checkpoint that is whole, bitwise as saved; None if there are none.

        like: a dict of pytrees of arrays or ShapeDtypeStructs: structure, shapes, dtypes and shardings of the result.
        Damaged steps newer than the restored one are deleted: the run will write those steps again.
        Raises UserError if no checkpoint is whole, or if the newest whole one has another structure than `like`.
        """
        self.wait()
        newest = newest_checkpoint(self.directory, like, warn=self._warn)
        if newest is None and self.steps():
            raise UserError(f"{self.directory} has no undamaged checkpoint: remove that folder to start from step 0")
        if newest is not None:
            for step in self.steps():
                if step > newest[0]:  # damaged
                    shutil.rmtree(self.directory / str(step))
            self._manager.reload()
        return newest

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints of later steps, so that the one of `step` is the newest. UserError without it."""
        self.wait()
        if step not in self.steps():
            raise UserError(f"{self.directory} holds no checkpoint of step {step}, only of {self.steps()}")
        with self._saving_lock():
            for later in self.steps():
                if later > step:
                    shutil.rmtree(self.directory / str(later))
            self._manager.reload()

    def _open_manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=NewestAndPinned(self._keep, self._pinned),
            cleanup_tmp_directories=True,
            save_root_metadata=False,
            lightweight_initialize=True,
        )
        return ocp.CheckpointManager(self.directory, options=options)

    @contextmanager
    def _saving_lock(self) -> Iterator[None]:
        """Turns a refused write into a UserError and removes what was half written."""
        try:
            yield
        except (OSError, ValueError) as error:  # tensorstore raises ValueError, with the system's error in its text
            code = error.errno if isinstance(error, OSError) else _os_error_code(error)
            if code is None:
                raise
            for leftover in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)
            with suppress(OSError):
                self._manager = self._open_manager()  # a failed one raises the same error at every call
            raise UserError(
                f"cannot save a checkpoint in {self.directory}: {os.strerror(code)}; "
                "make room there or choose another --workdir, then start again: "
                f"{_resume_hint(self.steps())}"
            ) from error


def restore_params(
    directory: str | Path, name: str = "params", *, step: int | None = None, warn: Callable[[str], None] = print
) -> tuple[Any, dict[str, Any]]:
    """(tree[name] as nested dicts of numpy arrays, metadata) of the newest checkpoint whose `name` is whole.

    Nothing else of the checkpoint is read: no optimizer state. step: only the checkpoint of this step. warn: called
    with one line about every checkpoint that is skipped. Raises UserError if there is no such checkpoint.
    """
    directory = Path(directory).absolute()
    steps = [each for each in checkpoint_steps(directory) if step in (None, each)]
    for step in reversed(steps):
        folder = directory / str(step)
        if damage := _damage(folder, only=name):
            warn(_damage_message(folder, damage))
            continue
        item = SealedPyTreeHandler()
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item.metadata(folder / name).tree)
        return item.restore(folder / name, args=SealedPyTreeRestore(restore_args=as_numpy)), _meta(folder)[META_ITEM]
    what_there_is = f"{len(steps)} checkpoints, none of them whole with {name}" if steps else "no checkpoint"
    what_there_is += "" if step is None else f" of step {step}"
    raise UserError(f"{directory} holds {what_there_is}: train that stage first, or give the folder of another run")


def newest_checkpoint(
    directory: str | Path, like: Mapping[str, Any], *, until: int | None = None, warn: Callable[[str], None] = print
) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
    """(step, tree, meta) of the newest checkpoint that is whole, as `Checkpoints.restore` gives it; None if there is
    none. Nothing in the folder is changed, so that it may be another process's.

    until: none of a later step. warn: given one line about every damaged step that is passed over.
    """
    directory = Path(directory).absolute()
    for step in reversed(checkpoint_steps(directory)):
        if until is not None and step > until:
            continue
        folder = directory / str(step)
        if damage := _damage(folder):
            warn(_damage_message(folder, damage))
            continue
        return step, _restored_tree(folder, like), _meta(folder)[META_ITEM]
    return None


def checkpoint_steps(directory: Path) -> list[int]:
    """Steps with a complete checkpoint in a folder, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(int(folder.name) for folder in directory.iterdir() if re.fullmatch(r"\d+", folder.name))


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _meta(folder: Path) -> dict[str, Any]:
    return json.loads((folder / META_ITEM / "metadata").read_text())


def _damage(folder: Path, *, only: str | None = None) -> str | None:
    """The first thing wrong with a step's folder, or None. `only` looks at no other item."""
    try:
        for item in _meta(folder)["items"] if only is None else [only]:
            for name, digest in json.loads((folder / item / DIGESTS_FILE).read_text()).items():
                if _sha256(folder / item / name) != digest:
                    return f"{item}/{name} has changed"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _damage_message(folder: Path, damage: str) -> str:
    return f"checkpoint {folder} is damaged ({damage}): trying the one before"


def _restored_tree(folder: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    target = jax.tree.map(_restore_target, dict(like))
    _check_same_structure(folder, target)
    item = SealedPyTreeHandler()
    tree = {
        name: item.restore(
            folder / name,
            args=SealedPyTreeRestore(item=part, restore_args=ocp.checkpoint_utils.construct_restore_args(part)),
        )
        if jax.tree.leaves(part)
        else part
        for name, part in target.items()
    }
    return jax.tree.map(_with_key_type, tree, dict(like))


def _check_same_structure(folder: Path, target: Mapping[str, Any]) -> None:
    """Raises UserError naming the first leaf whose name, shape or dtype is not the same in `folder` and `target`."""
    saved = {name: SealedPyTreeHandler().metadata(folder / name).tree for name in _meta(folder)["items"]}
    there, here = _leaf_descriptions(saved), _leaf_descriptions(target)
    for leaf in [*here, *there]:
        old, new = (side[leaf] if leaf in side else "absent" for side in (there, here))
        if old != new:
            raise UserError(
                f"checkpoint {folder} is of another model or optimizer: {leaf} is {old} there and {new} "
                "here; use its config, or another --workdir"
            )


def _leaf_descriptions(tree: Any) -> dict[str, str]:
    """{"params/lm/embed": "float32[256, 64]", ...}"""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _restore_target(leaf: Any) -> jax.ShapeDtypeStruct:
    """What orbax is to restore for `leaf`: of a typed key its data; without a sharding on the first device."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    plain = jax.eval_shape(_key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=sharding)


def _with_key_type(leaf: jax.Array, like: Any) -> jax.Array:
    if not _is_key(like):
        return leaf
    # JAX gives the algorithm of a key, not of its dtype: ask while tracing one.
    impl = []
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct(like.shape, like.dtype))
    return jax.random.wrap_key_data(leaf, impl=impl[0])


def _os_error_code(error: Exception) -> int | None:
    match = re.search(r"os_error_code='(\d+)'", str(error))
    return int(match[1]) if match else None


def _resume_hint(steps: list[int]) -> str:
    return f"the run will continue from step {steps[-1]}" if steps else "no step was saved yet"

"""Checkpoints: bitwise round trips, and every way in which a disk has let somebody down."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.core.errors import UserError
from lm.runs.checkpoint import Checkpoints, restore_params

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0.0, 100)))


def tree(seed: int, *, width: int = 5) -> dict:
    key = jax.random.key(seed)
    params = {"lm": {"embed": jax.random.normal(key, (7, width)), "norm": jnp.full((width,), 1 / 3, jnp.bfloat16)}}
    gradient = jax.tree.map(lambda x: x * 0.1, params)
    _, opt_state = OPTIMIZER.update(gradient, OPTIMIZER.init(params), params)
    return {"params": params, "opt_state": opt_state, "step": jnp.int32(seed), "key": key}


def bits(tree) -> list[bytes]:
    plain = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(plain)]


def saved(directory: Path, *steps: int) -> None:
    with Checkpoints(directory) as checkpoints:
        for step in steps:
            checkpoints.save(step, tree(step), {"step": step})


def largest_file(folder: Path) -> Path:
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def test_round_trip_is_bitwise_and_keeps_types(tmp_path):
    saved(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        step, restored, meta = checkpoints.restore(jax.eval_shape(lambda: tree(0)))
    assert (step, meta) == (1, {"step": 1})
    assert bits(restored) == bits(tree(1)) != bits(tree(2))
    assert jax.tree.structure(restored) == jax.tree.structure(tree(0))  # optax's NamedTuples included
    assert restored["key"].dtype == jax.random.key(0).dtype
    assert restored["params"]["lm"]["norm"].dtype == jnp.bfloat16
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_of_any_algorithm_and_shape_survive(tmp_path, impl):
    keys = {"keys": jax.random.split(jax.random.key(3, impl=impl), 4)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, keys, {})
        _, restored, _ = checkpoints.restore(keys)
    assert restored["keys"].dtype == keys["keys"].dtype
    assert bits(restored) == bits(keys)


def test_parts_without_arrays_come_back_empty(tmp_path):
    nothing = {"params": {"w": jnp.ones(2)}, "opt_state": optax.sgd(0.1).init({"w": jnp.ones(2)}), "frozen": {}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, nothing, {})
        _, restored, _ = checkpoints.restore(nothing)
    assert jax.tree.structure(restored) == jax.tree.structure(nothing)


def test_restores_into_the_shardings_asked_for(tmp_path):
    if jax.device_count() < 2:
        pytest.skip("needs several devices")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    values = {"params": jnp.arange(8.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, values, {})
        _, restored, _ = checkpoints.restore({"params": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=rows)})
    assert restored["params"].sharding == rows
    assert bits(restored) == bits(values)


def test_donating_right_after_save_changes_nothing(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    x = jnp.arange(1 << 20, dtype=jnp.float32)
    expected = np.arange(1 << 20, dtype=np.float32)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {"params": x}, {})
        for _ in range(5):
            x = overwrite(x)
        x.block_until_ready()
        _, restored, _ = checkpoints.restore({"params": x})
    np.testing.assert_array_equal(restored["params"], expected)


def test_keeps_the_newest_and_leaves_a_step_that_is_there(tmp_path):
    saved(tmp_path, 1, 2, 3)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2, 3]
        checkpoints.save(3, tree(9), {"step": 9})
        assert checkpoints.restore(tree(0))[2] == {"step": 3}


def test_no_checkpoint_is_none(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(tree(0)) is None
        assert checkpoints.steps() == []


def truncate(folder: Path) -> None:
    file = largest_file(folder / "params")
    os.truncate(file, file.stat().st_size // 2)


def zero(folder: Path) -> None:
    """The right length and wrong content, as a power cut may leave it."""
    file = largest_file(folder / "opt_state")
    file.write_bytes(bytes(file.stat().st_size))


def remove_file(folder: Path) -> None:
    largest_file(folder / "params" / "d").unlink()


def remove_item(folder: Path) -> None:
    shutil.rmtree(folder / "opt_state")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def truncate_meta(folder: Path) -> None:
    os.truncate(folder / "meta" / "metadata", 5)


@pytest.mark.parametrize("damage", [truncate, zero, remove_file, remove_item, empty, truncate_meta])
def test_damaged_step_is_passed_over_and_written_again(tmp_path, damage):
    saved(tmp_path, 1, 2)
    damage(tmp_path / "2")
    warnings = []
    with Checkpoints(tmp_path, warn=warnings.append) as checkpoints:
        step, restored, _ = checkpoints.restore(tree(0))
        assert step == 1 and bits(restored) == bits(tree(1))
        assert len(warnings) == 1 and str(tmp_path / "2") in warnings[0]
        checkpoints.save(2, tree(2), {"step": 2})
        step, restored, _ = checkpoints.restore(tree(0))
        assert step == 2 and bits(restored) == bits(tree(2))
    assert len(warnings) == 1


def test_only_damaged_steps_is_an_error_that_deletes_nothing(tmp_path):
    saved(tmp_path, 1, 2)
    truncate(tmp_path / "1")
    truncate(tmp_path / "2")
    with Checkpoints(tmp_path, warn=lambda line: None) as checkpoints:
        with pytest.raises(UserError, match=f"{tmp_path} has no undamaged checkpoint: remove"):
            checkpoints.restore(tree(0))
        assert checkpoints.steps() == [1, 2]
    with pytest.raises(UserError, match="2 checkpoints, none of them whole"):
        restore_params(tmp_path)


def test_leftover_of_a_kill_is_no_checkpoint(tmp_path):
    saved(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        assert checkpoints.restore(tree(0))[0] == 1
        checkpoints.save(2, tree(2), {})
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_killed_while_saving_keeps_the_step_before(tmp_path):
    code = (
        "import sys, time, jax.numpy as jnp; from lm.runs import checkpoint\n"
        "def stall(file): print('all but sealed', flush=True); time.sleep(60)\n"
        "with checkpoint.Checkpoints(sys.argv[1]) as checkpoints:\n"
        "    checkpoints.save(1, {'params': jnp.arange(3.0)}, {})\n"
        "    checkpoints.wait()\n"
        "    checkpoint._sha256 = stall\n"
        "    checkpoints.save(2, {'params': jnp.arange(4.0)}, {})\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "all but sealed\n"
        process.kill()
    assert sorted(os.listdir(tmp_path)) == ["1", "2.orbax-checkpoint-tmp"]
    with Checkpoints(tmp_path) as checkpoints:
        step, restored, _ = checkpoints.restore({"params": jnp.zeros(3)})
    assert step == 1 and bits(restored) == bits({"params": jnp.arange(3.0)})
    assert os.listdir(tmp_path) == ["1"]


def test_foreign_structure_names_the_leaf_and_both_shapes(tmp_path):
    saved(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"params/lm/embed is float32\[7, 5\] there and float32\[7, 6\] here"):
            checkpoints.restore({"params": tree(0, width=6)["params"]})
        with pytest.raises(UserError, match=r"params/value is absent there and float32\[2\] here"):
            checkpoints.restore({"params": {"value": jnp.zeros(2)}})
        with pytest.raises(UserError, match=r"opt_state/1/0/count is int32\[\] there and absent here"):
            checkpoints.restore({name: part for name, part in tree(0).items() if name != "opt_state"})
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(0)["params"])
        with pytest.raises(UserError, match=r"params/lm/embed is float32\[7, 5\] there and bfloat16\[7, 5\] here"):
            checkpoints.restore(tree(0) | {"params": half})
        assert checkpoints.steps() == [1]


def test_restore_params_reads_no_optimizer_state(tmp_path):
    saved(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "2" / "opt_state")
    params, meta = restore_params(tmp_path)
    assert meta == {"step": 2}
    assert bits(params) == bits(tree(2)["params"])
    assert jax.tree.structure(params) == jax.tree.structure(tree(2)["params"])
    truncate(tmp_path / "2")
    assert restore_params(tmp_path)[1] == {"step": 1}


def test_restore_params_of_a_step(tmp_path):
    saved(tmp_path, 1, 2)
    assert bits(restore_params(tmp_path, step=1)[0]) == bits(tree(1)["params"])
    with pytest.raises(UserError, match="holds no checkpoint of step 3: train that stage first"):
        restore_params(tmp_path, step=3)


def test_restore_params_without_checkpoint_says_where(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/none holds no checkpoint"):
        restore_params(tmp_path / "none")


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MB; skipped where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_full_disk_is_one_clear_error_and_costs_no_earlier_step(small_disk):
    incompressible = np.random.default_rng(0).standard_normal(300_000, np.float32)  # 1.2 MB
    with Checkpoints(small_disk / "c") as checkpoints:
        checkpoints.save(1, tree(1), {})
        with pytest.raises(UserError, match=r"c: No space left on device; .* continue from step 1"):
            checkpoints.save(2, {"params": jnp.asarray(incompressible)}, {})
            checkpoints.wait()
        assert os.listdir(small_disk / "c") == ["1"]
        checkpoints.save(3, tree(3), {})
        assert checkpoints.restore(tree(0))[0] == 3
    assert bits(restore_params(small_disk / "c")[0]) == bits(tree(3)["params"])


def test_full_disk_at_the_last_save_surfaces_on_leaving(small_disk):
    incompressible = np.random.default_rng(0).standard_normal(300_000, np.float32)
    with pytest.raises(UserError, match="No space left on device; .* no step was saved yet"):
        with Checkpoints(small_disk / "c") as checkpoints:
            checkpoints.save(2, {"params": jnp.asarray(incompressible)}, {})


def test_full_disk_while_sealing(tmp_path, monkeypatch):
    """The same without a mount: the system refuses the small file that is written last."""
    write = Path.write_text

    def refuse(path, text, *rest, **options):
        if path.name == "sha256.json":
            raise OSError(28, "No space left on device")
        return write(path, text, *rest, **options)

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree(1), {})
        checkpoints.wait()
        monkeypatch.setattr(Path, "write_text", refuse)
        with pytest.raises(UserError, match="No space left on device; .* continue from step 1"):
            checkpoints.save(2, tree(2), {})
            checkpoints.wait()
        monkeypatch.undo()
        assert os.listdir(tmp_path) == ["1"]
        checkpoints.save(2, tree(2), {})
        assert checkpoints.restore(tree(0))[0] == 2


def test_unwritable_place_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path}/file/c: Not a directory"):
        Checkpoints(tmp_path / "file" / "c")

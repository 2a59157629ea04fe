"""Trains several runs of one config, which differ in seeds and numbers, as one vmapped program.

Each is a run of lm train with a workdir of its own: config, metrics, checkpoints, report. Their compiled functions are
called together (lm.sweep.vmap_group, which says why): one program starts, compiles and steps for all of them. This is
for models that are too small to keep a device busy. It uses one device. Seconds, and so MFU, are those of the group.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType
from ml_collections import ConfigDict

from lm.core.config import flatten, to_dict
from lm.core.errors import UserError
from lm.runs.checkpoint import Checkpoints
from lm.runs.console import SigtermExit, muted_thread, on_sigterm
from lm.runs.hardware import peak_flops
from lm.sweep.vmap_group import VmapGroup, own_arrays
from lm.train import loop
from lm.train.host import RunHost

TRACED_SUBTREES = ("optimizer.", "stage.")  # subtrees whose numbers may differ: they become arguments of the program
UNTRACED_SUBTREES = ("data.",)  # may differ too, unless shapes depend on it: each run makes its own batches
SEED_KEY = "seed"


def train_vmapped(configs: Sequence[ConfigDict], paths: Sequence[Path]) -> list[dict[str, Any] | Exception]:
    """Trains every config in its workdir, or continues it; the summary of each, or what stopped it.

    Raises UserError if they differ in what a program is compiled for, and SigtermExit after SIGTERM, once all are
    saved.
    """
    scalars = traced_scalars([flatten(to_dict(config)) for config in configs])
    peak_flops()  # measured before the runs share the machine
    group, saving = VmapGroup(len(configs)), threading.Lock()
    with on_sigterm() as stopping:

        @contextmanager
        def member_watch() -> Iterator[Any]:
            yield lambda: stopping() or group.stopped.is_set()

        @contextmanager
        def turn(checkpoints: Checkpoints) -> Iterator[None]:  # orbax numbers its operations by process, not by thread
            with saving:
                yield
                checkpoints.wait()

        def member(number: int) -> dict[str, Any]:
            with muted_thread() if number else nullcontext():
                host = RunHost(
                    group.jit,
                    group.make_once,
                    scalars[number],
                    one_device_mesh,
                    member_watch,
                    own_arrays,
                    turn,
                    is_timed=False,
                )
                return loop.train_stage(configs[number], paths[number], host=host)

        results = group.run_members(member)
    for result in results:
        if isinstance(result, SigtermExit):
            raise result
        if isinstance(result, jax.errors.TracerBoolConversionError):
            keys = ", ".join(scalars[0]) or "the config"
            raise UserError(
                f"{keys}: some value decides what is computed, so that no one program fits all runs: leave "
                "--vectorised out"
            ) from result
    return results


def traced_scalars(flat: Sequence[Mapping[str, Any]]) -> list[dict[str, np.float32]]:
    """The numbers of optimizer and stage in which the configs differ, for each config. UserError for any other
    difference."""
    absent = [key for key in dict.fromkeys(key for one in flat for key in one) if any(key not in one for one in flat)]
    if absent:
        raise UserError(f"{absent[0]} is set in some runs only: set it in all, or leave --vectorised out")
    differ = [key for key in flat[0] if any(one[key] != flat[0][key] for one in flat)]
    traced = [
        key for key in differ if key.startswith(TRACED_SUBTREES) and all(isinstance(one[key], float) for one in flat)
    ]
    for key in differ:
        if key not in traced and key != SEED_KEY and not key.startswith(UNTRACED_SUBTREES):
            raise UserError(
                f"runs that differ in {key} ({', '.join(map(str, dict.fromkeys(one[key] for one in flat)))}) need "
                "programs of their own: leave --vectorised out, or sweep only seeds and numbers of optimizer and stage"
            )
    return [{key: np.float32(one[key]) for key in traced} for one in flat]


def structure_key(config: ConfigDict) -> str:
    """Everything that must be equal for runs in one program."""
    flat = flatten(to_dict(config))
    traced = {k for k, v in flat.items() if k.startswith(TRACED_SUBTREES) and isinstance(v, float)}
    return str({k: "a number" if k in traced else v for k, v in sorted(flat.items()) if k != SEED_KEY})


def one_device_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    """The mesh of the first device, whatever sizes are asked for."""
    return jax.make_mesh(
        (1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )

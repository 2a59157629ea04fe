"""Where trials run: the devices of each trial on this machine, and workers on other machines through Slurm or Ray."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lm.core.errors import UserError

# The variable that hides all but some devices of a kind from a process.
VISIBLE_DEVICES = {"gpu": "CUDA_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES", "rocm": "HIP_VISIBLE_DEVICES"}
# One TPU process for a share of a host's chips: https://cloud.google.com/tpu/docs/run-jax-jobs, not tried by us.
TPU_ENVIRONMENT = {"TPU_PROCESS_BOUNDS": "1,1,1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
DEVICE_COUNT_CODE = "import jax, json; print(json.dumps([jax.default_backend(), jax.local_device_count()]))"


def device_environments(jobs: int | None) -> list[dict[str, str]]:
    """The environment of each of the `jobs` trials that run at once: equal shares of this machine's accelerators.

    None: one trial for each accelerator, one in all on a CPU. Another process asks JAX for the devices, because a
    process that asks holds them.
    """
    counted = subprocess.run([sys.executable, "-c", DEVICE_COUNT_CODE], capture_output=True, text=True)
    if counted.returncode:
        error = counted.stderr.strip().splitlines()[-1]
        raise UserError(f"JAX finds no device here ({error}): see `python -c {DEVICE_COUNT_CODE!r}`")
    backend, count = json.loads(counted.stdout.strip().splitlines()[-1])
    return split_devices(backend, count, jobs, os.environ)


def split_devices(backend: str, count: int, jobs: int | None, environment: Mapping[str, str]) -> list[dict[str, str]]:
    if backend == "cpu":
        return [{}] * (jobs or 1)
    jobs = jobs or count
    if jobs > count:
        raise UserError(f"--jobs={jobs} is more than the {count} devices of this machine: one trial needs one at least")
    cut = [range(i * count // jobs, (i + 1) * count // jobs) for i in range(jobs)]
    if backend == "tpu":
        return [
            {
                **TPU_ENVIRONMENT,
                "TPU_VISIBLE_CHIPS": ",".join(map(str, c)),
                "TPU_CHIPS_PER_PROCESS_BOUNDS": f"{len(c)},1,1",
            }
            for c in cut
        ]
    name = VISIBLE_DEVICES[backend]
    names = environment[name].split(",") if name in environment else [str(i) for i in range(count)]
    return [{name: ",".join(names[i] for i in c)} for c in cut]


def launch_slurm(arguments: Sequence[str], workers: int, folder: Path, options: Mapping[str, str]) -> Callable[[], int]:
    """Submits `workers` jobs that each run this sweep's command; returns a function that counts unfinished jobs.

    options: of submitit's executor, such as timeout_min, gpus_per_node, slurm_partition; cluster=local runs them here.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--launcher=slurm needs submitit: pip install submitit") from None
    cluster = options["cluster"] if "cluster" in options else "slurm"
    try:
        executor = submitit.AutoExecutor(folder=str(folder / "slurm"), cluster=cluster)
        executor.update_parameters(
            name="lm.sweep.controller",
            **{key: number_or_text(value) for key, value in options.items() if key != "cluster"},
        )
        jobs = [executor.submit(run_worker, list(arguments)) for _ in range(workers)]
    except (RuntimeError, NameError, TypeError, ValueError, OSError) as error:
        raise UserError(f"--launcher=slurm: {error}; --options=cluster=local tries it on this machine") from error
    return lambda: sum(not job.done() for job in jobs)


def launch_ray(arguments: Sequence[str], workers: int, folder: Path, options: Mapping[str, str]) -> Callable[[], int]:
    """Starts `workers` tasks of a Ray cluster that each run this sweep's command; returns a function that counts
    unfinished tasks.

    options: address of the cluster, and resources of a task, such as num_gpus=1; no address: a cluster of this machine.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--launcher=ray needs Ray: pip install ray") from None
    needs = {key: number_or_text(value) for key, value in options.items() if key != "address"}
    try:
        ray.init(address=options["address"] if "address" in options else None, log_to_driver=False)
        task = ray.remote(run_worker).options(**needs)
        tasks = [task.remote(list(arguments), os.getcwd()) for _ in range(workers)]
    except (ConnectionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--launcher=ray: {error}") from error
    return lambda: len(ray.wait(tasks, num_returns=len(tasks), timeout=0)[1])


LAUNCHERS = {"slurm": launch_slurm, "ray": launch_ray}


def run_worker(arguments: list[str], directory: str = ".") -> int:
    """Joins the study from the machine that calls it; returns the exit status of the sweep's command there."""
    return subprocess.run([sys.executable, "-m", "lm.sweep.controller", *arguments], cwd=directory).returncode


def number_or_text(text: str) -> int | float | str:
    """`text` as a number if it is one, else unchanged."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text

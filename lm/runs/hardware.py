"""The peak speed of this machine, which measured speeds are compared with, and the memory that a run used."""

import resource
import sys
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

# Peak dense bfloat16 FLOP/s of one device, by how JAX's device_kind begins; the first that fits counts. NVIDIA's
# sheets give the double, "with sparsity". Sources: H100, H200 and A100 Tensor Core GPU datasheets, nvidia.com;
# "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e", docs.cloud.google.com/tpu/docs; v4i ("v4 lite"): Jouppi et al. 2021.
DEVICE_PEAK_FLOPS: Mapping[str, float] = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "TPU v4 lite": 138e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p: JAX calls it so
    "TPU v6": 918e12,  # v6e, which JAX calls "TPU v6 lite"
}


def matmul_ceiling(*, dtype: str = "float32", size: int = 1024, repeats: int = 8, seconds: float = 1.0) -> float:
    """FLOP/s of the fastest of `repeats` square matrix products on one device, or of those begun within `seconds`.

    Compiled and warm; a product of n x n matrices is 2 n^3 FLOPs.
    """
    a = jnp.ones((size, size), dtype)
    return 2 * size**3 / fastest_seconds(jax.jit(jnp.matmul), a, a, repeats=repeats, seconds=seconds)


def memory_bandwidth(*, size: int = 2**28, repeats: int = 8, seconds: float = 1.0) -> float:
    """Bytes a second that one device reads at best: a float32 matrix of `size` bytes times a vector, as in decoding.

    Compiled and warm, the fastest of `repeats`, or of those begun within `seconds`. A sum of as many numbers comes to
    three quarters of it on a CPU.
    """
    columns = 2**10
    matrix, vector = jnp.ones((size // (4 * columns), columns)), jnp.ones(columns)
    return 4 * matrix.size / fastest_seconds(jax.jit(jnp.matmul), matrix, vector, repeats=repeats, seconds=seconds)


def fastest_seconds(function: Callable[..., jax.Array], *arrays: jax.Array, repeats: int, seconds: float) -> float:
    """Seconds of the fastest of `repeats` calls, or of those begun within `seconds`, after one that does not count."""
    function(*arrays).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    for _ in range(repeats):
        start = time.perf_counter()
        function(*arrays).block_until_ready()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return best


def peak_flops() -> tuple[float | None, str]:
    """FLOP/s of all devices of this run together at best, and where the number is from; None where it is unknown.

    CPU devices share the machine's cores, so one of them is measured, in the float32 that they compute in.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return matmul_ceiling(), "the fastest float32 matrix product measured on this machine"
    for kind, flops in DEVICE_PEAK_FLOPS.items():
        if device.device_kind.startswith(kind) and "MIG" not in device.device_kind:  # a slice of a GPU has less
            return jax.device_count() * flops, f"the maker's dense bfloat16 figure for {kind}"
    return None, f"no figure is known for {device.device_kind}"


def peak_memory() -> tuple[int, str]:
    """Bytes at most in use so far, and of what: "device", the fullest one, where the backend counts them; else
    "process", its resident set, with whatever the process did before."""
    statistics = [device.memory_stats() for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in statistics if stats and "peak_bytes_in_use" in stats]
    if peaks:
        return max(peaks), "device"
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) of the two
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "process"

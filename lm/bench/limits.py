"""The machine's limits, measured again in every turn, because other programs may have used it the last time."""

import dataclasses

import jax

from lm.runs.hardware import matmul_ceiling, memory_bandwidth, peak_flops


@dataclasses.dataclass
class DeviceLimits:
    """The best measured so far: FLOP/s of matrix products by dtype, and bytes read a second."""

    flops: dict[str, float] = dataclasses.field(default_factory=lambda: {"float32": 0.0, "bfloat16": 0.0})
    bandwidth: float = 0.0

    def remeasure(self) -> None:
        """Small arrays on a CPU; on an accelerator arrays that take longer than launching a program."""
        cpu = jax.default_backend() == "cpu"
        for dtype in self.flops:
            ceiling = matmul_ceiling(dtype=dtype, size=1024 if cpu else 8192, seconds=0.3)
            self.flops[dtype] = max(self.flops[dtype], ceiling)
        self.bandwidth = max(self.bandwidth, memory_bandwidth(size=2**28 if cpu else 2**32, seconds=0.3))

    def peak_flops_per_second(self) -> tuple[float, str]:
        """The FLOP/s that one device is compared with, and their source: the maker's figure if there is one."""
        if jax.default_backend() == "cpu":
            return self.flops["float32"], "the float32 matmul ceiling"
        known, source = peak_flops()
        if known is None:
            return self.flops["bfloat16"], f"the bfloat16 matmul ceiling: {source}"
        return known / jax.device_count(), source

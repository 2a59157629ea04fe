"""Tokens a second of greedy sampling, with prefill and decoding apart, against the memory's bandwidth.

A decode step must read every matrix and the keys and values of all earlier tokens. At batch 1 these reads, not
arithmetic, set the limit: bytes a step over the measured bandwidth.
"""

import functools
import json
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.bench.limits import DeviceLimits
from lm.bench.sizes import backend_config
from lm.bench.turns import Peer, TimedSteps, Timings, timing_summary
from lm.core.types import Params
from lm.generate.sampler import SamplingParams, prefill, sample
from lm.model import ModelConfig, make_model
from lm.model.params import matmul_param_count
from lm.weights.config_map import config_json


class GenerationShape(NamedTuple):
    """The sizes of a generation: each of `batch` prompts is answered with exactly `new` tokens."""

    batch: int
    prompt: int = 32  # tokens
    new: int = 256


def timed_steps(config: ModelConfig, shape: GenerationShape, dtype: str, lm: Params | None = None) -> TimedSteps:
    """Generations: seconds of each in all (`whole`), to the first logits (`prefill`), and of the rest (`decode`).

    Prefill is timed in a call of its own. lm: random if there is none.
    """
    model = make_model(backend_config(config, dtype))
    lm = jax.jit(model.init)(jax.random.key(0)) if lm is None else jax.device_put(lm)
    first = jax.jit(functools.partial(prefill, model, capacity=shape.prompt + shape.new))
    generate = jax.jit(functools.partial(sample, model, sampling=SamplingParams(shape.new, temperature=0.0)))
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (shape.batch, shape.prompt)).astype(np.int32)
    given = jax.device_put((prompts, np.full(shape.batch, shape.prompt, np.int32)))

    def run(count: int):
        times = []
        for _ in range(count + 1):
            start = time.perf_counter()
            jax.block_until_ready(first(lm, *given))
            ready = time.perf_counter()
            jax.block_until_ready(generate(lm, *given, jax.random.key(0)))
            end = time.perf_counter()
            times.append({"prefill": ready - start, "decode": end - ready - (ready - start), "whole": end - ready})
        return times[1:]

    return run


def peer(python: str, config: ModelConfig, shape: GenerationShape, dtype: str) -> Peer:
    """The same shape and prompts' sizes with transformers' generate."""
    options = {**shape._asdict(), "dtype": backend_config(config, dtype).dtype}
    return Peer(python, "generate.py", {"config": json.dumps(config_json(config, "llama")), **options})


def bytes_per_step(config: ModelConfig, shape: GenerationShape, dtype: str) -> float:
    """The bytes that a decode step must read, on average: each matrix once, and the cache as it is by then.

    In the dtype of the products. For a mixture of experts, the experts of one token.
    """
    width = jnp.dtype(dtype).itemsize
    held = [shape.prompt + t for t in range(1, shape.new + 1)]  # tokens that a step attends to, its own among them
    cached_tokens = sum(
        statistics.fmean(min(n, config.window) if local else n for n in held) for local in config.local_layers
    )
    return width * (matmul_param_count(config) + shape.batch * cached_tokens * 2 * config.kv_heads * config.head_size)


def result(
    name: str, config: ModelConfig, shape: GenerationShape, dtype: str, timed: Timings, limits: DeviceLimits
) -> dict[str, Any]:
    """Speeds of a whole generation, of its two parts, and how much of the bandwidth decoding needs."""
    dtype = backend_config(config, dtype).dtype
    summary = timing_summary(timed, "whole", units=shape.batch * shape.new)
    median = summary["ours"]["median"]
    size = bytes_per_step(config, shape, dtype)
    read = size * shape.new / median["decode"]
    return {
        "size": name,
        "dtype": dtype,
        **shape._asdict(),
        **summary,
        "prefill_per_second": shape.batch * shape.prompt / median["prefill"],
        "decode_per_second": shape.batch * shape.new / median["decode"],
        "bytes_per_step": size,
        "bytes_per_second": read,
        "bandwidth": limits.bandwidth,
        "of_bandwidth": read / limits.bandwidth,
    }

"""Tokens a second of pretraining: the stage's own update with its own AdamW, clipping and z-loss, compiled once.

A batch is whole rows of one segment each. The peer has the same shape, from the config.json that we would write for it,
no z-loss, and in bfloat16 autocast around float32 parameters.
"""

import json
import time
from typing import Any

import jax
import numpy as np

from lm.bench.limits import DeviceLimits
from lm.bench.sizes import BenchmarkSize, backend_config
from lm.bench.turns import Peer, TimedSteps, Timings, timing_summary
from lm.core.types import Tokens
from lm.model import make_model
from lm.model.params import flops_per_token
from lm.optim import optimizers
from lm.stages.pretraining import pretrain
from lm.weights.config_map import config_json


def timed_steps(size: BenchmarkSize, dtype: str) -> TimedSteps:
    """Steps of pretraining on one batch: seconds of each, after one that compiles or warms up."""
    model = make_model(backend_config(size.config, dtype))
    update = pretrain.make(model, optimizers.make_optimizer(learning_rate=1e-4, total_steps=1000))
    state = jax.jit(lambda key: update.init(key, {"lm": model.init(key)}, {}))(jax.random.key(0))
    step = jax.jit(update.update, donate_argnums=0)
    batch = jax.device_put(random_batch(size))

    def run(count: int):
        nonlocal state
        times = []
        for _ in range(count + 1):
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, batch))
            times.append({"step": time.perf_counter() - start})
        return times[1:]

    return run


def random_batch(size: BenchmarkSize) -> Tokens:
    """Rows of tokens drawn evenly; every target counts."""
    ids = np.random.default_rng(0).integers(0, size.config.vocab_size, (size.rows, size.length + 1)).astype(np.int32)
    ones = np.ones((size.rows, size.length), np.int32)
    positions = np.arange(size.length, dtype=np.int32) * ones
    return Tokens(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), positions, ones)


def peer(python: str, size: BenchmarkSize, dtype: str) -> Peer:
    """The same shape, batch and optimizer in PyTorch; it predicts what follows `length` tokens, as ours does."""
    options = {"config": json.dumps(config_json(size.config, "llama")), "rows": size.rows, "length": size.length}
    return Peer(python, "train_step.py", {**options, "dtype": backend_config(size.config, dtype).dtype})


def result(name: str, size: BenchmarkSize, dtype: str, timed: Timings, limits: DeviceLimits) -> dict[str, Any]:
    """Speeds, and FLOP/s that the model needs (rematerialisation is not counted) over what the device could do."""
    tokens = size.rows * size.length
    summary = timing_summary(timed, "step", units=tokens)
    flops = flops_per_token(size.config, size.length) * summary["per_second"]["ours"]["median"]
    peak, source = limits.peak_flops_per_second()
    return {
        "size": name,
        "dtype": backend_config(size.config, dtype).dtype,
        "rows": size.rows,
        "length": size.length,
        **summary,
        "flops_per_second": flops,
        "of_peak": flops / peak,
        "peak": {"flops_per_second": peak, "source": source},
    }

"""Seconds of one GRPO step, with rollout and update apart, against TRL.

Size S: 4 prompts of 64 tokens x 8 answers of 64 tokens, none ending early, AdamW, the reference's log-probs included on
both sides.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np

from lm.bench.limits import DeviceLimits
from lm.bench.sizes import SIZES, backend_config
from lm.bench.turns import Peer, TimedSteps, Timings, timing_summary
from lm.core.types import Rollouts
from lm.generate.sampler import SamplingParams
from lm.model import ModelConfig, make_model
from lm.model.params import matmul_param_count
from lm.optim import optimizers
from lm.stages.rl import grpo
from lm.stages.rl.multi_turn import rollout_rows


@dataclasses.dataclass(frozen=True)
class RolloutShape:
    """The sizes of a step."""

    prompts: int = 4
    group: int = 8
    prompt: int = 64  # tokens
    new: int = 64


def timed_steps(config: ModelConfig, shape: RolloutShape, *, beta: float = 0.04) -> TimedSteps:
    """Steps of stage grpo: seconds of generation, of update (reference's and own log-probs, loss, gradient, AdamW), and
    of both."""
    model = make_model(backend_config(config, "auto"))
    update = grpo.make(model, optimizers.make_optimizer(learning_rate=1e-4, total_steps=1000), beta=beta)
    state = jax.jit(lambda key: update.init(key, {"lm": model.init(key)}, {}))(jax.random.key(0))
    draw = jax.jit(functools.partial(rollout_rows, model, sampling=SamplingParams(shape.new)))
    step = jax.jit(update.update, donate_argnums=0)
    rows = shape.prompts * shape.group
    prompts = np.random.default_rng(0).integers(1, config.vocab_size, (shape.prompts, shape.prompt))
    prompts, lengths = prompts.repeat(shape.group, axis=0).astype(np.int32), np.full(rows, shape.prompt, np.int32)

    def run(count: int):
        nonlocal state
        times = []
        for i in range(count + 1):
            start = time.perf_counter()
            tokens, logprobs, completions = jax.block_until_ready(
                draw(state.params["lm"], prompts, lengths, jax.random.fold_in(jax.random.key(1), i))
            )
            sampled = time.perf_counter()
            rewards = np.mean(np.asarray(completions.tokens) % 2 == 0, axis=1, dtype=np.float32)
            batch = Rollouts(tokens, rewards, {}, np.asarray(completions.stopped), logprobs, group=shape.group)
            state, _ = jax.block_until_ready(step(state, batch))
            end = time.perf_counter()
            times.append({"generation": sampled - start, "update": end - sampled, "step": end - start})
        return times[1:]

    return run


def peer(python: str, shape: RolloutShape) -> Peer:
    """TRL's step with the GPT-2 that has as many layers, columns and heads, and about as many parameters."""
    c = SIZES["S"].config
    sizes = {"layers": c.layers, "width": c.width, "heads": c.heads, "hidden": 4 * c.width, "vocabulary": c.vocab_size}
    return Peer(python, "grpo_step.py", {**dataclasses.asdict(shape), **sizes})


def step_flops(config: ModelConfig, shape: RolloutShape) -> float:
    """FLOPs of the matrix products that a step must do: one pass to generate, one of the reference, one forward and
    backward; two a parameter and token in each pass, without attention."""
    tokens = shape.prompts * shape.group * (shape.prompt + shape.new)
    return 2 * matmul_param_count(config) * tokens * (1 + 1 + 3)


def result(config: ModelConfig, shape: RolloutShape, timed: Timings, limits: DeviceLimits) -> dict[str, Any]:
    """Seconds of each phase, and those that the products alone take at the device's best."""
    peak, source = limits.peak_flops_per_second()
    least = step_flops(config, shape) / peak
    summary = timing_summary(timed, "step")
    summary |= {"of_peak": least / summary["ours"]["median"]["step"], "least": least}
    return {"size": "S", **dataclasses.asdict(shape), **summary, "peak": {"flops_per_second": peak, "source": source}}

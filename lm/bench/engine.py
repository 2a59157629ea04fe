"""The gain of continuous batching and of shared prefixes: the serving engine against the fixed loop, and itself.

Answers of SHORTEST to `new` tokens to REQUESTS prompts at temperature 1: the lengths of any 8 in a row are evenly
spaced, in an order of their own. The fixed loop is lm.generate.sampler.sample over `batch` prompts at a time, as
lm.generate.answers and rollouts run it: each batch goes on until its longest answer is there. The engine has `batch`
slots. Groups are as GRPO's: GROUP answers of GROUP_NEW tokens to each of GROUP_PROMPTS new prompts, with the engine's
prefix cache and without it. Only the tokens of answers count.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.bench.generation import GenerationShape
from lm.bench.sizes import backend_config
from lm.bench.turns import TimedSteps, Timings, phase_seconds
from lm.core.types import Params
from lm.generate.engine import Engine, Request
from lm.generate.sampler import SamplingParams, sample
from lm.model import Model, ModelConfig, make_model

REQUESTS = 64
SHORTEST, SPACED = 8, 8  # tokens of an answer; so many lengths up to the longest
GROUP_PROMPTS, GROUP = 8, 8
GROUP_PROMPT, GROUP_NEW = 256, 32  # tokens
COMPARISONS = {"lengths": ("engine", "fixed"), "groups": ("shared", "apart")}  # what is held against what


class EngineWork(NamedTuple):
    """What both sides answer."""

    prompts: np.ndarray  # i32[REQUESTS,P]
    lengths: np.ndarray  # i32[REQUESTS]  tokens of each answer


def engine_work(config: ModelConfig, shape: GenerationShape) -> EngineWork:
    draw = np.random.default_rng(0)
    prompts = draw.integers(1, config.vocab_size, (REQUESTS, shape.prompt)).astype(np.int32)
    spaced = np.linspace(min(SHORTEST, shape.new), shape.new, SPACED).astype(int)
    lengths = np.concatenate([draw.permutation(spaced) for _ in range(-(-REQUESTS // SPACED))])
    return EngineWork(prompts, lengths[:REQUESTS])


def group_requests(config: ModelConfig, seed: int) -> list[Request]:
    """GROUP requests of each prompt, one after the other; another seed, other prompts."""
    draw = np.random.default_rng(seed)
    prompts = draw.integers(1, config.vocab_size, (GROUP_PROMPTS, GROUP_PROMPT)).repeat(GROUP, axis=0)
    return [Request(row.tolist(), SamplingParams(GROUP_NEW), seed=i) for i, row in enumerate(prompts)]


def answer_seconds(engine: Engine, requests: Sequence[Request]) -> float:
    """Seconds until all requests are answered."""
    start = time.perf_counter()
    for request in requests:
        engine.submit(request)
    while not engine.is_idle:
        engine.step()
    return time.perf_counter() - start


def fixed_loop(model: Model, lm: Params, work: EngineWork, batch: int) -> Callable[[], float]:
    """() -> seconds until all are answered, `batch` prompts at a time, each batch for as long as its longest answer."""
    batches = np.arange(-(-REQUESTS // batch) * batch).reshape(-1, batch) % REQUESTS  # the last one is full, too
    limits = [int(work.lengths[rows].max()) for rows in batches]
    run = {new: jax.jit(functools.partial(sample, model, sampling=SamplingParams(new))) for new in set(limits)}

    def seconds() -> float:
        start = time.perf_counter()
        for number, (rows, new) in enumerate(zip(batches, limits)):
            lengths = np.full(batch, work.prompts.shape[1], np.int32)
            jax.block_until_ready(run[new](lm, work.prompts[rows], lengths, jax.random.key(number)))
        return time.perf_counter() - start

    return seconds


def timed_steps(config: ModelConfig, shape: GenerationShape, dtype: str) -> TimedSteps:
    """Steps: seconds of the `fixed` loop and of the `engine` for the same answers, and of an engine for groups whose
    prompts are prefilled once each (`shared`) or once an answer (`apart`)."""
    model = make_model(backend_config(config, dtype))
    lm = jax.jit(model.init)(jax.random.key(0))
    work = engine_work(config, shape)
    requests = [
        Request(row.tolist(), SamplingParams(int(new)), seed=i)
        for i, (row, new) in enumerate(zip(work.prompts, work.lengths))
    ]
    fixed = fixed_loop(model, lm, work, shape.batch)
    engines = {
        name: Engine(
            model, lm, None, slots=shape.batch, queue=max(REQUESTS, GROUP_PROMPTS * GROUP), prefix_cache=shares
        )
        for name, shares in (("shared", True), ("apart", False))
    }
    done = 0

    def run(count: int):
        nonlocal done
        times = []
        for _ in range(count + 1):
            done += 1
            row = {"fixed": fixed(), "engine": answer_seconds(engines["apart"], requests)}
            for name, engine in engines.items():
                row[name] = answer_seconds(engine, group_requests(config, done))
            times.append(row)
        return times[1:]

    return run


def result(name: str, config: ModelConfig, shape: GenerationShape, dtype: str, timed: Timings) -> dict[str, Any]:
    """Tokens a second of all four, and the two ratios, by the median of steps and turn by turn."""
    tokens = {"lengths": int(engine_work(config, shape).lengths.sum()), "groups": GROUP_PROMPTS * GROUP * GROUP_NEW}
    seconds, by_turn = phase_seconds(timed.ours)["median"], [phase_seconds([turn])["median"] for turn in timed.ours]
    comparisons = {
        what: {
            "per_second": {side: tokens[what] / seconds[side] for side in (ours, other)},
            "ratio": seconds[other] / seconds[ours],
            "each_turn": [turn[other] / turn[ours] for turn in by_turn],
        }
        for what, (ours, other) in COMPARISONS.items()
    }
    return {
        "size": name,
        "dtype": backend_config(config, dtype).dtype,
        **shape._asdict(),
        "requests": REQUESTS,
        "tokens": tokens,
        **comparisons,
        "turns": [[dict(row) for row in turn] for turn in timed.ours],
    }

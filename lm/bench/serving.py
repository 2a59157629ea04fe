"""A load test of `lm serve` on loopback, beside a loop that answers the same prompts one after the other with `sample`.

The server runs in a process of its own. C clients send greedy streaming requests of random ids, each the next one as
soon as its answer is whole; the same prompts at every C. A first round, which compiles, does not count.
"""

import asyncio
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.bench.generation import GenerationShape, peer as generation_peer
from lm.core.errors import UserError
from lm.generate.sampler import SamplingParams, check_sampling, sample
from lm.runs.workdir import TrainedModel

REQUESTS_PER_CLIENT, MIN_REQUESTS = 4, 8
PERCENTILES = (50, 95, 99)
STOP_SECONDS = 30.0  # for the server to end


class ServedAnswer(NamedTuple):
    """What one client saw of one answer."""

    tokens: int
    first: float  # seconds from the request to the first text
    gaps: list[float]  # seconds between one text and the next


def random_prompts(trained: TrainedModel, count: int, length: int) -> np.ndarray:
    """i32[count,length] ids, none of them special."""
    usable = [i for i, text in enumerate(trained.tokenizer.token_bytes()) if text]
    return np.random.default_rng(0).choice(usable, (count, length)).astype(np.int32)


@contextlib.contextmanager
def running_server(workdir: Path, *, slots: int, queue: int) -> Iterator[tuple[str, int]]:
    """Host and port of `lm serve` in a process of its own, which is stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="lm-") as folder:
        flags = [f"--workdir={workdir}", "--port=0", f"--slots={slots}", f"--queue={queue}"]
        flags.append(f"--rankings={folder}/people.db")
        process = subprocess.Popen(
            [sys.executable, "-m", "lm", "serve", *flags],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        try:
            said = process.stdout.readline() + process.stdout.readline()  # that it compiles, and where it listens
            found = re.search(r"http://([\d.]+):(\d+)/", said)
            if not found:
                raise UserError(f"lm serve did not start ({said.strip() or 'see above'})")
            yield found[1], int(found[2])
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


async def streamed_answer(address: tuple[str, int], prompt: Sequence[int], new: int) -> ServedAnswer:
    """One request by hand: a client's library would take the time of the cores that the server needs."""
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
    data = json.dumps({**body, "stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nContent-Type: application/json\r\n"
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        status = await reader.readline()
        if b" 200 " not in status:
            raise UserError(f"lm serve answered {status.decode().strip()}: {(await reader.read())[-300:]!r}")
        times, tokens = [], 0
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise UserError(f"lm serve failed: {event['error']['message']}")
            if event["choices"] and event["choices"][0]["text"]:
                times.append(time.perf_counter())
            if "usage" in event:
                tokens = event["usage"]["completion_tokens"]
    finally:
        writer.close()
    first = (times[0] if times else time.perf_counter()) - began
    return ServedAnswer(tokens, first, [after - before for before, after in zip(times, times[1:])])


async def measured_load(
    address: tuple[str, int], prompts: np.ndarray, clients: int, new: int
) -> tuple[list[ServedAnswer], float]:
    """The answers to all prompts by so many clients, and the seconds in all."""
    waiting, answers = iter(prompts.tolist()), []

    async def client() -> None:
        for prompt in waiting:
            answers.append(await streamed_answer(address, prompt, new))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return answers, time.perf_counter() - began


def sample_loop(trained: TrainedModel, new: int) -> Callable[[np.ndarray], tuple[int, float]]:
    """(prompts) -> tokens and seconds of answering them one after the other."""
    sampling = SamplingParams(new, temperature=0.0, stop=tuple(trained.tokenizer.stop_ids))
    draw = jax.jit(functools.partial(sample, trained.model, sampling=sampling))
    lm = jax.device_put(trained.params["lm"])

    def run(prompts: np.ndarray) -> tuple[int, float]:
        began, tokens = time.perf_counter(), 0
        for prompt in prompts:
            tokens += int(draw(lm, prompt[None], np.array([len(prompt)], np.int32), jax.random.key(0)).lengths[0])
        return tokens, time.perf_counter() - began

    return run


def results(
    trained: TrainedModel,
    *,
    clients: Sequence[int],
    prompt: int,
    new: int,
    slots: int,
    python: str,
    on_turn: Callable[[Mapping[str, float]], None],
) -> dict[str, Any]:
    """One row for each count of clients, the loop, and transformers' loop where there is a peer."""
    check_sampling(trained.model, prompt, SamplingParams(new))
    prompts = random_prompts(trained, max(MIN_REQUESTS, REQUESTS_PER_CLIENT * max(clients)), prompt)
    rows = []
    with running_server(trained.path, slots=slots, queue=max(clients)) as address:
        asyncio.run(measured_load(address, prompts[:slots], slots, new))
        for count in clients:
            given = prompts[: max(MIN_REQUESTS, REQUESTS_PER_CLIENT * count)]
            rows.append({"clients": count, **load_figures(*asyncio.run(measured_load(address, given, count, new)))})
            on_turn({"tokens/s": rows[-1]["tokens_per_second"]})
    loop = sample_loop(trained, new)
    loop(prompts[:1])
    tokens, seconds = loop(prompts[:MIN_REQUESTS])
    found = {"size": trained.path.name, "prompt": prompt, "new": new, "slots": slots, "rows": rows}
    found["loop"] = {"requests_per_second": MIN_REQUESTS / seconds, "tokens_per_second": tokens / seconds}
    if python:
        reply = generation_peer(
            python, trained.model_config, GenerationShape(1, prompt, new), trained.model_config.dtype
        ).run_steps(MIN_REQUESTS)
        found["peer"] = {"tokens_per_second": new * len(reply["seconds"]) / sum(r["whole"] for r in reply["seconds"])}
        found["peer"]["versions"] = reply["versions"]
    return found


def load_figures(answers: Sequence[ServedAnswer], seconds: float) -> dict[str, Any]:
    """Rates, and percentiles of the seconds to the first text and between texts."""
    gaps = [gap for answer in answers for gap in answer.gaps] or [0.0]
    return {
        "requests": len(answers),
        "requests_per_second": len(answers) / seconds,
        "tokens_per_second": sum(answer.tokens for answer in answers) / seconds,
        "first": dict(zip(PERCENTILES, np.percentile([answer.first for answer in answers], PERCENTILES).tolist())),
        "between": dict(zip(PERCENTILES, np.percentile(gaps, PERCENTILES).tolist())),
    }

"""What the tests of lm serve share: an engine whose answers are written down, tiny models, running servers."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
import uvicorn

from lm import model
from lm.generate.engine import EngineStats, Event, QueueFull, SampledToken
from lm.generate.sampler import SamplingParams, sample
from lm.runs.checkpoint import Checkpoints
from lm.runs.workdir import TrainedModel, load_trained_model
from lm.serve.api import Api, make_app
from lm.serve.rankings import RankingBook
from lm.serve.served_model import EngineLimits, ServedModel
from lm.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
PROMPT_WIDTH = 32  # tokens, of all prompts that are sampled for comparison: one program


class ScriptedEngine:
    """Gives each request the ids of `answer(request)`, one a step, then the stop id; `slots` requests at a time.

    gate: a step waits until it is set. cancelled: the numbers of requests that were cancelled while they were open.
    """

    def __init__(self, answer, stop: int, *, slots: int = 2, seconds_a_step: float = 0.0):
        self._answer, self._stop, self.slots, self._seconds = answer, stop, slots, seconds_a_step
        self.gate = threading.Event()
        self.gate.set()
        self.requests, self.cancelled, self.fail_next = [], [], False
        self._open = {}

    def submit(self, request):
        if len(self._open) >= 100:
            raise QueueFull("the scripted queue is full")
        self.requests.append(request)
        number = len(self.requests) - 1
        self._open[number] = [*self._answer(request), self._stop][: request.sampling.max_new]
        return number

    def cancel(self, number):
        if self._open.pop(number, None) is not None:
            self.cancelled.append(number)

    def step(self):
        self.gate.wait(20)
        time.sleep(self._seconds)
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("scripted failure")
        events = []
        for number in list(self._open)[: self.slots]:
            ids, request = self._open[number], self.requests[number]
            id_ = ids.pop(0)
            token = SampledToken(id_, -0.5, tuple((i + 20, -1.0 - i) for i in range(request.top_logprobs)))
            finish = "" if ids else "stop" if id_ == self._stop else "length"
            if finish:
                del self._open[number]
            events.append(Event(number, (token,), finish))
        return events

    @property
    def is_idle(self):
        return not self._open

    def stats(self):
        running = min(len(self._open), self.slots)
        return EngineStats(running, len(self._open) - running, self.slots, 9, 1, 2, 3, 4, 5, 6)


def tiny_workdir(
    path: Path, tokenizer: Tokenizer, *, stage: str = "sft", context: int = 64, seed: int = 0, deviation: float = 0.3
) -> Path:
    """A workdir as lm train leaves it, of a random model; deviation: of noise that gives it tastes."""
    config = model.ModelConfig(
        vocab_size=tokenizer.vocab_size,
        layers=2,
        width=16,
        heads=2,
        kv_heads=1,
        head_size=8,
        hidden=24,
        context=context,
    )
    lm = jax.jit(model.make_model(config.for_backend("cpu")).init)(jax.random.key(seed))
    lm = jax.tree.map(lambda x: x + deviation * jax.random.normal(jax.random.key(x.size), x.shape), lm)
    meta = {"stage": stage, "fingerprint": tokenizer.fingerprint, "model": dataclasses.asdict(config)}
    with Checkpoints(path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": {"lm": lm}}, meta)
    tokenizer.save(path / "tokenizer.model")
    (path / "config.json").write_text(json.dumps({"stage": {"name": stage}}))
    return path


def loaded(path: Path) -> TrainedModel:
    return load_trained_model(path, backend="cpu")


def scripted_model(name: str, trained: TrainedModel, engine: ScriptedEngine, *, queue: int = 4) -> ServedModel:
    return ServedModel(name, trained, engine, EngineLimits(engine.slots, queue), fingerprint=f"print of {name}")


@contextlib.contextmanager
def serving(models: list[ServedModel], book_path: Path, *, max_body: int = 10_000, **options):
    """(address, api) of a server in a thread of this process."""
    api = Api({served.name: served for served in models}, max_body=max_body, book=RankingBook(book_path))
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(make_app(api, **options), log_config=None, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", api
    finally:
        api.stop()
        server.should_exit = True
        thread.join()
        api.book.close()


@contextlib.contextmanager
def started(*flags: str):
    """(process, address) of `lm serve` once it listens; killed at the end if it still runs. What it says on stderr
    fails the test."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lm.serve.server", "--port=0", *flags]
    complaints = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would stop the server once it is full
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=complaints, text=True)
    try:
        said = process.stdout.readline() + process.stdout.readline()  # that it compiles, and where it listens
        found = re.search(r"http://[^/]*", said)
        assert found, f"{said} {said_in(complaints)}"
        yield process, found[0]
        assert said_in(complaints) == ""
    finally:
        process.kill()
        process.communicate()
        complaints.close()


def said_in(file) -> str:
    file.seek(0)
    return file.read()


@functools.cache
def sampler(workdir: Path, max_new: int, temperature: float):
    """(trained model, its compiled `sample` of one prompt)."""
    trained = loaded(workdir)
    sampling = SamplingParams(max_new, temperature, stop=trained.tokenizer.stop_ids)
    return trained, jax.jit(functools.partial(sample, trained.model, sampling=sampling))


def sampled_text(workdir, messages, max_new: int, *, seed: int = 0, temperature: float = 0.0) -> str:
    """What `sample` of this prompt alone draws."""
    trained, draw = sampler(workdir, max_new, temperature)
    ids = trained.tokenizer.encode_prompts([messages])[0]
    prompt = np.zeros((1, PROMPT_WIDTH), np.int32)
    prompt[0, : len(ids)] = ids
    drawn = draw(trained.params["lm"], prompt, np.array([len(ids)], np.int32), jax.random.key(seed))
    return trained.tokenizer.decode(drawn.tokens[0, : drawn.lengths[0]].tolist())

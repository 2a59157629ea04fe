"""Serves trained models over HTTP, as OpenAI's clients and llama.cpp's users ask them, with a chat page at /.

    python -m lm serve --workdir=runs/quickstart
    python -m lm serve --workdir=runs/quickstart --model=sft=runs/quickstart/sft --port=8000

Every model has an engine that answers --slots requests at once; what comes when --queue more wait is refused at once
with status 429. --workdir is a stage's folder or a pipeline's, whose last policy then answers; --model adds others by
name, LoRA runs too, and a request names one of them. On this machine no token is needed; for any other --host there is
one, given or drawn. SIGTERM or ctrl-C finishes what runs, at most --drain_seconds long, then exits.

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello!"}]}'
"""

import argparse
import asyncio
import contextlib
import secrets
import socket
import time
import webbrowser
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from lm.core.config import parsed_flags
from lm.core.errors import UserError, check_at_least
from lm.data.annotations import PEOPLE_DB
from lm.feedback.web import LOOPBACK_HOSTS, open_socket, server_address
from lm.generate.engine import Request
from lm.generate.sampler import SamplingParams
from lm.runs.console import run_program, say, warn
from lm.serve.api import Api, make_app
from lm.serve.rankings import RankingBook
from lm.serve.served_model import EngineLimits, ServedModel, load_served_models
from lm.train.warm_start import policy_folder

WARM_UP_LENGTHS = (1, 64, 128, 256, 512)  # tokens: around where the engine's cache doubles
POLL_SECONDS = 0.05  # how often a draining server looks whether it is done
FLAGS = {
    "workdir": dict(
        required=True, metavar="DIR", help="the model that answers by default: a run, or a pipeline's folder"
    ),
    "model": dict(action="append", default=[], metavar="NAME=DIR", help="another one; may be given several times"),
    "host": dict(default=LOOPBACK_HOSTS[0], help="0.0.0.0 admits other machines, with a token; default: this one only"),
    "port": dict(type=int, default=8000, help="0 takes a free one; default: 8000"),
    "token": dict(default="", help="the secret of every request; default: none here, a random one for other hosts"),
    "slots": dict(type=int, default=8, help="answers of a model at once; default: 8"),
    "queue": dict(type=int, default=64, help="requests of a model that may wait; default: 64"),
    "pages": dict(type=int, default=0, help="of the cache, of 16 tokens; default: 0, for all slots or 1 GiB"),
    "max_tokens": dict(type=int, default=0, help="of an answer at most; default: 0, what the context leaves"),
    "seconds": dict(type=float, default=600.0, help="of an answer at most, waiting included; default: 600"),
    "max_body": dict(type=int, default=1_000_000, help="bytes of a request at most; default: 1000000"),
    "drain_seconds": dict(type=float, default=30.0, help="for what runs when SIGTERM comes; default: 30"),
    "rankings": dict(default="", metavar="FILE", help=f"verdicts of the chat page; default: WORKDIR/{PEOPLE_DB}"),
    "open": dict(action="store_true", help="open the page in a browser"),
}


class DrainingServer(uvicorn.Server):
    """Uvicorn that finishes what runs before it stops. A second signal stops it at once."""

    def __init__(self, app: Starlette, api: Api, *, drain_seconds: float):
        # log_config: uvicorn's own closes the handlers of other libraries, and stderr with them.
        super().__init__(
            uvicorn.Config(app, log_config=None, log_level="warning", lifespan="off", timeout_graceful_shutdown=3)
        )
        self._api, self._drain_seconds = api, drain_seconds

    def handle_exit(self, sig: int, frame) -> None:
        """The first signal: new requests are refused. Uvicorn would raise it again at the end; this exits with 0."""
        if self._api.draining:
            super().handle_exit(sig, frame)
        self._api.draining = True

    async def run_until_drained(self, listening: socket.socket) -> None:
        """Serves until a signal has come and the last request has ended, or time is up."""
        serving = asyncio.create_task(self.serve(sockets=[listening]))
        while not self._api.draining and not serving.done():
            await asyncio.sleep(POLL_SECONDS)
        if self._api.open_requests and not self.should_exit:
            say(f"stopping: {self._api.open_requests} requests still run, for {self._drain_seconds:g} s at most")
        limit = time.monotonic() + self._drain_seconds
        while self._api.open_requests and time.monotonic() < limit and not self.should_exit:
            await asyncio.sleep(POLL_SECONDS)
        await asyncio.to_thread(self._api.stop)  # what is left ends with an error that its client can read
        self.should_exit = True
        await serving


def model_folders(flags: argparse.Namespace) -> dict[str, Path]:
    """The folder of each model by its name, the default one first. UserError for a name that is given twice."""
    folders = {policy_folder(Path(flags.workdir)).resolve().name: Path(flags.workdir)}
    for given in flags.model:
        name, _, folder = given.partition("=")
        if not name.strip() or not folder:
            raise UserError(f"--model={given} names no model: give --model=NAME=DIR")
        if name in folders:
            raise UserError(f"two models are called {name}: give --model={name}2={folder}")
        folders[name] = Path(folder)
    return folders


async def warm_up(models: list[ServedModel]) -> None:
    """Compiles what requests of the common lengths need, before the first comes."""
    for served in models:
        for length in WARM_UP_LENGTHS:
            ids = [served.tokenizer.eos] * min(length, served.context - 1)
            stream = await served.worker.submit([Request(ids, SamplingParams(1, 0.0))])
            async for _, event in stream.events():
                if event.finish == "error":
                    raise UserError(f"{served.name} cannot answer: {event.message}")
            if length >= served.context - 1:
                break


def check_flags(flags: argparse.Namespace) -> None:
    check_at_least(1, "serve", slots=flags.slots, queue=flags.queue, max_body=flags.max_body)
    check_at_least(0, "serve", pages=flags.pages, max_tokens=flags.max_tokens, drain_seconds=flags.drain_seconds)
    if not flags.seconds > 0:
        raise UserError(f"serve.seconds is {flags.seconds}; it must be above 0")
    if not all(c.isascii() and c.isprintable() and c not in ' ;,"\\' for c in flags.token):
        raise UserError("--token holds a character that no cookie may: give letters, digits, - and _")


def program(argv: list[str]) -> None:
    flags = parsed_flags(argv, __doc__, FLAGS)
    check_flags(flags)
    folders = model_folders(flags)
    local = flags.host in LOOPBACK_HOSTS
    token = flags.token or ("" if local else secrets.token_urlsafe())
    limits = EngineLimits(flags.slots, flags.queue, flags.pages, flags.max_tokens, flags.seconds)
    with open_socket(flags.host, flags.port) as listening:
        models = load_served_models(folders, limits, warn=warn)
        say(f"compiling {', '.join(models)}")
        asyncio.run(warm_up(list(models.values())))
        book = RankingBook(Path(flags.rankings or Path(flags.workdir) / PEOPLE_DB))
        api = Api(models, max_body=flags.max_body, book=book)
        app = make_app(api, token=token, hosts=LOOPBACK_HOSTS if local else ())
        address = server_address(flags.host, listening)
        secret = f"?token={token}" if token else ""
        say(f"chat at {address}{secret}; OpenAI's API at {address}v1 (models: {', '.join(models)}; ctrl-C stops)")
        if token:
            say(f"other programs send the header Authorization: Bearer {token}")
        if flags.open:
            webbrowser.open(address + secret)
        server = DrainingServer(app, api, drain_seconds=flags.drain_seconds)
        with contextlib.closing(book):
            asyncio.run(server.run_until_drained(listening))
        say("stopped")


if __name__ == "__main__":
    run_program(program)

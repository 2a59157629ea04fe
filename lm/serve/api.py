"""The HTTP interface: OpenAI's requests, llama.cpp's /completion, the chat page, and rankings of its answers.

    POST /v1/chat/completions   /v1/completions   /completion      GET /v1/models   /v1/models/NAME
    GET  /health   /metrics     /                                  POST /rankings   /rankings/undo

An error is OpenAI's {"error": {"message", "type", "code"}}: 400 for an invalid request, 401 without the token, 403 for
another host or origin, 404 for an unknown model, 413 for a long body, 429 at once while the queue is full, 503 while
the server drains.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lm.core.errors import UserError
from lm.data.annotations import StoreUnavailable
from lm.feedback.web import LOOPBACK_HOSTS, RequestGuard
from lm.generate.engine import QueueFull
from lm.serve import openai_requests as asked, openai_responses as said
from lm.serve.openai_requests import RequestOptions
from lm.serve.openai_responses import AnswerText, ResponseForm, TextPiece, server_event
from lm.serve.prometheus import ServerMetrics
from lm.serve.rankings import RankingBook
from lm.serve.served_model import PromptTooLong, ServedModel
from lm.serve.worker import EngineStopped, EventStream

COOKIE_NAME = "serving"  # holds the token
CLIENT_CLOSED_STATUS = 499  # as nginx calls it; nobody reads it
SSE_HEADERS = {"X-Accel-Buffering": "no"}  # a proxy must not collect a stream
DEFAULT_COMPLETION_TOKENS = 16  # of /v1/completions, as OpenAI's


class RequestFailed(Exception):
    """A request that began and cannot be finished: the engine failed, or the server stopped."""


class Generation:
    """The answers to one HTTP request, as its events come."""

    def __init__(self, served: ServedModel, options: RequestOptions, stream: EventStream, count: int, metrics, began):
        self._served, self._options, self._metrics, self._began = served, options, metrics, began
        self._events = stream.events()
        self.texts = [AnswerText(served.tokenizer, options.stop_strings) for _ in range(count)]
        self._last = [0.0] * count  # when each choice's last tokens came

    async def pieces(self) -> AsyncIterator[tuple[int, TextPiece, str]]:
        """(choice, what to send, why it ended or ""), until all have ended. RequestFailed where one cannot."""
        name = self._served.name
        async for index, event in self._events:
            now = time.perf_counter()
            if event.tokens:
                kind = "time_between_tokens_seconds" if self._last[index] else "time_to_first_token_seconds"
                self._metrics.observe(kind, now - (self._last[index] or self._began), model=name)
                self._metrics.count("generated_tokens_total", len(event.tokens), model=name)
                self._last[index] = now
            if event.finish:
                self._metrics.count("answers_total", model=name, finish=event.finish)
            if event.finish and event.finish not in said.FINISH_REASONS:
                raise RequestFailed(event.message or "the answer was cancelled")
            yield index, self.texts[index].add(event.tokens, is_last=bool(event.finish)), event.finish

    async def whole(self) -> tuple[list[TextPiece], list[str]]:
        """All answers and why each ended."""
        parts: list[list[TextPiece]] = [[] for _ in self.texts]
        finishes = [""] * len(parts)
        async for index, piece, finish in self.pieces():
            parts[index].append(piece)
            finishes[index] = finish
        joined = [
            TextPiece("".join(piece.text for piece in each), tuple(token for piece in each for token in piece.tokens))
            for each in parts
        ]
        return joined, finishes

    @property
    def completion_tokens(self) -> int:
        return sum(text.token_count for text in self.texts)


class EventResponse(StreamingResponse):
    """Server-sent events. However it ends, a client that hung up included, the requests behind it are cancelled."""

    def __init__(self, content: AsyncIterator[str], stream: EventStream):
        super().__init__(content, media_type="text/event-stream", headers=SSE_HEADERS)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()


class Api:
    """The handlers and what they share. `draining`: whether requests are refused as the server stops."""

    def __init__(self, models: Mapping[str, ServedModel], *, max_body: int, book: RankingBook):
        self.models, self.max_body, self.book = dict(models), max_body, book
        self.metrics = ServerMetrics()
        self.draining = False

    @property
    def open_requests(self) -> int:
        return sum(served.worker.open_requests for served in self.models.values())

    def stop(self) -> None:
        """Ends the engines' threads; what still runs ends as cancelled."""
        self.draining = True
        for served in self.models.values():
            served.worker.stop()

    async def chat(self, request: Request) -> Response:
        body = await self._body(request)
        options = asked.request_options(body, chat=True)
        served = self._model(options.model)
        check_count(served, 1, options.choices)
        messages, tools = asked.chat_messages(body), asked.requested_tools(body)
        prompt = await run_in_threadpool(served.chat_prompt, messages, tools)
        return await self._answer(request, served, [prompt], options, chat=True)

    async def completion(self, request: Request) -> Response:
        body = await self._body(request)
        options = asked.request_options(body, chat=False, default_max_new=DEFAULT_COMPLETION_TOKENS)
        served = self._model(options.model)
        given = asked.completion_prompts(body)
        check_count(served, len(given), options.choices)
        prompts = await run_in_threadpool(lambda: [served.text_prompt(prompt) for prompt in given])
        return await self._answer(request, served, prompts, options, chat=False)

    async def llama_completion(self, request: Request) -> Response:
        """llama.cpp's own form, which has one prompt and one answer."""
        body = asked.llama_body(await self._body(request))
        options = asked.request_options(body, chat=False)
        if options.choices > 1:
            raise UserError(f"n is {options.choices}; this form has one answer: use /v1/completions")
        served, given = self._model(options.model), asked.completion_prompts(body)
        prompts = await run_in_threadpool(lambda: [served.text_prompt(given[0])])
        stream, generation = await self._generation(served, prompts, options)

        def final(answer: TextPiece, finish: str) -> dict[str, Any]:
            return said.llama_body(answer, finish, served.name, len(prompts[0]), generation.completion_tokens)

        async def events() -> AsyncIterator[str]:
            async for _, piece, finish in self._failures_as_events(generation):
                if isinstance(piece, str):
                    yield piece
                elif finish:
                    yield server_event(final(piece, finish))
                elif piece.text:
                    yield server_event({"index": 0, "content": piece.text, "stop": False})

        if options.stream:
            return EventResponse(events(), stream)
        return await self._unless_hung_up(request, stream, self._whole_llama(generation, final))

    async def _whole_llama(self, generation: Generation, final) -> Response:
        answers, finishes = await generation.whole()
        return JSONResponse(final(answers[0], finishes[0]))

    async def _generation(
        self, served: ServedModel, prompts: Sequence[np.ndarray], options: RequestOptions
    ) -> tuple[EventStream, Generation]:
        began = time.perf_counter()
        requests = await run_in_threadpool(served.requests, prompts, options)
        stream = await served.worker.submit(requests)
        self.metrics.count("prompt_tokens_total", sum(map(len, prompts)), model=served.name)
        return stream, Generation(served, options, stream, len(requests), self.metrics, began)

    async def _answer(
        self,
        request: Request,
        served: ServedModel,
        prompts: Sequence[np.ndarray],
        options: RequestOptions,
        *,
        chat: bool,
    ) -> Response:
        stream, generation = await self._generation(served, prompts, options)
        form = ResponseForm(
            served.name, served.fingerprint, served.token_bytes, chat=chat, with_logprobs=options.logprobs
        )
        prompt_tokens = sum(map(len, prompts))

        async def events() -> AsyncIterator[str]:
            for index in range(len(generation.texts)):
                for opening in form.opening(index):
                    yield server_event(opening)
            async for index, piece, finish in self._failures_as_events(generation):
                if isinstance(piece, str):
                    yield piece
                    return
                if piece.text or piece.tokens or finish:
                    yield server_event(form.chunk(index, piece, finish))
            if options.include_usage:
                usage = said.usage_counts(prompt_tokens, generation.completion_tokens)
                yield server_event(form.usage_chunk(usage))
            yield said.STREAM_END

        async def whole() -> Response:
            answers, finishes = await generation.whole()
            usage = said.usage_counts(prompt_tokens, generation.completion_tokens)
            return JSONResponse(form.whole(answers, finishes, usage))

        if options.stream:
            return EventResponse(events(), stream)
        return await self._unless_hung_up(request, stream, whole())

    @staticmethod
    async def _failures_as_events(generation: Generation) -> AsyncIterator[tuple[int, TextPiece | str, str]]:
        """The pieces; a failure as an event with its error, as the response has begun."""
        try:
            async for index, piece, finish in generation.pieces():
                yield index, piece, finish
        except RequestFailed as failure:
            yield 0, server_event(said.error_body(500, str(failure))), ""

    @staticmethod
    async def _unless_hung_up(request: Request, stream: EventStream, answer) -> Response:
        """The response, unless the client hangs up before it is there."""
        answering = asyncio.ensure_future(answer)
        leaving = asyncio.ensure_future(until_hung_up(request))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return answering.result() if answering.done() else Response(status_code=CLIENT_CLOSED_STATUS)
        finally:
            for task in (answering, leaving):
                task.cancel()
            stream.close()

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model_card(served) for served in self.models.values()]})

    async def one_model(self, request: Request) -> Response:
        return JSONResponse(model_card(self._model(request.path_params["name"])))

    async def health(self, request: Request) -> Response:
        failed = [name for name, served in self.models.items() if served.worker.has_failed]
        status = "draining" if self.draining else f"the engine of {failed[0]} failed" if failed else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def prometheus(self, request: Request) -> Response:
        gauges: dict[str, dict] = {}
        for name, served in self.models.items():
            for field, value in served.worker.stats._asdict().items():
                gauges.setdefault(f"engine_{field}", {})[(("model", name),)] = value
            gauges.setdefault("open_requests", {})[(("model", name),)] = served.worker.open_requests
        return PlainTextResponse(self.metrics.text(gauges), media_type="text/plain; version=0.0.4")

    async def rank(self, request: Request) -> Response:
        body = await self._body(request)
        return JSONResponse(await run_in_threadpool(self.book.record, body, self.models))

    async def undo(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self.book.undo, await self._body(request)))

    async def _body(self, request: Request) -> dict[str, Any]:
        if self.draining:
            raise EngineStopped("the server stops: ask again when it is back")
        return asked.parsed_json(await limited_body(request, self.max_body))

    def _model(self, name: str) -> ServedModel:
        """The model of that name; the first where the request names none."""
        if name and name not in self.models:
            raise HTTPException(404, f"there is no model {name!r} here; there are: {', '.join(self.models)}")
        return self.models[name or next(iter(self.models))]


def make_app(api: Api, *, token: str = "", hosts: Collection[str] = LOOPBACK_HOSTS) -> Starlette:
    """The server's application. token: the secret that a request must bring; empty: none. hosts: as in RequestGuard."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("page.html")

    def page(request: Request) -> Response:
        models = [{"name": name, "context": served.context} for name, served in api.models.items()]
        setup = {"models": models, "rankings": str(api.book.path)}
        return HTMLResponse(template.render(setup=setup, nonce=request.state.nonce))

    return Starlette(
        routes=[
            Route("/", page),
            *(Route(f"{prefix}/chat/completions", api.chat, methods=["POST"]) for prefix in ("/v1", "")),
            Route("/v1/completions", api.completion, methods=["POST"]),
            *(Route(path, api.llama_completion, methods=["POST"]) for path in ("/completion", "/completions")),
            Route("/v1/models", api.list_models),
            Route("/v1/models/{name:path}", api.one_model),
            Route("/health", api.health),
            Route("/metrics", api.prometheus),
            Route("/rankings", api.rank, methods=["POST"]),
            Route("/rankings/undo", api.undo, methods=["POST"]),
        ],
        middleware=[
            Middleware(
                RequestGuard,
                token=token,
                hosts=hosts,
                cookie=COOKIE_NAME,
                refused=error_response,
                open_paths=["/health"],
            )
        ],
        exception_handlers={
            QueueFull: lambda request, error: error_response(429, str(error), {"Retry-After": "1"}),
            EngineStopped: lambda request, error: error_response(503, str(error), {"Retry-After": "5"}),
            StoreUnavailable: lambda request, error: error_response(503, str(error)),
            PromptTooLong: prompt_too_long,
            UserError: lambda request, error: error_response(400, str(error)),
            RequestFailed: lambda request, error: error_response(500, str(error)),
            ClientDisconnect: lambda request, error: Response(status_code=CLIENT_CLOSED_STATUS),
            HTTPException: lambda request, error: error_response(error.status_code, error.detail),
        },
    )


def model_card(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "lm",
        "context_length": served.context,
    }


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    codes = {401: "invalid_api_key", 404: "model_not_found", 429: "queue_full"}
    body = said.error_body(status, message, codes[status] if status in codes else None)
    return JSONResponse(body, status, headers=headers)


def check_count(served: ServedModel, prompts: int, choices: int) -> None:
    """UserError for more answers in one request than may ever be open."""
    if prompts * choices > served.worker.limit:
        raise UserError(
            f"{prompts * choices} answers were asked for at once, and {served.worker.limit} may run or wait here: "
            "lower n, or send fewer prompts"
        )


def prompt_too_long(request: Request, error: PromptTooLong) -> Response:
    body = said.error_body(400, str(error), "context_length_exceeded")
    return JSONResponse({"error": {**body["error"], "room": error.room}}, 400)


async def limited_body(request: Request, limit: int) -> bytes:
    """The body. HTTPException 413 as soon as it is longer than `limit` bytes."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise HTTPException(413, f"the body has more than {limit:,} bytes, which is the limit here: shorten it")
        parts.append(part)
    return b"".join(parts)


async def until_hung_up(request: Request) -> None:
    """Returns when the client has closed the connection; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""A thread that runs an engine, and how asyncio gives it requests and gets their events.

The engine belongs to its thread. What others want of it comes as a command in a queue, which the thread empties before
every step; events go to the event loop of whoever asked, all of a step in one call.
"""

import asyncio
import queue
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from lm.core.errors import UserError
from lm.generate.engine import Engine, EngineStats, Event, QueueFull, Request
from lm.runs.console import warn


class EngineStopped(UserError):
    """The server stops and takes no more requests."""


class RequestEvent(NamedTuple):
    index: int  # which of the requests that were submitted together
    event: Event


class EventStream:
    """The events of requests that were submitted together, until all of them have finished. Closing it cancels them."""

    def __init__(self, worker: "EngineWorker", count: int):
        self._worker, self._unfinished = worker, count
        self._events: asyncio.Queue[RequestEvent] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[None] = self.loop.create_future()
        self.numbers: dict[int, int] = {}  # of the engine's requests; the worker's thread alone touches it

    def deliver(self, index: int, event: Event) -> None:
        """In the event loop: hands an event over."""
        self._unfinished -= bool(event.finish)
        self._events.put_nowait(RequestEvent(index, event))

    async def events(self) -> AsyncIterator[RequestEvent]:
        while self._unfinished or not self._events.empty():
            yield await self._events.get()

    def close(self) -> None:
        """Frees what unfinished requests hold. May be called twice."""
        if self._unfinished:
            self._worker.cancel(self)


class EngineWorker:
    """Runs an engine in a thread of its own.

    limit: requests that may be open, running or waiting; one more is refused at once. The engine's own queue must not
    be shorter than that.
    """

    def __init__(self, engine: Engine, *, limit: int):
        self.engine, self.limit = engine, limit
        self.stats: EngineStats = engine.stats()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[int, tuple[EventStream, int]] = {}  # of the thread alone, by the engine's number
        self._lock = threading.Lock()
        self._open, self._stopping = 0, False
        self.has_failed = False  # whether the last step raised
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def open_requests(self) -> int:
        """Requests that run or wait."""
        return self._open

    async def submit(self, requests: Sequence[Request]) -> EventStream:
        """The events to come of these requests, once the engine has taken them.

        QueueFull at once if they are more than may be open; UserError for one that the model cannot serve: then none
        of them runs.
        """
        with self._lock:
            if self._stopping:
                raise EngineStopped("the server stops: ask again when it is back")
            if self._open + len(requests) > self.limit:
                raise QueueFull(f"{self._open} requests run or wait, and {self.limit} may: try again later")
            self._open += len(requests)
        stream = EventStream(self, len(requests))
        self._commands.put(lambda: self._submit(stream, requests))
        try:
            await stream.accepted
        except asyncio.CancelledError:
            stream.close()
            raise
        return stream

    def cancel(self, stream: EventStream) -> None:
        """Frees what a stream's requests hold, before the next step."""
        self._commands.put(lambda: self._cancel(stream))

    def stop(self) -> None:
        """Ends the thread; requests that still run end as cancelled."""
        with self._lock:
            self._stopping = True
        self._commands.put(lambda: None)
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping:
            with suppress(queue.Empty):
                if self.engine.is_idle:
                    self._commands.get()()
                while True:
                    self._commands.get_nowait()()
            if self._stopping or self.engine.is_idle:
                continue
            try:
                self._deliver(self.engine.step())
                self.has_failed = False
            except Exception as error:  # a bug or a full memory must not leave clients waiting
                self.has_failed = True
                traceback.print_exc()
                warn(f"the engine failed ({type(error).__name__}: {error}); its requests end with an error")
                self._end_all("error", f"the engine failed: {type(error).__name__}")
            self.stats = self.engine.stats()
        self._end_all("cancelled", "the server stopped")

    def _submit(self, stream: EventStream, requests: Sequence[Request]) -> None:
        try:
            for index, request in enumerate(requests):
                stream.numbers[number := self.engine.submit(request)] = index
                self._streams[number] = stream, index
        except Exception as error:
            self._cancel(stream)
            self._release(len(requests) - len(stream.numbers))
            stream.numbers.clear()
            _in_loop(stream, _set_exception, stream.accepted, error)
        else:
            _in_loop(stream, _set_result, stream.accepted)

    def _cancel(self, stream: EventStream) -> None:
        for number in stream.numbers:
            if self._streams.pop(number, None):
                self.engine.cancel(number)
                self._release(1)

    def _deliver(self, events: Sequence[Event]) -> None:
        batches: dict[int, tuple[EventStream, list[tuple[int, Event]]]] = {}
        for event in events:
            if event.request not in self._streams:
                continue  # cancelled meanwhile
            stream, index = self._streams[event.request]
            if event.finish:
                del self._streams[event.request]
                self._release(1)
            batches.setdefault(id(stream), (stream, []))[1].append((index, event))
        for stream, batch in batches.values():
            _in_loop(stream, _deliver_all, stream, batch)

    def _end_all(self, finish: str, message: str) -> None:
        events = [Event(number, (), finish, message) for number in self._streams]
        for number in self._streams:
            self.engine.cancel(number)
        self._deliver(events)

    def _release(self, count: int) -> None:
        with self._lock:
            self._open -= count


def _in_loop(stream: EventStream, call: Callable[..., None], *arguments) -> None:
    with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
        stream.loop.call_soon_threadsafe(call, *arguments)


def _deliver_all(stream: EventStream, batch: Sequence[tuple[int, Event]]) -> None:
    for index, event in batch:
        stream.deliver(index, event)


def _set_result(future: asyncio.Future) -> None:
    if not future.done():
        future.set_result(None)


def _set_exception(future: asyncio.Future, error: Exception) -> None:
    if not future.done():
        future.set_exception(error)

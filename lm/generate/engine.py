"""The serving engine: requests with their own settings come and go while a batch decodes.

Continuous batching (Yu et al. 2022, Orca) over a paged KV cache (Kwon et al. 2023, arXiv 2309.06180): a request that is
admitted takes a slot and pages, its prompt is prefilled in chunks between the others' tokens, and from then on each
`Engine.step` gives it one more token. Full pages stay behind for requests that begin with the same tokens, so a shared
system prompt, or the prompt of a group of samples, is prefilled once. Whatever the neighbours, greedy tokens and those
of a seed are the ones that lm.generate.sampler.sample gives the prompt alone, unless rounding decides between two.

A request takes a page when its tokens fill the last one. Where none is free, the youngest request goes back to the
head of the queue; it keeps its tokens, and its pages are kept as a prefix as long as nobody needs them. Several answers
to a prompt are several requests with seeds of their own.
"""

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.errors import check_at_least
from lm.core.types import Params
from lm.generate.answers import text_before_stop
from lm.generate.decode_programs import DecodeRows, DrawnTokens, decode, idle_rows, prefill_chunk
from lm.generate.engine_requests import (
    EngineStats,
    Event,
    Job,
    QueueFull,
    Request,
    SampledToken,
    TokenConstraint,
    check_request,
)
from lm.generate.paged_cache import (
    PageAllocator,
    cache_with_row,
    default_pages,
    empty_pages,
    gathered_cache,
    page_digests,
)
from lm.model import Model
from lm.tokenizer import Tokenizer

__all__ = ["Engine", "EngineStats", "Event", "QueueFull", "Request", "SampledToken", "TokenConstraint"]

MIN_CACHE_TOKENS = 64  # slots of the rows' cache at least; it grows with them


class Engine:
    """Continuous batching over paged KV slots. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer | None,
        *,
        slots: int = 8,
        page_size: int = 16,
        pages: int = 0,
        queue: int = 64,
        prefill_chunk: int = 128,
        prefix_cache: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        """params: the decoder's. tokenizer: for stop strings; None if there are none.

        slots: requests that decode at a time. page_size: tokens of a page. pages: of the KV cache, 0 for as many as all
        slots at full context need, or as DEFAULT_PAGE_BYTES hold; a request that needs more is refused. queue: requests
        that wait at most. prefill_chunk: tokens of prompts that a step prefills, about. prefix_cache: whether full
        pages are shared and kept. clock: seconds, for deadlines.
        """
        check_at_least(1, "engine", slots=slots, page_size=page_size, queue=queue, prefill_chunk=prefill_chunk)
        check_at_least(0, "engine", pages=pages)
        self._model, self._tokenizer, self._clock = model, tokenizer, clock
        self._lm = model.decoding_params(jax.tree.map(jnp.asarray, params))
        self._page_size, self._queue_limit, self._keeps_prefixes = page_size, queue, prefix_cache
        self._chunk = max(prefill_chunk // page_size, 1) * page_size
        self._row_pages = -(-model.config.context // page_size)  # of a row at full context
        count = (pages or default_pages(model.config, slots * self._row_pages, page_size)) + 1
        self._pages, self._allocator = empty_pages(model.config, count, page_size), PageAllocator(count)
        self._rows = idle_rows(slots, self._row_pages + self._chunk // page_size)  # the host's copy
        self._device_rows: DecodeRows | None = None  # what the last step left; None after a change of the host's
        self._cache, self._cache_pages = None, 0  # the rows' pages side by side, so many of each
        V = model.config.vocab_size
        self._used, self._everything = jnp.zeros((slots, V), bool), jnp.ones((slots, V), bool)
        self._jobs: dict[int, Job] = {}
        self._waiting: deque[Job] = deque()
        self._prefilling: Job | None = None
        self._running: dict[int, Job] = {}  # by slot
        self._ended: list[Event] = []  # outside a decode step, to be given by the next one
        self._submitted = self._steps = self._tokens_out = 0
        self._prefix_hits = self._prefix_tokens = self._preemptions = 0
        self._compile(model)

    def _compile(self, model: Model) -> None:
        jit, bound = jax.jit, functools.partial
        self._run_prefill = jit(bound(prefill_chunk, model), donate_argnames="pages")
        self._run_decode = jit(bound(decode, model), donate_argnames=("pages", "cache", "used"))
        self._gather = jit(gathered_cache)
        self._gather_row = jit(cache_with_row, donate_argnames="cache")
        self._set_used = jit(lambda used, slot, row: used.at[slot].set(row), donate_argnums=0)

    # Requests

    def submit(self, request: Request) -> int:
        """Its number, by which `step` names it. QueueFull where too many wait, UserError for what cannot be served."""
        request = request._replace(ids=[int(i) for i in request.ids])
        check_request(
            self._model,
            request,
            pages=self._allocator.count,
            page_size=self._page_size,
            has_tokenizer=self._tokenizer is not None,
        )
        if len(self._waiting) >= self._queue_limit:
            raise QueueFull(f"{self._queue_limit} requests wait already, which is the limit: try again later")
        number = self._submitted
        self._submitted += 1
        key = np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.key(request.seed), 0)))
        job = Job(number, request, self._clock() + request.seconds, key, self._digests(request.ids[:-1]))
        self._jobs[number] = job
        self._waiting.append(job)
        return number

    def _digests(self, ids: Sequence[int]) -> list[bytes]:
        """Of the full pages of ids; none where no prefix is kept."""
        return page_digests(ids, self._page_size) if self._keeps_prefixes else []

    def cancel(self, number: int) -> None:
        """Ends a request and frees its slot and pages at once. A number that is unknown or finished is ignored."""
        if number in self._jobs:
            self._end(self._jobs[number], "cancelled")

    def _end(self, job: Job, finish: str, message: str = "") -> None:
        """Ends it outside a decode step; the next step says so."""
        self._free(job)
        self._ended.append(Event(job.number, (), finish, message))

    def _free(self, job: Job) -> None:
        """Ends a job wherever it is, and gives back what it holds."""
        del self._jobs[job.number]
        if job in self._waiting:
            self._waiting.remove(job)
        else:
            self._release(job)

    def _release(self, job: Job) -> None:
        """Takes slot and pages from an admitted job."""
        if job is self._prefilling:
            self._prefilling = None
        else:
            del self._running[job.slot]
            for held, reset in zip(self._rows, idle_rows(1, self._rows.table.shape[1])):
                held[job.slot] = reset[0]
            self._device_rows = None
        self._name_pages(job, self._digests(job.ids[: job.filled]))
        self._allocator.release(job.pages)
        job.slot, job.pages, job.filled = -1, [], 0

    def _preempt(self, job: Job) -> None:
        """Puts an admitted job back to the head of the queue, with the tokens it has."""
        self._preemptions += 1
        self._release(job)
        job.digests = self._digests(job.ids[:-1])
        self._waiting.appendleft(job)

    def _name_pages(self, job: Job, digests: Sequence[bytes]) -> None:
        """Its full pages are found by others from now on."""
        for page, digest in zip(job.pages[: job.filled // self._page_size], digests):
            self._allocator.name(page, digest)

    # Steps

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, runs, or is still to be told."""
        return not self._jobs and not self._ended

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._running) + (self._prefilling is not None),
            waiting=len(self._waiting),
            slots=len(self._rows.live),
            pages=self._allocator.count,
            pages_used=self._allocator.used,
            prefix_hits=self._prefix_hits,
            prefix_tokens=self._prefix_tokens,
            tokens_out=self._tokens_out,
            steps=self._steps,
            preemptions=self._preemptions,
        )

    def step(self) -> list[Event]:
        """Ends what is late, admits and prefills about `prefill_chunk` tokens, and draws one token of every row."""
        self._steps += 1
        now = self._clock()
        for job in [job for job in self._jobs.values() if job.deadline <= now]:
            self._end(job, "deadline")
        self._prefill()
        events = self._decode() if self._running else []
        ended, self._ended = self._ended, []
        return ended + events

    def _prefill(self) -> None:
        """One prompt at a time, so that the next one finds the pages of this one."""
        room = self._chunk
        while room > 0:
            job = self._prefilling or self._admit_next()
            if job is None:
                return
            room -= self._prefill_chunk(job)
            if not job.to_prefill:
                self._prefilling = None
                self._join(job)

    def _admit_next(self) -> Job | None:
        """The first that waits, with pages; None where there is none, or no slot or page for it."""
        if not self._waiting or len(self._running) == len(self._rows.live):
            return None
        job = self._waiting[0]
        shared = self._allocator.prefix(job.digests)
        new = -(-(job.to_prefill + 1) // self._page_size) - len(shared)
        pages = self._allocator.take(shared, new, spare=len(self._running))  # that the others may soon need
        if pages is None:
            return None
        self._waiting.popleft()
        job.pages, job.filled = pages, len(shared) * self._page_size
        self._prefix_hits += bool(shared)
        self._prefix_tokens += job.filled
        self._prefilling = job
        return job

    def _prefill_chunk(self, job: Job) -> int:
        """Prefills the next chunk of a prompt; returns its length with padding, 0 where nothing is left."""
        if not job.to_prefill:
            return 0
        size, count = self._page_size, min(job.to_prefill, self._chunk)
        length = self._chunk
        while length // 2 >= max(count, 2 * size) and (length // 2) % size == 0:
            length //= 2
        ids = np.zeros(length, np.int32)
        ids[:count] = job.ids[job.filled : job.filled + count]
        table = np.zeros(self._bucket(-(-(job.filled + length) // size), self._rows.table.shape[1]), np.int32)
        table[: len(job.pages)] = job.pages[: len(table)]
        self._pages = self._run_prefill(self._lm, self._pages, ids, np.int32(job.filled), np.int32(count), table)
        job.filled += count
        self._name_pages(job, job.digests)
        return length

    def _bucket(self, pages: int, limit: int) -> int:
        """A number of pages that holds so many, at most `limit`: a power of two, or half as much again."""
        least = max(pages, -(-MIN_CACHE_TOKENS // self._page_size))
        power = 1 << (least - 1).bit_length()
        return min(power * 3 // 4 if power * 3 // 4 >= least else power, limit)

    def _join(self, job: Job) -> None:
        """A prefilled job takes a slot."""
        job.slot = next(slot for slot in range(len(self._rows.live)) if slot not in self._running)
        self._running[job.slot] = job
        request, sampling = job.request, job.request.sampling
        table = np.zeros(self._rows.table.shape[1], np.int32)
        table[: len(job.pages)] = job.pages
        row = DecodeRows(
            tokens=job.ids[-1],
            lengths=job.filled,
            draws=len(job.tokens),
            live=True,
            keys=job.key,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            log_min_p=math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf,
            repetition_penalty=sampling.repetition_penalty,
            wants_top=request.top_logprobs > 0,
            table=table,
        )
        for held, new in zip(self._rows, row):
            held[job.slot] = new
        self._device_rows = None
        if sampling.repetition_penalty != 1:
            mask = np.zeros(self._used.shape[1], bool)
            mask[np.asarray(job.ids)] = True
            self._used = self._set_used(self._used, job.slot, mask)
        if self._cache is not None and self._cache_pages >= self._needed_cache_pages():
            row_table = self._rows.table[job.slot, : self._cache_pages].copy()
            self._cache = self._gather_row(self._cache, self._pages, row_table, job.slot)
        else:
            self._cache = None

    def _needed_cache_pages(self) -> int:
        """Pages a row that the cache must have, for the token to be fed next."""
        return self._bucket(int(self._rows.lengths.max()) // self._page_size + 1, self._row_pages)

    def _extend_pages(self) -> None:
        """A page more for each row that has filled its last, the older rows first; the youngest make room."""
        grown = False
        for job in list(self._running.values()):
            while job.slot >= 0 and job.filled == len(job.pages) * self._page_size:
                if (new := self._allocator.take([], 1)) is not None:
                    self._rows.table[job.slot, len(job.pages)] = new[0]
                    job.pages += new
                    grown = True
                else:
                    self._preempt(self._prefilling or list(self._running.values())[-1])
        if grown and self._device_rows is not None:
            self._device_rows = self._device_rows._replace(table=jax.device_put(self._rows.table.copy()))

    def _decode(self) -> list[Event]:
        """One token of every running job."""
        self._extend_pages()
        needed = self._needed_cache_pages()
        if self._cache is None or needed != self._cache_pages:
            self._cache = None  # its memory is free for the new one
            self._cache = self._gather(self._pages, self._rows.table[:, :needed].copy(), self._rows.lengths.copy())
            self._cache_pages = needed
        allowed = self._allowed_tokens()
        if not self._running:
            return []
        if self._device_rows is None:  # copied, as a CPU device may read numpy's own memory
            self._device_rows = jax.device_put(jax.tree.map(np.copy, self._rows))
        self._pages, self._cache, self._used, self._device_rows, drawn = self._run_decode(
            self._lm, self._pages, self._cache, self._used, self._device_rows, allowed
        )
        wanted = drawn if self._rows.wants_top.any() else drawn[:3]
        drawn = DrawnTokens(*jax.device_get(tuple(wanted)), *(() if len(wanted) == 5 else (None, None)))
        live = self._rows.live
        self._rows.tokens[live] = drawn.tokens[live]
        self._rows.lengths[live] += 1
        self._rows.draws[live] += 1
        return [self._event(job, drawn) for job in list(self._running.values())]

    def _allowed_tokens(self):
        """bool[B,V] of what constraints let through. A constraint that fails ends its own request only."""
        constrained = [job for job in self._running.values() if job.request.constraint is not None]
        if not constrained:
            return self._everything
        allowed = np.ones(self._everything.shape, bool)
        for job in constrained:
            try:
                allowed[job.slot] = job.request.constraint.allowed()
            except Exception as error:
                self._end(job, "error", f"the constraint failed: {error}")
                continue
            if not allowed[job.slot].any():
                self._end(job, "error", "the constraint allows no token")
        return allowed

    def _event(self, job: Job, drawn: DrawnTokens) -> Event:
        """The token that a step drew of a job, which is freed if that was its last."""
        slot, request = job.slot, job.request
        token = int(drawn.tokens[slot])
        job.tokens.append(token)
        job.filled += 1
        self._tokens_out += 1
        top = ()
        if k := request.top_logprobs:
            top = tuple(zip(drawn.top_ids[slot, :k].tolist(), drawn.top_logprobs[slot, :k].tolist()))
        sampled = SampledToken(token, float(drawn.logprobs[slot]), top, float(drawn.sampling_logprobs[slot]))
        finish, message = self._finish(job, token)
        if finish:
            self._free(job)
        return Event(job.number, (sampled,), finish, message)

    def _finish(self, job: Job, token: int) -> tuple[str, str]:
        """Why a job ends with this token, "" if it goes on, and the message of an error."""
        request = job.request
        if token in request.sampling.stop:
            return "stop", ""
        if request.stop_strings and text_before_stop(self._tokenizer.decode(job.tokens), request.stop_strings)[1]:
            return "stop", ""
        if len(job.tokens) == request.sampling.max_new:
            return "length", ""
        if request.constraint is not None:
            try:
                request.constraint.accept(token)
            except Exception as error:
                return "error", f"the constraint failed: {error}"
        return "", ""

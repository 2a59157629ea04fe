"""The engine: a request's tokens are its own (rules 6 and 12), whoever comes and goes; nothing leaks."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.errors import UserError
from lm.generate import paged_cache
from lm.generate.engine import Engine, QueueFull, Request
from lm.generate.paged_cache import (
    PageAllocator,
    cache_with_row,
    empty_pages,
    gathered_cache,
    page_digests,
    pages_with_chunk,
    pages_with_tokens,
)
from lm.generate.sampler import SamplingParams, sample
from lm.model import make_model

SETTINGS = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 9, "top_p": 0.9},
    {"temperature": 1.2, "min_p": 0.05, "repetition_penalty": 1.3},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {},
)
PREFIX = [5, 9, 2, 7, 11, 3, 3, 8, 1, 30]  # two full pages of 4, as a system prompt


class Words:
    """A tokenizer of one letter a token, as far as the engine needs one: id 0 is no text."""

    def decode(self, ids) -> str:
        return "".join(chr(64 + int(i)) for i in ids if i)


@pytest.fixture(scope="module")
def alone(tiny_model, tiny_lm):
    """Request -> the tokens and log-probs that `sample` gives its prompt alone."""
    compiled = functools.cache(lambda sampling: jax.jit(functools.partial(sample, tiny_model, sampling=sampling)))

    def run(request: Request) -> tuple[list[int], np.ndarray]:
        # one program for all answers of these settings: a longer limit changes no earlier token
        run = compiled(request.sampling._replace(max_new=24, stop=()))
        ids = np.zeros((1, 40), np.int32)
        ids[0, : len(request.ids)] = request.ids
        out = run(tiny_lm, ids, np.array([len(request.ids)], np.int32), jax.random.key(request.seed))
        tokens = out.tokens[0].tolist()
        ends = [t + 1 for t, token in enumerate(tokens) if token in request.sampling.stop]
        length = min([*ends, request.sampling.max_new])
        return tokens[:length], np.asarray(out.logprobs[0, :length])

    return run


@pytest.fixture
def make_engine(tiny_model, tiny_lm):
    """(**options) -> an engine of 3 slots with pages of 4 tokens."""
    return lambda **options: Engine(
        tiny_model, tiny_lm, Words(), **{"slots": 3, "page_size": 4, "prefill_chunk": 8, **options}
    )


def random_request(draw: np.random.Generator, number: int, **changes) -> Request:
    """Some begin with the same ten tokens."""
    own = draw.integers(1, 31, draw.integers(1, 30)).tolist()
    sampling = SamplingParams(int(draw.integers(1, 24)), **SETTINGS[number % len(SETTINGS)], stop=(7, 12))
    return Request((PREFIX if number % 3 == 0 else []) + own, sampling, seed=number)._replace(**changes)


def drained(engine: Engine, limit: int = 2000) -> dict[int, list]:
    """All events until it is idle, by request."""
    events = {}
    for _ in range(limit):
        if engine.is_idle:
            return events
        for event in engine.step():
            events.setdefault(event.request, []).append(event)
    raise AssertionError(f"still at work after {limit} steps: {engine.stats()}")


def answer(events) -> list[int]:
    return [token.id for event in events for token in event.tokens]


def assert_nothing_is_held(engine: Engine) -> None:
    """When idle: no slot is taken, and each page is free, or kept for its prefix, and none is both."""
    stats, pages = engine.stats(), engine._allocator
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert not engine._rows.live.any() and not engine._rows.table.any()
    assert sorted([*pages._free, *pages._kept]) == list(range(1, pages.count + 1)) and not any(pages._uses)
    assert set(pages._kept) == set(pages._digest_of) == set(pages._page_of.values())


def test_answers_are_those_of_the_lone_request(make_engine, alone):
    engine, draw = make_engine(), np.random.default_rng(0)
    requests = [random_request(draw, i) for i in range(15)]
    numbers = [engine.submit(request) for request in requests]
    events = drained(engine)
    for number, request in zip(numbers, requests):
        tokens, logprobs = alone(request)
        given = [token for event in events[number] for token in event.tokens]
        assert [token.id for token in given] == tokens
        np.testing.assert_allclose([token.sampling_logprob for token in given], logprobs, atol=1e-5)
        assert [event.finish for event in events[number]][:-1] == [""] * (len(tokens) - 1)
        assert events[number][-1].finish == ("stop" if tokens[-1] in (7, 12) else "length")
    assert engine.stats().tokens_out == sum(len(alone(request)[0]) for request in requests)
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("pages", [0, 18], ids=["all pages", "few pages"])
def test_random_joins_cancels_and_deadlines(pages, make_engine, alone):
    """300 steps of a clock that counts them. With 18 pages, where one request may need 16, prefixes are evicted, and
    requests give their pages to older ones and wait again.

    What ends by itself has the lone request's tokens, what is cut off has the first of them.
    """
    now, draw, requests, events = [0.0], np.random.default_rng(1), {}, {}
    engine = make_engine(pages=pages, queue=5, clock=lambda: now[0])
    refused = 0

    def collect() -> None:
        for event in engine.step():
            events.setdefault(event.request, []).append(event)

    for step in range(300):
        now[0] += 1
        if draw.random() < 0.3:
            seconds = float(draw.integers(3, 30)) if draw.random() < 0.3 else math.inf
            request = random_request(draw, step, seconds=seconds)
            try:
                requests[engine.submit(request)] = request
            except QueueFull:
                refused += 1
        if draw.random() < 0.08 and requests:
            engine.cancel(int(draw.choice(list(requests)[-6:])))
        collect()
        stats = engine.stats()
        assert stats.running <= 3 and stats.waiting <= 5 and stats.pages_used <= stats.pages
    while not engine.is_idle:
        now[0] += 1
        collect()

    ends = {}
    for number, request in requests.items():
        finishes = [event.finish for event in events[number]]
        assert not any(finishes[:-1]) and finishes[-1], "one end, the last event"
        ends.setdefault(finishes[-1], []).append(number)
        tokens, given = alone(request)[0], answer(events[number])
        assert given == tokens if finishes[-1] in ("stop", "length") else given == tokens[: len(given)] != tokens
    assert all(len(ends[finish]) >= 3 for finish in ("stop", "length", "deadline", "cancelled")) and len(ends) == 4
    assert refused and engine.stats().prefix_hits > 10 and (engine.stats().preemptions > 3) == bool(pages)
    assert_nothing_is_held(engine)


def test_a_group_prefills_its_prompt_once(make_engine, alone):
    """17 tokens before the last: four full pages of 4. The second of a group finds them, also if both came at once."""
    prompt = np.random.default_rng(2).integers(1, 31, 18).tolist()
    group = [Request(prompt, SamplingParams(6), seed=seed) for seed in range(5)]
    engine, apart = make_engine(), make_engine(prefix_cache=False)
    answers = []
    for one in (engine, apart):
        numbers = [one.submit(request) for request in group]
        events = drained(one)
        answers.append([answer(events[number]) for number in numbers])
        assert_nothing_is_held(one)
    assert answers[0] == answers[1] == [alone(request)[0] for request in group]
    assert engine.stats()[5:7] == (4, 64) and apart.stats()[5:7] == (0, 0)
    assert engine._allocator.kept >= 4 and not apart._allocator.kept


def test_a_conversation_goes_on_from_the_pages_of_its_answer(make_engine, alone):
    """10 + 8 tokens, the last never fed: 17 in four full pages. The next turn begins with all 18."""
    engine = make_engine()
    first = Request(list(PREFIX), SamplingParams(8, temperature=0.0))
    engine.submit(first)
    said = answer(drained(engine)[0])
    second = first._replace(ids=[*PREFIX, *said, 4, 9])
    engine.submit(second)
    assert answer(drained(engine)[1]) == alone(second)[0]
    assert engine.stats().prefix_tokens == 16


@pytest.mark.parametrize("sampling", [SamplingParams(20, **settings) for settings in SETTINGS])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_request_that_was_put_back_goes_on_where_it_was(prefix_cache, sampling, make_engine, alone):
    """12 pages of 4, and three requests that grow to 8 each: the younger ones wait again, then go on with their keys,
    their tokens and what their penalty is of."""
    engine = make_engine(pages=12, prefix_cache=prefix_cache)
    draw = np.random.default_rng(5)
    requests = [Request(draw.integers(1, 31, 12).tolist(), sampling, seed=i) for i in range(3)]
    numbers = [engine.submit(request) for request in requests]
    events = drained(engine)
    assert [answer(events[number]) for number in numbers] == [alone(request)[0] for request in requests]
    assert engine.stats().preemptions >= 2
    assert_nothing_is_held(engine)


def test_pages_of_a_large_context_are_bounded(tiny_model, monkeypatch):
    """By hand: a token is 2 layers x key and value x 2 heads x 8 numbers of 4 bytes, 256; a page of 4 is 1,024."""
    monkeypatch.setattr(paged_cache, "DEFAULT_PAGE_BYTES", 10_300)
    assert [paged_cache.default_pages(tiny_model.config, wanted, 4) for wanted in (9, 48)] == [9, 10]


def test_pages_are_evicted_by_last_use():
    """By hand: pages 1 to 4. Of two prefixes the older goes first, and of it the last page before the first."""
    pages = PageAllocator(5)
    old, new = pages.take([], 2), pages.take([], 1)
    for page, digest in zip([*old, *new], (b"a", b"ab", b"c")):
        pages.name(page, digest)
    pages.release(old)
    pages.release(new)
    assert (old, new, pages.used, pages.kept) == ([1, 2], [3], 0, 3)
    assert pages.prefix([b"a", b"ab", b"abc"]) == [1, 2] and pages.prefix([b"x", b"a"]) == []
    assert pages.take([1, 2], 3) is None, "two are free besides: page 4, and page 3 of the other prefix"
    assert pages.take([], 2) == [4, 2], "the free one, then the last page of the prefix used least recently"
    assert pages.prefix([b"a", b"ab"]) == [1] and pages.prefix([b"c"]) == [3]
    shared = pages.take([1], 0)
    assert pages.take([1], 0) == [1] and pages.used == 3
    pages.release(shared)
    assert pages.used == 3, "the other one still uses it"
    pages.release([1])
    assert pages.used == 2 and pages.take([], 2) == [3, 1]


def test_equal_digests_are_equal_prefixes():
    a, b = page_digests([1, 2, 3, 4, 5], 2), page_digests([9, 2, 3, 4], 2)
    assert len(a) == 2 and a[:1] == page_digests([1, 2, 7], 2) and not set(a) & set(b)


def test_a_stop_string_ends_an_answer_at_the_token_that_completes_it(make_engine, alone):
    """A letter a token, so a string of two spans a border; the tokens before it were given as they came."""
    request = Request(list(PREFIX), SamplingParams(16, temperature=1.0), seed=3)
    tokens = alone(request)[0]
    text = Words().decode(tokens)
    stop = text[4:6]
    end = text.find(stop) + 2
    engine = make_engine()
    numbers = [engine.submit(request._replace(stop_strings=stops)) for stops in ((stop, "??"), ("??",))]
    events = drained(engine)
    assert answer(events[numbers[0]]) == tokens[:end] and events[numbers[0]][-1].finish == "stop"
    assert answer(events[numbers[1]]) == tokens and events[numbers[1]][-1].finish == "length"


class Alternating:
    """Even and odd tokens in turn, then the stop id 7; it remembers what it was told."""

    def __init__(self, length: int, error: str = ""):
        self.tokens, self.length, self.error = [], length, error

    def allowed(self) -> np.ndarray:
        if self.error and len(self.tokens) == self.length:
            raise ValueError(self.error)
        if len(self.tokens) == self.length:
            return np.arange(31) == 7
        return np.arange(31) % 2 == len(self.tokens) % 2

    def accept(self, token: int) -> None:
        self.tokens.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_constraint_binds_its_own_request_only(temperature, make_engine, alone):
    engine, constraint = make_engine(), Alternating(6)
    sampling = SamplingParams(20, temperature=temperature, stop=(7,))
    free = Request(list(PREFIX), sampling, seed=1)
    bound, other = engine.submit(free._replace(constraint=constraint)), engine.submit(free)
    events = drained(engine)
    given = answer(events[bound])
    assert [token % 2 for token in given[:6]] == [0, 1] * 3 and given[6:] == [7] and constraint.tokens == given[:6]
    assert events[bound][-1].finish == "stop" and answer(events[other]) == alone(free)[0] != given


def test_a_constraint_that_fails_ends_its_own_request_only(make_engine, alone):
    engine, request = make_engine(), Request(list(PREFIX), SamplingParams(8, temperature=0.0))
    failing, none, other = (
        engine.submit(request._replace(constraint=constraint))
        for constraint in (Alternating(2, "no such rule"), Nothing(), None)
    )
    events = drained(engine)
    assert len(answer(events[failing])) == 2 and events[failing][-1][2:] == (
        "error",
        "the constraint failed: no such rule",
    )
    assert [event[1:] for event in events[none]] == [((), "error", "the constraint allows no token")]
    assert answer(events[other]) == alone(request)[0]
    assert_nothing_is_held(engine)


class Nothing(Alternating):
    """A constraint that nothing meets."""

    def __init__(self):
        super().__init__(0)

    def allowed(self) -> np.ndarray:
        return np.zeros(31, bool)


def test_the_likeliest_tokens_and_their_logprobs(make_engine, tiny_model, tiny_lm):
    """Against one full forward pass: the model's own log-probs, whatever the temperature."""
    request = Request(list(PREFIX), SamplingParams(6, temperature=0.7), seed=2, top_logprobs=20)
    engine = make_engine()
    numbers = [engine.submit(request), engine.submit(request._replace(top_logprobs=0))]
    events = drained(engine)
    tokens = [token for event in events[numbers[0]] for token in event.tokens]
    ids = jnp.asarray([[*PREFIX, *(token.id for token in tokens)]])
    states = tiny_model.hidden_states(tiny_lm, ids, jnp.arange(16)[None], jnp.ones_like(ids))
    expected = np.asarray(jax.nn.log_softmax(tiny_model.logits(tiny_lm, states)))[0, 9:]
    for token, row in zip(tokens, expected):
        top_ids, logprobs = zip(*token.top)
        assert token.logprob == pytest.approx(row[token.id], abs=1e-5)
        np.testing.assert_allclose(logprobs, np.sort(row)[::-1][:20], atol=1e-5)
        np.testing.assert_allclose(row[list(top_ids)], logprobs, atol=1e-5)
        assert 0.8 < np.exp(logprobs).sum() < 1 and len(set(top_ids)) == 20
    assert answer(events[numbers[1]]) == answer(events[numbers[0]]) and not events[numbers[1]][0].tokens[0].top


def test_at_temperature_1_both_logprobs_are_the_same(make_engine):
    engine = make_engine()
    engine.submit(Request([3], SamplingParams(10), seed=2))
    for token in (token for event in drained(engine)[0] for token in event.tokens):
        assert token.sampling_logprob == pytest.approx(token.logprob, abs=1e-5) and token.logprob < 0


def test_cancelling_frees_at_once_and_is_told_once(make_engine):
    engine = make_engine(slots=1)
    first, second = (engine.submit(Request(list(PREFIX), SamplingParams(20), seed=i)) for i in range(2))
    engine.step()
    assert engine.stats()[:2] == (1, 1)
    engine.cancel(first)
    engine.cancel(first)
    engine.cancel(99)
    assert engine.stats().running == 0 and engine.stats().pages_used == 0 and not engine.is_idle
    events = drained(engine)
    assert [event.finish for event in events[first]].count("cancelled") == 1 and len(answer(events[second])) == 20
    assert_nothing_is_held(engine)


MODELS = {
    "windows, caps": dict(window=6, global_every=2, attention_softcap=5.0, logit_softcap=8.0),
    "window below a page": dict(window=3),
    "learned positions": dict(positions="learned", norm="layer", bias="all", gated=False, activation="gelu"),
    "experts": dict(experts=4, experts_per_token=2),
    "bfloat16 cache": dict(cache_dtype="bfloat16"),
    "int8 cache": dict(cache_dtype="int8"),
    "scanned": dict(scan="yes"),
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_models_of_all_kinds(changes, tiny_model):
    model = make_model(dataclasses.replace(tiny_model.config, **changes))
    lm = jax.jit(model.init)(jax.random.key(0))
    lm = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), lm)
    engine, sampling = Engine(model, lm, None, slots=2, page_size=4, prefill_chunk=8), SamplingParams(12, temperature=0)
    draw = np.random.default_rng(3)
    prompts = [draw.integers(1, 31, n).tolist() for n in (19, 3, 10)]
    prompts.append(prompts[0][:12] + [4])
    numbers = [engine.submit(Request(prompt, sampling)) for prompt in prompts]
    events = drained(engine)
    ids, lengths = np.zeros((4, 19), np.int32), np.array([len(prompt) for prompt in prompts], np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    expected = jax.jit(functools.partial(sample, model, sampling=sampling))(lm, ids, lengths, jax.random.key(0))
    np.testing.assert_array_equal([answer(events[number]) for number in numbers], expected.tokens)
    assert engine.stats().prefix_tokens == 12
    assert_nothing_is_held(engine)


def test_pages_side_by_side_are_a_plain_cache(tiny_model):
    """Tokens written one by one, and a chunk, come back at the slots that the table says."""
    draw, config = np.random.default_rng(0), tiny_model.config
    pages = empty_pages(config, 6, 4)
    table = jnp.array([[3, 1], [5, 2]])
    row = gathered_cache(pages, table, jnp.zeros(2, jnp.int32))
    filled = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape)).astype(x.dtype), row)
    for slot in range(8):
        at = jnp.full(2, slot)
        pages = pages_with_tokens(pages, filled, at, table[:, slot // 4], at % 4)
    back = gathered_cache(pages, table, jnp.zeros(2, jnp.int32))
    jax.tree.map(np.testing.assert_array_equal, (back.keys, back.values), (filled.keys, filled.values))
    first = jax.tree.map(lambda x: x[:1], filled)
    chunked = pages_with_chunk(empty_pages(config, 6, 4), first, jnp.int32(4), jnp.array([2]))
    np.testing.assert_array_equal(chunked[1][0][2], filled.keys[1][0, :, 4:])
    swapped = cache_with_row(back, pages, table[0], jnp.int32(1))
    np.testing.assert_array_equal(swapped.values[0][1], filled.values[0][0])
    np.testing.assert_array_equal(swapped.values[0][0], filled.values[0][0])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ids": []}, "the prompt is empty"),
        ({"ids": [1] * 60}, "60 tokens and 8 more .* context is 64"),
        ({"ids": [1, 31]}, "the token 31, but the model's vocabulary is 31"),
        ({"sampling": SamplingParams(8, samples=2)}, "samples is 2; a request has 1 answer"),
        ({"sampling": SamplingParams(8, top_p=2.0)}, "top_p 2.0"),
        ({"stop_strings": ("",)}, "a stop string is empty"),
        ({"top_logprobs": 21}, "top_logprobs is 21; it must be from 0 to 20"),
        ({"seconds": 0.0}, "seconds is 0.0"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"ids": [1] * 40}, "needs 12 pages of 4 tokens and the engine has 8: shorten the prompt"),
    ],
)
def test_bad_requests(changes, message, make_engine):
    engine = make_engine(pages=8)
    with pytest.raises(UserError, match=message):
        engine.submit(Request([1, 2], SamplingParams(8))._replace(**changes))
    assert engine.is_idle


def test_a_full_queue_refuses_at_once(make_engine):
    engine = make_engine(queue=2)
    request = Request([1, 2], SamplingParams(2))
    for _ in range(2):
        engine.submit(request)
    with pytest.raises(QueueFull, match="2 requests wait already"):
        engine.submit(request)
    engine.step()
    assert engine.submit(request) == 2 and len(drained(engine)) == 3


@pytest.mark.parametrize("option", ["slots", "page_size", "queue", "prefill_chunk"])
def test_bad_options(option, make_engine):
    with pytest.raises(UserError, match=f"engine.{option} is 0; it must be at least 1"):
        make_engine(**{option: 0})
    with pytest.raises(UserError, match="give it one"):
        engine = make_engine()
        engine._tokenizer = None
        engine.submit(Request([1], SamplingParams(2), stop_strings=("a",)))

"""The engine: a request's tokens are its own (rules 6 and 12), whoever comes and goes; nothing leaks."""

import functools

import jax
import numpy as np
import pytest

from lm.generate.engine import Engine, Request
from lm.generate.sampler import SamplingParams, sample

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

"""Sampling: rule 14 (cached decode = full forward), rule 6 (one distribution), rule 12 (a row's draws are its own)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.errors import UserError
from lm.core.options import ConfigFunction
from lm.core.types import Completions
from lm.generate.sampler import SamplingParams, decode_step, prefill, prompt_completion_rows, sample
from lm.model.logits import repetition_penalized_logits, sampling_logits
from lm.stages import STAGES

LENGTHS = np.array([9, 4, 1, 6], np.int32)
PROMPTS = np.random.default_rng(0).integers(1, 31, (4, 9)).astype(np.int32)  # right of its length a row holds garbage
NEW, KEY = 8, jax.random.key(5)
SETTINGS = {"temperature": 0.7, "top_k": 12, "top_p": 0.9}


@pytest.fixture(scope="module")
def sampler(tiny_model, tiny_lm):
    """(prompts, lengths, **options) -> Completions of numpy arrays."""
    compiled = functools.cache(
        lambda **options: jax.jit(functools.partial(sample, tiny_model, sampling=SamplingParams(**options)))
    )

    def run(prompts=PROMPTS, lengths=LENGTHS, max_new=NEW, **options):
        return jax.tree.map(np.asarray, compiled(max_new=max_new, **options)(tiny_lm, prompts, lengths, KEY))

    return run


@pytest.fixture(scope="module")
def free(sampler):
    """Drawn without a stop id."""
    return sampler(**SETTINGS)


@pytest.fixture(scope="module")
def full(tiny_model, tiny_lm):
    """Tokens -> logits f32[B,T,V] of one uncached forward pass."""
    run = jax.jit(
        lambda t: tiny_model.logits(tiny_lm, tiny_model.hidden_states(tiny_lm, t.inputs, t.positions, t.segments))
    )
    return lambda tokens: np.asarray(run(tokens))


def test_cached_decode_equals_the_full_forward_pass(tiny_model, tiny_lm, rows, full):
    """Rule 14: at every position, for ragged prompts and grouped queries, to the cache's last slot."""
    new = np.random.default_rng(1).integers(1, 31, (4, NEW)).astype(np.int32)
    ids = np.zeros((4, 9 + NEW + 1), np.int32)
    for row, n in enumerate(LENGTHS):
        ids[row, : n + NEW] = [*PROMPTS[row, :n], *new[row]]
    expected = full(rows(ids, LENGTHS + NEW + 1))
    step = jax.jit(functools.partial(decode_step, tiny_model))
    logits, cache = jax.jit(functools.partial(prefill, tiny_model, capacity=9 + NEW))(tiny_lm, PROMPTS, LENGTHS)
    for t in range(NEW + 1):
        np.testing.assert_allclose(logits, expected[np.arange(4), LENGTHS - 1 + t], rtol=1e-4, atol=1e-5)
        if t < NEW:
            logits, cache = step(tiny_lm, new[:, t], LENGTHS + t, cache)
    assert cache.length == 9 + NEW == cache.segments.shape[1]


def test_greedy_is_the_argmax_of_the_full_forward_pass(sampler, full):
    """Rule 14: T = 0 is argmax, and its log-probability is 0."""
    drawn = sampler(temperature=0.0)
    tokens, logprobs = prompt_completion_rows(PROMPTS, LENGTHS, drawn)
    best = full(tokens).argmax(-1)
    np.testing.assert_array_equal(np.where(tokens.weights, best, 0), np.where(tokens.weights, tokens.targets, 0))
    assert np.all(drawn.lengths == NEW) and not drawn.stopped.any() and not np.any(logprobs)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, SETTINGS], ids=["greedy", "sampled"])
def test_a_row_depends_on_its_own_prompt_and_number_alone(options, sampler):
    """Rules 12 and 14: neither on its batch mates, nor on their number, nor on the padding to its right."""
    together = sampler(**options)
    fewer = np.pad(PROMPTS[:2], ((0, 0), (0, 3)), constant_values=7)
    apart = sampler(fewer, LENGTHS[:2], **options)
    np.testing.assert_array_equal(together.tokens[:2], apart.tokens)
    np.testing.assert_allclose(together.logprobs[:2], apart.logprobs, atol=1e-5)
    others = PROMPTS.copy()
    others[[0, 2, 3]] = others[[0, 2, 3], ::-1]
    np.testing.assert_array_equal(sampler(others, **options).tokens[1], together.tokens[1])
    assert len({tuple(row) for row in together.tokens}) == 4


def test_a_row_ends_with_the_first_of_several_stop_ids(sampler, free):
    """Rule 14: it keeps the stop id and stays as it is; the others go on as if nothing had happened."""
    stop = (int(free.tokens[0, 2]), int(free.tokens[2, 1]))
    assert 0 not in stop  # which is what a finished row holds
    stopped = sampler(**SETTINGS, stop=stop)
    for row in range(4):
        at = [t for t in range(NEW) if free.tokens[row, t] in stop]
        length = at[0] + 1 if at else NEW
        assert stopped.lengths[row] == length and stopped.stopped[row] == bool(at)
        np.testing.assert_array_equal(stopped.tokens[row], [*free.tokens[row, :length], *[0] * (NEW - length)])
        np.testing.assert_allclose(stopped.logprobs[row], free.logprobs[row] * (np.arange(NEW) < length), atol=1e-6)
    ends = {int(stopped.tokens[row, n - 1]) for row, n in enumerate(stopped.lengths) if stopped.stopped[row]}
    assert ends == set(stop) and not stopped.stopped.all() and len(set(stopped.lengths.tolist())) >= 3


def test_logprobs_are_of_the_distribution_that_was_sampled(free, full, tiny_model, tiny_lm):
    """Rules 6 and 12, against the full forward pass: the draw of each key, and its log-probability on that support."""
    tokens, logprobs = prompt_completion_rows(PROMPTS, LENGTHS, free)
    logits = sampling_logits(full(tokens), **SETTINGS)
    w = np.asarray(tokens.weights) > 0
    expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(tokens.targets)[..., None], -1)
    expected = expected[..., 0]
    np.testing.assert_allclose(logprobs[w], expected[w], atol=1e-5)
    assert w.sum() == 4 * NEW and np.isfinite(expected[w]).all() and np.isinf(np.asarray(logits)).any()
    for row in range(4):
        for t in range(NEW):
            key = jax.random.fold_in(jax.random.fold_in(KEY, row), t)
            assert free.tokens[row, t] == jax.random.categorical(key, logits[row, LENGTHS[row] - 1 + t])


def test_the_trainer_scores_what_the_sampler_drew(sampler, tiny_model, tiny_lm):
    """Rule 6: old log-probs are of logits / T, from the function the losses call."""
    tokens, logprobs = prompt_completion_rows(PROMPTS, LENGTHS, sampler(temperature=0.7))
    scored = jax.jit(functools.partial(tiny_model.token_logprobs, temperature=0.7))(tiny_lm, tokens)
    np.testing.assert_allclose(logprobs, scored * tokens.weights, atol=1e-5)


def test_frequencies_match_the_distribution(sampler, rows, full):
    """4096 draws after one prompt: every count within 4.5 deviations of n p, and nothing outside the support."""
    n, settings = 4096, {"temperature": 0.7, "top_k": 6, "top_p": 0.95}
    prompt = np.array([3, 14, 15], np.int32)
    drawn = sampler(np.tile(prompt, (n, 1)), np.full(n, 3, np.int32), max_new=1, **settings).tokens[:, 0]
    logits = full(rows([[*prompt, 0]], [4]))[0, -1]
    p = np.asarray(jax.nn.softmax(sampling_logits(logits, **settings)), np.float64)
    counts = np.bincount(drawn, minlength=31)
    assert 3 <= (p > 0).sum() <= 6 and not counts[p == 0].any()
    assert np.all(np.abs(counts - n * p) <= 4.5 * np.sqrt(n * p * (1 - p)))


def test_the_penalty_is_of_prompt_and_answer(sampler, full):
    """Rule 6: each draw, and its log-probability, against the full forward pass and a set of what the row held."""
    settings = {"temperature": 0.7, "min_p": 0.05}
    drawn = sampler(**settings, repetition_penalty=1.5)
    tokens, logprobs = prompt_completion_rows(PROMPTS, LENGTHS, drawn)
    logits = full(tokens)
    for row, n in enumerate(LENGTHS):
        for t in range(NEW):
            held = [*PROMPTS[row, :n], *drawn.tokens[row, :t]]  # not the garbage to the right of a prompt
            now = np.array(logits[row, n - 1 + t])
            now[held] = [z / 1.5 if z > 0 else z * 1.5 for z in now[held]]
            now = sampling_logits(jnp.asarray(now), **settings)
            key = jax.random.fold_in(jax.random.fold_in(KEY, row), t)
            assert drawn.tokens[row, t] == jax.random.categorical(key, now)
            expected = jax.nn.log_softmax(now)[drawn.tokens[row, t]]
            np.testing.assert_allclose(logprobs[row, n - 1 + t], expected, atol=1e-5)
    assert np.any(drawn.tokens != sampler(**settings).tokens)


def test_a_great_penalty_forbids_what_was_said(sampler):
    """31 tokens, at most 9 + 8 of them seen: the argmax is always another one."""
    drawn = sampler(temperature=0.0, repetition_penalty=1e6)
    for row, n in enumerate(LENGTHS):
        assert len(set(drawn.tokens[row])) == NEW and not set(drawn.tokens[row]) & set(PROMPTS[row, :n])


def test_penalised_by_hand():
    logits, seen = jnp.array([3.0, -3.0, 0.0, 3.0, -3.0]), jnp.array([True, True, True, False, False])
    np.testing.assert_allclose(repetition_penalized_logits(logits, seen, 1.5), [2.0, -4.5, 0.0, 3.0, -3.0])
    np.testing.assert_array_equal(repetition_penalized_logits(logits, seen, 1.0), logits)


@pytest.mark.parametrize("name", STAGES)
def test_no_stage_can_sample_otherwise_than_its_losses_score(name):
    """Rule 6: a loss knows the temperature, but neither what the row held before nor a cut support."""
    options = {*ConfigFunction(STAGES[name].batches).options, *ConfigFunction(STAGES[name].make).options}
    assert not {"repetition_penalty", "min_p", "top_k", "top_p"} & options


def test_samples_are_those_of_repeated_prompts(sampler):
    """Three answers to each prompt from one prefill: the tokens of the prompts three times over. The log-probs are
    equal but for rounding, as a prefill of 4 rows and one of 12 are products of other shapes."""
    settings = {"temperature": 0.9, "repetition_penalty": 1.2, "stop": (3, 5, 7)}
    shared = sampler(**settings, samples=3)
    apart = sampler(np.repeat(PROMPTS, 3, axis=0), np.repeat(LENGTHS, 3), **settings)
    np.testing.assert_allclose(shared.logprobs, apart.logprobs, rtol=1e-6, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, shared.replace(logprobs=apart.logprobs), apart)
    assert shared.tokens.shape == (12, NEW) and len({tuple(row) for row in shared.tokens}) == 12
    assert shared.stopped.any() and not shared.stopped.all()


def test_joined_by_hand():
    """Rule 2: the weight belongs to the target; the stop token (9) is trained, prompt and padding are not."""
    prompts = jnp.array([[1, 2, 77], [3, 4, 5]])  # 77 is padding: the first prompt has two tokens
    drawn = Completions(
        tokens=jnp.array([[6, 9], [7, 8]]),
        logprobs=jnp.array([[-0.1, -0.2], [-0.3, -0.4]]),
        lengths=jnp.array([2, 2]),
        stopped=jnp.array([True, False]),
    )
    tokens, logprobs = prompt_completion_rows(prompts, jnp.array([2, 3]), drawn)
    np.testing.assert_array_equal(tokens.inputs, [[1, 2, 6, 9], [3, 4, 5, 7]])
    np.testing.assert_array_equal(tokens.targets, [[2, 6, 9, 0], [4, 5, 7, 8]])
    np.testing.assert_array_equal(tokens.weights, [[0, 1, 1, 0], [0, 0, 1, 1]])
    np.testing.assert_array_equal(tokens.positions, [[0, 1, 2, 3], [0, 1, 2, 3]])
    np.testing.assert_array_equal(tokens.segments, [[1, 1, 1, 1], [1, 1, 1, 1]])
    np.testing.assert_allclose(logprobs, [[0, -0.1, -0.2, 0], [0, 0, -0.3, -0.4]])
    one, _ = prompt_completion_rows(
        prompts, jnp.array([1, 3]), drawn.replace(lengths=jnp.array([1, 2]))
    )  # 1, then 6, then nothing
    np.testing.assert_array_equal(one.inputs[0], [1, 6, 0, 0])
    np.testing.assert_array_equal(one.weights[0], [1, 0, 0, 0])
    np.testing.assert_array_equal(one.segments[0], [1, 1, 0, 0])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_new": 0}, "max_new_tokens is 0"),
        ({"max_new": 60}, "the prompt has 9 tokens and 60 more .* context is 64: .* lower max_new_tokens to 55"),
        ({"prompts": PROMPTS[:, :0]}, "the prompt is empty"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"min_p": 1.5}, r"min_p is 1.5; it must be from 0 \(all\) to 1"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be above 0, and 1 is none"),
        ({"samples": 0}, "samples is 0; it must be at least 1"),
    ],
)
def test_bad_requests(changes, message, sampler):
    with pytest.raises(UserError, match=message):
        sampler(**changes)

"""Speculative sampling: the target's distribution, whatever the draft (rule 6); its own tokens at temperature 0."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import model
from lm.core.errors import UserError
from lm.generate.sampler import SamplingParams, prompt_completion_rows, sample
from lm.generate.speculative import acceptance_probability, residual_logits, speculative_sample
from lm.model.logits import sampling_logits

LENGTHS = np.array([9, 4, 1, 6], np.int32)
PROMPTS = np.random.default_rng(0).integers(1, 31, (4, 9)).astype(np.int32)  # right of its length a row holds garbage
NEW, KEY = 12, jax.random.key(5)
V, LONG = 4, 3


def off(lm, noise: float, seed: int = 0):
    """The decoder with that much noise on every leaf."""
    leaves, treedef = jax.tree.flatten(lm)
    draw = np.random.default_rng(seed)
    return jax.tree.unflatten(treedef, [x + noise * draw.normal(size=x.shape).astype(np.float32) for x in leaves])


@pytest.fixture(scope="module")
def run(tiny_model, tiny_lm):
    """(**options) -> Completions and Acceptance of the tiny model with a draft that guesses some of its tokens."""
    compiled = functools.cache(
        lambda **options: jax.jit(
            functools.partial(speculative_sample, tiny_model, tiny_model, sampling=SamplingParams(**options))
        )
    )
    near = off(tiny_lm, 0.1)

    def drawn(prompts=PROMPTS, lengths=LENGTHS, draft_lm=near, max_new=NEW, **options):
        given = compiled(max_new=max_new, **options)(tiny_lm, draft_lm, prompts, lengths, KEY)
        return jax.tree.map(np.asarray, given)

    return drawn


def test_acceptance_and_residual_by_hand():
    """p = (.5, .5, 0, 0), q = (.2, .1, .7, 0): min(1, p / q) = 1, 1, 0; p - q = .3, .4, -, -, which is 3/7 and 4/7."""
    p, q = jnp.log(jnp.array([[0.5, 0.5, 0, 0], [0.2, 0.1, 0.7, 0]]))
    np.testing.assert_allclose(acceptance_probability(p, q), [1, 1, 0, 1], atol=1e-6)
    np.testing.assert_allclose(jax.nn.softmax(residual_logits(p, q)), [3 / 7, 4 / 7, 0, 0], atol=1e-6)
    np.testing.assert_allclose(
        acceptance_probability(q, p)[:2], [0.4, 0.2], atol=1e-6
    )  # only what p may propose is of interest
    np.testing.assert_array_equal(residual_logits(p, p), p)  # nothing is left: it is never drawn from, but for rounding


def test_what_is_emitted_is_distributed_as_the_target():
    """q(x) min(1, p/q) + (1 - sum of it) residual(x) = p(x), for every p and q, supports that differ included."""
    logits = np.random.default_rng(0).normal(size=(2, 50, V)).astype(np.float32) * 2
    p, q = (jax.nn.log_softmax(sampling_logits(x, top_k=k)) for x, k in zip(jnp.asarray(logits), (3, 2)))
    kept = np.exp(q) * acceptance_probability(p, q)
    refused = 1 - np.sum(kept, axis=-1, keepdims=True)
    np.testing.assert_allclose(kept + refused * jax.nn.softmax(residual_logits(p, q)), np.exp(p), atol=1e-6)
    assert np.any(np.isinf(p) & ~np.isinf(q)) and 0.1 < np.mean(refused) < 0.9


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="plain", marks=pytest.mark.slow),
        pytest.param({"temperature": 0.7, "top_p": 0.8}, id="adjusted"),
    ],
)
def test_frequencies_of_whole_answers(settings):
    """6144 answers of 3 tokens by two different models of 4: each count within 4.5 deviations of the target's n p."""
    n, prompt = 6144, [1, 3]
    config = model.ModelConfig(
        vocab_size=V, layers=1, width=8, heads=2, kv_heads=1, head_size=4, hidden=8, context=16, query_blocks=1
    )
    target, draft = (
        model.make_model(config.for_backend("cpu")),
        model.make_model(dataclasses.replace(config, window=2).for_backend("cpu")),
    )
    lm = off(jax.jit(target.init)(jax.random.key(0)), 0.7)
    draft_lm = off(lm, 0.3, seed=1)
    long = np.array(list(itertools.product(range(V), repeat=LONG)), np.int32)
    ids = np.concatenate([np.tile(prompt, (len(long), 1)), long], axis=1).astype(np.int32)
    positions = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
    logits = target.logits(lm, target.hidden_states(lm, ids, positions, np.ones_like(ids)))[:, 1:-1]
    each = np.take_along_axis(np.asarray(jax.nn.softmax(sampling_logits(logits, **settings))), long[..., None], axis=-1)
    p = np.prod(each[..., 0].astype(np.float64), axis=1)
    sampling = SamplingParams(LONG, **settings)
    go = jax.jit(functools.partial(speculative_sample, target, draft, sampling=sampling, draft_tokens=2))
    drawn, told = go(lm, draft_lm, np.tile(np.array(prompt, np.int32), (n, 1)), np.full(n, 2, np.int32), KEY)
    counts = np.bincount(np.asarray(drawn.tokens) @ [V**2, V, 1], minlength=V**LONG)
    assert np.all(np.abs(counts - n * p) <= 4.5 * np.sqrt(n * p * (1 - p))) and (counts > 0).sum() >= 8
    assert 0.3 < told.accepted.sum() / told.proposed.sum() < 0.9  # or the redrawn ones would count for little
    assert p.sum() == pytest.approx(1, abs=1e-5) and (p == 0).any() == bool(settings)


@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, id="plain", marks=pytest.mark.slow), pytest.param(dict(window=3, global_every=2), id="windows")],
)
def test_greedy_is_samples_and_logprobs_are_the_trainers(changes, tiny_model):
    """Rules 6 and 14: ragged prompts, grouped queries, rings that take slots back; a draft that is refused at times."""
    m = model.make_model(dataclasses.replace(tiny_model.config, **changes))
    lm = off(jax.jit(m.init)(jax.random.key(0)), 0.1)
    given = lm, off(lm, 0.03, seed=1), PROMPTS, LENGTHS, KEY
    cool, greedy = SamplingParams(NEW, temperature=0.7), SamplingParams(NEW, temperature=0.0)
    go = lambda sampling: jax.jit(functools.partial(speculative_sample, m, m, sampling=sampling, draft_tokens=3))(
        *given
    )
    drawn, told = go(greedy)
    without = jax.jit(functools.partial(sample, m, sampling=greedy))(lm, PROMPTS, LENGTHS, KEY)
    jax.tree.map(np.testing.assert_array_equal, drawn, without)
    assert 0.2 < told.accepted.sum() / told.proposed.sum() < 0.95 and len(set(told.rounds.tolist())) > 1
    drawn, told = go(cool)
    tokens, logprobs = prompt_completion_rows(PROMPTS, LENGTHS, drawn)
    scored = jax.jit(functools.partial(m.token_logprobs, temperature=0.7))(lm, tokens)
    np.testing.assert_allclose(logprobs, scored * tokens.weights, atol=2e-5)
    assert np.all(drawn.lengths == NEW) and 0.2 < told.accepted.sum() / told.proposed.sum() < 0.95


def test_a_draft_that_is_the_target_is_always_right(run, tiny_lm):
    """Then 5 tokens a pass: 12 in 3 rounds, which could propose 4 + 4 + 2. A useless one costs a pass a token."""
    drawn, told = run(draft_lm=tiny_lm, temperature=0.7)
    assert np.all(told.rounds == 3) and np.all(told.proposed == 10) and np.all(told.accepted == 10)
    assert np.all(drawn.lengths == NEW) and len({tuple(row) for row in drawn.tokens}) == 4
    other = {**tiny_lm, "embedding": tiny_lm["embedding"][::-1]}
    greedy, told = run(draft_lm=other, temperature=0.0)
    assert told.rounds.max() == NEW and told.accepted.sum() <= 4
    np.testing.assert_array_equal(greedy.tokens, run(temperature=0.0)[0].tokens)


def test_a_row_depends_on_its_own_prompt_and_number_alone(run):
    """Rules 12 and 14: neither on its batch mates, nor on the padding to its right."""
    together, _ = run(temperature=0.7)
    others = PROMPTS.copy()
    others[[0, 2, 3]] = others[[0, 2, 3], ::-1]
    others[1, LENGTHS[1] :] = 7
    apart, _ = run(others, temperature=0.7)
    np.testing.assert_array_equal(apart.tokens[1], together.tokens[1])
    np.testing.assert_allclose(apart.logprobs[1], together.logprobs[1], atol=1e-5)
    assert np.any(apart.tokens[0] != together.tokens[0])


def test_a_row_ends_with_the_first_of_several_stop_ids(run):
    """It keeps the stop id, wherever in a round it falls, and is zeros from there on; the others go on as before."""
    free, all_told = run(temperature=0.7)
    stop = (int(free.tokens[0, 2]), int(free.tokens[2, 5]))
    stopped, told = run(temperature=0.7, stop=stop)
    for row in range(4):
        at = [t for t in range(NEW) if free.tokens[row, t] in stop]
        length = at[0] + 1 if at else NEW
        assert stopped.lengths[row] == length and stopped.stopped[row] == bool(at)
        np.testing.assert_array_equal(stopped.tokens[row], [*free.tokens[row, :length], *[0] * (NEW - length)])
        np.testing.assert_allclose(stopped.logprobs[row], free.logprobs[row] * (np.arange(NEW) < length), atol=1e-6)
        assert told.proposed[row] <= all_told.proposed[row] and told.accepted[row] <= length
    assert stopped.stopped[0] and stopped.stopped[2] and len(set(stopped.lengths.tolist())) >= 3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"draft_tokens": 0}, "draft_tokens is 0; the draft must propose at least 1"),
        ({"max_new": 60}, "the prompt has 9 tokens and 60 more .* the model's context is 64"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0"),
        ({"repetition_penalty": 1.1}, "repetition_penalty does not go with a draft"),
        ({"samples": 2}, "samples is 2; with a draft each prompt gets 1"),
        ({"draft": {"vocab_size": 30}}, "the draft's vocabulary has 30 tokens and the target's 31: a draft must share"),
        ({"draft": {"context": 20}}, "the prompt has 9 tokens and 12 more .* the draft's context is 20: .* to 11, or"),
    ],
)
def test_bad_requests(changes, message, tiny_model, tiny_lm):
    changes = {"draft": {}, "draft_tokens": 4, "max_new": NEW, **changes}
    draft_tokens = changes.pop("draft_tokens")
    draft = model.make_model(dataclasses.replace(tiny_model.config, **changes.pop("draft")))
    with pytest.raises(UserError, match=message):
        speculative_sample(
            tiny_model,
            draft,
            tiny_lm,
            tiny_lm,
            PROMPTS,
            LENGTHS,
            KEY,
            SamplingParams(**changes),
            draft_tokens=draft_tokens,
        )

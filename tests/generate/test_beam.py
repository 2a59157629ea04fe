"""Beam search: against all sequences there are, against greedy decoding, and by the formula of its length penalty."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import model
from lm.core.errors import UserError
from lm.generate.beam import beam_search
from lm.generate.sampler import SamplingParams, prompt_completion_rows, sample

V, NEW, STOP = 5, 3, (0, 3)
PROMPTS, LENGTHS = np.array([[1, 2, 4], [2, 9, 9], [4, 1, 9]], np.int32) % V, np.array([3, 1, 2], np.int32)


@pytest.fixture(scope="module")
def five():
    """A model of five tokens, and its decoder: of key 5, as a narrow beam does lose the best of some prompt here."""
    config = model.ModelConfig(
        vocab_size=V, layers=1, width=8, heads=2, kv_heads=1, head_size=4, hidden=8, context=16, query_blocks=1
    )
    made = model.make_model(config.for_backend("cpu"))
    lm = jax.jit(made.init)(jax.random.key(0))
    leaves, treedef = jax.tree.flatten(lm)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    return made, jax.tree.unflatten(treedef, [x + 0.7 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@pytest.fixture(scope="module")
def search(five):
    """(prompts, lengths, **options) -> Completions and scores, as numpy arrays."""
    made, lm = five
    compiled = functools.cache(lambda **options: jax.jit(functools.partial(beam_search, made, **options)))

    def run(prompts=PROMPTS, lengths=LENGTHS, max_new=NEW, **options):
        return jax.tree.map(np.asarray, compiled(max_new=max_new, **options)(lm, prompts, lengths))

    return run


@pytest.fixture(scope="module")
def table(five):
    """row -> {tokens: log-probability of the last of them after the prompt and the others}, by full forward passes."""
    made, lm = five
    run = jax.jit(lambda t, p, s: jax.nn.log_softmax(made.logits(lm, made.hidden_states(lm, t, p, s))))
    long = np.array(list(itertools.product(range(V), repeat=NEW)), np.int32)

    @functools.cache
    def of(row: int) -> dict[tuple[int, ...], float]:
        n = LENGTHS[row]
        ids = np.concatenate([np.tile(PROMPTS[row, :n], (len(long), 1)), long], axis=1)
        logprobs = np.asarray(run(ids, np.tile(np.arange(n + NEW), (len(ids), 1)), np.ones_like(ids)))[:, n - 1 : -1]
        return {
            tuple(tokens[: t + 1]): float(logprobs[i, t, tokens[t]])
            for i, tokens in enumerate(long.tolist())
            for t in range(NEW)
        }

    return of


def score(table, tokens, penalty: float) -> float:
    """Equation 14 of Wu et al."""
    return sum(table[tokens[: t + 1]] for t in range(len(tokens))) / ((5 + len(tokens)) / 6) ** penalty


def ranked(table, penalty: float) -> list[tuple[int, ...]]:
    """All completions, best first: with two stop ids of five, 2 of one token, 3 x 2 of two, 9 x 2 that end with the
    third and 27 that are cut off."""
    whole = [y for y in table if not set(y[:-1]) & set(STOP) and (y[-1] in STOP or len(y) == NEW)]
    assert len(whole) == 2 + 6 + 18 + 27
    return sorted(whole, key=lambda y: -score(table, y, penalty))


def searched(table, width: int, penalty: float) -> list[tuple[int, ...]]:
    """A beam search in lists."""
    live, whole = [()], []
    for t in range(NEW):
        every = sorted([(*y, v) for y in live for v in range(V)], key=lambda y: -score(table, y, 0.0))
        whole += [y for y in every if y[-1] in STOP or t == NEW - 1]
        live = [y for y in every if y[-1] not in STOP][:width]
    return sorted(whole, key=lambda y: -score(table, y, penalty))[:width]


def agrees(found, scores, table, row: int, expected, penalty: float) -> None:
    """Whether these are the hypotheses found for a prompt, in order, with their scores."""
    width = len(expected)
    np.testing.assert_allclose(scores[row], [score(table, y, penalty) for y in expected], rtol=1e-5)
    for at, y in enumerate(expected, row * width):
        np.testing.assert_array_equal(found.tokens[at], [*y, *[0] * (NEW - len(y))])
        np.testing.assert_allclose(found.logprobs[at, : len(y)], [table[y[: t + 1]] for t in range(len(y))], rtol=1e-4)
        assert found.lengths[at] == len(y) and found.stopped[at] == (y[-1] in STOP)
        assert not found.logprobs[at, len(y) :].any()


@pytest.mark.parametrize("penalty", [0.0, 3.0])
def test_a_wide_beam_finds_the_best_of_all(penalty, search, table):
    """9 places hold every unfinished hypothesis of two tokens, so nothing is lost: the search is exhaustive."""
    found, scores = search(beam_width=9, length_penalty=penalty, stop=STOP)
    for row in range(3):
        agrees(found, scores, table(row), row, ranked(table(row), penalty)[:9], penalty)
    assert set(found.lengths.tolist()) == {1, 2, 3}


@pytest.mark.parametrize("width", [1, 2])
def test_a_narrow_beam_loses_what_a_search_in_lists_loses(width, search, table):
    found, scores = search(beam_width=width, length_penalty=1.0, stop=STOP)
    for row in range(3):
        agrees(found, scores, table(row), row, searched(table(row), width, 1.0), 1.0)


def test_the_lists_do_lose_something_and_the_penalty_matters(table):
    """Or the tests above would compare one list with itself."""
    for width in (1, 2):
        assert any(searched(table(row), width, 1.0) != ranked(table(row), 1.0)[:width] for row in range(3))
    assert any(searched(table(row), 2, 1.0) != searched(table(row), 2, 0.0) for row in range(3))
    tokens = lambda penalty: sum(len(y) for row in range(3) for y in ranked(table(row), penalty)[:9])
    assert tokens(3.0) > tokens(0.0)


def test_width_one_without_stop_ids_is_greedy(five, search):
    made, lm = five
    found, scores = search(beam_width=1, max_new=6)
    greedy = jax.jit(
        lambda: sample(made, lm, PROMPTS, LENGTHS, jax.random.key(0), SamplingParams(6, temperature=0.0))
    )()
    np.testing.assert_array_equal(found.tokens, greedy.tokens)
    np.testing.assert_allclose(found.logprobs.sum(axis=1), scores[:, 0], rtol=1e-5)
    tokens, logprobs = prompt_completion_rows(jnp.asarray(PROMPTS), LENGTHS, jax.tree.map(jnp.asarray, found))
    np.testing.assert_allclose(logprobs, jax.jit(made.token_logprobs)(lm, tokens) * tokens.weights, atol=1e-5)


def test_a_prompt_does_not_depend_on_its_mates(search):
    """Nor on when they end: rule 14."""
    found, scores = search(beam_width=2, length_penalty=1.0, stop=STOP)
    for row in range(3):
        one, alone = search(
            np.tile(PROMPTS[row], (3, 1)), np.tile(LENGTHS[row], 3), beam_width=2, length_penalty=1.0, stop=STOP
        )
        np.testing.assert_array_equal(one.tokens[:2], found.tokens[2 * row : 2 * row + 2])
        np.testing.assert_allclose(alone[0], scores[row], rtol=1e-6)


def test_fewer_sequences_than_places(search):
    """One new token: five sequences, and seven places."""
    found, scores = search(beam_width=7, max_new=1, stop=(*STOP, 3, 99))
    assert (
        np.isfinite(scores).sum(axis=1).tolist() == [5, 5, 5]
        and found.lengths.tolist() == [1] * 5 + [0] * 2 + ([1] * 5 + [0] * 2) * 2
    )
    for row in found.tokens.reshape(3, 7):
        assert sorted(row[:5]) == [0, 1, 2, 3, 4] and not row[5:].any()
    np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1, rtol=1e-5)  # all there is


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"beam_width": 0}, "the beam's width is 0; it must be at least 1"),
        ({"beam_width": 2, "length_penalty": -1.0}, "length_penalty is -1.0; it must be 0"),
        ({"beam_width": 2, "max_new": 14}, "the prompt has 3 tokens and 14 more were asked for"),
        ({"beam_width": 2, "prompts": PROMPTS[:, :0]}, "the prompt is empty"),
    ],
)
def test_bad_requests(changes, message, search):
    with pytest.raises(UserError, match=message):
        search(**changes)

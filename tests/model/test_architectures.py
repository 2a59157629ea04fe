"""What models of others have beside our defaults, against itself computed another way: windows, caps, positions.

tests/weights/test_weights.py holds each of them to transformers, and cached decoding to the full pass.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import model
from lm.core.errors import UserError
from lm.generate.sampler import SamplingParams, prompt_completion_rows, sample
from lm.model.attention import softcapped_logits
from lm.model.params import flops_per_token
from tests.model.test_decoder import TOKENS, A, B, C, packed

WINDOWED = dict(window=3, global_every=2, rope_local_base=100.0, attention_softcap=1.0, logit_softcap=2.0)
GEMMA = dict(WINDOWED, norm_at="both", norm_unit_offset=True, activation="gelu", embedding_scale=4.0)
MIXTURE = dict(window=3, global_every=2, experts=3, norm_at="output", qk_norm_over="all")
GPT = dict(positions="learned", norm="layer", bias="all", gated=False, activation="gelu", qk_norm=False, window=3)


@pytest.fixture(scope="module")
def made(tiny_model):
    """(changes of the tiny config) -> the model, and a decoder whose every leaf is off its starting value."""

    def of(**changes):
        m = model.make_model(dataclasses.replace(tiny_model.config, **changes))
        lm = jax.jit(m.init)(jax.random.key(0))
        leaves, treedef = jax.tree.flatten(lm)
        draw = np.random.default_rng(0)
        return m, jax.tree.unflatten(treedef, [x + 0.1 * draw.normal(size=x.shape).astype(np.float32) for x in leaves])

    return of


@pytest.mark.parametrize(
    "every", [pytest.param(0, id="all local", marks=pytest.mark.slow), pytest.param(2, id="mixed")]
)
def test_a_windowed_cache_keeps_the_window_and_decodes_as_the_full_pass(every, made):
    """Rule 14: in steps shorter and longer than the window, to the last slot, for prompts of mixed length."""
    m, lm = made(window=3, global_every=every)
    T, pad = 14, np.array([0, 4])  # the second row begins at slot 4
    ids = np.random.default_rng(0).integers(1, 31, (2, T)).astype(np.int32)
    segments = (np.arange(T) >= pad[:, None]).astype(np.int32)
    positions = np.maximum(np.arange(T) - pad[:, None], 0)
    full = jax.jit(m.hidden_states)(lm, ids, positions, segments)
    step = jax.jit(m.cached_hidden_states)
    for sizes in ([5, 1, 1, 2, 3, 1, 1], [14], [1] * 14):
        cache, parts = m.empty_cache(batch=2, capacity=T), []
        assert [layer.shape[2] for layer in (*cache.keys, *cache.values)] == 2 * [3, T if every else 3]
        for start, size in zip(np.cumsum([0, *sizes]), sizes):
            now = np.s_[:, start : start + size]
            x, cache = step(lm, ids[now], positions[now], segments[now], cache)
            parts.append(x)
        real = segments[..., None] > 0
        np.testing.assert_allclose(
            np.where(real, np.concatenate(parts, axis=1), 0), np.where(real, full, 0), rtol=1e-4, atol=1e-5
        )
        assert cache.length == T


def test_a_cache_no_longer_than_the_window_is_whole(made):
    m, _ = made(window=5)
    assert {layer.shape[2] for layer in m.empty_cache(batch=1, capacity=4).keys} == {4}


@pytest.mark.parametrize(
    "changes, how",
    [
        pytest.param(GEMMA, {"remat": "block", "query_blocks": 2}, id="gemma", marks=pytest.mark.slow),
        pytest.param(MIXTURE, {"remat": "dots", "loss_chunk": 5}, id="mixture"),
    ],
)
def test_a_scanned_stack_of_two_kinds_of_layers_is_the_unrolled_one(changes, how, made):
    """Value, gradient and routing, under rematerialisation, query blocks and a chunked loss too."""

    def of(**computed):
        m, lm = made(**changes, **computed)

        def total(lm):
            x, routing = m.hidden_and_routing(lm, TOKENS.inputs, TOKENS.positions, TOKENS.segments)
            scores = m.target_stats(lm, x, TOKENS.targets)
            extra = 0.0 if routing is None else jnp.sum(jnp.square(routing.probabilities)) + jnp.sum(routing.log_z)
            return jnp.sum((scores.logprobs + 0.01 * scores.log_z) * TOKENS.weights) + 0.01 * extra, routing

        return jax.jit(jax.value_and_grad(total, has_aux=True))(lm)

    plain = of()
    assert (plain[0][1] is None) == ("experts" not in changes)
    scanned = of(scan="yes", **how)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), scanned, plain)


@pytest.mark.parametrize(
    "layers, every, reach",
    [(1, 0, 2), (2, 0, 4), (2, 2, 11), (1, 1, 11)],
    ids=["one", "two", "one global", "all global"],
)
def test_causality_of_windows_by_gradient(layers, every, reach, made):
    """d state[t] / d input s is zero beyond (window - 1) positions a layer, across segments and ahead; else not."""
    m, lm = made(layers=layers, window=3, global_every=every)
    ids, segments = jnp.arange(12)[None], np.array([[1] * 9 + [2] * 3])
    project = np.random.default_rng(1).normal(size=16).astype(np.float32)

    def states(embedding):
        return m.hidden_states({**lm, "embedding": embedding}, ids, ids, segments)[0] @ project

    moved = np.abs(np.asarray(jax.jit(jax.jacrev(states))(lm["embedding"]))).max(axis=-1)[:, :12]
    back = np.arange(12)[:, None] - np.arange(12)
    expected = (back >= 0) & (back <= reach) & (segments[0][:, None] == segments[0])
    np.testing.assert_array_equal(moved > 0, expected)


def test_packed_rows_score_as_separate_ones_with_windows_and_learned_positions(made):
    """Rule 3: positions restart with each segment, and a window does not reach into the one before."""
    m, lm = made(**GPT)
    score = jax.jit(m.token_logprobs)
    together = np.asarray(score(lm, packed([A, B, C], length=12)))
    apart = np.asarray(score(lm, packed([A], [B], [C], length=12)))
    for row, (start, stop) in enumerate([(0, 5), (5, 8), (8, 10)]):
        np.testing.assert_allclose(together[0, start:stop], apart[row, : stop - start], atol=1e-5)


def test_caps_hold_in_the_loss_and_in_sampling(made):
    """Rules 6 and 11: both see c tanh(logits / c), before any temperature; sampler and trainer agree."""
    m, lm = made(logit_softcap=0.5)
    bare = model.make_model(dataclasses.replace(m.config, logit_softcap=0.0))
    lm = {**lm, "embedding": 3 * lm["embedding"]}
    prompts, lengths = np.array([[3, 14, 15], [9, 2, 0]], np.int32), np.array([3, 2], np.int32)

    @jax.jit
    def run(lm):
        drawn = sample(m, lm, prompts, lengths, jax.random.key(0), SamplingParams(5, temperature=0.7))
        tokens, logprobs = prompt_completion_rows(prompts, lengths, drawn)
        x = bare.hidden_states(lm, tokens.inputs, tokens.positions, tokens.segments)
        return tokens, logprobs, bare.logits(lm, x), m.token_logprobs(lm, tokens, temperature=0.7)

    tokens, logprobs, raw, scored = jax.device_get(run(lm))
    capped = 0.5 * np.tanh(raw / 0.5) / 0.7
    expected = np.take_along_axis(jax.nn.log_softmax(capped), tokens.targets[..., None], -1)[..., 0] * tokens.weights
    assert np.abs(raw).max() > 1  # or the cap would do nothing
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)
    np.testing.assert_allclose(scored * tokens.weights, expected, atol=1e-5)


def test_softcap_by_hand():
    """2 tanh(1 / 2) = 0.924; near nothing it is the identity, far out the cap; 0 is no cap."""
    x = jnp.array([0.0, 1.0, 1e-3, 100.0, -100.0])
    np.testing.assert_allclose(softcapped_logits(x, 2.0), [0, 0.9242343, 1e-3, 2, -2], rtol=1e-5)
    assert softcapped_logits(x, 0.0) is x


def test_flops_of_windows_and_experts(tiny_model):
    """At length 4 a window of 2 sees 1, 2, 2, 2 keys: 7 / 4 a query, against 10 / 4. Of 4 experts 2 are worked with."""
    c = tiny_model.config
    length = 4
    whole, windowed, mixed = (
        flops_per_token(dataclasses.replace(c, **changes), length)
        for changes in ({}, {"window": 2}, {"window": 2, "global_every": 2})
    )
    assert whole - windowed == 2 * (whole - mixed) == 12 * 4 * 8 * 2 * (10 - 7) / 4
    router = 2 * c.width * 4  # in both layers
    experts = flops_per_token(dataclasses.replace(c, experts=4, hidden=c.hidden // 2), length)
    assert experts == whole + 6 * router


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"norm": "batch"}, "model.norm is 'batch'; choose one of rms, layer"),
        ({"bias": "some"}, "model.bias is 'some'; choose one of none, qkv, attention, all"),
        ({"window": -1}, "model.window is -1; it must be at least 0"),
        ({"global_every": 2}, "model.global_every is 2, but there is no model.window: give one"),
        ({"experts": 2, "experts_per_token": 3}, "model.experts_per_token 3 is above model.experts 2"),
        ({"experts": 2, "experts_per_token": 0}, "model.experts_per_token is 0; it must be at least 1"),
        ({"rope_scaling": "yarn"}, "model.rope_scaling yarn needs model.rope_original, the context before it"),
        ({"rope_scaling": "ntk"}, "model.rope_scaling is 'ntk'; choose one of none, linear, llama3, yarn"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(UserError, match=message):
        model.ModelConfig(vocab_size=8, **changes)

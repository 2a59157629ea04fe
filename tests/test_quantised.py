"""Weights and caches in 8 bits: what is stored, and that decoding from it computes what the stored numbers say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_architectures import GEMMA, GPT, MIXTURE, made

from lm import model
from lm.beam import beam
from lm.errors import UserError
from lm.model.attention import attention
from lm.model.quantised import heads_in_int8, in_int8, stored
from lm.sample import decode, prefill, sample

__all__ = ["made"]
IDS = np.random.default_rng(0).integers(1, 31, (2, 14)).astype(np.int32)
PADDED = np.array([0, 4])  # the second row begins at slot 4
SEGMENTS = (np.arange(14) >= PADDED[:, None]).astype(np.int32)
POSITIONS = np.maximum(np.arange(14) - PADDED[:, None], 0)


def test_int8_by_hand():
    """A column's largest is 127: 0.5 / (1 / 127) = 63.5, which rounds to the even 64. By rows, 0.5 is the largest."""
    w, scale = in_int8(jnp.array([[1.0, 0.0], [-0.5, 0.0]]))
    assert w.tolist() == [[127, 0], [-64, 0]] and scale[0, 0] == pytest.approx(1 / 127)
    w, scale = in_int8(jnp.array([[1.0, 0.0], [-0.5, 0.0]]), axis=-1)
    assert w.tolist() == [[127, 0], [-127, 0]] and scale[1, 0] == pytest.approx(0.5 / 127)
    kept, of_heads = heads_in_int8(jnp.array([[1.0, -0.5], [0.0, 0.0]]))
    assert kept.tolist() == [[127, -64], [0, 0]] and of_heads[0] == pytest.approx(1 / 127)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_stored_weights_are_themselves_within_half_a_step(tied, made):
    m, lm = made(tied=tied)
    kept = stored("int8", lm, ends=True)
    inside = {f"{name}": (kept["layers"], lm["layers"]) for name in ("query", "down")}
    for name, (tree, source) in {**inside, **{n: (kept, lm) for n in ("embedding", "head") if n in lm}}.items():
        assert tree[name].dtype == np.int8
        gap = np.abs(tree[name] * tree[f"{name}_scale"] - source[name])
        assert np.all(gap <= 0.5001 * tree[f"{name}_scale"]) and gap.max() > 0
    assert kept["embedding_scale"].shape == (31, 1) and kept["layers"]["down_scale"].shape == (2, 1, 16)
    np.testing.assert_array_equal(kept["layers"]["query_norm"], lm["layers"]["query_norm"])
    assert stored("int8", lm)["embedding"] is lm["embedding"]
    assert stored("bfloat16", lm)["embedding"].dtype == jnp.bfloat16 and stored("float32", lm) is lm


def expanded(lm):
    """Stored weights as the float32 matrices that they stand for."""
    whole = lambda tree: {
        name: leaf * tree[f"{name}_scale"] if f"{name}_scale" in tree else leaf
        for name, leaf in tree.items()
        if not name.endswith("_scale") and name != "layers"
    }
    return {**whole(lm), "layers": whole(lm["layers"])}


@pytest.mark.parametrize("changes", [GEMMA, {**MIXTURE, "tied": False}, GPT], ids=["gemma", "mixture", "gpt"])
def test_the_forward_pass_reads_stored_weights_as_what_they_stand_for(changes, made):
    m, lm = made(**changes)
    kept = stored("int8", lm, ends=True)
    logits = jax.jit(lambda lm: m.logits(lm, m.hidden(lm, IDS, POSITIONS, SEGMENTS)))
    found, real = np.asarray(logits(kept)), SEGMENTS > 0
    np.testing.assert_allclose(found[real], logits(expanded(kept))[real], rtol=1e-4, atol=2e-5)
    gap = np.abs(found - logits(lm))[real]
    assert 1e-4 < gap.max() < 0.4  # logits of a few units


def test_attention_to_int8_is_attention_to_the_expanded_numbers():
    """The scales leave the sums: q (k s) = (q k) s, sum w (s v) = sum (w s) v."""
    draw = np.random.default_rng(0)
    q, k, v = (draw.normal(size=(2, 5, n, 8)).astype(np.float32) for n in (4, 2, 2))
    mask = np.broadcast_to(np.tri(5, dtype=bool), (2, 5, 5))
    (k, of_keys), (v, of_values) = heads_in_int8(k), heads_in_int8(v)
    found = attention(q, k, v, mask, of_keys, of_values, scale=0.3, softcap=2.0)
    whole = attention(q, k * of_keys[..., None], v * of_values[..., None], mask, scale=0.3, softcap=2.0)
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-6)


def eight(m, **changes):
    return model.make(dataclasses.replace(m.config, cache="int8", **changes))


@pytest.mark.parametrize("changes", [{}, {"window": 3}, GEMMA, MIXTURE], ids=["plain", "windowed", "gemma", "mixture"])
def test_decoding_from_an_int8_cache_is_near_the_full_pass(changes, made):
    """A key or value is off by 1/254 of its head's largest at most: states of size 1 by a few hundredths. In one step,
    in many, and about a ring: the same numbers, as a slot is rounded once, when it is written."""
    m, lm = made(**changes)
    kept = eight(m)
    full = np.where(SEGMENTS[..., None] > 0, jax.jit(m.hidden)(lm, IDS, POSITIONS, SEGMENTS), 0)
    step, outs = jax.jit(kept.cached), []
    for sizes in ([14], [5, 1, 1, 2, 3, 1, 1]):
        cache, parts = kept.cache(batch=2, capacity=14), []
        assert {a.dtype for a in (*cache.keys, *cache.values)} == {jnp.dtype("int8")}
        assert [a.shape for a in cache.key_scales] == [a.shape[:3] for a in cache.keys]
        for start, size in zip(np.cumsum([0, *sizes]), sizes):
            now = np.s_[:, start : start + size]
            x, cache = step(lm, IDS[now], POSITIONS[now], SEGMENTS[now], cache)
            parts.append(x)
        outs.append(np.where(SEGMENTS[..., None] > 0, np.concatenate(parts, axis=1), 0))
    gap = np.abs(outs[0] - full)
    assert 1e-4 < gap.max() < 0.1
    assert np.mean(np.abs(outs[0] - outs[1]) > 1e-4) < 0.01, np.abs(outs[0] - outs[1]).max()


def test_sampling_and_beam_search_go_through_an_int8_cache(made):
    """Copies and choices of rows take the scales along: three answers of one prefill are those of three prompts."""
    m, lm = made()
    kept = eight(m)
    lengths, key = np.array([9, 5], np.int32), jax.random.key(3)
    run = lambda ids, lengths, **options: jax.jit(functools.partial(sample, kept, max_new=5, **options))(
        lm, ids, lengths, key
    )
    shared = run(IDS[:, :9], lengths, samples=2)
    apart = run(np.repeat(IDS[:, :9], 2, axis=0), np.repeat(lengths, 2))
    np.testing.assert_array_equal(shared.tokens, apart.tokens)
    best, scores = jax.jit(functools.partial(beam, kept, width=2, max_new=4))(lm, IDS[:, :9], lengths)
    logits, cache = jax.jit(functools.partial(prefill, kept, capacity=13))(lm, IDS[:, :9], lengths)
    total, rows = 0.0, best.tokens[::2]  # the best hypothesis of each prompt, its tokens fed one by one
    for t in range(4):
        total += jnp.take_along_axis(jax.nn.log_softmax(logits), rows[:, t : t + 1], axis=1)[:, 0]
        logits, cache = decode(kept, lm, rows[:, t], lengths + t, cache)
    np.testing.assert_allclose(scores[:, 0], total, rtol=1e-4, atol=1e-4)


def test_refused(tiny_model, tiny_lm):
    with pytest.raises(UserError, match="model.cache is 'int4'; choose one of auto, float32, bfloat16, int8"):
        dataclasses.replace(tiny_model.config, cache="int4")
    with pytest.raises(UserError, match="the weights are to be kept as 'int4'; choose one of float32, bfloat16, int8"):
        stored("int4", tiny_lm)

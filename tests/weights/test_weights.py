"""Weights of others: every architecture computes what transformers computed, and folders lose nothing either way.

tests/peers/weights.json has the logits of transformers; tests/weights/test_weights_peers.py computes them anew.
"""

import dataclasses
import json
import tracemalloc
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from foreign import (
    IDS,
    LENGTHS,
    LONGEST,
    REAL,
    STORED,
    VOCAB,
    changed,
    drawn,
    folder_of,
    of_file,
    tensors,
    write_config,
)
from safetensors.numpy import save_file

from lm import model
from lm.core.errors import UserError
from lm.generate.sampler import decode_step, prefill
from lm.model.params import param_specs
from lm.weights import config_map, folder, names

MODELS = list(STORED["models"])
EACH = pytest.mark.parametrize("name", MODELS)
NEW = 4  # tokens decoded behind the prompts, to the cache's end


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """(name) -> its Config for tests, parameters, and folder."""
    found = {}

    def of(name):
        if name not in found:
            path = folder_of(name, tmp_path_factory.mktemp("theirs") / "model")
            c, params = folder.read_folder(path)
            found[name] = SimpleNamespace(shape=c, config=c.for_backend("cpu"), params=params, path=path)
        return found[name]

    return of


def longer() -> tuple[np.ndarray, np.ndarray]:
    """IDS with NEW more tokens behind each row's own length, and those tokens."""
    new = np.random.default_rng(1).integers(0, VOCAB, (len(LENGTHS), NEW)).astype(np.int32)
    ids = np.zeros((len(LENGTHS), LONGEST + NEW), np.int32)
    for row, n in enumerate(LENGTHS):
        ids[row, : n + NEW] = [*IDS[row, :n], *new[row]]
    return ids, new


@EACH
def test_logits_equal_transformers_and_those_of_a_cache_the_full_pass(name, read):
    """Ragged rows, to 1e-4 in float32; and rule 14: cached decode equals the full pass, to the cache's last slot.

    One program: most of a test is compiling it.
    """
    m, (ids, new), lengths = model.make_model(read(name).config), longer(), np.array(LENGTHS, np.int32)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    real = positions < lengths[:, None] + NEW

    @jax.jit
    def both(lm):
        full = m.logits(lm, m.hidden_states(lm, ids, positions, real.astype(np.int32)))
        first, cache = prefill(m, lm, IDS, lengths, capacity=LONGEST + NEW)

        def step(carry, t):
            logits, cache = decode_step(m, lm, jnp.asarray(new)[:, t], lengths + t, carry)
            return cache, logits

        cache, decoded = jax.lax.scan(step, cache, jnp.arange(NEW))
        return full, jnp.concatenate([first[None], decoded]), cache.length

    full, cached, filled = jax.device_get(both(read(name).params))
    np.testing.assert_allclose(full[:, :LONGEST][REAL], STORED["models"][name]["logits"], atol=1e-4)
    for t in range(NEW + 1):
        np.testing.assert_allclose(cached[t], full[np.arange(3), lengths - 1 + t], atol=2e-5, err_msg=f"position {t}")
    assert filled == LONGEST + NEW


def test_every_architecture_that_we_read_is_compared():
    assert {stored["config"]["model_type"] for stored in STORED["models"].values()} == set(config_map.FAMILIES)
    scalings = {read_shape(name).rope_scaling for name in MODELS}
    assert scalings == {"none", "linear", "llama3", "yarn"}
    assert {read_shape(name).bias for name in MODELS} == {"none", "qkv", "all"}


def read_shape(name):
    return config_map.model_config_from_json(STORED["models"][name]["config"])


@EACH
def test_exported_again_it_is_equal_tensor_for_tensor(name, read, tmp_path):
    """Under the architecture that it came from, with every option of its config.json that we know."""
    theirs, kind = read(name), STORED["models"][name]["config"]["model_type"]
    folder.write_folder(tmp_path, theirs.config, theirs.params, dtype="float32", ids={"eos_token_id": 3}, kind=kind)
    found, expected = of_file(tmp_path / "model.safetensors"), tensors(name)
    assert found.keys() == expected.keys()
    for tensor in expected:
        np.testing.assert_array_equal(found[tensor], expected[tensor], err_msg=tensor)
    hf = folder.read_config(tmp_path)
    assert (
        config_map.model_config_from_json(hf) == theirs.shape and hf["model_type"] == kind and hf["eos_token_id"] == 3
    )
    assert hf["architectures"] == STORED["models"][name]["config"]["architectures"]


def test_a_model_type_that_cannot_say_a_config_gives_way(read):
    c = read("gemma2").config
    assert config_map.config_json(c, "llama")["model_type"] == "gemma2"
    assert config_map.config_json(read("phi3").config)["model_type"] == "llama"  # the same computation
    own = model.ModelConfig(vocab_size=9)
    assert config_map.config_json(own)["model_type"] == "qwen3"
    with pytest.raises(UserError, match="no architecture of transformers computes this model"):
        config_map.config_json(dataclasses.replace(own, gated=False))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_shards(name, read, tmp_path):
    """As many tensors a file as fit in shard_bytes, an index that names the file of each, and the same model."""
    theirs = read(name)
    folder.write_folder(tmp_path, theirs.config, theirs.params, dtype="float32", ids={}, shard_bytes=6000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == files
    held = {file: of_file(tmp_path / file) for file in files}
    assert {tensor: file for file, inside in held.items() for tensor in inside} == index["weight_map"]
    sizes = {file: sum(x.nbytes for x in inside.values()) for file, inside in held.items()}
    assert sum(sizes.values()) == index["metadata"]["total_size"] == sum(x.nbytes for x in tensors(name).values())
    assert all(size <= 6000 or len(held[file]) == 1 for file, size in sizes.items())
    c, params = folder.read_folder(tmp_path)
    assert c == theirs.shape
    jax.tree.map(np.testing.assert_array_equal, params, theirs.params)


@pytest.mark.parametrize("dtype, kind", [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_half_precision_is_rounded_once(dtype, kind, read, tmp_path):
    theirs = read("qwen3")
    folder.write_folder(tmp_path, theirs.config, theirs.params, dtype=dtype, ids={})
    _, params = folder.read_folder(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < (theirs.path / "model.safetensors").stat().st_size * 0.7
    rounded = jax.tree.map(lambda x: x.astype(kind).astype(np.float32), theirs.params)
    jax.tree.map(np.testing.assert_array_equal, params, rounded)
    assert folder.read_config(tmp_path)["dtype"] == dtype


def test_older_files_say_the_same(read):
    """transformers 4 had rope_theta and rope_scaling, and Gemma 3 a pattern; ours are written so."""
    for name in MODELS:
        hf = config_map.config_json(read(name).config, STORED["models"][name]["config"]["model_type"])
        assert "rope_parameters" not in hf and config_map.model_config_from_json(hf) == read(name).shape
    gemma = {
        k: v for k, v in STORED["models"]["gemma3"]["config"].items() if k not in ("layer_types", "rope_parameters")
    }
    assert config_map.model_config_from_json(gemma) == read("gemma3").shape


def test_names_and_copies_that_files_hold_besides(read, tmp_path):
    """OpenAI's own GPT-2 has no "transformer."; tables computed anew and a tied model's second embedding are let go."""
    write_config(tmp_path, STORED["models"]["gpt2"]["config"])
    bare = {name.removeprefix("transformer."): value for name, value in tensors("gpt2").items()}
    mask = np.tri(32, dtype=np.float32)[None, None]
    save_file(bare | {"h.0.attn.bias": mask, "lm_head.weight": bare["wte.weight"]}, tmp_path / "model.safetensors")
    _, params = folder.read_folder(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, read("gpt2").params)


NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "tensors_, message",
    [
        (
            {QUERY: None, NORM: None},
            f'lacks tensor {QUERY} and 1 more, which config.json with model_type = "llama" needs',
        ),
        (
            {"model.layers.1.bias": drawn("", [3])},
            r"tensor model.layers.1.bias of .*model.safetensors has no place in a model whose config.json says",
        ),
        ({QUERY: drawn("", [16, 12])}, rf"tensor {QUERY} of .* is \[16, 12\], but config.json makes it \[16, 16\]"),
        ({NORM: np.zeros(16, np.int8)}, rf"tensor {NORM} of .*model.safetensors is I8: we read .* nothing quantised"),
    ],
    ids=["missing", "extra", "misshapen", "quantised"],
)
def test_tensors_that_do_not_fit(tensors_, message, tmp_path):
    changed(folder_of("llama", tmp_path), **tensors_)
    with pytest.raises(UserError, match=message) as raised:
        folder.read_folder(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mamba"}, "model_type 'mamba', which we do not know: we read gpt2, llama, .*qwen3_moe"),
        ({"hidden_size": None}, "config.json lacks hidden_size, which llama needs: take a complete folder"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config = {'bits': 4}, which we do not compute for llama"),
        ({"hidden_act": "relu"}, "the activation 'relu': we compute silu"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "scales its rotary positions by 'longrope'"),
        ({"partial_rotary_factor": 0.75}, "partial_rotary_factor = 0.75, which we do not compute"),
        ({"mlp_bias": True}, "mlp_bias without attention_bias"),
        ({"num_attention_heads": 3}, "model.heads 3 is not a multiple of model.kv_heads 2"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_configs_that_we_refuse(changes, message):
    hf = {**STORED["models"]["llama"]["config"], **changes}
    with pytest.raises(UserError, match=message) as raised:
        config_map.model_config_from_json({key: value for key, value in hf.items() if value is not None})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}, "every k-th layer"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True, which we do not compute for qwen2"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\], which we do not compute for qwen3_moe"),
        ("yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "yarn with truncate"),
        ("gpt2", {"activation_function": "relu"}, "the activation 'relu': we compute gelu_new for gpt2"),
    ],
    ids=lambda x: x if isinstance(x, str) and " " not in x else "",
)
def test_features_of_an_architecture_that_we_refuse(name, changes, message):
    with pytest.raises(UserError, match=message):
        config_map.model_config_from_json({**STORED["models"][name]["config"], **changes})


def torn(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def missing_shard(path):
    (path / "model.safetensors").unlink()
    index = {"weight_map": {NORM: "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "harm, message",
    [
        (torn, r"model.safetensors is torn or no safetensors \(.*\): download it again"),
        (missing_shard, r"lacks model-00001-of-00002.safetensors, which model.safetensors.index.json names"),
        (lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), "pytorch_model.bin is a pickle"),
        (
            lambda path: (path / "model.safetensors").unlink(),
            "has neither model.safetensors nor .*: download the folder",
        ),
        (lambda path: (path / "config.json").unlink(), r"cannot read .*config.json \(No such file"),
        (lambda path: (path / "config.json").write_text("{"), r"config.json is not JSON \("),
        (lambda path: (path / "config.json").write_text("[]"), "config.json is not a JSON object"),
    ],
    ids=["torn", "missing shard", "pickle", "no weights", "no config", "torn config", "another config"],
)
def test_folders_that_are_not_whole(harm, message, tmp_path):
    harm(folder_of("llama", tmp_path))
    with pytest.raises(UserError, match=message) as raised:
        folder.read_folder(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_dtype_that_is_none(read, tmp_path):
    with pytest.raises(UserError, match="dtype is 'int8'; choose one of float32, bfloat16, float16"):
        folder.write_folder(tmp_path, read("llama").config, read("llama").params, dtype="int8", ids={})
    assert not list(tmp_path.iterdir())


def peak(function) -> int:
    """The most bytes that numpy and Python held at once, above what they held before."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_of_reading_and_writing(tmp_path):
    """Reading: the model and its largest tensor one and a half times. Writing: one file, and twice that."""
    c = model.ModelConfig(vocab_size=3000, layers=12, hidden=512, tie_embeddings=False)
    zeros = lambda tree: {
        k: zeros(v) if isinstance(v, dict) else np.zeros(v.shape, np.float32) for k, v in tree.items()
    }
    params = zeros(param_specs(c))
    whole, largest = sum(x.nbytes for x in jax.tree.leaves(params)), 3000 * 128 * 4
    shard = 2_000_000
    assert whole > 6 * shard > 6 * largest  # so that a second copy would be seen
    writing = peak(lambda: folder.write_folder(tmp_path, c, params, dtype="float32", ids={}, shard_bytes=shard))
    assert writing < shard + 2 * largest + 200_000, writing
    reading = peak(lambda: folder.read_folder(tmp_path))
    assert reading < whole + 1.5 * largest + 200_000, (reading, whole)


def test_each_of_our_leaves_is_in_a_file_once():
    """Else a model would be exported without it: every preset's architecture names all of its parameters."""
    for name in MODELS:
        c, kind = read_shape(name), STORED["models"][name]["config"]["model_type"]
        leaves = [leaf for entry in names.tensor_entries(c, kind) for leaf in entry.leaf_names]
        tree = param_specs(c)
        assert sorted(leaves) == sorted([*tree["layers"], *(leaf for leaf in tree if leaf != "layers")]), name

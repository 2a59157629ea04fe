"""A folder's flags against its tensors: what is there is used, equals what is used, or is refused by name.

Where transformers has an answer of its own it is ours; tests/weights/test_weights_peers.py holds it to that.
"""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from foreign import (
    ABSENT,
    IDS,
    LONGEST,
    MISLABELLED,
    REAL,
    STORED,
    changed,
    config_of,
    drawn,
    folder_of,
    mislabelled_folder,
    of_file,
    tensors,
    write_config,
)
from safetensors.numpy import save_file

from lm import model
from lm.core.errors import UserError
from lm.model.params import initial_params, param_specs
from lm.model.rope import rope_frequencies
from lm.weights import config_map, folder

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
ATTENTION = "model.layers.0.self_attn"
TABLE = f"{ATTENTION}.rotary_emb.inv_freq"


def check_refused(path: Path, message: str) -> None:
    """Reading the folder ends in one line."""
    with pytest.raises(UserError, match=message) as raised:
        folder.read_folder(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", MISLABELLED)
def test_output_matrices_are_tied_as_the_tensors_have_it(name, tmp_path):
    """Two matrices that differ, or one by the head's name, are what transformers computes with (it ties no others).

    The logits are transformers' of the same tensors under a config.json that says the truth.
    """
    truth, untied = MISLABELLED[name]
    c, params = folder.read_folder(mislabelled_folder(name, tmp_path / "in"))
    assert c.tie_embeddings is not untied
    m = model.make_model(c.for_backend("cpu"))
    positions = np.broadcast_to(np.arange(LONGEST, dtype=np.int32), IDS.shape)
    logits = jax.jit(lambda lm: m.logits(lm, m.hidden_states(lm, IDS, positions, REAL.astype(np.int32))))(params)
    np.testing.assert_allclose(np.asarray(logits)[REAL], STORED["models"][truth]["logits"], atol=1e-4)

    (tmp_path / "out").mkdir()
    kind = STORED["models"][truth]["config"]["model_type"]
    folder.write_folder(tmp_path / "out", c, params, dtype="float32", ids={}, kind=kind)
    said = folder.read_config(tmp_path / "out")
    assert said["tie_word_embeddings"] is not untied and said["model_type"] == kind
    assert (HEAD in of_file(tmp_path / "out" / FILE)) is untied
    again, back = folder.read_folder(tmp_path / "out")
    assert again == c
    jax.tree.map(np.testing.assert_array_equal, params, back)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt2"])
def test_families_that_tie_by_default_untie_too(name, tmp_path):
    head = drawn(HEAD, [24, 16])
    changed(folder_of(name, tmp_path / "in"), **{HEAD: head})
    c, params = folder.read_folder(tmp_path / "in")
    np.testing.assert_array_equal(params["head"], head.T)
    (tmp_path / "out").mkdir()
    folder.write_folder(tmp_path / "out", c, params, dtype="float32", ids={}, kind=kind_of(name))
    assert folder.read_config(tmp_path / "out")["tie_word_embeddings"] is False
    assert of_file(tmp_path / "out" / FILE).keys() == of_file(tmp_path / "in" / FILE).keys()


def kind_of(name: str) -> str:
    return STORED["models"][name]["config"]["model_type"]


def test_a_head_that_equals_the_embedding(tmp_path):
    """Under a tied config a second copy is let go, in another dtype too; under an untied one it is a matrix."""
    path = folder_of("llama 3", tmp_path)
    rounded = tensors("llama 3")[EMBEDDING].astype(ml_dtypes.bfloat16)
    changed(path, **{HEAD: rounded, EMBEDDING: rounded.astype(np.float32)})
    c, params = folder.read_folder(path)
    assert c.tie_embeddings and "head" not in params
    write_config(path, config_of("llama 3", tie_word_embeddings=False))
    c, params = folder.read_folder(path)
    assert not c.tie_embeddings
    np.testing.assert_array_equal(params["head"].T, params["embedding"])


NO_PLACE = "has no place in a model whose config.json says"


@pytest.mark.parametrize(
    "name, flags, tensors_, message",
    [
        ("llama", {}, {HEAD: None}, f"lacks tensor {HEAD}, which config.json with tie_word_embeddings = false needs"),
        ("llama", {}, {HEAD: drawn("", [25, 16])}, rf"tensor {HEAD} of .* is \[25, 16\], but config.json makes it"),
        ("llama with biases", {"mlp_bias": False}, {}, f"mlp.down_proj.bias of .* and 5 more {NO_PLACE} mlp_bias = f"),
        (
            *("llama with biases", {"attention_bias": False, "mlp_bias": False}),
            *({f"model.layers.{i}.mlp.{part}_proj.bias": None for i in (0, 1) for part in ("gate", "up", "down")},),
            f"{ATTENTION}.k_proj.bias of .* and 7 more {NO_PLACE} attention_bias = false: correct that, or",
        ),
        ("llama", {"attention_bias": True}, {}, f"lacks tensor {ATTENTION}.k_proj.bias .* attention_bias = true needs"),
        ("qwen2", {}, {f"{ATTENTION}.q_proj.bias": None}, f'lacks tensor {ATTENTION}.q_proj.bias, .* "qwen2" needs'),
        ("qwen2", {}, {f"{ATTENTION}.o_proj.bias": drawn("", [16])}, f'o_proj.bias .* {NO_PLACE} model_type = "qwen2"'),
        (
            "mistral",
            {"attention_bias": True},
            {f"{ATTENTION}.q_proj.bias": drawn("", [16])},
            f"q_proj.bias .* {NO_PLACE}",
        ),
        ("llama", {}, {f"{ATTENTION}.q_norm.weight": drawn("", [4])}, f"q_norm.weight of .*{FILE} {NO_PLACE}"),
        ("qwen3", {}, {f"{ATTENTION}.q_norm.weight": None}, f"lacks tensor {ATTENTION}.q_norm.weight"),
        ("gemma2", {}, {"model.layers.1.pre_feedforward_layernorm.weight": None}, "lacks tensor .*pre_feedforward"),
        (
            "llama",
            {"num_hidden_layers": 1},
            {},
            f"model.layers.1.* and 8 more {NO_PLACE} num_hidden_layers = 1: correct",
        ),
        ("llama", {"num_hidden_layers": 3}, {}, "model.layers.2.* and 8 more, .* num_hidden_layers = 3 needs: correct"),
        ("gpt2", {"n_layer": 1}, {}, f"transformer.h.1.* and 11 more {NO_PLACE} n_layer = 1: correct"),
        ("mixtral", {"num_local_experts": 2}, {}, f"experts.2.* and 5 more {NO_PLACE} num_local_experts = 2: correct"),
        ("qwen3_moe", {"num_local_experts": 5}, {}, "experts.4.* and 5 more, .* num_local_experts = 5 needs: correct"),
        (
            "llama",
            {"vocab_size": 20},
            {},
            rf"tensor {EMBEDDING} of .* is \[24, 16\], but .* \[20, 16\] \(vocabulary 20\)",
        ),
        ("gpt2", {"n_positions": 64}, {}, r"wpe.weight of .* is \[32, 16\], but config.json makes it \[64, 16\]"),
        ("llama", {}, {"score.weight": drawn("", [2, 16])}, f"tensor score.weight of .* {NO_PLACE}"),
    ],
    ids=lambda x: "",
)
def test_a_flag_that_the_tensors_contradict(name, flags, tensors_, message, tmp_path):
    path = folder_of(name, tmp_path, **flags)
    folder.read_folder(folder_of(name, tmp_path / "whole"))  # as it was made it reads
    changed(path, **tensors_)
    check_refused(path, message)


def tables(name: str) -> dict[str, np.ndarray]:
    """Tables of rotary frequencies that old files of this model hold."""
    c = config_map.model_config_from_json(config_of(name))
    plain = rope_frequencies(c.head_size, c.rope_base)
    if name == "linear rope":  # first the frequencies were kept and the positions divided
        return {"plain": plain, "slowed": plain / 4}
    return {"float32": plain, "float16": plain.astype(np.float16), "bfloat16": plain.astype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("name", ["llama", "linear rope"])
def test_rotary_tables_are_let_go_where_config_json_implies_them(name, tmp_path):
    """As transformers, which never reads them; a table of another base is of another model."""
    path = folder_of(name, tmp_path)
    _, expected = folder.read_folder(path)
    for table in tables(name).values():
        changed(path, **{TABLE: table})
        jax.tree.map(np.testing.assert_array_equal, folder.read_folder(path)[1], expected)
    for wrong in (plain_of(name, base=20_000.0), plain_of(name)[:1], plain_of(name) / 3):
        changed(path, **{TABLE: wrong})
        check_refused(path, f"tensor {TABLE} of .*{FILE} {NO_PLACE}")


def plain_of(name: str, base: float = 10_000.0) -> np.ndarray:
    return rope_frequencies(config_map.model_config_from_json(config_of(name)).head_size, base)


def test_a_scaled_rotary_table_is_the_scaled_one(tmp_path):
    """Under Llama 3's rule the table holds slowed frequencies: an unscaled one says otherwise."""
    path = folder_of("llama 3", tmp_path)
    changed(path, **{TABLE: rope_frequencies(16, 100.0)})
    check_refused(path, f"tensor {TABLE} .* {NO_PLACE}")


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.bool_])
def test_the_mask_of_gpt2_is_let_go_if_it_is_causal(dtype, tmp_path):
    path = folder_of("gpt2", tmp_path)
    mask, names_ = (
        np.tri(32)[None, None].astype(dtype),
        [f"transformer.h.0.attn.{part}" for part in ("bias", "masked_bias")],
    )
    changed(path, **dict(zip(names_, (mask, np.array(-1e4, np.float32)))))
    folder.read_folder(path)
    for wrong in (mask.swapaxes(2, 3).copy(), mask[..., :16, :16].copy(), np.ones_like(mask)):
        changed(path, **{names_[0]: wrong})
        check_refused(path, f"tensor {names_[0]} of .* {NO_PLACE}")
    changed(path, **{names_[0]: mask, names_[1]: np.array(0.0, np.float32)})
    check_refused(path, f"tensor {names_[1]} of .* {NO_PLACE}")


LLAMA3 = STORED["models"]["llama 3"]["config"]["rope_parameters"] if STORED["models"] else {}


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("llama", {"rope_theta": 5e5}, "rope_parameters.rope_theta = 10000.0, but rope_theta = 500000.0: keep the one"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_parameters.rope_type = 'default', but",
        ),
        (
            "llama 3",
            {"rope_scaling": {**LLAMA3, "factor": 32.0}},
            "rope_parameters.factor = 8.0, but rope_scaling.factor",
        ),
        (
            "linear rope",
            {"rope_parameters": {"rope_type": "linear", "type": "yarn", "factor": 2.0}},
            "rope_type = 'lin",
        ),
        ("llama 3", {"original_max_position_embeddings": 16}, "original_max_position_embeddings = 8, but .* = 16"),
        (
            "gemma3",
            {"rope_local_base_freq": 5e3},
            "sliding_attention.rope_theta = 10000.0, but rope_local_base_freq = 5",
        ),
        ("gemma3", {"rope_theta": 5e5}, "rope_parameters.rope_theta = 1000000.0, but rope_theta = 500000.0"),
        (
            *("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}),
            "the rotary positions of its windows by 'linear'",
        ),
        ("linear rope", {"rope_parameters": {"rope_type": "linear"}}, "config.json lacks factor, which llama needs"),
        ("llama 3", {"rope_parameters": {**LLAMA3, "low_freq_factor": None}}, "config.json lacks low_freq_factor"),
        (
            "mistral",
            {"rope_local_base_freq": 5e3},
            "has rope_local_base 5000.0, which a mistral of transformers has not",
        ),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "has rope_scaling 'linear', which a phi3",
        ),
        ("gpt2", {"num_attention_heads": 2}, "n_head = 4, but num_attention_heads = 2: keep the one"),
        ("qwen3_moe", {"num_experts": 8}, "num_experts = 8, but num_local_experts = 4: keep the one"),
        ("gemma2", {"hidden_act": "silu"}, "hidden_activation = 'gelu', but hidden_act = 'silu'"),
        ("gemma2", {"layer_types": ["sliding_attention", "full_attention"]}, "but 3 layers and sliding_window 3"),
        ("gemma2", {"sliding_window": None}, "layer_types .* sliding_window None"),
        ("gemma3", {"sliding_window_pattern": 2}, "sliding_window_pattern = 2, but _sliding_window_pattern = 3"),
        (
            *("gemma3", {"sliding_window_pattern": 2, "_sliding_window_pattern": ABSENT}),
            "sliding_window_pattern 2, but layer_types",
        ),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "has layer_types .* sliding_window 3"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "has layer_types .* sliding_window None"),
        ("qwen3", {"layer_types": ["full_attention"] * 3}, "has layer_types .* but 2 layers"),
        ("llama", {"layer_types": ["full_attention", "linear_attention"]}, "has layer_types .*linear_attention"),
    ],
    ids=lambda x: x if isinstance(x, str) and " " not in x else "",
)
def test_what_config_json_says_twice(name, changes, message):
    """Two values of one thing are refused; said twice alike, they are one."""
    with pytest.raises(UserError, match=message) as raised:
        config_map.model_config_from_json(config_of(name, **changes))
    assert "\n" not in str(raised.value)
    hf = config_of(name)
    alike = {key: hf[key] for key in changes.keys() & hf.keys()}
    assert config_map.model_config_from_json(
        {**hf, **alike, **repeated_values(hf)}
    ) == config_map.model_config_from_json(hf)


def repeated_values(hf: dict) -> dict:
    """What a config.json says, in its other places."""
    rope = hf.get("rope_parameters") or {}
    whole = rope.get("full_attention", rope)
    again = {"rope_scaling": {**whole, "type": whole["rope_type"]}, "rope_theta": whole["rope_theta"]} if whole else {}
    if "n_layer" in hf:
        again |= {"num_hidden_layers": hf["n_layer"], "hidden_size": hf["n_embd"], "num_attention_heads": hf["n_head"]}
    return again


def test_keys_twice_in_one_file(tmp_path):
    path = folder_of("llama", tmp_path)
    text = (path / "config.json").read_text()
    for value, harmful in ((24, False), (32, True)):
        (path / "config.json").write_text(text.replace("{", f'{{"vocab_size": {value}, ', 1))
        if harmful:
            check_refused(path, "config.json has vocab_size twice, as 32 and as 24: keep the one that is right")
        else:
            folder.read_folder(path)


@pytest.mark.parametrize(
    "name, absent, expected",
    [
        ("mistral", ["sliding_window"], {"window": 4096}),
        ("mistral", ["rope_parameters"], {"rope_base": 10_000.0}),
        ("mixtral", ["rope_parameters"], {"rope_base": 1_000_000.0}),
        ("gemma2", ["sliding_window"], {"window": 4096}),
        (
            "gemma2",
            ["attn_logit_softcapping", "final_logit_softcapping"],
            {"attention_softcap": 50.0, "logit_softcap": 30},
        ),
        ("gemma2", ["hidden_activation", "tie_word_embeddings"], {"activation": "gelu", "tie_embeddings": True}),
        ("gemma3", ["rope_parameters"], {"rope_base": 1_000_000.0, "rope_local_base": 10_000.0}),
        ("gpt2", ["tie_word_embeddings"], {"tie_embeddings": True}),
        ("llama", ["tie_word_embeddings"], {"tie_embeddings": False}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_config_json_leaves_out(name, absent, expected):
    """Means what transformers takes for it: the defaults of its config classes."""
    c = config_map.model_config_from_json(config_of(name, **dict.fromkeys(absent, ABSENT)))
    assert {key: getattr(c, key) for key in expected} == expected


def write_shards(path: Path) -> dict[str, str]:
    """The folder of a small Llama in two files; what its index says."""
    held = tensors("llama")
    names_ = sorted(held)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names_[i::2] for i in (0, 1)}
    path.mkdir(exist_ok=True)
    write_config(path, config_of("llama"))
    for file, inside in files.items():
        save_file({name: held[name] for name in inside}, path / file)
    index = {name: file for file, inside in files.items() for name in inside}
    write_index(path, index)
    return index


def write_index(path: Path, index) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def add(file: Path, **more) -> None:
    save_file((of_file(file) if file.exists() else {}) | more, file)


ONE, TWO = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


def test_shards_and_their_index(tmp_path):
    """What the index leaves out is read all the same, as by transformers; copies that are exact are let go."""
    index = write_shards(tmp_path)
    _, expected = folder.read_folder(tmp_path)
    write_index(tmp_path, {name: file for name, file in index.items() if name != EMBEDDING})
    (tmp_path / "consolidated.safetensors").write_bytes(b"in Mistral's own names, beside the same weights in ours")
    jax.tree.map(np.testing.assert_array_equal, folder.read_folder(tmp_path)[1], expected)
    held = tensors("llama")
    other = TWO if index[EMBEDDING] == ONE else ONE
    add(tmp_path / other, **{EMBEDDING: held[EMBEDDING]})
    add(tmp_path / FILE, **held)
    jax.tree.map(np.testing.assert_array_equal, folder.read_folder(tmp_path)[1], expected)


@pytest.mark.parametrize(
    "harm, message",
    [
        (
            lambda path, index: write_index(path, {**index, "gone": TWO}),
            f"names tensor gone in {TWO}, which lacks it: d",
        ),
        (lambda path, index: write_index(path, dict.fromkeys(index, ONE)), f"names tensor .* in {ONE}, which lacks it"),
        (lambda path, index: write_index(path, {**index, "x": "y.safetensors"}), "lacks y.safetensors, which"),
        (
            lambda path, index: write_index(path, {}),
            f"{INDEX} has no weight_map from tensors to files: download it again",
        ),
        (lambda path, index: add(path / ONE, more=drawn("", [2])), f"tensor more of .*{ONE} {NO_PLACE}"),
        (
            lambda path, index: [add(path / file, **{EMBEDDING: drawn(file, [24, 16])}) for file in (ONE, TWO)],
            f"tensor {EMBEDDING} of .*{TWO} differs from that of the same name in {ONE}: move the file",
        ),
        (
            lambda path, index: add(path / FILE, **{EMBEDDING: drawn("", [24, 16])}),
            f"tensor {EMBEDDING} of .* differs from that of the same name in",
        ),
        (
            lambda path, index: add(path / "adapter_model.safetensors", lora_A=drawn("", [2, 16])),
            f"tensor lora_A of .*adapter_model.safetensors {NO_PLACE}",
        ),
    ],
    ids=["absent", "elsewhere", "no file", "empty", "unnamed", "two that differ", "stale", "adapter"],
)
def test_shards_that_contradict_their_index(harm, message, tmp_path):
    harm(tmp_path, write_shards(tmp_path))
    check_refused(tmp_path, message)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda params: {**params, "head": params["embedding"].T},
            "the parameters have head beyond their config: load",
        ),
        (
            lambda params: {**params, "layers": {k: v for k, v in params["layers"].items() if k != "query_norm"}},
            "the parameters lack layers.query_norm, which their config has",
        ),
        (
            lambda params: {**params, "embedding": params["embedding"][:-1]},
            r"parameter embedding is \[8, 128\], but .* \[9,",
        ),
    ],
    ids=["head", "norm", "rows"],
)
def test_no_flag_is_written_that_its_tensors_contradict(change, message, tmp_path):
    c = model.ModelConfig(vocab_size=9, layers=1)
    params = initial_params(param_specs(c), jax.random.key(0))
    with pytest.raises(UserError, match=message):
        folder.write_folder(tmp_path, c, change(params), dtype="float32", ids={})
    assert not list(tmp_path.iterdir())


def test_no_architecture_is_written_that_refuses_its_config():
    """transformers' Phi-3 takes no linear scaling, and only Gemma 3 has a second rotary base."""
    c = dataclasses.replace(
        config_map.model_config_from_json(config_of("phi3")), rope_scaling="linear", rope_factor=2.0
    )
    assert config_map.config_json(c, "phi3")["model_type"] == "llama"
    c = dataclasses.replace(config_map.model_config_from_json(config_of("mistral")), rope_local_base=5e3)
    with pytest.raises(UserError, match="no architecture of transformers computes this model"):
        config_map.config_json(c, "mistral")

"""Hugging Face's names of the tensors of each architecture, and their places in our parameters.

Theirs are one tensor a layer (and expert), [out, in]; ours are stacked on leading axes, [in, out]. Where one of
theirs joins several of ours, ours are side by side in it.
"""

from typing import NamedTuple

from lm.model.config import ModelConfig
from lm.model.params import param_specs


class TensorEntry(NamedTuple):
    tensor_name: str  # with {i} for the layer and {e} for the expert
    leaf_names: tuple[str, ...]  # leaves; of "layers" where theirs has {i}
    is_transposed: bool


HEAD_TENSOR = "lm_head.weight"
PROJECTIONS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm", "attention_norm": "input_layernorm"}
EXPERT_TENSORS = {
    "mixtral": {"router": "gate", "gate": "experts.{e}.w1", "up": "experts.{e}.w3", "down": "experts.{e}.w2"},
    "qwen3_moe": {
        "router": "gate",
        "gate": "experts.{e}.gate_proj",
        "up": "experts.{e}.up_proj",
        "down": "experts.{e}.down_proj",
    },
}
EXPERT_BLOCKS = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}  # what holds the experts
FUSED_PROJECTIONS = {  # Phi-3
    ("query", "key", "value"): "self_attn.qkv_proj",
    ("attention_out",): "self_attn.o_proj",
    ("gate", "up"): "mlp.gate_up_proj",
    ("down",): "mlp.down_proj",
}
GPT2_TENSORS = {  # its matrices are [in, out], as ours
    ("attention_norm",): "ln_1",
    ("query", "key", "value"): "attn.c_attn",
    ("attention_out",): "attn.c_proj",
    ("mlp_norm",): "ln_2",
    ("up",): "mlp.c_fc",
    ("down",): "mlp.c_proj",
}


def tensor_entries(c: ModelConfig, kind: str) -> list[TensorEntry]:
    """The tensors of a model of this Config and model_type, none of ours left out."""
    entries = _gpt2_entries(c) if kind == "gpt2" else _llama_entries(c, kind)
    tree = param_specs(c)
    named = {name for entry in entries for name in entry.leaf_names}
    assert named == tree["layers"].keys() | tree.keys() - {"layers"}, named ^ set(tree)
    return entries


def _llama_entries(c: ModelConfig, kind: str) -> list[TensorEntry]:
    layers = param_specs(c)["layers"]
    entries = [
        TensorEntry("model.embed_tokens.weight", ("embedding",), False),
        TensorEntry("model.norm.weight", ("final_norm",), False),
    ]
    if not c.tie_embeddings:
        entries.append(TensorEntry(HEAD_TENSOR, ("head",), True))
    for name, theirs in _layer_norms(c).items():
        if name in layers:
            entries.append(TensorEntry(f"model.layers.{{i}}.{theirs}.weight", (name,), False))
    projections = {(name,): theirs for name, theirs in PROJECTIONS.items()}
    if kind == "phi3":
        projections = FUSED_PROJECTIONS
    elif kind in EXPERT_TENSORS:
        own = {name: f"{EXPERT_BLOCKS[kind]}.{theirs}" for name, theirs in EXPERT_TENSORS[kind].items()}
        projections = {(name,): theirs for name, theirs in {**PROJECTIONS, **own}.items()}
    for names, theirs in projections.items():
        entries.append(TensorEntry(f"model.layers.{{i}}.{theirs}.weight", names, True))
        if f"{names[0]}_bias" in layers:
            biases = tuple(f"{name}_bias" for name in names)
            entries.append(TensorEntry(f"model.layers.{{i}}.{theirs}.bias", biases, False))
    return entries


def _layer_norms(c: ModelConfig) -> dict[str, str]:
    """Llama's post_attention_layernorm comes before the MLP; Gemma's and OLMo's after the attention."""
    if c.norm_at == "input":
        return {**NORMS, "mlp_norm": "post_attention_layernorm"}
    return {
        **NORMS,
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }


def _gpt2_entries(c: ModelConfig) -> list[TensorEntry]:
    entries = [
        TensorEntry("transformer.wte.weight", ("embedding",), False),
        TensorEntry("transformer.wpe.weight", ("position_embedding",), False),
        TensorEntry("transformer.ln_f.weight", ("final_norm",), False),
        TensorEntry("transformer.ln_f.bias", ("final_norm_bias",), False),
    ]
    if not c.tie_embeddings:
        entries.append(TensorEntry(HEAD_TENSOR, ("head",), True))
    for names, theirs in GPT2_TENSORS.items():
        entries.append(TensorEntry(f"transformer.h.{{i}}.{theirs}.weight", names, False))
        entries.append(
            TensorEntry(f"transformer.h.{{i}}.{theirs}.bias", tuple(f"{name}_bias" for name in names), False)
        )
    return entries

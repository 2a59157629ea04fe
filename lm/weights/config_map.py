"""Hugging Face's config.json to our ModelConfig and back, for each architecture by its model_type.

A feature that we cannot compute is an error that names it, never ignored. A config that no entry here can write has
no architecture there.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from lm.core.errors import UserError
from lm.model.config import ModelConfig
from lm.weights.rope import read_rope, single_value, write_rope

Json = Mapping[str, Any]
# Of both GELUs, that by tanh; Hugging Face has several names for it.
ACTIVATION_NAMES = {"silu": "silu", "swish": "silu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}


class ModelFamily(NamedTuple):
    """What every model of one model_type has in common."""

    architecture: str  # the class in transformers
    fixed_options: Mapping[str, Any]  # of our Config
    read_options: Callable[[Json], dict[str, Any]]  # what else config.json says, as keyword arguments of Config
    write_json: Callable[[ModelConfig], dict[str, Any]]  # and back
    required_values: Mapping[str, Any] = {}  # keys of config.json that we follow at this value only
    defaults: Mapping[str, Any] = {}  # what transformers takes where config.json lacks a key


def model_config_from_json(hf: Json) -> ModelConfig:
    """Our Config of a config.json. UserError for an architecture or a feature that we cannot compute."""
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"config.json has model_type {kind!r}, which we do not know: we read {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    refused = {**SUPPORTED_VALUES, **family.required_values}
    for key, value in refused.items():
        if hf.get(key, value) not in (value, None):
            raise UserError(f"config.json has {key} = {hf[key]!r}, which we do not compute for {kind} (only {value!r})")
    try:
        c = ModelConfig(**{**family.fixed_options, **family.read_options(_with_aliases({**family.defaults, **hf}))})
    except KeyError as error:
        raise UserError(f"config.json lacks {error.args[0]}, which {kind} needs: take a complete folder") from error
    for name in ("rope_scaling", "rope_local_base"):
        if getattr(c, name) != family.fixed_options.get(name, getattr(c, name)):
            raise UserError(
                f"config.json has {name} {getattr(c, name)!r}, which a {kind} of transformers has not: "
                "take it away, or give the model_type that has it"
            )
    types = hf.get("layer_types")
    if types is not None and types != _layer_types(c.local_layers):
        raise UserError(
            f"config.json has layer_types {types}, but {c.layers} layers and sliding_window "
            f"{hf.get('sliding_window')}: we compute every k-th layer global, or none; correct what is wrong"
        )
    return c


def _with_aliases(hf: Json) -> dict[str, Any]:
    """A config.json in which keys with two names have both."""
    aliased = dict(hf)
    for pair in ALIASES:
        value = single_value({name: hf.get(name) for name in pair})
        aliased |= dict.fromkeys(pair, value) if value is not None else {}
    return aliased


ALIASES = (  # attribute_map of transformers
    ("n_layer", "num_hidden_layers"),
    ("n_embd", "hidden_size"),
    ("n_head", "num_attention_heads"),
    ("n_positions", "max_position_embeddings"),
    ("num_experts", "num_local_experts"),
)


def config_json(c: ModelConfig, preferred_type: str = "") -> dict[str, Any]:
    """The config.json of a Config: of the preferred model_type if it can express it, else of the first that can."""
    shown = ("dtype", "cache_dtype", "scan", "remat", "query_blocks", "loss_chunk", "attention")  # how it is computed
    how = {name: getattr(c, name) for name in shown}
    for kind in sorted(FAMILIES, key=lambda kind: kind != preferred_type):  # the others in their order
        family = FAMILIES[kind]
        if any(getattr(c, name) != value for name, value in family.fixed_options.items()):
            continue
        hf = {
            "architectures": [family.architecture],
            "model_type": kind,
            **family.write_json(c),
            **family.required_values,
        }
        with contextlib.suppress(UserError):  # one that this model_type cannot express
            if dataclasses.replace(model_config_from_json(hf), **how) == c:
                return hf
    raise UserError(
        "no architecture of transformers computes this model: of ours these can be exported: the defaults (as Qwen 3), "
        "and whatever lm.model.presets has"
    )


SUPPORTED_VALUES = {
    "quantization_config": None,
    "pretraining_tp": 1,
    "use_bidirectional_attention": False,
    "partial_rotary_factor": 1.0,
}


def _sizes(hf: Json, base: float = 10_000.0, local: float = 0.0) -> dict[str, Any]:
    """base, local: the bases of rotary positions where config.json has none."""
    heads = hf["num_attention_heads"]
    named = {key: hf[key] for key in ("hidden_activation", "hidden_act") if hf.get(key)}
    for activation in named.values():
        if activation not in ACTIVATION_NAMES:
            raise UserError(f"config.json has the activation {activation!r}: we compute {', '.join(ACTIVATION_NAMES)}")
    return {
        "vocab_size": hf["vocab_size"],
        "layers": hf["num_hidden_layers"],
        "width": hf["hidden_size"],
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "head_size": hf.get("head_dim") or hf["hidden_size"] // heads,
        "hidden": hf["intermediate_size"],
        "activation": single_value({key: ACTIVATION_NAMES[value] for key, value in named.items()}) or "silu",
        "context": hf["max_position_embeddings"],
        "norm_eps": hf["rms_norm_eps"],
        "tie_embeddings": bool(hf.get("tie_word_embeddings")),
        **read_rope(hf, base=base, local=local),
    }


def _write_sizes(c: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "num_hidden_layers": c.layers,
        "hidden_size": c.width,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_size,
        "intermediate_size": c.hidden,
        "hidden_act": c.activation if c.activation == "silu" else "gelu_pytorch_tanh",
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        **write_rope(c),
    }


def _windows(hf: Json, every: int) -> dict[str, Any]:
    """The window, and which layers see past it: by `layer_types` or, in older files, each `every`-th."""
    window, types = hf.get("sliding_window") or 0, hf.get("layer_types")
    if not window or types is not None and "sliding_attention" not in types:
        return {}
    if types is not None:
        every = types.index("full_attention") + 1 if "full_attention" in types else 0
    return {"window": window, "global_every": every}


def _layer_types(local: Iterable[bool]) -> list[str]:
    """layer_types, by whether each layer sees only its window."""
    return ["sliding_attention" if each else "full_attention" for each in local]


def _write_windows(c: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": c.window, "layer_types": _layer_types(c.local_layers)}


def _gpt2(hf: Json) -> dict[str, Any]:
    if ACTIVATION_NAMES.get(hf["activation_function"]) != "gelu":
        raise UserError(f"config.json has the activation {hf['activation_function']!r}: we compute gelu_new for gpt2")
    width, heads = hf["n_embd"], hf["n_head"]
    return {
        "vocab_size": hf["vocab_size"],
        "layers": hf["n_layer"],
        "width": width,
        "heads": heads,
        "kv_heads": heads,
        "head_size": width // heads,
        "hidden": hf.get("n_inner") or 4 * width,
        "context": hf["n_positions"],
        "norm_eps": hf["layer_norm_epsilon"],
        "tie_embeddings": hf.get("tie_word_embeddings", True),
    }


def _write_gpt2(c: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "n_layer": c.layers,
        "n_embd": c.width,
        "n_head": c.heads,
        "n_inner": c.hidden,
        "n_positions": c.context,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": "gelu_new",
        "tie_word_embeddings": c.tie_embeddings,
    }


def _llama(hf: Json) -> dict[str, Any]:
    biases = {(False, False): "none", (True, False): "attention", (True, True): "all"}
    pair = bool(hf.get("attention_bias")), bool(hf.get("mlp_bias"))
    if pair not in biases:
        raise UserError("config.json has mlp_bias without attention_bias: we compute both, the latter, or none")
    return {**_sizes(hf), "bias": biases[pair]}


def _write_llama(c: ModelConfig) -> dict[str, Any]:
    return {**_write_sizes(c), "attention_bias": c.bias in ("attention", "all"), "mlp_bias": c.bias == "all"}


def _mistral(hf: Json, base: float = 10_000.0) -> dict[str, Any]:
    return {**_sizes(hf, base), "window": hf.get("sliding_window") or 0}


def _write_mistral(c: ModelConfig) -> dict[str, Any]:
    return {**_write_sizes(c), "sliding_window": c.window or None}


def _gemma2(hf: Json) -> dict[str, Any]:
    return {**_gemma(hf), **_windows(hf, every=2)}


def _gemma3(hf: Json) -> dict[str, Any]:
    # Files from before there were two rotary bases in them mean the values that Gemma 3 was made with.
    own = _gemma(hf, base=1_000_000.0, local=10_000.0)
    every = single_value({name: hf.get(name) for name in ("sliding_window_pattern", "_sliding_window_pattern")})
    types = hf.get("layer_types")
    if every and types not in (None, _layer_types(bool((i + 1) % every) for i in range(own["layers"]))):
        raise UserError(
            f"config.json has sliding_window_pattern {every}, but layer_types {types}: keep the one that is right"
        )
    return {**own, **_windows(hf, every or 6)}


def _gemma(hf: Json, base: float = 10_000.0, local: float = 0.0) -> dict[str, Any]:
    caps = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
    return {
        **_sizes(hf, base, local),
        **{ours: float(hf.get(theirs) or 0.0) for ours, theirs in caps.items()},
        "attention_scale": hf["query_pre_attn_scalar"] ** -0.5,
        "embedding_scale": math.sqrt(hf["hidden_size"]),
    }


def _write_gemma(c: ModelConfig) -> dict[str, Any]:
    scalar = round((c.attention_scale or c.head_size**-0.5) ** -2, 6)
    return {
        **_write_sizes(c),
        **_write_windows(c),
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attn_logit_softcapping": c.attention_softcap or None,
        "final_logit_softcapping": c.logit_softcap or None,
    }


def _mixtral(hf: Json) -> dict[str, Any]:
    return {
        **_mistral(hf, base=1_000_000.0),
        "experts": hf["num_local_experts"],
        "experts_per_token": hf["num_experts_per_tok"],
    }


def _write_mixtral(c: ModelConfig) -> dict[str, Any]:
    experts = {"num_local_experts": c.experts, "num_experts_per_tok": c.experts_per_token}
    return {**_write_mistral(c), **experts}


def _qwen3_moe(hf: Json) -> dict[str, Any]:
    return {
        **_sizes(hf),
        "hidden": hf["moe_intermediate_size"],
        "experts": hf["num_experts"],
        "experts_per_token": hf["num_experts_per_tok"],
        "experts_normalized": bool(hf.get("norm_topk_prob")),
    }


def _write_qwen3_moe(c: ModelConfig) -> dict[str, Any]:
    return {
        **_write_sizes(c),
        "moe_intermediate_size": c.hidden,
        "num_experts": c.experts,
        "num_experts_per_tok": c.experts_per_token,
        "norm_topk_prob": c.experts_normalized,
    }


PLAIN_OPTIONS = dict(
    norm="rms",
    gated=True,
    positions="rope",
    rope_local_base=0.0,
    embedding_scale=1.0,
    logit_softcap=0.0,
    attention_softcap=0.0,
)
DENSE_OPTIONS = dict(PLAIN_OPTIONS, experts=0)
GEMMA_OPTIONS = dict(
    norm="rms", gated=True, positions="rope", norm_at="both", norm_unit_offset=True, activation="gelu", bias="none"
)
GEMMA_DEFAULTS = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
}  # of Gemma
NO_SLIDING_WINDOW = {"use_sliding_window": False}
FAMILIES: dict[str, ModelFamily] = {
    "gpt2": ModelFamily(
        "GPT2LMHeadModel",
        dict(norm="layer", gated=False, positions="learned", bias="all", activation="gelu", qk_norm=False),
        _gpt2,
        _write_gpt2,
        required_values={
            "scale_attn_by_inverse_layer_idx": False,
            "scale_attn_weights": True,
            "add_cross_attention": False,
        },
    ),
    "llama": ModelFamily("LlamaForCausalLM", dict(DENSE_OPTIONS, qk_norm=False), _llama, _write_llama),
    "mistral": ModelFamily(
        "MistralForCausalLM",
        dict(DENSE_OPTIONS, qk_norm=False, bias="none"),
        _mistral,
        _write_mistral,
        defaults={"sliding_window": 4096},
    ),
    "qwen2": ModelFamily(
        "Qwen2ForCausalLM", dict(DENSE_OPTIONS, qk_norm=False, bias="qkv"), _sizes, _write_sizes, NO_SLIDING_WINDOW
    ),
    "qwen3": ModelFamily(
        "Qwen3ForCausalLM",
        dict(DENSE_OPTIONS, qk_norm=True, bias="none"),
        _sizes,
        _write_sizes,
        {**NO_SLIDING_WINDOW, "attention_bias": False},
    ),
    "gemma2": ModelFamily(
        "Gemma2ForCausalLM",
        dict(GEMMA_OPTIONS, qk_norm=False, rope_local_base=0.0),
        _gemma2,
        _write_gemma,
        {"attention_bias": False},
        {**GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": ModelFamily(
        "Gemma3ForCausalLM",
        dict(GEMMA_OPTIONS, qk_norm=True),
        _gemma3,
        _write_gemma,
        {"attention_bias": False},
        GEMMA_DEFAULTS,
    ),
    "olmo2": ModelFamily(
        "Olmo2ForCausalLM",
        dict(DENSE_OPTIONS, norm_at="output", qk_norm=True, qk_norm_over="all", bias="none"),
        _sizes,
        _write_sizes,
        {"attention_bias": False},
    ),
    "phi3": ModelFamily(
        "Phi3ForCausalLM",
        dict(DENSE_OPTIONS, qk_norm=False, bias="none", rope_scaling="none"),
        _mistral,
        _write_mistral,
    ),
    "mixtral": ModelFamily(
        "MixtralForCausalLM", dict(PLAIN_OPTIONS, qk_norm=False, bias="none"), _mixtral, _write_mixtral
    ),
    "qwen3_moe": ModelFamily(
        "Qwen3MoeForCausalLM",
        dict(PLAIN_OPTIONS, qk_norm=True, bias="none"),
        _qwen3_moe,
        _write_qwen3_moe,
        {**NO_SLIDING_WINDOW, "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
}

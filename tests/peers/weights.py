"""Logits of transformers for a small random model of every architecture, for tests/weights/test_weights.py.

    python tests/peers/weights.py   where requirements.txt and tests/peers.txt are installed: writes weights.json anew

Tensors are drawn by name (tests/foreign.py), loaded by transformers' own loader and computed in float32.
"""

import json
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from foreign import FIXTURES, IDS, REAL, VOCAB, collapsed, drawn, expanded

PINNED = ("torch", "transformers")
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGER = {"original_max_position_embeddings": 8}  # so that some frequencies are slowed, some kept, some between
WINDOW = {"head_dim": 8, "sliding_window": 3, "num_hidden_layers": 3}
GEMMA = {"query_pre_attn_scalar": 6}
MODELS = {
    "gpt2": ("GPT2Config", dict(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=32)),
    "llama": ("LlamaConfig", SIZES),
    "llama with biases": ("LlamaConfig", dict(SIZES, attention_bias=True, mlp_bias=True)),
    "llama 3": (
        "LlamaConfig",
        dict(SIZES, head_dim=16, rope_theta=100.0, rope_scaling=LLAMA_3 | LONGER, tie_word_embeddings=True),
    ),
    "linear rope": ("LlamaConfig", dict(SIZES, rope_scaling={"rope_type": "linear", "factor": 4.0})),
    "yarn": (
        "Qwen2Config",
        dict(SIZES, hidden_size=32, rope_theta=100.0, rope_scaling={"rope_type": "yarn", "factor": 4.0} | LONGER),
    ),
    "mistral": ("MistralConfig", dict(SIZES, sliding_window=3)),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen3": ("Qwen3Config", dict(SIZES, head_dim=8)),
    "gemma2": ("Gemma2Config", SIZES | WINDOW | GEMMA | dict(final_logit_softcapping=4.0, attn_logit_softcapping=1.5)),
    "gemma3": ("Gemma3TextConfig", SIZES | WINDOW | GEMMA | dict(sliding_window_pattern=3)),
    "olmo2": ("Olmo2Config", SIZES),
    "phi3": ("Phi3Config", dict(SIZES, pad_token_id=0)),
    "mixtral": ("MixtralConfig", dict(SIZES, num_local_experts=3)),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        dict(SIZES, head_dim=8, num_experts=4, num_experts_per_tok=3, moe_intermediate_size=12, norm_topk_prob=False),
    ),
}


def made(name: str, path: Path) -> transformers.PreTrainedModel:
    """The model, as it loads from a folder that holds the drawn tensors."""
    kind, options = MODELS[name]
    config = getattr(transformers, kind)(**options)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    save_file({n: drawn(n, shape) for n, shape in shapes(path).items()}, path / "model.safetensors", {"format": "pt"})
    return loaded(path)


def loaded(path: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def shapes(path: Path) -> dict[str, list[int]]:
    with safe_open(path / "model.safetensors", "np") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def logits(model: transformers.PreTrainedModel, ids: np.ndarray, real: np.ndarray) -> np.ndarray:
    """f32[rows,positions,V] of rows that are padded on the right."""
    with torch.no_grad():
        given = {
            "input_ids": torch.tensor(ids, dtype=torch.long),
            "attention_mask": torch.tensor(real, dtype=torch.long),
        }
        return model(**given).logits.numpy()


def numbers() -> dict[str, dict]:
    """config.json, tensors' shapes and logits of the real positions, by model."""
    found = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            of_real = logits(made(name, Path(folder)), IDS, REAL)[REAL]
            config, of_all = json.loads((Path(folder) / "config.json").read_text()), shapes(Path(folder))
            tensors = collapsed(of_all)
            assert expanded(tensors, config) == dict(sorted(of_all.items())), name
            found[name] = {"config": config, "tensors": tensors, "logits": rounded(of_real)}
    return found


def rounded(array: np.ndarray) -> list:
    return [[float(f"{x:.5f}") for x in row] for row in array]


def versions() -> dict[str, str]:
    return {name: metadata.version(name).partition("+")[0] for name in PINNED}


if __name__ == "__main__":
    text = json.dumps({"versions": versions(), "models": numbers()}, separators=(",", ":"))
    FIXTURES.write_text(text.replace('"logits"', '\n"logits"') + "\n")
    print(f"wrote {FIXTURES}, {FIXTURES.stat().st_size} bytes")

"""A GGUF file: weights, quantised or not, the shape of the model and its tokenizer in one file.

Names are those of llama.cpp. Its rotary positions rotate neighbouring pairs where ours rotate halves, so Llama's
queries and keys are stored in another order.
"""

import dataclasses
from collections.abc import Container
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as spm
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from lm.core.errors import UserError
from lm.core.types import Params
from lm.model.config import ModelConfig
from lm.model.params import BIASED_PROJECTIONS
from lm.tokenizer import Tokenizer
from lm.tokenizer.huggingface import SPACE_SYMBOL, tokenizer_from_parts
from lm.weights import config_map, tensors
from lm.weights.names import TensorEntry

ARCHITECTURES = ("llama", "qwen2", "qwen3")
LAYER_TENSORS = {
    "attention_norm": "attn_norm.weight",
    "query": "attn_q.weight",
    "key": "attn_k.weight",
    "value": "attn_v.weight",
    "query_bias": "attn_q.bias",
    "key_bias": "attn_k.bias",
    "value_bias": "attn_v.bias",
    "query_norm": "attn_q_norm.weight",
    "key_norm": "attn_k_norm.weight",
    "attention_out": "attn_output.weight",
    "attention_out_bias": "attn_output.bias",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    **{f"{name}_bias": f"ffn_{name}.bias" for name in ("gate", "up", "down")},
}
TRANSPOSED_TENSORS = {"query", "key", "value", "attention_out", "gate", "up", "down"}

# What cuts a text before its bytes are merged, by the file's name for it: patterns applied one after the other.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT_PATTERNS = (r"\p{N}", GPT2_PATTERN)
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
CJK_PATTERN = "[一-龥\u0800-一가-\ud7ff]+"
PRETOKENIZER_PATTERNS: dict[str, tuple[str, ...]] = {
    "gpt-2": (GPT2_PATTERN,),
    "mpt": (GPT2_PATTERN,),
    "llama-bpe": (LLAMA3_PATTERN,),
    "qwen2": (LLAMA3_PATTERN.replace("{1,3}", ""),),
    "qwen35": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), DIGIT_PATTERNS),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2_PATTERN, "[0-9][0-9][0-9]"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK_PATTERN, r"\p{N}"),
    "deepseek-llm": (
        *(
            r"[\r\n]",
            r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
            r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
            r"\s+$",
            CJK_PATTERN,
            r"\p{N}+",
        ),
    ),
}
UNKNOWN_TOKEN, CONTROL_TOKEN, USER_DEFINED_TOKEN, UNUSED_TOKEN = (
    2,
    3,
    4,
    5,
)  # of a token's type, numbered as sentencepiece does


def read_gguf(
    path: Path, on_progress: tensors.ProgressCallback = lambda done, total: None
) -> tuple[ModelConfig, Params, Tokenizer]:
    """The model of a GGUF file, dequantised to float32, and its tokenizer."""
    file = _open_gguf(path)
    fields = {key: field for key, field in file.fields.items()}
    kind = _field_value(fields, "general.architecture")
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{path} holds architecture {kind!r}, which we do not read from GGUF: we read {', '.join(ARCHITECTURES)}"
        )
    stored = {tensor.name: tensor for tensor in file.tensors}
    c = config_map.model_config_from_json(_config_json(fields, kind, tied="output.weight" not in stored))
    c = dataclasses.replace(c, bias=_bias(stored))
    entries = _tensor_entries(c)
    needed = {name for name, _, _ in tensors.tensor_places(c, entries)}
    for what, names in (("lacks", needed - stored.keys()), ("has a tensor more than we use:", stored.keys() - needed)):
        if names:
            raise UserError(
                f"{path} {what} {min(names)} (of {kind} with block_count {c.layers}): take another file, "
                "or convert the model's original folder"
            )

    def tensor(name: str) -> np.ndarray:
        value = _dequantized_tensor(stored[name], path)
        part = name.rsplit(".", 2)[-2]
        if kind == "llama" and part in ("attn_q", "attn_k"):
            value = pairs_to_halves(value, c.heads if part == "attn_q" else c.kv_heads)
        return value

    params = tensors.read_params(
        c, entries, tensor, on_progress, place=lambda name: f"tensor {name} of {path}", says="its metadata"
    )
    return c, params, tokenizer_from_fields(fields)


def read_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer alone, of a file that may hold no weights."""
    return tokenizer_from_fields(_open_gguf(path).fields)


def pairs_to_halves(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection [heads * H, D] from neighbouring pairs to halves."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def _open_gguf(path: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give a .gguf file") from error
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path} is torn or no GGUF file ({error}): download it again") from error


def _dequantized_tensor(tensor, path: Path) -> np.ndarray:
    shape = tuple(int(n) for n in reversed(tensor.shape))
    try:
        return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
    except (NotImplementedError, ValueError) as error:
        kind = tensor.tensor_type.name
        raise UserError(
            f"tensor {tensor.name} of {path} is {kind}, a type that we do not read: take another file"
        ) from error


def _field_value(fields, key: str, default: Any = None) -> Any:
    return fields[key].contents() if key in fields else default


def _bias(tensor_names: Container[str]) -> str:
    """ModelConfig.bias, from the tensors of the first layer, as no field holds it."""
    there = {name for name in TRANSPOSED_TENSORS if f"blk.0.{LAYER_TENSORS[f'{name}_bias']}" in tensor_names}
    kind = next((kind for kind, names in BIASED_PROJECTIONS.items() if set(names) == there), None)
    if kind is None:
        raise UserError(
            f"this GGUF file has biases of {', '.join(sorted(there))}: we compute those of query, key and value, those "
            "and the attention's output, or all; take another model"
        )
    return kind


def _config_json(fields, kind: str, *, tied: bool) -> dict[str, Any]:
    """What Hugging Face's config.json would say."""
    own = lambda name, default=None: _field_value(fields, f"{kind}.{name}", default)
    scale = {name: own(f"rope.{name}") for name in ("scaling.type", "scaling.factor", "scale_linear")}
    if any(value not in (None, "none", 0.0, 1.0) for value in scale.values()) or own("expert_count"):
        raise UserError(
            "this GGUF file scales its rotary positions or has experts: convert the model's original folder"
        )
    heads, width, tokens = (
        own("attention.head_count"),
        own("embedding_length"),
        len(fields["tokenizer.ggml.tokens"].data),
    )
    size = own("attention.key_length", width // heads)
    for name, expected in (("rope.dimension_count", size), ("vocab_size", tokens)):
        if own(name, expected) != expected:
            raise UserError(
                f"this GGUF file says {kind}.{name} = {own(name)}, but its heads have {size} dimensions and its "
                f"tokenizer {tokens} ids: convert the model's original folder"
            )
    return {
        "model_type": kind,
        "vocab_size": tokens,
        "num_hidden_layers": own("block_count"),
        "hidden_size": width,
        "intermediate_size": own("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": own("attention.head_count_kv", heads),
        "head_dim": size,
        "max_position_embeddings": own("context_length"),
        "rms_norm_eps": float(f"{own('attention.layer_norm_rms_epsilon'):.6g}"),  # it is kept as a float32
        "rope_theta": own("rope.freq_base", 10_000.0),
        "tie_word_embeddings": tied,
    }


def _tensor_entries(c: ModelConfig) -> list[TensorEntry]:
    entries = [
        TensorEntry("token_embd.weight", ("embedding",), False),
        TensorEntry("output_norm.weight", ("final_norm",), False),
    ]
    if not c.tie_embeddings:
        entries.append(TensorEntry("output.weight", ("head",), True))
    absent = {f"{name}_bias" for name in TRANSPOSED_TENSORS - set(BIASED_PROJECTIONS[c.bias])}
    absent |= set() if c.qk_norm else {"query_norm", "key_norm"}
    names = [name for name in LAYER_TENSORS if name not in absent]
    return entries + [
        TensorEntry(f"blk.{{i}}.{LAYER_TENSORS[name]}", (name,), name in TRANSPOSED_TENSORS) for name in names
    ]


def tokenizer_from_fields(fields) -> Tokenizer:
    """The tokenizer that a file's fields describe."""
    model, tokens = _field_value(fields, "tokenizer.ggml.model"), _field_value(fields, "tokenizer.ggml.tokens")
    kinds = _field_value(fields, "tokenizer.ggml.token_type")
    _check_counts(fields, len(tokens))
    special = [token for token, kind in zip(tokens, kinds) if kind == CONTROL_TOKEN]
    if model in ("gpt2", "gemma4"):
        coder = {"tokenizer_json": _bpe_tokenizer(fields, tokens, kinds, blanks=model == "gemma4").to_str()}
    elif model == "llama":
        coder = {"sentencepiece_model": _sentencepiece_proto(fields, tokens, kinds)}
    else:
        raise UserError(f"this GGUF file has a tokenizer of kind {model!r}: we read gpt2, gemma4 and llama")
    ids = {name: _field_value(fields, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    names = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    return tokenizer_from_parts(
        **coder,
        chat_template=_field_value(fields, "tokenizer.chat_template", ""),
        named_tokens=names,
        special_tokens=special,
        stop_ids=[ids["eos"]] if ids["eos"] is not None else [],
    )


def _check_counts(fields, tokens: int) -> None:
    """UserError where the file's lists are not of one length, or it names an id that no token has."""
    for name in ("token_type", "scores"):
        values = _field_value(fields, f"tokenizer.ggml.{name}")
        if values is not None and len(values) != tokens:
            raise UserError(
                f"this GGUF file has {tokens} tokens, but {len(values)} entries in tokenizer.ggml.{name}: take another"
            )
    for name in ("bos", "eos", "unknown"):
        i = _field_value(fields, f"tokenizer.ggml.{name}_token_id", 0)
        if not 0 <= i < tokens:
            raise UserError(f"this GGUF file has {tokens} tokens, but {name}_token_id = {i}: take another")


def _bpe_tokenizer(fields, tokens: list[str], kinds: list[int], *, blanks: bool) -> tokenizers.Tokenizer:
    """BPE by the merges of a file: of bytes (Radford et al. 2019), the text cut by the patterns of the file's kind; or
    with `blanks` of characters, spaces as blanks, what is in no piece by its bytes."""
    kind = _field_value(fields, "tokenizer.ggml.pre", "gpt-2")
    if not blanks and kind not in PRETOKENIZER_PATTERNS:
        raise UserError(f"this GGUF file cuts words by the rule {kind!r}: we know {', '.join(PRETOKENIZER_PATTERNS)}")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in _field_value(fields, "tokenizer.ggml.merges")]
    options = dict(byte_fallback=True) if blanks else dict(ignore_merges=kind == "llama-bpe")
    result = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    if blanks:
        result.normalizer = normalizers.Replace(" ", SPACE_SYMBOL)
        result.pre_tokenizer = pre_tokenizers.Split(Regex("[^\n]+|\n+"), "isolated")
        result.decoder = decoders.Sequence(
            [decoders.Replace(SPACE_SYMBOL, " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    else:
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRETOKENIZER_PATTERNS[kind]]
        bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        result.pre_tokenizer, result.decoder = pre_tokenizers.Sequence([*splits, bytewise]), decoders.ByteLevel()
    result.add_special_tokens([token for token, kind in zip(tokens, kinds) if kind == CONTROL_TOKEN])
    result.add_tokens(
        [
            tokenizers.AddedToken(token, normalized=False)
            for token, kind in zip(tokens, kinds)
            if kind == USER_DEFINED_TOKEN
        ]
    )
    bos = _field_value(fields, "tokenizer.ggml.bos_token_id")
    if (
        _field_value(fields, "tokenizer.ggml.add_bos_token", kind == "llama-bpe") and bos is not None
    ):  # llama.cpp's default
        result.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return result


def _sentencepiece_proto(fields, tokens: list[str], kinds: list[int]) -> bytes:
    """A sentencepiece model of these pieces."""
    proto = spm.ModelProto()
    scores = _field_value(fields, "tokenizer.ggml.scores")
    unknown = _field_value(fields, "tokenizer.ggml.unknown_token_id", 0)
    for i, (token, score, kind) in enumerate(zip(tokens, scores, kinds)):
        proto.pieces.add(
            piece=token, score=score, type=UNUSED_TOKEN if kind == UNKNOWN_TOKEN and i != unknown else kind
        )
    ids = {name: _field_value(fields, f"tokenizer.ggml.{name}_token_id", -1) for name in ("bos", "eos")}
    if not _field_value(fields, "tokenizer.ggml.add_bos_token", True):
        ids["bos"] = -1  # a text begins with itself
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = spm.TrainerSpec.BPE, True, len(tokens)
    trainer.unk_id, trainer.unk_piece = unknown, tokens[unknown]
    for name, i in ids.items():
        setattr(trainer, f"{name}_id", i)
        if i >= 0:
            setattr(trainer, f"{name}_piece", tokens[i])
    normalizer.name, normalizer.remove_extra_whitespaces = "identity", False
    normalizer.add_dummy_prefix = _field_value(fields, "tokenizer.ggml.add_space_prefix", True)
    return proto.SerializeToString()

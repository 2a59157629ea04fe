"""The tokenizer files of a Hugging Face folder, in and out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

from lm.core.errors import UserError
from lm.core.textfiles import file_text
from lm.tokenizer import SPECIAL_TOKENS, Tokenizer
from lm.tokenizer.huggingface import SPACE_SYMBOL, HuggingFaceTokenizer, tokenizer_from_parts
from lm.tokenizer.sentencepiece import SentencePieceTokenizer

TOKENIZER_JSON, SENTENCEPIECE_FILE, TOKENIZER_CONFIG, GENERATION_CONFIG = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "generation_config.json",
)
ADDED_TOKENS_FILES, CHAT_TEMPLATE_FILE = "added_tokens.json", "chat_template.jinja"
# Our own template in Jinja, for others to read.
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def read_tokenizer_files(source: Path, hf: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a folder with this config.json: tokenizer.json, or else a sentencepiece model."""
    config = _optional_json(source / TOKENIZER_CONFIG)
    generation = _optional_json(source / GENERATION_CONFIG)
    tokens = {key: _token_text(config[key]) for key in config if key.endswith("_token") and config[key]}
    added = [t["content"] for t in config.get("added_tokens_decoder", {}).values() if t.get("special")]
    if (source / TOKENIZER_JSON).exists():
        text = file_text(source / TOKENIZER_JSON)
        content = _parsed_json(text, source / TOKENIZER_JSON)
        added += [t["content"] for t in content.get("added_tokens", []) if t.get("special")]
        coder = {"tokenizer_json": text}
        ids_by_token = {t["content"]: t["id"] for t in content.get("added_tokens", [])}
        vocab = content["model"].get("vocab", {})
        ids_by_token |= vocab if isinstance(vocab, dict) else {}
    elif (source / SENTENCEPIECE_FILE).exists():
        coder, ids_by_token = {"sentencepiece_model": (source / SENTENCEPIECE_FILE).read_bytes()}, {}
    else:
        raise UserError(
            f"{source} has neither {TOKENIZER_JSON} nor {SENTENCEPIECE_FILE}: a model needs its tokenizer; "
            "download the folder again"
        )
    stops = _id_list(generation.get("eos_token_id")) or _id_list(hf.get("eos_token_id"))
    named = ids_by_token.get(tokens.get("eos_token"))
    stops = list(dict.fromkeys(([named] if named is not None else []) + stops))
    special = sorted({*added, *tokens.values()})
    result = tokenizer_from_parts(
        **coder,
        chat_template=_chat_template(source, config),
        named_tokens=tokens,
        special_tokens=special,
        stop_ids=stops,
    )
    _check_added_tokens(source, result, config)
    return result


def _check_added_tokens(source: Path, tokenizer: HuggingFaceTokenizer, config: Mapping[str, Any]) -> None:
    """UserError for an added token that the tokenizer has at no id, or at another."""
    decoder = config.get("added_tokens_decoder", {}).items()
    added = {
        TOKENIZER_CONFIG: [(t["content"], int(i)) for i, t in decoder],
        ADDED_TOKENS_FILES: list(_optional_json(source / ADDED_TOKENS_FILES).items()),
    }
    for file, tokens in added.items():
        for token, i in tokens:
            if tokenizer.token_id(token) != i:
                raise UserError(
                    f"{source / file} says that {token!r} is id {i}, but the tokenizer has "
                    f"{tokenizer.token_id(token)}: "
                    f"make {TOKENIZER_JSON} anew with transformers, or take away the entry"
                )


def _chat_template(source: Path, config: Mapping[str, Any]) -> str:
    if (source / CHAT_TEMPLATE_FILE).exists():
        return file_text(source / CHAT_TEMPLATE_FILE)
    template = config.get("chat_template") or ""
    if isinstance(template, list):  # several by name
        named = {each["name"]: each["template"] for each in template}
        template = named.get("default", "")
    return template


def write_tokenizer_files(destination: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Files from which AutoTokenizer makes the same tokenizer; returns what config.json says of it."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        bundle = json.loads(tokenizer.proto)
        if "tokenizer" not in bundle:
            raise UserError(
                "a borrowed sentencepiece model is not written as tokenizer.json: keep the file it came from"
            )
        text, template, tokens = (
            json.dumps(bundle["tokenizer"], ensure_ascii=False),
            bundle["template"],
            bundle["tokens"],
        )
        stops = bundle["stops"]
    else:
        text, template = huggingface_tokenizer(tokenizer).to_str(), CHAT_TEMPLATE
        tokens = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>", "unk_token": "<|unk|>"}
        stops = [tokenizer.eos, tokenizer.end_of_message]
    (destination / TOKENIZER_JSON).write_text(text, encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}
    if template:
        (destination / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
        config["chat_template"] = template
    (destination / TOKENIZER_CONFIG).write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (destination / GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": stops}, indent=2) + "\n")
    bos = tokenizer.start_ids[0] if tokenizer.start_ids else None
    return {"bos_token_id": bos, "eos_token_id": stops[0]}


def huggingface_tokenizer(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """Our sentencepiece model as a tokenizer.json that gives the same ids.

    A merge is any way to cut a piece into two others; they are taken in the order of the pieces, as sentencepiece does.
    """
    pieces = tokenizer.processor.id_to_piece(list(range(tokenizer.vocab_size)))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    scores = tokenizer.processor.get_score(list(range(tokenizer.vocab_size)))
    merges = []
    for i, piece in enumerate(pieces):
        if i < len(SPECIAL_TOKENS) or tokenizer.processor.is_byte(i) or len(piece) < 2:
            continue
        cuts = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        merges += [(-scores[i], vocab[a], vocab[b], (a, b)) for a, b in cuts if a in vocab and b in vocab]
    model = models.BPE(
        vocab=vocab, merges=[merge for *_, merge in sorted(merges)], byte_fallback=True, unk_token=SPECIAL_TOKENS[1]
    )
    result = tokenizers.Tokenizer(model)
    # The blank itself is spelt in bytes, as ours does; then spaces become blanks.
    result.normalizer = normalizers.Replace(" ", SPACE_SYMBOL)
    result.decoder = decoders.Sequence([decoders.Replace(SPACE_SYMBOL, " "), decoders.ByteFallback(), decoders.Fuse()])
    result.add_special_tokens(list(SPECIAL_TOKENS))
    result.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos)]
    )
    return result


def _token_text(token: Any) -> str:
    return token["content"] if isinstance(token, Mapping) else token


def _id_list(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _optional_json(path: Path) -> dict[str, Any]:
    return _parsed_json(file_text(path), path) if path.exists() else {}


def _parsed_json(text: str, path: Path) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): download it again") from error

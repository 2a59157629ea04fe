"""Other people's tokenizers: Hugging Face's tokenizer.json, or a sentencepiece model, with a chat template.

A workdir keeps one file, JSON: {"tokenizer": their JSON} or {"sentencepiece": base64}, and template, tokens, stops.
Where the template may show the date, the file ends with the date to show: otherwise a run resumed on another day would
continue with other ids.
"""

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import tokenizers

from lm.core.errors import UserError
from lm.tokenizer.base import Message, TokenizedExample, Tokenizer, checked_messages, valid_unicode
from lm.tokenizer.chat_template import PROBE_MESSAGES, ChatTemplate
from lm.tokenizer.sentencepiece import SPACE_SYMBOL, piece_bytes


class EncodedText(NamedTuple):
    ids: list[int]
    offsets: list[int]  # of each token, in characters


def byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for, as in GPT-2's encoder.py."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_LEVEL = byte_level_alphabet()


def bytes_of_level(token: str) -> bytes:
    """The bytes of a byte-level token; none where it holds a character outside that alphabet."""
    return bytes(BYTE_LEVEL[c] for c in token) if all(c in BYTE_LEVEL for c in token) else b""


def bytes_of_piece(piece: str) -> bytes:
    """The bytes of a sentencepiece-like token."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE_SYMBOL, " ").encode()


class TokenizerJson:
    """A tokenizer.json."""

    def __init__(self, source: str):
        self._plain, self._special = (tokenizers.Tokenizer.from_str(source) for _ in range(2))
        for each in (self._plain, self._special):
            each.no_padding()
            each.no_truncation()
        self._plain.encode_special_tokens = True  # a text that spells a special token is a text
        self.vocab_size = max(self._plain.get_vocab().values()) + 1
        self.start_ids = tuple(self._special.encode("").ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._plain.encode_batch(list(texts), add_special_tokens=False)]

    def encode_with_special(self, text: str) -> EncodedText:
        """A text in which special tokens are themselves."""
        e = self._special.encode(text, add_special_tokens=False)
        return EncodedText(e.ids, [start for start, _ in e.offsets])

    def decode(self, ids: list[int], *, special: bool) -> str:
        return self._plain.decode(ids, skip_special_tokens=not special)

    def token_id(self, token: str) -> int | None:
        return self._plain.token_to_id(token)

    def token_bytes(self) -> list[bytes]:
        source = json.loads(self._plain.to_str())
        decoder = source["decoder"] or {"type": "none"}
        parts = [part["type"] for part in (decoder["decoders"] if decoder["type"] == "Sequence" else [decoder])]
        if not {"ByteLevel", "ByteFallback", "Metaspace"} & set(parts):
            raise UserError(
                f"this tokenizer's decoder ({', '.join(parts)}) does not say which bytes a token stands for"
            )
        pieces = [b""] * self.vocab_size
        for token, i in source["model"]["vocab"].items() if isinstance(source["model"]["vocab"], dict) else ():
            pieces[i] = bytes_of_level(token) if "ByteLevel" in parts else bytes_of_piece(token)
        for added in source["added_tokens"]:
            pieces[added["id"]] = b"" if added["special"] else added["content"].encode()
        return pieces


class SentencePieceModel:
    """A sentencepiece model."""

    def __init__(self, proto: bytes):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.vocab_size = self._processor.vocab_size()
        self.start_ids = (self._processor.bos_id(),) if self._processor.bos_id() >= 0 else ()
        special = [self._processor.id_to_piece(i) for i in range(self.vocab_size) if self._processor.is_control(i)]
        self._cut = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts))

    def encode_with_special(self, text: str) -> EncodedText:
        ids, starts, at = [], [], 0
        for match in [*self._cut.finditer(text), None]:
            part = text[at : match.start() if match else len(text)]
            if part:
                pieces = self._processor.encode_as_proto(part).pieces
                characters = [i for i, character in enumerate(part) for _ in character.encode()] + [len(part)]
                ids += [piece.id for piece in pieces]
                starts += [at + characters[piece.begin] for piece in pieces]  # it counts bytes
            if match:
                ids.append(self._processor.piece_to_id(match[0]))
                starts.append(match.start())
                at = match.end()
        return EncodedText(ids, starts)

    def token_bytes(self) -> list[bytes]:
        return piece_bytes(self._processor)

    def decode(self, ids: list[int], *, special: bool) -> str:
        if special:
            return "".join(self._processor.id_to_piece(ids)).replace(SPACE_SYMBOL, " ")
        return self._processor.decode(ids)

    def token_id(self, token: str) -> int | None:
        id_ = self._processor.piece_to_id(token)
        unknown = self._processor.unk_id()
        return None if id_ == unknown and token != self._processor.id_to_piece(unknown) else id_


@dataclass(frozen=True)
class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer as the JSON above without the date, and the date."""

    proto: bytes
    date: str = ""

    mask_rule = "borrowed 1; trained: what the assistant says, up to the last special token of it"

    def __reduce__(self):
        return HuggingFaceTokenizer, (self.proto, self.date)

    @cached_property
    def _bundle(self) -> dict[str, Any]:
        return json.loads(self.proto)

    @cached_property
    def _coder(self) -> TokenizerJson | SentencePieceModel:
        if "tokenizer" in self._bundle:
            return TokenizerJson(json.dumps(self._bundle["tokenizer"]))
        return SentencePieceModel(base64.b64decode(self._bundle["sentencepiece"]))

    @cached_property
    def template(self) -> ChatTemplate:
        if not self._bundle["template"]:
            raise UserError(
                "this tokenizer came without a chat template: it can continue text, and hold no conversation"
            )
        return ChatTemplate(self._bundle["template"], self._bundle["tokens"], self.date)

    @property
    def vocab_size(self) -> int:
        return self._coder.vocab_size

    def token_id(self, token: str) -> int | None:
        """The id of a token that is spelt so; None if there is none."""
        return self._coder.token_id(token)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._bundle["template"])

    @property
    def shows_date(self) -> bool:
        return "strftime_now" in self._bundle["template"]

    def dated(self, date: str) -> "HuggingFaceTokenizer":
        return HuggingFaceTokenizer(self.proto, date) if self.shows_date else self

    @property
    def file(self) -> bytes:
        return self.proto.removesuffix(b"}") + _date_suffix(self.date) if self.date else self.proto

    @property
    def start_ids(self) -> tuple[int, ...]:
        return self._coder.start_ids

    @property
    def eos(self) -> int:
        return self._bundle["stops"][0]

    @cached_property
    def end_of_message(self) -> int:
        if not self._bundle["template"]:
            return self.eos
        try:
            closing = int(self.encode_chats([PROBE_MESSAGES])[0].ids[-1])
        except UserError:  # a template that rewrites its answers can be asked, not learned from
            return self.eos
        return closing if closing in self._special else self.eos  # the probe's own words end no answer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((self.end_of_message, *self._bundle["stops"])))

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return self._coder.encode_batch([valid_unicode(text) for text in texts])

    def decode(self, ids: Iterable[int]) -> str:
        return self._coder.decode([int(i) for i in ids], special=False)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        return [self._coder.decode([int(i)], special=True) for i in ids]

    def token_bytes(self) -> list[bytes]:
        return [b"" if i in self._special else text for i, text in enumerate(self._coder.token_bytes())]

    def encode_chats(self, conversations: Sequence[Sequence[Message]], *, last: bool = False) -> list[TokenizedExample]:
        return [self._example(checked_messages(messages), last) for messages in conversations]

    def _example(self, messages: Sequence[Message], only_last: bool) -> TokenizedExample:
        """The template's text is tokenised once, as a whole. What an assistant's turn holds behind its last special
        token (a line's end) is not trained, and left out where nothing follows. An answer is not trained either if
        its first token also holds the end of the marker: a model that is asked sees another token there."""
        text, spans = self.template.render_with_spans(messages, last=only_last)
        ids, starts = self._coder.encode_with_special(text)
        starts = np.array(starts)
        weights = np.zeros(len(ids), np.float32)
        last = len(ids)
        for begin, end, weight in spans:
            inside = np.flatnonzero((starts >= begin) & (starts < end))
            if not inside.size:
                raise UserError(
                    "the chat template's marker and an answer share a token, so that no mask parts them: "
                    "take a template whose marker ends in a special token or a line's end"
                )
            closing = [i for i in inside if ids[i] in self._special]
            last = closing[-1] + 1 if closing else inside[-1] + 1
            if self._coder.encode_with_special(text[:begin]).ids == ids[: inside[0]]:
                weights[inside[0] : last] = weight
        if messages[-1]["role"] != "assistant":
            last = len(ids)
        return TokenizedExample(np.array(ids[:last], np.int32), weights[:last])

    @cached_property
    def _special(self) -> set[int]:
        special_ids = {self._coder.token_id(token) for token in self._bundle["special"]}
        return (special_ids - {None}) | set(self._bundle["stops"])

    def encode_prompts(self, conversations: Sequence[Sequence[Message]]) -> list[np.ndarray]:
        texts = [
            self.template.render(checked_messages(messages), add_generation_prompt=True) for messages in conversations
        ]
        return [np.array(self._coder.encode_with_special(text).ids, np.int32) for text in texts]

    def encode_prompt_with_tools(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> np.ndarray:
        if not re.search(r"\btools\b", self._bundle["template"]):
            return super().encode_prompt_with_tools(messages, tools)
        text = self.template.render(checked_messages(messages), add_generation_prompt=True, tools=tools)
        return np.array(self._coder.encode_with_special(text).ids, np.int32)

    def encode_reply(self, role: str, text: str, limit: int) -> list[int]:
        content = self.decode(self.encode(text)[:limit])
        rendered = self.template.render(
            [*PROBE_MESSAGES, {"role": role, "content": content}], add_generation_prompt=True
        )
        ids = self._coder.encode_with_special(rendered).ids
        begin = len(self.encode_chats([PROBE_MESSAGES])[0].ids)
        return ids[begin:]


def huggingface_from_bytes(proto: bytes, path) -> HuggingFaceTokenizer:
    """The tokenizer in the bytes of a workdir's file."""
    try:
        date = json.loads(proto).get("date", "")
        tokenizer = HuggingFaceTokenizer(proto.removesuffix(_date_suffix(date)) + b"}" if date else proto, date)
        tokenizer.encode("a")
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"{path} is no tokenizer ({error}): convert its model again") from error
    return tokenizer


def _date_suffix(date: str) -> bytes:
    """Replaces the last brace of a file, to store this date."""
    return f', "date": {json.dumps(date)}}}'.encode()


def tokenizer_from_parts(
    *,
    tokenizer_json: str | None = None,
    sentencepiece_model: bytes | None = None,
    chat_template: str = "",
    named_tokens: Mapping[str, str] = {},  # noqa: B006
    special_tokens: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
) -> HuggingFaceTokenizer:
    """A tokenizer from its parts.

    tokenizer: the text of a tokenizer.json, or pieces: a sentencepiece model. tokens: special tokens that a template
    may name ("bos_token"). special: all of them. stops: ids that end an answer, the end of a document first.
    """
    if not stop_ids:
        raise UserError("this tokenizer names no token that ends a text (eos_token): a model could never stop")
    coder = (
        {"tokenizer": json.loads(tokenizer_json)}
        if tokenizer_json is not None
        else {"sentencepiece": base64.b64encode(sentencepiece_model or b"").decode()}
    )
    rest = {
        "template": chat_template,
        "tokens": dict(named_tokens),
        "special": sorted(special_tokens),
        "stops": list(stop_ids),
    }
    result = huggingface_from_bytes(json.dumps({**coder, **rest}, ensure_ascii=False).encode(), "the tokenizer")
    if chat_template:
        result.template.render(
            PROBE_MESSAGES[:1], add_generation_prompt=True
        )  # an error of a template that does not parse, or takes no question, is raised now
    return result

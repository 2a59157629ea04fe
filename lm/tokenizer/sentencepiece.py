"""Our own tokenizers: text to ids and back, and the chat template.

Byte-pair encoding by sentencepiece with byte fallback, so every text round-trips exactly and no token is unknown. The
role markers are *control symbols*: no text encodes to them, so a user cannot forge a turn by typing one. For the same
reason no piece crosses a marker, so joining the ids of the messages gives the tokenisation of the whole.
"""

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import sentencepiece

from lm.core.errors import UserError
from lm.tokenizer.base import (
    ROLES,
    Message,
    TokenizedExample,
    Tokenizer,
    checked_messages,
    message_weight,
    valid_unicode,
)

SPECIAL_TOKENS = (
    "<|pad|>",
    "<|unk|>",
    "<|bos|>",
    "<|eos|>",
    *(f"<|{role}|>" for role in ROLES),
    "<|end|>",
)  # ids 0, 1, ...
TEMPLATE_RULE = (
    f"template 1; ids {' '.join(SPECIAL_TOKENS)} from 0; <|bos|> then per message <|role|> content <|end|>; "
    "trained: assistant content and its <|end|>; a pretraining document is <|bos|> text <|eos|>"
)
SPACE_SYMBOL = (
    "\u2581"  # sentencepiece's space; the character itself is encoded in bytes, or it would be decoded as a space
)
CHUNK_CHARACTERS = 4096  # characters; the trainer drops a text whole if it is long or holds a character reserved to it
TRAINER_OPTIONS = dict(
    model_type="bpe",
    byte_fallback=True,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    split_digits=True,
    allow_whitespace_only_pieces=True,
    max_sentence_length=4 * CHUNK_CHARACTERS,  # bytes
    pad_id=0,
    unk_id=1,
    bos_id=2,
    eos_id=3,
    pad_piece=SPECIAL_TOKENS[0],
    unk_piece=SPECIAL_TOKENS[1],
    bos_piece=SPECIAL_TOKENS[2],
    eos_piece=SPECIAL_TOKENS[3],
    unk_surface="",
    control_symbols=list(SPECIAL_TOKENS[4:]),
    minloglevel=2,
)


def piece_bytes(processor: sentencepiece.SentencePieceProcessor) -> list[bytes]:
    """What each piece of a model adds to a text; empty for control symbols and the unknown piece."""
    pieces = []
    for i in range(processor.vocab_size()):
        piece = processor.id_to_piece(i)
        if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            pieces.append(b"")
        elif processor.is_byte(i):
            pieces.append(bytes([int(piece[3:5], 16)]))
        else:
            pieces.append(piece.replace(SPACE_SYMBOL, " ").encode())
    return pieces


@dataclass(frozen=True)
class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model made by `train_tokenizer`, and the template above."""

    proto: bytes

    mask_rule = TEMPLATE_RULE

    def __reduce__(self):
        return SentencePieceTokenizer, (self.proto,)

    @cached_property
    def processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.proto)

    @cached_property
    def _blank(self) -> list[int]:
        return [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]

    @property
    def vocab_size(self) -> int:
        return self.processor.vocab_size()

    @property
    def pad(self) -> int:
        return SPECIAL_TOKENS.index("<|pad|>")

    @property
    def bos(self) -> int:
        return SPECIAL_TOKENS.index("<|bos|>")

    @property
    def eos(self) -> int:
        return SPECIAL_TOKENS.index("<|eos|>")

    @property
    def end_of_message(self) -> int:
        return SPECIAL_TOKENS.index("<|end|>")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.end_of_message, self.eos

    @cached_property
    def role_ids(self) -> dict[str, int]:
        return {role: SPECIAL_TOKENS.index(f"<|{role}|>") for role in ROLES}

    @property
    def marker_ids(self) -> tuple[int, ...]:
        return (*self.role_ids.values(), self.end_of_message)

    @property
    def has_chat_template(self) -> bool:
        return True

    @property
    def start_ids(self) -> tuple[int, ...]:
        return (self.bos,)

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        texts = [valid_unicode(text) for text in texts]
        encoded = self.processor.encode(texts, num_threads=min(os.cpu_count() or 1, len(texts) or 1))
        for row, text in enumerate(texts):
            if SPACE_SYMBOL in text:
                first, *rest = self.processor.encode(text.split(SPACE_SYMBOL))
                encoded[row] = first + [i for part in rest for i in self._blank + part]
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        return self.processor.decode([int(i) for i in ids if i < self.vocab_size])

    def pieces(self, ids: Iterable[int]) -> list[str]:
        return [self._piece(int(i)) for i in ids]

    def _piece(self, i: int) -> str:
        return self.processor.id_to_piece(i).replace(SPACE_SYMBOL, " ") if i < self.vocab_size else f"<{i}>"

    def token_bytes(self) -> list[bytes]:
        return piece_bytes(self.processor)

    def encode_chats(self, conversations: Sequence[Sequence[Message]], *, last: bool = False) -> list[TokenizedExample]:
        """`<|bos|>`, then for each message `<|role|>` content `<|end|>`; all their contents are encoded in one call.

        Trained as targets: the content of assistant messages and their `<|end|>`, so that answers learn to stop; not
        role markers, not other messages. `last`: of the last message alone.
        """
        texts = [message["content"] for messages in conversations for message in checked_messages(messages)]
        contents = iter(self.encode_batch(texts))
        return [self._example(messages, contents, last) for messages in conversations]

    def _example(self, messages: Sequence[Message], contents: Iterator[list[int]], last: bool) -> TokenizedExample:
        ids, trained = [self.bos], []  # where the content of each trained message begins and ends, and its weight
        for i, message in enumerate(messages):
            begin = len(ids) + 1  # behind the role's marker
            ids += [self.role_ids[message["role"]], *next(contents), self.end_of_message]
            if message["role"] == "assistant" and (not last or i + 1 == len(messages)):
                trained.append((begin, len(ids), message_weight(message)))
        weights = np.zeros(len(ids), np.float32)
        for begin, end, weight in trained:
            weights[begin:end] = weight
        return TokenizedExample(np.fromiter(ids, np.int32, len(ids)), weights)

    def encode_prompts(self, conversations: Sequence[Sequence[Message]]) -> list[np.ndarray]:
        """The conversation and the assistant's marker: a prefix of `encode_chats` of the same and any answer."""
        assistant = np.int32(self.role_ids["assistant"])
        return [np.append(example.ids, assistant) for example in self.encode_chats(conversations)]

    def encode_reply(self, role: str, text: str, limit: int) -> list[int]:
        return [self.role_ids[role], *self.encode(text)[:limit], self.end_of_message, self.role_ids["assistant"]]


def sentencepiece_from_bytes(proto: bytes, path) -> SentencePieceTokenizer:
    """The tokenizer in the bytes of a file. UserError if they are not a tokenizer made by `train_tokenizer`."""
    tokenizer = SentencePieceTokenizer(proto or b"empty")  # sentencepiece takes no bytes for no model
    try:
        pieces = tokenizer.pieces(range(min(len(SPECIAL_TOKENS), tokenizer.vocab_size)))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is not a sentencepiece model: train a tokenizer again") from error
    if pieces != list(SPECIAL_TOKENS) or tokenizer.processor.unk_id() in tokenizer._blank:
        raise UserError(
            f"{path} lacks our special pieces or byte fallback: it was not made by lm.tokenizer.train_tokenizer "
            "(lm convert brings in those of others)"
        )
    return tokenizer


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 2048, max_bytes: int = 32_000_000
) -> SentencePieceTokenizer:
    """A tokenizer with `vocab_size` pieces (special ids and 256 bytes included) learned from `texts`, which are not
    held in memory where they can be iterated over twice.

    Nothing is normalised; runs of spaces are pieces, so indentation is cheap; each digit stands alone. Of more than
    `max_bytes` (UTF-8) an even share of every text is read. The same texts give the same bytes. Sennrich et al. 2016,
    arXiv 1508.07909; Kudo and Richardson 2018, arXiv 1808.06226.
    """
    texts = list(texts) if iter(texts) is texts else texts  # they are read twice
    size, has_text = 0, False
    for chunk in text_chunks(texts):
        size += len(chunk.encode())
        has_text = has_text or bool(chunk.strip())
    if not has_text:
        raise UserError("the tokenizer's corpus holds no text: give it some, or another corpus")
    share = min(1.0, max_bytes / size)
    chunks = [chunk for i, chunk in enumerate(text_chunks(texts)) if int((i + 1) * share) > int(i * share)]
    proto = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks or [next(text_chunks(texts))]),
            model_writer=proto,
            vocab_size=vocab_size,
            **TRAINER_OPTIONS,
        )
    except (RuntimeError, OSError) as error:
        refuse_vocab_size(error, vocab_size, size)
        raise
    return SentencePieceTokenizer(proto.getvalue())


def text_chunks(texts: Iterable[str]) -> Iterator[str]:
    """The texts in pieces that sentencepiece's trainer does not drop for their length."""
    for text in map(valid_unicode, texts):
        for i in range(0, len(text), CHUNK_CHARACTERS):
            yield text[i : i + CHUNK_CHARACTERS]


def refuse_vocab_size(error: Exception, vocab_size: int, size: int) -> None:
    """UserError where the trainer's `error` says that `vocab_size` does not fit a text of `size` bytes."""
    high = re.search(r"value <= (\d+)", str(error))
    if high:
        raise UserError(
            f"{size} bytes of text are too few for vocab_size={vocab_size}: "
            f"give more text, or a vocab_size of at most {high[1]}"
        ) from error
    low = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
    if low:
        raise UserError(
            f"vocab_size={vocab_size} cannot hold the special ids, the bytes and the characters of this text: "
            f"take at least {low[1]}"
        ) from error

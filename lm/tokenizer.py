"""Text to ids and back, and the chat template.

Byte-pair encoding by sentencepiece with byte fallback, so every text round-trips exactly and nothing is unknown. The
role markers are *control symbols*: no text encodes to them, so nobody can forge a turn by typing one. For the same
reason no piece crosses a marker, and joining the ids of the messages is the one tokenisation the template has.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

from lm.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
SPECIAL = ("<|pad|>", "<|unk|>", "<|bos|>", "<|eos|>", *(f"<|{role}|>" for role in ROLES), "<|end|>")  # ids 0, 1, ...
TEMPLATE = (
    f"template 1; ids {' '.join(SPECIAL)} from 0; <|bos|> then per message <|role|> content <|end|>; "
    "trained: assistant content and its <|end|>; a pretraining document is <|bos|> text <|eos|>"
)
BLANK = "\u2581"  # sentencepiece's space; the character itself is spelt in bytes, or it would come back as a space
CHUNK = 4096  # characters; the trainer drops a text whole if it is long or holds a character reserved to it

Message = Mapping[str, str]  # {"role": one of ROLES, "content": text}


class Example(NamedTuple):
    """A tokenised conversation."""

    ids: np.ndarray  # i32[n]
    weights: np.ndarray  # f32[n]  1 where the token is trained as a target


@dataclass(frozen=True)
class Tokenizer:
    """A sentencepiece model, held as its bytes: cheap to pickle, compare and fingerprint."""

    proto: bytes

    def __reduce__(self):
        return Tokenizer, (self.proto,)

    @cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.proto)

    @cached_property
    def _blank(self) -> list[int]:
        return [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in BLANK.encode()]

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def pad(self) -> int:
        return SPECIAL.index("<|pad|>")

    @property
    def bos(self) -> int:
        return SPECIAL.index("<|bos|>")

    @property
    def eos(self) -> int:
        return SPECIAL.index("<|eos|>")

    @property
    def end(self) -> int:
        return SPECIAL.index("<|end|>")

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids that end an answer: of a message, or of a document."""
        return self.end, self.eos

    @property
    def roles(self) -> dict[str, int]:
        return {role: SPECIAL.index(f"<|{role}|>") for role in ROLES}

    @property
    def fingerprint(self) -> str:
        """What a later stage must agree with: pieces, special ids, template and mask rule."""
        return hashlib.sha256(self.proto + TEMPLATE.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encode_all([text])[0]

    def encode_all(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of each text, on all cores. Never a special id."""
        texts = [unicode(text) for text in texts]
        encoded = self._processor.encode(texts, num_threads=min(os.cpu_count() or 1, len(texts) or 1))
        for row, text in enumerate(texts):
            if BLANK in text:
                first, *rest = self._processor.encode(text.split(BLANK))
                encoded[row] = first + [i for part in rest for i in self._blank + part]
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special ids drop out, bytes that are no UTF-8 show as U+FFFD."""
        return self._processor.decode([int(i) for i in ids])

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """What each id stands for, special ids and single bytes by name: for showing a row token by token."""
        return [piece.replace(BLANK, " ") for piece in self._processor.id_to_piece([int(i) for i in ids])]

    def save(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(self.proto)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        try:
            tokenizer = Tokenizer(Path(path).read_bytes() or b"empty")  # sentencepiece takes no bytes for no model
        except OSError as error:
            raise UserError(f"no tokenizer at {path} ({error.strerror}): train one, or name its workdir") from error
        try:
            pieces = tokenizer.pieces(range(min(len(SPECIAL), tokenizer.vocab_size)))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path} is not a sentencepiece model: train a tokenizer again") from error
        if pieces != list(SPECIAL) or tokenizer._processor.unk_id() in tokenizer._blank:
            raise UserError(f"{path} lacks our special pieces or byte fallback: it was not made by lm.tokenizer.train")
        return tokenizer


def unicode(text: str) -> str:
    """`text` with each lone surrogate, which is no Unicode and has no UTF-8, as U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def train(texts: Iterable[str], *, vocab_size: int = 2048, max_bytes: int = 32_000_000) -> Tokenizer:
    """A tokenizer with `vocab_size` pieces (special ids and 256 bytes included) learnt from `texts`.

    Nothing is normalised; runs of spaces are pieces, so indentation is cheap; each digit stands alone. Of more than
    `max_bytes` (UTF-8) an even share of every text is read. The same texts give the same bytes. Sennrich et al. 2016,
    arXiv 1508.07909; Kudo and Richardson 2018, arXiv 1808.06226.
    """
    chunks = [text[i : i + CHUNK] for text in map(unicode, texts) for i in range(0, len(text), CHUNK)]
    size = sum(len(chunk.encode()) for chunk in chunks)
    if not any(chunk.strip() for chunk in chunks):
        raise UserError("the tokenizer's corpus holds no text: give it some, or another corpus")
    share = min(1.0, max_bytes / size)
    chunks = [chunk for i, chunk in enumerate(chunks) if int((i + 1) * share) > int(i * share)] or chunks[:1]
    proto = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=proto,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * CHUNK,  # bytes
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=SPECIAL[0],
            unk_piece=SPECIAL[1],
            bos_piece=SPECIAL[2],
            eos_piece=SPECIAL[3],
            unk_surface="",
            control_symbols=list(SPECIAL[4:]),
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        high = re.search(r"value <= (\d+)", str(error))
        low = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        if high:
            raise UserError(
                f"{size} bytes of text are too few for vocab_size={vocab_size}: "
                f"give more text, or a vocab_size of at most {high[1]}"
            ) from error
        if low:
            raise UserError(
                f"vocab_size={vocab_size} cannot hold the special ids, the bytes and the characters of this text: "
                f"take at least {low[1]}"
            ) from error
        raise
    return Tokenizer(proto.getvalue())


def chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> Example:
    """`<|bos|>`, then for each message `<|role|>` content `<|end|>`.

    Trained as targets: the content of assistant messages and their `<|end|>`, so that answers learn to stop; not role
    markers, not what others said.
    """
    return chats(tokenizer, [messages])[0]


def chats(tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]]) -> list[Example]:
    """`chat` of each; all their contents are encoded in one call."""
    if not all(conversations):
        raise UserError("a conversation without messages: give at least one {'role', 'content'}")
    contents = iter(tokenizer.encode_all(_content(message) for messages in conversations for message in messages))
    return [_example(tokenizer, messages, contents) for messages in conversations]


def _example(tokenizer: Tokenizer, messages: Sequence[Message], contents: Iterator[list[int]]) -> Example:
    ids, weights = [tokenizer.bos], [0.0]
    for message in messages:
        content, trained = next(contents), float(message["role"] == "assistant")
        ids += [tokenizer.roles[message["role"]], *content, tokenizer.end]
        weights += [0.0] + [trained] * (len(content) + 1)
    return Example(np.array(ids, np.int32), np.array(weights, np.float32))


def prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> np.ndarray:
    """i32[n]: the conversation so far and the assistant's marker; a prefix of `chat` of the same and any answer."""
    return prompts(tokenizer, [messages])[0]


def prompts(tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]]) -> list[np.ndarray]:
    """`prompt` of each."""
    assistant = np.int32(tokenizer.roles["assistant"])
    return [np.append(example.ids, assistant) for example in chats(tokenizer, conversations)]


def _content(message: Message) -> str:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise UserError(f"a message must be {{'role', 'content'}}, not {message!r}")
    if message["role"] not in ROLES:
        raise UserError(f"unknown role {message['role']!r} in a conversation: use one of {', '.join(ROLES)}")
    if not isinstance(message["content"], str):
        raise UserError(f"the content of a {message['role']} message must be text, not {message['content']!r}")
    return message["content"]

"""The interface of every tokenizer, ours and other people's."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm.core.errors import UserError

ROLES = ("system", "user", "assistant", "tool")

# {"role": one of ROLES, "content": text}; an assistant's may hold "weight", that of its tokens as targets (1).
Message = Mapping[str, Any]


class TokenizedExample(NamedTuple):
    """A tokenised conversation."""

    ids: np.ndarray  # i32[n]
    weights: np.ndarray  # f32[n]  1 where the token is trained as a target


class Tokenizer(ABC):
    """Text to ids and back, conversations by a template. Held as its bytes: cheap to pickle, compare, fingerprint."""

    proto: bytes
    mask_rule: str  # how it lays out a conversation and masks it

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @property
    @abstractmethod
    def has_chat_template(self) -> bool:
        """Whether it has a template for conversations."""

    @property
    @abstractmethod
    def start_ids(self) -> tuple[int, ...]:
        """The ids that a document begins with, if any."""

    @property
    @abstractmethod
    def eos(self) -> int:
        """The id that ends a document."""

    @property
    @abstractmethod
    def end_of_message(self) -> int:
        """The id that ends a message."""

    @property
    @abstractmethod
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""

    @abstractmethod
    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of each text, on all cores. Never a special id."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special ids are left out, invalid UTF-8 shows as U+FFFD."""

    @abstractmethod
    def pieces(self, ids: Iterable[int]) -> list[str]:
        """What each id stands for, special ids by name: for showing a row token by token."""

    @abstractmethod
    def encode_chats(self, conversations: Sequence[Sequence[Message]], *, last: bool = False) -> list[TokenizedExample]:
        """Whole conversations as the template renders them: the ids of every stage come from here and from
        `encode_prompts`.

        The assistant's words and the token that ends them have weight 1, and nothing follows it. last: only the last
        message is trained, which must be the assistant's.
        """

    @abstractmethod
    def encode_prompts(self, conversations: Sequence[Sequence[Message]]) -> list[np.ndarray]:
        """i32[n] each: the conversation so far, up to where the assistant's answer begins."""

    @abstractmethod
    def encode_reply(self, role: str, text: str, limit: int) -> list[int]:
        """What comes between an answer's end token and the next answer: a message, its words cut to `limit` tokens."""

    @property
    def marker_ids(self) -> tuple[int, ...]:
        """The tokens of the chat template that no text holds: roles and the end of a message. None: another's model
        has learned its own."""
        return ()

    @property
    def shows_date(self) -> bool:
        """Whether its template may show the date, so that ids depend on it."""
        return False

    @property
    def date(self) -> str:
        """The date that its template shows, ISO 8601; empty where none is set."""
        return ""

    def dated(self, date: str) -> "Tokenizer":
        """The same tokenizer, with the same fingerprint, whose template shows this date."""
        return self

    @property
    def fingerprint(self) -> str:
        """What a later stage must agree with: pieces, special ids, template and mask rule; not the date."""
        return hashlib.sha256(self.proto + self.mask_rule.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def document_ids(self, ids: Sequence[int]) -> list[int]:
        """A text's ids as pretraining sees them."""
        return [*self.start_ids, *ids, self.eos]

    @property
    def file(self) -> bytes:
        """What `save` writes."""
        return self.proto

    def save(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(self.file)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def valid_unicode(text: str) -> str:
    """`text` with each lone surrogate, which UTF-8 cannot encode, as U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def checked_messages(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages of a conversation. UserError for one that is not valid."""
    if not messages:
        raise UserError("a conversation without messages: give at least one {'role', 'content'}")
    for message in messages:
        if not isinstance(message, Mapping) or set(message) - {"weight"} != {"role", "content"}:
            raise UserError(f"a message must be {{'role', 'content'}}, not {message!r}")
        if message["role"] not in ROLES:
            raise UserError(f"unknown role {message['role']!r} in a conversation: use one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise UserError(f"the content of a {message['role']} message must be text, not {message['content']!r}")
    return messages


def message_weight(message: Message) -> float:
    """What the tokens of an assistant's message count as targets; 0: they are context."""
    return float(message["weight"]) if "weight" in message else 1.0

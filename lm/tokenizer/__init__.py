"""Text to ids and back, and conversations to ids and masks: by a tokenizer of our own, or by one that others made."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lm.errors import UserError
from lm.tokenizer import borrowed, own
from lm.tokenizer.interface import ROLES, Example, Message, Tokenizer, unicode
from lm.tokenizer.own import SPECIAL, TEMPLATE, train

__all__ = [
    "ROLES",
    "SPECIAL",
    "TEMPLATE",
    "Example",
    "Message",
    "Tokenizer",
    "chat",
    "chats",
    "load",
    "prompt",
    "prompts",
    "train",
    "unicode",
]


def load(path: str | Path) -> Tokenizer:
    """The tokenizer in a file. UserError if there is none."""
    try:
        proto = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"no tokenizer at {path} ({error.strerror}): train one, or name its workdir") from error
    return borrowed.opened(proto, path) if proto.startswith(b"{") else own.opened(proto, path)


def chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> Example:
    """One conversation: see Tokenizer.chats."""
    return tokenizer.chats([messages])[0]


def chats(tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]], *, last: bool = False) -> list[Example]:
    """See Tokenizer.chats."""
    return tokenizer.chats(conversations, last=last)


def prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> np.ndarray:
    """i32[n]: see Tokenizer.prompts."""
    return tokenizer.prompts([messages])[0]


def prompts(tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]]) -> list[np.ndarray]:
    """See Tokenizer.prompts."""
    return tokenizer.prompts(conversations)

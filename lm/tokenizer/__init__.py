"""Text to ids and back, and conversations to ids and masks.

`load_tokenizer` reads a tokenizer, `train_tokenizer` trains one; `encode_chats` and `encode_prompts` turn conversations
into ids. `sentencepiece` holds our own tokenizers, `huggingface` other people's; a further kind is a subclass of
`base.Tokenizer`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lm.core.errors import UserError
from lm.tokenizer import huggingface, sentencepiece
from lm.tokenizer.base import ROLES, Message, TokenizedExample, Tokenizer, valid_unicode
from lm.tokenizer.sentencepiece import SPECIAL_TOKENS, TEMPLATE_RULE, train_tokenizer

__all__ = [
    "ROLES",
    "SPECIAL_TOKENS",
    "TEMPLATE_RULE",
    "TokenizedExample",
    "Message",
    "Tokenizer",
    "encode_chat",
    "encode_chats",
    "load_tokenizer",
    "encode_prompt",
    "encode_prompts",
    "train_tokenizer",
    "valid_unicode",
]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file. UserError if there is none."""
    try:
        proto = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"no tokenizer at {path} ({error.strerror}): train one, or name its workdir") from error
    return (
        huggingface.huggingface_from_bytes(proto, path)
        if proto.startswith(b"{")
        else sentencepiece.sentencepiece_from_bytes(proto, path)
    )


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> TokenizedExample:
    """One conversation: see Tokenizer.encode_chats."""
    return tokenizer.encode_chats([messages])[0]


def encode_chats(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]], *, last: bool = False
) -> list[TokenizedExample]:
    """See Tokenizer.encode_chats."""
    return tokenizer.encode_chats(conversations, last=last)


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> np.ndarray:
    """i32[n]: see Tokenizer.encode_prompts."""
    return tokenizer.encode_prompts([messages])[0]


def encode_prompts(tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]]) -> list[np.ndarray]:
    """See Tokenizer.encode_prompts."""
    return tokenizer.encode_prompts(conversations)

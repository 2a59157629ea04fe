"""Answers that are JSON: at each step, which tokens of the vocabulary a grammar admits."""

import collections
from typing import Any

import numpy as np

from lm.core.errors import UserError
from lm.serve.json_grammar import JsonGrammar, State, StringFrame
from lm.tokenizer import Tokenizer

MASKS_KEPT = 2048  # states of one grammar whose masks are kept
GRAMMARS_KEPT = 32  # of a vocabulary, each with its masks


class TokenTrie:
    """Tokens by their bytes: {byte: child}, and the ids that end here."""

    __slots__ = ("children", "ids")

    def __init__(self):
        self.children: dict[int, TokenTrie] = {}
        self.ids: list[int] = []

    def add(self, text: bytes, id_: int) -> None:
        node = self
        for byte in text:
            node = node.children.setdefault(byte, TokenTrie())
        node.ids.append(id_)


class JsonVocabulary:
    """A tokenizer's tokens as bytes, and the grammars that were asked for."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        """vocab_size: of the model's logits, which may have more ids than the tokenizer."""
        self.size, self.stop_ids = vocab_size, tuple(tokenizer.stop_ids)
        self.bytes = [b"" if i in self.stop_ids else text for i, text in enumerate(tokenizer.token_bytes())][
            :vocab_size
        ]
        self.tokens, self.structural_tokens = TokenTrie(), TokenTrie()
        self.plain = np.zeros(vocab_size, bool)  # tokens that may stand anywhere inside a string
        for i, text in enumerate(self.bytes):
            if not text:
                continue
            self.tokens.add(text, i)
            if is_plain(text):
                self.plain[i] = True
            else:
                self.structural_tokens.add(text, i)
        self._grammars: collections.OrderedDict[str, TokenGrammar] = collections.OrderedDict()

    def constraint(self, key: str, schema: Any) -> "JsonConstraint":
        """A new constraint for one answer. key: the schema as text. UserError for a schema that is not supported."""
        if key not in self._grammars:
            self._grammars[key] = TokenGrammar(self, JsonGrammar(schema))
            if len(self._grammars) > GRAMMARS_KEPT:
                self._grammars.popitem(last=False)
        self._grammars.move_to_end(key)
        return JsonConstraint(self._grammars[key])


class TokenGrammar:
    """A grammar over tokens: the masks of the states that were met."""

    def __init__(self, vocabulary: JsonVocabulary, grammar: JsonGrammar):
        self.vocabulary, self.grammar = vocabulary, grammar
        self._masks: collections.OrderedDict[State, np.ndarray] = collections.OrderedDict()

    def mask(self, state: State) -> np.ndarray:
        """bool[V]: the tokens that may follow."""
        if state in self._masks:
            self._masks.move_to_end(state)
            return self._masks[state]
        vocabulary = self.vocabulary
        in_text = bool(state) and isinstance(state[-1], StringFrame) and state[-1].phase == ""
        mask = vocabulary.plain.copy() if in_text else np.zeros(vocabulary.size, bool)
        pending = [(vocabulary.structural_tokens if in_text else vocabulary.tokens, state)]
        while pending:
            node, reached = pending.pop()
            mask[node.ids] = True
            for byte, child in node.children.items():
                following = self.grammar.after(reached, byte)
                if following is not None:
                    pending.append((child, following))
        if self.grammar.is_complete(state) or not mask.any():
            mask[list(vocabulary.stop_ids)] = True
        mask.setflags(write=False)
        self._masks[state] = mask
        if len(self._masks) > MASKS_KEPT:
            self._masks.popitem(last=False)
        return mask


class JsonConstraint:
    """The tokens that may come next in one answer; a TokenConstraint of lm.generate.engine."""

    def __init__(self, tokens: TokenGrammar):
        self._tokens, self._state = tokens, tokens.grammar.start

    def allowed(self) -> np.ndarray:
        """bool[V] of the next token; once the value is whole, the stop ids alone."""
        return self._tokens.mask(self._state)

    def accept(self, token: int) -> None:
        """Goes on after a sampled token. UserError for one that was not allowed."""
        if token in self._tokens.vocabulary.stop_ids:
            return
        state: State | None = self._state
        for byte in self._tokens.vocabulary.bytes[token]:
            state = None if state is None else self._tokens.grammar.after(state, byte)
        if state is None:
            raise UserError(f"token {token} is not one that the constraint allows here")
        self._state = state


def is_plain(text: bytes) -> bool:
    """Whether these bytes may stand anywhere inside a JSON string, without any state before or after."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return not set(text) & {*range(0x20), *b'"\\'}

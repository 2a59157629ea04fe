"""The answers of OpenAI's HTTP interface: text made of tokens, and the JSON around it."""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from lm.generate.answers import text_before_stop, text_without_partial_stop
from lm.generate.engine import SampledToken
from lm.tokenizer import Tokenizer

FINISH_REASONS = {"stop": "stop", "length": "length", "deadline": "length"}  # of an event, as OpenAI calls them
STREAM_END = "data: [DONE]\n\n"


class TextPiece(NamedTuple):
    """What may be sent of an answer that grows: text that no later token changes, and the tokens it is made of."""

    text: str
    tokens: tuple["PlacedToken", ...]


class PlacedToken(NamedTuple):
    token: SampledToken
    offset: int  # characters of the answer before it


class AnswerText:
    """An answer's text, token by token: without special tokens, without what may become a stop string, and never with
    half a character."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, tuple(stop_strings)
        self._ids: list[int] = []
        self._held: list[PlacedToken] = []
        self._stable = 0  # characters of the stable text, before any stop string is cut
        self.text = ""  # sent so far

    @property
    def token_count(self) -> int:
        """Sampled tokens, the stop token included."""
        return len(self._ids)

    def add(self, tokens: Sequence[SampledToken], *, is_last: bool) -> TextPiece:
        """What these tokens add; with the last ones, all that is left."""
        text = ""
        for token in tokens:
            self._ids.append(token.id)
            if token.id not in self._tokenizer.stop_ids:
                self._held.append(PlacedToken(token, self._stable))
            text = self._tokenizer.decode(self._ids)
            self._stable = len(text.rstrip("\ufffd"))
        text = self._tokenizer.decode(self._ids) if is_last or not tokens else text
        text, has_stop = text_before_stop(text if is_last else text.rstrip("\ufffd"), self._stops)
        if not is_last and not has_stop:
            text = text_without_partial_stop(text, self._stops)
        ready = [placed for placed in self._held if placed.offset < len(text)]
        self._held = [placed for placed in self._held if placed.offset >= len(text)]
        piece = TextPiece(text[len(self.text) :], tuple(ready))
        self.text = text
        return piece


class ResponseForm:
    """The fixed fields of all parts of one response, and the shape of its choices."""

    def __init__(self, model: str, fingerprint: str, tokens: Sequence[bytes], *, chat: bool, with_logprobs: bool):
        self._chat, self._with_logprobs, self._bytes = chat, with_logprobs, tokens
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._fixed = {"created": int(time.time()), "model": model, "system_fingerprint": f"fp_{fingerprint[:12]}"}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What a stream's choice begins with."""
        return [self._chunk(index, {"role": "assistant", "content": ""}, None, "")] if self._chat else []

    def chunk(self, index: int, piece: TextPiece, finish: str) -> dict[str, Any]:
        """A part of a stream. finish: "" while the answer goes on."""
        return self._chunk(index, {"content": piece.text} if piece.text else {}, piece, finish)

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {"id": self.id, "object": kind, **self._fixed, "choices": [], "usage": usage}

    def whole(self, answers: Sequence[TextPiece], finishes: Sequence[str], usage: dict[str, int]) -> dict[str, Any]:
        """A response at once."""
        choices = []
        for index, (piece, finish) in enumerate(zip(answers, finishes, strict=True)):
            said = {"message": {"role": "assistant", "content": piece.text}} if self._chat else {"text": piece.text}
            choices.append({"index": index, **said, "logprobs": self._logprobs(piece), **self._finish(finish)})
        kind = "chat.completion" if self._chat else "text_completion"
        return {"id": self.id, "object": kind, **self._fixed, "choices": choices, "usage": usage}

    def _chunk(self, index: int, delta: dict[str, Any], piece: TextPiece | None, finish: str) -> dict[str, Any]:
        logprobs = self._logprobs(piece) if piece and piece.tokens else None
        if self._chat:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, **self._finish(finish)}
            return {"id": self.id, "object": "chat.completion.chunk", **self._fixed, "choices": [choice]}
        said = {"text": piece.text if piece else ""}
        choice = {"index": index, **said, "logprobs": logprobs, **self._finish(finish)}
        return {"id": self.id, "object": "text_completion", **self._fixed, "choices": [choice]}

    @staticmethod
    def _finish(finish: str) -> dict[str, Any]:
        return {"finish_reason": FINISH_REASONS[finish] if finish else None}

    def _logprobs(self, piece: TextPiece) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        if self._chat:
            content = [
                self._token_entry(token.id, token.logprob)
                | {"top_logprobs": [self._token_entry(*other) for other in token.top]}
                for token, _ in piece.tokens
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [self._text(token.id) for token, _ in piece.tokens],
            "token_logprobs": [token.logprob for token, _ in piece.tokens],
            "top_logprobs": [{self._text(i): value for i, value in token.top} for token, _ in piece.tokens],
            "text_offset": [offset for _, offset in piece.tokens],
        }

    def _token_entry(self, id_: int, logprob: float) -> dict[str, Any]:
        return {"token": self._text(id_), "logprob": logprob, "bytes": list(self._token_bytes(id_))}

    def _text(self, id_: int) -> str:
        return self._token_bytes(id_).decode(errors="replace")

    def _token_bytes(self, id_: int) -> bytes:
        return self._bytes[id_] if id_ < len(self._bytes) else b""


def usage_counts(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def server_event(value: dict[str, Any]) -> str:
    """One event of a stream."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds[status] if status in kinds else "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def llama_body(
    answer: TextPiece, finish: str, model: str, prompt_tokens: int, completion_tokens: int
) -> dict[str, Any]:
    """A whole response, or the last part of a stream, as llama.cpp's /completion gives it."""
    return {
        "index": 0,
        "content": answer.text,
        "stop": True,
        "model": model,
        "tokens_predicted": completion_tokens,
        "tokens_evaluated": prompt_tokens,
        "truncated": False,
        "stop_type": "limit" if finish in ("length", "deadline") else "eos",
    }

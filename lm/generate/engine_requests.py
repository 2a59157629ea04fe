"""What the serving engine is asked, where a request stands, and what the engine tells of it.

`lm.generate.engine` has the names that its callers need, too.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from lm.core.errors import UserError
from lm.generate.answers import check_stop_strings
from lm.generate.decode_programs import TOP_LOGPROBS
from lm.generate.sampler import SamplingParams, check_sampling
from lm.model import Model


class QueueFull(UserError):
    """As many requests wait as may: try again later."""


class TokenConstraint(Protocol):
    """Which tokens may come next. It belongs to one request and follows its tokens."""

    def allowed(self) -> np.ndarray:
        """bool[V] of the next token, at least one of them true."""
        ...

    def accept(self, token: int) -> None:
        """A sampled token. After the last, `allowed` is the stop ids only."""
        ...


class Request(NamedTuple):
    """A prompt, and how to answer it. A request ends with a stop id of `sampling` alone: give the tokenizer's there."""

    ids: Sequence[int]  # the prompt, chat form and start token included
    sampling: SamplingParams  # its own; samples must be 1
    seed: int = 0  # token t is drawn with fold_in(fold_in(key(seed), 0), t), as `sample` of this prompt alone
    stop_strings: Sequence[str] = ()  # it ends with the token that completes one
    top_logprobs: int = 0  # likeliest tokens to give with each token, at most TOP_LOGPROBS
    seconds: float = math.inf  # from submission to the deadline; what is there by then is the answer
    constraint: TokenConstraint | None = None


class SampledToken(NamedTuple):
    id: int
    logprob: float  # log softmax(logits): the model's own, whatever the temperature
    top: tuple[tuple[int, float], ...]  # the likeliest ids with theirs, in order
    sampling_logprob: float = 0.0  # of the distribution drawn from, as `sample` gives it; 0 if greedy


class Event(NamedTuple):
    """What a step gave of one request."""

    request: int  # its number
    tokens: tuple[SampledToken, ...]  # new ones
    finish: str = ""  # "", "stop" (stop id or string), "length", "deadline", "cancelled", "error"
    message: str = ""  # of an error


@dataclasses.dataclass(eq=False)
class Job:
    """A submitted request, and where it stands."""

    number: int
    request: Request
    deadline: float
    key: np.ndarray  # u32[2]
    digests: list[bytes]  # of the full pages of what is to be prefilled
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    filled: int = 0  # tokens whose keys and values are in the pages
    tokens: list[int] = dataclasses.field(default_factory=list)  # drawn so far

    @property
    def ids(self) -> list[int]:
        """The prompt and what was drawn."""
        return [*self.request.ids, *self.tokens]

    @property
    def to_prefill(self) -> int:
        """Tokens yet to go into pages before it decodes: all but the last, which is fed to draw the next."""
        return len(self.request.ids) + len(self.tokens) - 1 - self.filled


class EngineStats(NamedTuple):
    running: int  # requests with a slot
    waiting: int
    slots: int
    pages: int
    pages_used: int  # by requests; what a prefix is kept for counts as free
    prefix_hits: int  # requests that found their first tokens in pages, since the start
    prefix_tokens: int  # tokens that so were not prefilled
    tokens_out: int
    steps: int
    preemptions: int = 0  # how often a request gave its pages to an older one and waited again


def check_request(model: Model, request: Request, *, pages: int, page_size: int, has_tokenizer: bool) -> None:
    """UserError for a request that an engine of this model with so many pages can never serve."""
    sampling, V = request.sampling, model.config.vocab_size
    check_sampling(model, len(request.ids), sampling)
    check_stop_strings(request.stop_strings)
    if sampling.samples != 1:
        raise UserError(f"samples is {sampling.samples}; a request has 1 answer: submit it once for each, with seeds")
    if not all(0 <= i < V for i in request.ids):
        bad = next(i for i in request.ids if not 0 <= i < V)
        raise UserError(f"the prompt has the token {bad}, but the model's vocabulary is {V}: encode it again")
    if not 0 <= request.top_logprobs <= min(TOP_LOGPROBS, V):
        raise UserError(f"top_logprobs is {request.top_logprobs}; it must be from 0 to {min(TOP_LOGPROBS, V)}")
    if not -(2**63) <= request.seed < 2**63:
        raise UserError(f"seed is {request.seed}; it must fit into 64 bits")
    if not request.seconds > 0:
        raise UserError(f"seconds is {request.seconds}; a deadline must be later than now")
    if request.stop_strings and not has_tokenizer:
        raise UserError("stop_strings need the engine's tokenizer, and it has none: give it one")
    needed = -(-(len(request.ids) + sampling.max_new - 1) // page_size)  # the last token drawn is never fed
    if needed > pages:
        raise UserError(
            f"the request needs {needed} pages of {page_size} tokens and the engine has {pages}: shorten the prompt, "
            "lower max_new_tokens, or give the engine more pages"
        )

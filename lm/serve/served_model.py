"""A model under the name that requests give: its tokenizer, its engine in a thread, and what a request means to it."""

import threading
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.core.errors import UserError
from lm.feedback.answering_models import params_sha256
from lm.generate.engine import Engine, Request
from lm.generate.sampler import SamplingParams
from lm.runs.workdir import TrainedModel, require_decoder
from lm.serve.json_constraint import JsonConstraint, JsonVocabulary
from lm.serve.openai_requests import RequestOptions
from lm.serve.worker import EngineWorker
from lm.train.warm_start import load_policy, policy_folder

PAGE_SIZE = 16  # tokens of a page of the cache


class PromptTooLong(UserError):
    """Prompt and answer do not fit into the model's context. room: the tokens that the prompt leaves."""

    def __init__(self, message: str, room: int):
        super().__init__(message)
        self.room = room


class EngineLimits(NamedTuple):
    """How much of a machine one model takes."""

    slots: int = 8  # answers at once
    queue: int = 64  # requests that may wait
    pages: int = 0  # of the cache; 0: the engine's default
    max_tokens: int = 0  # of an answer; 0: what the context leaves
    seconds: float = 600.0  # of an answer, from its request on


class ServedModel:
    """One name of the server. Several names have an engine each."""

    def __init__(
        self, name: str, trained: TrainedModel, engine: Engine, limits: EngineLimits, *, fingerprint: str = ""
    ):
        self.name, self.trained, self.limits, self.fingerprint = name, trained, limits, fingerprint
        self.created = int(time.time())
        self.context = min(trained.model.config.context, engine.stats().pages * PAGE_SIZE)
        self.token_bytes = token_bytes_of(trained)
        self.worker = EngineWorker(engine, limit=limits.slots + limits.queue)
        self._lock = threading.Lock()
        self._vocabulary: JsonVocabulary | None = None
        self._tokenizer = trained.tokenizer

    @property
    def tokenizer(self):
        """The tokenizer; a template that contains the date shows today's."""
        if self._tokenizer.shows_date and self._tokenizer.date != date.today().isoformat():
            self._tokenizer = self._tokenizer.dated(date.today().isoformat())
        return self._tokenizer

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """The ids i32[n] of a conversation. UserError where the model has learned none, or its template no tools."""
        if self.trained.stage == "pretrain" or not self.tokenizer.has_chat_template:
            raise UserError(f"{self.name} was only pretrained and holds no conversation: use /v1/completions")
        if tools:
            return self.tokenizer.encode_prompt_with_tools(messages, tools)
        return self.tokenizer.encode_prompts([messages])[0]

    def text_prompt(self, prompt: str | list[int]) -> np.ndarray:
        """The ids i32[n] of a text, with the model's start, or of ids, as they are."""
        if isinstance(prompt, str):
            return np.array([*self.tokenizer.start_ids, *self.tokenizer.encode(prompt)], np.int32)
        if max(prompt) >= self.trained.model.config.vocab_size:
            raise UserError(f"prompt has the id {max(prompt)}, and {self.name} knows those below its vocabulary's size")
        return np.array(prompt, np.int32)

    def requests(self, prompts: Sequence[np.ndarray], options: RequestOptions) -> list[Request]:
        """One request for each choice of each prompt; choice i draws with seed + i.

        UserError for a prompt that leaves no room, and for a schema that is not supported.
        """
        requests = []
        for ids in prompts:
            sampling = options.sampling._replace(max_new=self._max_new(len(ids), options.sampling))
            sampling = sampling._replace(stop=tuple(self.tokenizer.stop_ids))
            for choice in range(options.choices):
                requests.append(
                    Request(
                        ids.tolist(),
                        sampling,
                        seed=(options.seed + choice) % 2**32,
                        stop_strings=options.stop_strings,
                        top_logprobs=options.top_logprobs,
                        seconds=self.limits.seconds,
                        constraint=self._constraint(options),
                    )
                )
        return requests

    def _max_new(self, prompt: int, sampling: SamplingParams) -> int:
        room = self.context - prompt
        if room < 1 or sampling.max_new > room:
            asked = f" and max_tokens is {sampling.max_new}" if sampling.max_new else ""
            raise PromptTooLong(
                f"the prompt has {prompt} tokens{asked}, but {self.name}'s context is {self.context}: shorten the "
                f"prompt{f', or lower max_tokens to {room}' if room > 0 else ''}",
                max(room, 0),
            )
        most = min(room, self.limits.max_tokens or room)
        if sampling.max_new > most:
            raise UserError(f"max_tokens is {sampling.max_new}; this server answers with at most {most}: lower it")
        return sampling.max_new or most

    def _constraint(self, options: RequestOptions) -> JsonConstraint | None:
        if not options.schema_key:
            return None
        with self._lock:
            if self._vocabulary is None:
                if not any(self.token_bytes):
                    raise UserError(f"response_format: the tokens of {self.name} are no pieces of text")
                self._vocabulary = JsonVocabulary(self.tokenizer, self.trained.model.config.vocab_size)
            try:
                return self._vocabulary.constraint(options.schema_key, options.schema)
            except RecursionError as error:
                raise UserError("response_format: its schema is nested too deeply") from error


def token_bytes_of(trained: TrainedModel) -> list[bytes]:
    """The bytes of each token; those of its piece where the tokenizer cannot tell."""
    try:
        return trained.tokenizer.token_bytes()
    except UserError:
        return []


def load_served_models(folders: Mapping[str, Path], limits: EngineLimits, *, warn, prefix_cache: bool = True):
    """{name: ServedModel}. Adapters of a LoRA run are joined into its base. UserError for what cannot be served."""
    models: dict[str, ServedModel] = {}
    for name, folder in folders.items():
        trained = load_policy(policy_folder(folder), backend=jax.default_backend(), warn=warn)
        require_decoder(trained, "lm serve")
        lm = jax.tree.map(jax.numpy.asarray, trained.params["lm"])
        engine = Engine(
            trained.model,
            lm,
            trained.tokenizer,
            slots=limits.slots,
            pages=limits.pages,
            page_size=PAGE_SIZE,
            queue=limits.slots + limits.queue,  # the worker's limit comes first
            prefix_cache=prefix_cache,
        )
        models[name] = ServedModel(name, trained, engine, limits, fingerprint=params_sha256(trained.params))
    return models

"""Models answer the prompts that people will judge."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm.core.errors import UserError
from lm.core.types import Array
from lm.data.annotations import AnnotationStore
from lm.data.conversations import Conversation
from lm.data.prompts import padded_prompts, prompts_at
from lm.generate.answers import batch_answerer
from lm.generate.sampler import SamplingParams, check_sampling
from lm.runs.console import Progress, SigtermExit, on_sigterm, say, warn
from lm.runs.workdir import TrainedModel
from lm.stages import REWARD_MODEL_STAGES
from lm.tokenizer import encode_prompts

PROMPTS_AT_ONCE = 32  # prompts answered together, about
MAX_ATTEMPTS = 3  # at answers that differ
RECORDED_FIELDS = ("temperature", "top_k", "top_p")


class AnsweringModel:
    """A trained model that answers, and what is recorded with its answers."""

    def __init__(self, name: str, trained: TrainedModel, sampling: SamplingParams, *, seed: int):
        if trained.stage in REWARD_MODEL_STAGES:
            raise UserError(f"{trained.path} is a reward model, which scores answers and writes none: name a policy")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed is {seed}; it must be from 0 to {2**32 - 1}")
        check_sampling(trained.model, 1, sampling)
        self._trained, self._sampling = trained, sampling
        self.source = {
            "model": name,
            "fingerprint": params_sha256(trained.params),
            "sampler": {"seed": seed, **sampling_record(sampling)},
        }

    def has_room_for(self, conversations: Sequence[Conversation]) -> list[bool]:
        """Whether each conversation leaves room for an answer in the model's context."""
        room = self._trained.model.config.context - self._sampling.max_new
        return [len(ids) <= room for ids in self._prompt_ids(conversations)]

    def answer_sampler(
        self, conversations: Sequence[Conversation], rows_at_once: int
    ) -> Callable[[Sequence[int], Array], list[str]]:
        """(rows of `conversations`, key) -> an answer to each."""
        ids = self._prompt_ids(conversations)
        prompts = padded_prompts(ids, [conversation.messages for conversation in conversations], max(map(len, ids)))
        trained = self._trained
        answers = batch_answerer(
            trained.model,
            trained.params["lm"],
            trained.tokenizer,
            self._sampling,
            jit=jax.jit,
            rows_at_once=rows_at_once,
        )
        return lambda rows, key: [answer.text for answer in answers(prompts_at(prompts, np.array(rows)), key)]

    def _prompt_ids(self, conversations: Sequence[Conversation]) -> list[np.ndarray]:
        return encode_prompts(self._trained.tokenizer, [conversation.messages for conversation in conversations])


def sampling_record(sampling: SamplingParams) -> dict[str, Any]:
    """The record of how answers were sampled: the flags of `lm rank`, and other fields that are not default."""
    always = {"max_new_tokens": sampling.max_new, **{name: getattr(sampling, name) for name in RECORDED_FIELDS}}
    defaults = SamplingParams(sampling.max_new)._asdict()
    return always | {
        name: value for name, value in sampling._asdict().items() if name not in always and value != defaults[name]
    }


def params_sha256(params: Any) -> str:
    """The sha256 of the names and bytes of all parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


def answer_prompts(
    store: AnnotationStore,
    speakers: Sequence[AnsweringModel],
    prompts: Sequence[Conversation],
    *,
    count: int,
    seed: int,
) -> None:
    """Adds `count` answers to every prompt that has no answers of these speakers yet; equal answers count once.

    Speaker (i + j) mod their number gives answer j to prompt i. The draws depend only on the list of prompts and the
    seed: after a kill, the same command gives the same answers.
    """
    room = np.all([speaker.has_room_for(prompts) for speaker in speakers], axis=0)
    fit = [conversation for conversation, fits in zip(prompts, room) if fits]
    if not fit:
        raise UserError("no prompt leaves room for an answer: shorten them, or lower --max_new_tokens")
    if len(fit) < len(prompts):
        warn(
            f"{len(prompts) - len(fit)} of {len(prompts)} prompts are too long for the models' context and are left out"
        )
    at_once = len(speakers) * max(1, PROMPTS_AT_ONCE // len(speakers))  # so that all give equally many
    listening = [speaker.answer_sampler(fit, at_once * count // len(speakers)) for speaker in speakers]
    sources = [speaker.source for speaker in speakers]
    there = {_prompt_key(item.prompt) for item in store.items() if all(source in sources for source in item.sources)}
    added = dropped = alike = 0
    with Progress("answers", len(fit), "prompt") as progress, on_sigterm() as stopping:
        for first in range(0, len(fit), at_once):
            if stopping():
                raise SigtermExit
            rows = range(first, min(first + at_once, len(fit)))
            new = [i for i in rows if _prompt_key(fit[i].messages) not in there]
            if new:
                key = jax.random.fold_in(jax.random.key(seed), first)
                answers = _distinct_answers(listening, rows, key, count)
                dropped += sum(count - len(answers[i]) for i in new)
                items = [
                    (
                        fit[i].name,
                        fit[i].messages,
                        list(answers[i].values()),
                        [sources[(i + j) % len(sources)] for j in answers[i]],
                    )
                    for i in new
                    if len(answers[i]) >= 2
                ]
                alike += len(new) - len(items)
                added += store.add_items(items)
            progress.update(rows[-1] + 1, {})
    say(f"answers: {added} prompts were answered, {len(fit) - added - alike} had answers already")
    if dropped:
        warn(
            f"{dropped} answers were left out, since {MAX_ATTEMPTS} attempts gave only answers that were there, and so "
            f"{alike} prompts, without two different answers: raise --temperature"
        )


def _distinct_answers(listening: Sequence[Callable], rows: range, key: Array, count: int) -> dict[int, dict[int, str]]:
    """{row: {j: answer j}}. An answer is left out if MAX_ATTEMPTS draws gave only answers that its row already has."""
    distinct: dict[int, dict[int, str]] = {i: {} for i in rows}
    for attempt in range(MAX_ATTEMPTS):
        for s, listen in enumerate(listening):
            slots = [(i, j) for i in rows for j in range(count) if (i + j) % len(listening) == s]
            each = jax.random.fold_in(jax.random.fold_in(key, attempt), s)
            for (i, j), text in zip(slots, listen([i for i, _ in slots], each)):
                if j not in distinct[i] and text not in distinct[i].values():
                    distinct[i][j] = text
        if all(len(answers) == count for answers in distinct.values()):
            break
    return {i: dict(sorted(answers.items())) for i, answers in distinct.items()}


def _prompt_key(messages: Sequence[Mapping[str, str]]) -> str:
    return json.dumps(messages, sort_keys=True)

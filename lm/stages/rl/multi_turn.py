"""How a policy answers prompts: once, or in exchanges with an environment, whose words are never trained."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.core.errors import UserError, check_at_least
from lm.core.types import Tokens
from lm.data import packing
from lm.data.conversations import Example, reward_example
from lm.data.prompts import Prompts
from lm.generate.sampler import SamplingParams, prompt_completion_rows, sample
from lm.model import Model
from lm.rewards.environments import ENVIRONMENTS, Environment
from lm.stages.context import StageContext
from lm.tokenizer import TokenizedExample, Tokenizer

REPLY_MARKER_TOKENS = 3  # of an environment's reply, not its words: its role, its end, the next answer's role


class ExchangeOptions(NamedTuple):
    """Whether an environment replies to the policy's answers, and how often."""

    environment: str = ""  # one of lm.rewards.environments', which replies to answers; what it says is never trained
    exchanges: int = 2  # answers of a row at most, where an environment replies to them
    reply_length: int = 16  # tokens of a reply at most

    def longest(self, max_new: int) -> int:
        """Sampled tokens that a row may hold, of answers of up to `max_new`."""
        return self.exchanges * max_new if self.environment else max_new

    def room(self, max_new: int) -> int:
        """Tokens that a row may hold behind its prompt: answers of up to `max_new`, and the replies between them."""
        return max_new + (self.exchanges - 1) * (max_new + self.reply_length) if self.environment else max_new

    def named_environment(self) -> Environment:
        """The environment. UserError for a name that is none, or replies without room for a word."""
        if self.environment not in ENVIRONMENTS:
            choices = ", ".join(ENVIRONMENTS)
            raise UserError(f"data.environment is {self.environment!r}; choose one of {choices}, or leave it empty")
        check_at_least(REPLY_MARKER_TOKENS + 1, "data", reply_length=self.reply_length)
        return ENVIRONMENTS[self.environment]


class SampledAnswers(NamedTuple):
    """Answers as they were sampled, before anything is known of their worth."""

    tokens: Tokens  # [B,T]
    logprobs: np.ndarray  # f32[B,T]  the sampler's
    examples: Sequence[Example]  # the row of each: its messages are those before the last answer
    texts: Sequence[str]  # the last answers
    stopped: np.ndarray  # bool[B]
    lengths: np.ndarray  # i32[B]  sampled tokens
    last_ids: Sequence[Sequence[int]]  # sampled tokens of the last answer, whose text is in `texts`


AnswerSampler = Callable[[Any, Prompts, Any], SampledAnswers]  # (lm, prompts, key) -> one answer to each


def rollout_rows(model: Model, lm, prompts, lengths, key, sampling: SamplingParams):
    """Rows of prompt and answer (`Tokens`), the sampler's log-probs on them, and the bare completions."""
    completions = sample(model, lm, prompts, lengths, key, sampling)
    return *prompt_completion_rows(prompts, lengths, completions), completions


def rollout_program(context: StageContext, sampling: SamplingParams):
    """(lm, prompts, lengths, key) -> `rollout_rows`, compiled, with the tokenizer's stop ids.

    The temperature is an argument of the program, so that the trials of a sweep share one.
    """
    sampling = sampling._replace(stop=context.tokenizer.stop_ids)
    program = context.jit(
        lambda lm, prompts, lengths, key, temperature: rollout_rows(
            context.model, lm, prompts, lengths, key, sampling._replace(temperature=temperature)
        )
    )
    return lambda lm, prompts, lengths, key: program(lm, prompts, lengths, key, sampling.temperature)


def single_turn_sampler(sampled, tokenizer: Tokenizer) -> AnswerSampler:
    """One answer to each prompt."""

    def answer(lm, rows: Prompts, key) -> SampledAnswers:
        tokens, logprobs, completions = sampled(lm, rows.ids, rows.lengths, key)
        lengths = np.asarray(completions.lengths)
        ids = [row[:n] for row, n in zip(np.asarray(completions.tokens), lengths)]
        texts, stopped = [tokenizer.decode(row) for row in ids], np.asarray(completions.stopped)
        return SampledAnswers(tokens, logprobs, rows.examples, texts, stopped, lengths, ids)

    return answer


def multi_turn_sampler(
    sampled, tokenizer: Tokenizer, environment: Environment, exchanges: int, max_new: int, reply_length: int
) -> AnswerSampler:
    """Up to `exchanges` answers a row, the environment's replies between them, which weigh nothing.

    A row ends where the environment has nothing to say or where an answer was cut off by the limit; the messages of its
    example then hold all but the last answer, its other fields stay.
    """

    def answer(lm, rows: Prompts, key) -> SampledAnswers:
        episodes = [Episode(ids[:n], example) for ids, n, example in zip(rows.ids, rows.lengths, rows.examples)]
        open_rows = list(range(len(episodes)))
        for exchange in range(exchanges):
            width = rows.ids.shape[1] + exchange * (max_new + reply_length)
            ids, lengths = np.zeros((len(episodes), width), np.int32), np.ones(len(episodes), np.int32)
            for b in open_rows:  # a closed row is sampled too, of nothing, so that every shape stays
                ids[b, : len(episodes[b].ids)], lengths[b] = episodes[b].ids, len(episodes[b].ids)
            _, _, drawn = jax.device_get(sampled(lm, ids, lengths, jax.random.fold_in(key, exchange)))
            for b in open_rows:
                n = int(drawn.lengths[b])
                episodes[b].append_answer(drawn.tokens[b, :n], drawn.logprobs[b, :n], bool(drawn.stopped[b]), tokenizer)
            open_rows = [b for b in open_rows if episodes[b].stopped]
            if exchange + 1 < exchanges:
                replies = environment([episodes[b].example for b in open_rows], [episodes[b].text for b in open_rows])
                replied = [(b, reply) for b, reply in zip(open_rows, replies, strict=True) if reply is not None]
                for b, reply in replied:
                    episodes[b].append_reply(reply, tokenizer, reply_length - REPLY_MARKER_TOKENS)
                open_rows = [b for b, _ in replied]
            if not open_rows:
                break
        length = rows.ids.shape[1] + exchanges * max_new + (exchanges - 1) * reply_length - 1
        examples = [
            TokenizedExample(np.array(episode.ids, np.int32), np.array(episode.weights, np.float32))
            for episode in episodes
        ]
        logprobs = np.zeros((len(episodes), length), np.float32)
        for b, episode in enumerate(episodes):
            logprobs[b, np.flatnonzero(episode.weights) - 1] = episode.logprobs
        return SampledAnswers(
            packing.padded_rows(examples, length),
            logprobs,
            [episode.example for episode in episodes],
            [episode.text for episode in episodes],
            np.array([episode.stopped for episode in episodes]),
            np.array([sum(map(bool, episode.weights)) for episode in episodes], np.int32),
            [episode.last_ids for episode in episodes],
        )

    return answer


class Episode:
    """A row of a conversation with an environment, while it grows."""

    def __init__(self, ids: np.ndarray, example: Example):
        self.ids, self.weights = list(ids), [0.0] * len(ids)
        self.fields, self.messages = example, list(example["messages"])
        self.logprobs: list[float] = []  # of the sampled tokens
        self.text, self.stopped, self.last_ids = "", False, []  # of the last answer

    @property
    def example(self) -> Example:
        """The row that it began with, its messages those so far."""
        return reward_example(self.messages, self.fields)

    def append_answer(self, ids, logprobs, stopped: bool, tokenizer: Tokenizer) -> None:
        """An answer of the policy."""
        self.last_ids = ids.tolist()
        self.ids += self.last_ids
        self.weights += [1.0] * len(ids)
        self.logprobs += logprobs.tolist()
        self.text, self.stopped = tokenizer.decode(ids), stopped

    def append_reply(self, text: str, tokenizer: Tokenizer, limit: int) -> None:
        """A message of the environment, its words cut to `limit` tokens, and the marker of the next answer."""
        ids = tokenizer.encode_reply("tool", text, limit)
        self.ids += ids
        self.weights += [0.0] * len(ids)
        self.messages += [{"role": "assistant", "content": self.text}, {"role": "tool", "content": text}]

"""Rollouts: the current policy answers prompts, rewards say what the answers are worth, a table shows them to
people."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.data import batches as rows_to_batches, chats, corpus as corpora, rows as packing
from lm.data.prompts import Prompts, fitting, take
from lm.environments import ENVIRONMENTS, Environment
from lm.errors import UserError, at_least
from lm.model import Model
from lm.returns import overlong
from lm.rewards import REWARDS, Reward, weighed
from lm.sample import check, joined, sample
from lm.stages.context import Batches, Context
from lm.tokenizer import Example, Tokenizer
from lm.types import Rollouts, Tokens, TrainState
from lm.update import frozen_net

MODEL = "model"  # the name of the learnt reward among `rewards`
MODEL_ALONE: Mapping[str, float] = {MODEL: 1.0}
# Roles folded into the key, above every step: an update folds its step in, and no two draws may share a key.
ROLLOUT, HELD_OUT = 2**30, 2**30 + 1


class Drawn(NamedTuple):
    """Answers as they were sampled, before anything is known of their worth."""

    tokens: Tokens  # [B,T]
    logprobs: np.ndarray  # f32[B,T]  the sampler's
    contexts: Sequence[list[dict]]  # the messages before each last answer
    texts: Sequence[str]  # the last answers
    stopped: np.ndarray  # bool[B]
    lengths: np.ndarray  # i32[B]  sampled tokens


def batches(
    context: Context,
    *,
    reward_model: str = "",
    rewards: Mapping[str, float] = MODEL_ALONE,
    pessimism: float = 0.0,
    rater: str = "",
    sources: str = "chitchat",
    turns: int = 3,
    prompt_length: int = 64,
    max_new: int = 32,
    rollouts: int = 64,
    group: int = 1,
    temperature: float = 1.0,
    cut_penalty: float = 1.0,
    overlong_buffer: int = 0,
    resample: int = 0,
    environment: str = "",
    exchanges: int = 2,
    reply_length: int = 16,
    corpus: str = "",
    text_length: int = 128,
    held_out: float = 0.02,
    held_out_rollouts: int = 128,
) -> Batches:
    """`rollouts` answers of the current policy, `group` to each prompt from `sources`, and what they are worth.

    The reward is a sum of `rewards`, by name and weight: "model" is the reward model of the workdir `reward_model` (of
    several, with commas between them: their mean less `pessimism` standard deviations), the others are lm.rewards';
    where there are several, each is logged as reward/NAME. `rater` names one that is logged as score/NAME but never
    learned from. An answer that the limit cut off loses `cut_penalty`; one within `overlong_buffer` tokens of it loses
    a share (`returns.overlong`). Prompts longer than `prompt_length` tokens are skipped and counted.

    `resample`: prompts whose answers all got the same reward teach nothing within a group; they are replaced by further
    ones, in at most so many rounds (dynamic sampling, arXiv 2503.14476). `environment`: one of lm.environments', which
    replies to an answer of the policy with up to `reply_length` tokens, for at most `exchanges` answers a row; what it
    says is context, never trained. `corpus`: adds rows of `text_length` tokens of it to each batch, one a rollout, for
    stages that go on learning from text.
    """
    model, tokenizer = context.model, context.tokenizer
    checked(model, prompt_length, max_new=max_new, temperature=temperature, rollouts=rollouts, group=group)
    at_least(1, "data", turns=turns, held_out_rollouts=held_out_rollouts, exchanges=exchanges)
    at_least(0, "data", resample=resample, overlong_buffer=overlong_buffer)
    if rater and rater not in REWARDS:
        raise UserError(f"data.rater is {rater!r}; choose one of {', '.join(REWARDS)}, or leave it empty")
    worth = weighed(reward_parts(context, rewards, reward_model, pessimism))
    watched = weighed({rater: (0.0, REWARDS[rater])} if rater else {})
    sampled = context.jit(
        lambda lm, prompts, lengths, key: rollout(
            model, lm, prompts, lengths, key, max_new=max_new, temperature=temperature, stop=tokenizer.stops
        )
    )
    answer = answers(sampled, tokenizer)
    length = prompt_length + max_new - 1
    if environment:
        world = environment_named(environment)
        answer = conversations(sampled, tokenizer, world, exchanges, max_new, reply_length)
        length += (exchanges - 1) * (max_new + reply_length)
        context.admit(length)

    def drawn(state, chosen: Prompts, key) -> Rollouts:
        rows = take(chosen, np.repeat(np.arange(len(chosen.ids)), group))
        found = answer(state.params["lm"], rows, key)
        total, parts = worth(found.contexts, found.texts)
        _, seen = watched(found.contexts, found.texts)
        scores = {f"reward/{name}": part for name, part in parts.items() if len(parts) > 1}
        scores |= {f"score/{name}": score for name, score in seen.items()}
        total = total - cut_penalty * ~found.stopped
        if overlong_buffer:
            total = total + np.asarray(overlong(found.lengths, limit=max_new, buffer=overlong_buffer))
        return Rollouts(found.tokens, np.float32(total), scores, found.stopped, found.logprobs, group=group)

    train, unseen = corpora.split(chats.prompts(chats.conversations(sources), turns=turns), held_out)
    (train, skipped), (unseen, _) = (fitting(tokenizer, side, prompt_length) for side in (train, unseen))
    prompts = rollouts // group
    order = rows_to_batches.batches(np.arange(len(train.ids)), batch_size=prompts, seed=context.seed)
    text = text_batches(context, corpus, text_length, rollouts, held_out) if corpus else None
    about = {"length": length, "prompts": len(train.ids), "held_out_prompts": len(unseen.ids), "skipped": skipped}

    def held_out_batches(state):
        for start in range(0, min(held_out_rollouts // group, len(unseen.ids)) - prompts + 1, prompts):
            key = jax.random.fold_in(jax.random.fold_in(state.key, HELD_OUT), start)
            batch = drawn(state, take(unseen, np.arange(start, start + prompts)), key)
            yield batch.replace(text=text(0)) if text else batch

    def train_batch(state, i):
        key = jax.random.fold_in(jax.random.fold_in(state.key, ROLLOUT), i)
        batch = drawn(state, take(train, order(i * (resample + 1))), key)
        for again in range(1, resample + 1):
            if not alike(batch).any():
                break
            further = drawn(state, take(train, order(i * (resample + 1) + again)), jax.random.fold_in(key, again))
            batch = refilled(batch, further)
        return batch.replace(text=text(i)) if text else batch

    return Batches(train_batch, held_out_batches, about, table(context, temperature))


def checked(model: Model, prompt: int, *, max_new: int, temperature: float, rollouts: int, group: int) -> None:
    """UserError for sizes that cannot be sampled or learnt from."""
    check(model, prompt, max_new=max_new, temperature=temperature, top_k=0, top_p=1.0)
    if temperature == 0:
        raise UserError(
            "data.temperature is 0: greedy answers do not explore, and their log-probs are all 0; use e.g. 1.0"
        )
    at_least(1, "data", rollouts=rollouts, group=group)
    if rollouts % group:
        raise UserError(f"data.rollouts {rollouts} is no multiple of data.group {group}: change one of the two")


def reward_parts(
    context: Context, rewards: Mapping[str, float], reward_model: str, pessimism: float
) -> dict[str, tuple[float, Reward]]:
    """Weight and function of each reward whose weight is not 0. UserError for a name that is none."""
    for name in rewards:
        if name != MODEL and name not in REWARDS:
            raise UserError(f"data.rewards.{name} is no reward; choose among {MODEL}, {', '.join(REWARDS)}")
    if not any(rewards.values()):
        raise UserError(f"data.rewards gives no reward a weight: there is nothing to learn; set e.g. {MODEL} to 1.0")
    return {
        name: (weight, context.reward_from(reward_model, pessimism) if name == MODEL else REWARDS[name])
        for name, weight in rewards.items()
        if weight
    }


def environment_named(name: str) -> Environment:
    if name not in ENVIRONMENTS:
        raise UserError(f"data.environment is {name!r}; choose one of {', '.join(ENVIRONMENTS)}, or leave it empty")
    return ENVIRONMENTS[name]


def rollout(model: Model, lm, prompts, lengths, key, **options):
    """Rows of prompt and answer (`Tokens`), the sampler's log-probs on them, and the bare completions."""
    completions = sample(model, lm, prompts, lengths, key, **options)
    return *joined(prompts, lengths, completions), completions


Answer = Callable[[Any, Prompts, Any], Drawn]  # (lm, prompts, key) -> one answer to each


def answers(sampled, tokenizer: Tokenizer) -> Answer:
    """One answer to each prompt."""

    def answer(lm, rows: Prompts, key) -> Drawn:
        tokens, logprobs, completions = sampled(lm, rows.ids, rows.lengths, key)
        lengths = np.asarray(completions.lengths)
        texts = [tokenizer.decode(row[:n]) for row, n in zip(np.asarray(completions.tokens), lengths)]
        return Drawn(tokens, logprobs, rows.contexts, texts, np.asarray(completions.stopped), lengths)

    return answer


def conversations(
    sampled, tokenizer: Tokenizer, environment: Environment, exchanges: int, max_new: int, reply_length: int
) -> Answer:
    """Up to `exchanges` answers a row, the environment's replies between them, which weigh nothing.

    A row ends where the environment has nothing to say or where an answer was cut off by the limit; its `context` then
    holds all but the last answer.
    """

    def answer(lm, rows: Prompts, key) -> Drawn:
        told = [Told(list(ids[:n]), [0.0] * n, list(c)) for ids, n, c in zip(rows.ids, rows.lengths, rows.contexts)]
        open_rows = list(range(len(told)))
        for exchange in range(exchanges):
            width = rows.ids.shape[1] + exchange * (max_new + reply_length)
            ids, lengths = np.zeros((len(told), width), np.int32), np.ones(len(told), np.int32)
            for b in open_rows:  # a closed row is sampled too, of nothing, so that every shape stays
                ids[b, : len(told[b].ids)], lengths[b] = told[b].ids, len(told[b].ids)
            _, _, drawn = jax.device_get(sampled(lm, ids, lengths, jax.random.fold_in(key, exchange)))
            for b in open_rows:
                n = int(drawn.lengths[b])
                told[b].hear(drawn.tokens[b, :n], drawn.logprobs[b, :n], bool(drawn.stopped[b]), tokenizer)
            open_rows = [b for b in open_rows if told[b].stopped]
            if exchange + 1 < exchanges:
                replies = environment([told[b].messages for b in open_rows], [told[b].text for b in open_rows])
                replied = [(b, reply) for b, reply in zip(open_rows, replies, strict=True) if reply is not None]
                for b, reply in replied:
                    told[b].reply(reply, tokenizer, reply_length)
                open_rows = [b for b, _ in replied]
            if not open_rows:
                break
        length = rows.ids.shape[1] + exchanges * max_new + (exchanges - 1) * reply_length - 1
        examples = [Example(np.array(t.ids, np.int32), np.array(t.weights, np.float32)) for t in told]
        logprobs = np.zeros((len(told), length), np.float32)
        for b, t in enumerate(told):
            logprobs[b, np.flatnonzero(t.weights) - 1] = t.logprobs
        return Drawn(
            packing.pad(examples, length),
            logprobs,
            [t.messages for t in told],
            [t.text for t in told],
            np.array([t.stopped for t in told]),
            np.array([sum(map(bool, t.weights)) for t in told], np.int32),
        )

    return answer


class Told:
    """A row of a conversation with an environment, while it grows."""

    def __init__(self, ids: list[int], weights: list[float], messages: list[dict]):
        self.ids, self.weights, self.messages = ids, weights, messages
        self.logprobs: list[float] = []  # of the sampled tokens
        self.text, self.stopped = "", False

    def hear(self, ids, logprobs, stopped: bool, tokenizer: Tokenizer) -> None:
        """An answer of the policy."""
        self.ids += ids.tolist()
        self.weights += [1.0] * len(ids)
        self.logprobs += logprobs.tolist()
        self.text, self.stopped = tokenizer.decode(ids), stopped

    def reply(self, text: str, tokenizer: Tokenizer, limit: int) -> None:
        """A message of the environment, cut to `limit` tokens with its markers, and the marker of the next answer."""
        content = tokenizer.encode(text)[: limit - 3]
        ids = [tokenizer.roles["tool"], *content, tokenizer.end, tokenizer.roles["assistant"]]
        self.ids += ids
        self.weights += [0.0] * len(ids)
        self.messages += [{"role": "assistant", "content": self.text}, {"role": "tool", "content": text}]


def alike(batch: Rollouts) -> np.ndarray:
    """bool[prompts]: whether all answers of the group got the same reward."""
    rewards = np.asarray(batch.rewards).reshape(-1, batch.group)
    return rewards.max(axis=1) == rewards.min(axis=1)


def refilled(batch: Rollouts, further: Rollouts) -> Rollouts:
    """The batch with groups of equal rewards replaced by such of `further` as are not, as far as these go."""
    free, useful = np.flatnonzero(alike(batch)), np.flatnonzero(~alike(further))
    free = free[: len(useful)]

    def replaced(old, new):
        old, new = (np.array(x).reshape(-1, batch.group, *x.shape[1:]) for x in (old, new))
        old[free] = new[useful[: len(free)]]
        return old.reshape(-1, *old.shape[2:])

    return jax.tree.map(replaced, batch, further)


def text_batches(context: Context, corpus: str, length: int, rows: int, held_out: float) -> Callable[[int], Tokens]:
    """i -> that many rows of text, as in pretraining; none of its held-out documents."""
    context.admit(length)
    seen, _ = corpora.split(corpora.documents(corpus), held_out)
    return rows_to_batches.batches(
        packing.documents(context.tokenizer, [document.text for document in seen], length),
        batch_size=rows,
        seed=context.seed,
    )


def table(context: Context, temperature: float) -> Callable[[TrainState, Rollouts, int], Iterator[dict[str, Any]]]:
    """(state, batch, rows) -> the first rows of a batch for people: prompt, response, each reward, KL to the
    reference."""
    model, tokenizer = context.model, context.tokenizer
    logprobs = context.jit(lambda ref, tokens: model.token_logprobs(ref, tokens, temperature=temperature))

    def shown(state: TrainState, batch: Rollouts, rows: int) -> Iterator[dict[str, Any]]:
        part = jax.device_get(jax.tree.map(lambda x: x[:rows], batch.replace(text=None)))
        w = part.tokens.weights
        ref = np.asarray(logprobs(frozen_net(state), part.tokens))
        for b in range(len(w)):
            trained = w[b] > 0
            first, *_, last = np.flatnonzero(trained).repeat(2)
            yield {
                "prompt": "".join(tokenizer.pieces(part.tokens.inputs[b, : first + 1])),
                "response": "".join(tokenizer.pieces(part.tokens.targets[b, first : last + 1])),
                "reward": float(part.rewards[b]),
                **{name: float(score[b]) for name, score in part.scores.items()},
                "kl": float(np.sum((part.sampler_logprobs[b] - ref[b]) * trained)),
                "tokens": int(trained.sum()),
                "stopped": bool(part.stopped[b]),
            }

    return shown

"""Rollouts: the current policy answers prompts, rewards say what answers are worth, a table shows them to people."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm.core.errors import UserError, check_at_least
from lm.core.types import Rollouts, Tokens, TrainState
from lm.data.mixture import parse_sources
from lm.data.mixture_rows import source_order, text_rows
from lm.data.origins import RowOrigin, SegmentOrigin, source_of
from lm.data.prompt_sources import PromptSourceOptions, PromptSources, prompt_sources
from lm.data.prompts import Prompts, prompts_at
from lm.data.sources import BUILT_IN_KINDS
from lm.data.token_rows import mixed_rows
from lm.data.tokenized_sources import TokenizedSource, tokenized_texts
from lm.generate.sampler import SamplingParams, check_sampling
from lm.model import Model
from lm.rewards.reward_model import reward_row_length
from lm.stages.context import Batches, StageContext
from lm.stages.rl.multi_turn import (
    AnswerSampler,
    ExchangeOptions,
    multi_turn_sampler,
    rollout_program,
    single_turn_sampler,
)
from lm.stages.rl.policy_gradient import SQUARED
from lm.stages.rl.rollout_rewards import AnswerRewards, RewardOptions, answer_rewards

# Roles folded into the key, above every step: an update folds its step in, and no two draws may share a key.
ROLLOUT_KEY, HELD_OUT_KEY = 2**30, 2**30 + 1


def batches(
    context: StageContext,
    *,
    prompt_options: PromptSourceOptions = PromptSourceOptions(),
    reward_options: RewardOptions = RewardOptions(),
    exchange_options: ExchangeOptions = ExchangeOptions(),
    max_new: int = 32,
    rollouts: int = 64,
    group: int = 1,
    temperature: float = 1.0,
    resample_rounds: int = 0,
    corpus: str | Sequence[Mapping[str, Any]] = "",
    text_length: int = 128,
    held_out_rollouts: int = 128,
) -> Batches:
    """`rollouts` answers of the current policy, `group` to each prompt, and what they are worth.

    Prompts: lm.data.prompt_sources. Rewards: lm.stages.rl.rollout_rewards. Exchanges with an environment:
    lm.stages.rl.multi_turn. An answer has up to `max_new` tokens, sampled at `temperature`.

    `resample_rounds`: prompts whose answers all got the same reward are replaced by further ones, in at most so many
    rounds (dynamic sampling). `corpus`: adds rows of `text_length` tokens of it to each batch, one a rollout, for
    stages that go on learning from text; text, or a list like `sources`, split and drawn as the prompts are.
    """
    sampling = SamplingParams(max_new, temperature)
    prompt_length = prompt_options.prompt_length
    check_rollout_options(context.model, prompt_length, sampling, rollouts=rollouts, group=group)
    check_at_least(1, "data", turns=prompt_options.turns, held_out_rollouts=held_out_rollouts)
    check_at_least(0, "data", resample_rounds=resample_rounds)
    room = exchange_options.room(max_new)  # sampled and replied tokens that a row may hold behind its prompt
    answer = answer_sampler(context, exchange_options, sampling, length=prompt_length + room - 1)
    rewards = answer_rewards(
        context, reward_options, length=reward_row_length(prompt_length, room), limit=exchange_options.longest(max_new)
    )
    sample = rollout_sampler(context, answer, rewards, group=group)
    size = rollouts // group  # prompts of a batch
    prompts = prompt_sources(
        context.tokenizer, prompt_options, batch_size=size, seed=context.seed, draws_per_step=resample_rounds + 1
    )
    count = held_out_prompts(
        len(prompts.held_out.ids), held_out_rollouts=held_out_rollouts, rollouts=rollouts, group=group
    )
    split = prompt_options.held_out, prompt_options.source_temperature
    text, held_out_text = text_batches(context, corpus, text_length, rollouts, *split)
    train = training_rollouts(sample, prompts, resample_rounds)

    def held_out_batches(state: TrainState) -> Iterator[Rollouts]:
        for start, part in prompts.held_out_batches(count, size):
            batch = with_squared_scores(sample(state, part, HELD_OUT_KEY, start))
            yield batch.replace(text_tokens=held_out_text(start // size))

    origins = prompt_origins(prompts, writer="policy")
    return Batches(
        lambda state, i: train(state, i).replace(text_tokens=text(i)),
        held_out_batches,
        {"length": prompt_length + room - 1, **prompts.counts},
        rollout_table(context, temperature),
        row_origins=lambda state, batch, i: origins(batch.tokens),
        truncation=prompt_truncation(prompts.names, prompt_options, max_new=max_new),
    )


# (state, prompts, role of the key, number of the draw) -> answers to the prompts, with their rewards
RolloutSampler = Callable[[TrainState, Prompts, int, int], Rollouts]


def rollout_sampler(
    context: StageContext, answer: AnswerSampler, rewards: AnswerRewards, *, group: int
) -> RolloutSampler:
    """Samples `group` answers of the policy to each prompt, and measures what they are worth."""

    def sample(state: TrainState, prompts: Prompts, role: int, number: int) -> Rollouts:
        key = jax.random.fold_in(jax.random.fold_in(state.key, role), number)
        rows = prompts_at(prompts, np.repeat(np.arange(len(prompts.ids)), group))
        with context.sampling_phase(state):
            answers = answer(state.params["lm"], rows, key)
        with context.timed_phase("reward"):
            total, token_rewards, scores = rewards(answers)
        return Rollouts(answers.tokens, total, scores, answers.stopped, answers.logprobs, token_rewards, group=group)

    return sample


def training_rollouts(
    sample: RolloutSampler, prompts: PromptSources, resample_rounds: int
) -> Callable[[TrainState, int], Rollouts]:
    """(state, i) -> training batch i.

    Groups of equal rewards teach nothing within a group; they are replaced by groups of further prompts, in at most
    `resample_rounds` rounds (dynamic sampling, Yu et al. 2025, arXiv 2503.14476); row metric "rounds" counts them.
    """

    def batch_number(state: TrainState, number: int) -> Rollouts:
        return sample(state, prompts.train_batch(number), ROLLOUT_KEY, number)

    def train_batch(state: TrainState, i: int) -> Rollouts:
        first = i * (resample_rounds + 1)  # every round has prompts and keys of its own
        batch, rounds = batch_number(state, first), 1
        while rounds <= resample_rounds and equal_reward_groups(batch).any():
            batch, rounds = resampled_batch(batch, batch_number(state, first + rounds)), rounds + 1
        if not resample_rounds:
            return batch
        rounds_by_row = np.full(len(batch.rewards), rounds, np.float32)
        return batch.replace(row_metrics={**batch.row_metrics, "rounds": rounds_by_row})

    return train_batch


def with_squared_scores(batch: Rollouts) -> Rollouts:
    """The batch with the squares of reward and scores among its row metrics: their means give standard errors."""
    scores = {"reward": batch.rewards, **{n: x for n, x in batch.row_metrics.items() if n.startswith("score/")}}
    squares = {f"{name}{SQUARED}": np.square(np.asarray(values)) for name, values in scores.items()}
    return batch.replace(row_metrics={**batch.row_metrics, **squares})


def prompt_truncation(sources: Sequence[str], options: PromptSourceOptions, *, max_new: int) -> str:
    """What becomes of prompts and answers that are longer, in words."""
    return (
        f"{','.join(sources)}: prompts of the last {options.turns} messages (rows of files whole), one longer than "
        f"{options.prompt_length} tokens left out; an answer is cut off after {max_new} tokens"
    )


def prompt_origins(prompts: PromptSources, *, writer: str) -> Callable[[Tokens], list[RowOrigin]]:
    """rows -> where the training prompt of each is from, found by its ids."""
    train = prompts.train

    def origins(tokens: Tokens) -> list[RowOrigin]:
        names = {tuple(message["content"] for message in c.messages): c.name for c in prompts.distinct}
        numbers = {ids[:n].tobytes(): k for k, (ids, n) in enumerate(zip(train.ids, train.lengths))}
        rows = []
        for inputs, weights in zip(np.asarray(tokens.inputs, np.int32), np.asarray(tokens.weights)):
            k = numbers[inputs[: int(np.argmax(weights > 0)) + 1].tobytes()]
            name = names[tuple(message["content"] for message in train.examples[k]["messages"])]
            rows.append(RowOrigin([SegmentOrigin(name, source_of(name, prompts.names), document=k)], k, writer=writer))
        return rows

    return origins


def check_rollout_options(
    model: Model, prompt_length: int, sampling: SamplingParams, *, rollouts: int, group: int
) -> None:
    """UserError for sizes that cannot be sampled or learned from."""
    check_sampling(model, prompt_length, sampling)
    if sampling.temperature == 0:
        raise UserError(
            "data.temperature is 0: greedy answers do not explore, and their log-probs are all 0; use e.g. 1.0"
        )
    check_at_least(1, "data", rollouts=rollouts, group=group)
    if rollouts % group:
        raise UserError(f"data.rollouts {rollouts} is no multiple of data.group {group}: change one of the two")


def held_out_prompts(there: int, *, held_out_rollouts: int, rollouts: int, group: int = 1) -> int:
    """How many of the held-out prompts that are `there` are answered: whole batches of them, `group` rollouts each.

    UserError, which names what is too small, where that is not one batch."""
    if held_out_rollouts < rollouts:
        raise UserError(
            f"data.held_out_rollouts is {held_out_rollouts}, no whole batch of data.rollouts {rollouts}: raise it to "
            f"{rollouts} at least, or lower data.rollouts"
        )
    batch = rollouts // group
    if there < batch:
        raise UserError(
            f"the held-out side has {there} prompts, no whole batch of {batch} (data.rollouts {rollouts}, {group} to a "
            "prompt): raise data.held_out, or lower data.rollouts"
        )
    return min(held_out_rollouts // group, there) // batch * batch


def answer_sampler(
    context: StageContext, options: ExchangeOptions, sampling: SamplingParams, *, length: int
) -> AnswerSampler:
    """How the policy answers: once or, with an environment, in exchanges, in rows of up to `length` tokens."""
    check_at_least(1, "data", exchanges=options.exchanges)
    if options.environment:
        context.check_length(length)
    sampled = rollout_program(context, sampling)
    if not options.environment:
        return single_turn_sampler(sampled, context.tokenizer)
    return multi_turn_sampler(
        sampled,
        context.tokenizer,
        options.named_environment(),
        options.exchanges,
        sampling.max_new,
        options.reply_length,
    )


def equal_reward_groups(batch: Rollouts) -> np.ndarray:
    """bool[prompts]: whether all answers of the group got the same reward."""
    rewards = np.asarray(batch.rewards).reshape(-1, batch.group)
    return rewards.max(axis=1) == rewards.min(axis=1)


def resampled_batch(batch: Rollouts, further: Rollouts) -> Rollouts:
    """The batch with groups of equal rewards replaced by such of `further` as are not, as far as these go."""
    free, useful = np.flatnonzero(equal_reward_groups(batch)), np.flatnonzero(~equal_reward_groups(further))
    free = free[: len(useful)]

    def with_replacements(old, new):
        old, new = (np.array(x).reshape(-1, batch.group, *x.shape[1:]) for x in (old, new))
        old[free] = new[useful[: len(free)]]
        return old.reshape(-1, *old.shape[2:])

    return jax.tree.map(with_replacements, batch, further)


TextBatches = Callable[[int], Tokens | None]


def text_batches(
    context: StageContext,
    corpus: str | Sequence[Mapping[str, Any]],
    length: int,
    rows: int,
    held_out: float,
    temperature: float = 1.0,
) -> tuple[TextBatches, TextBatches]:
    """i -> that many rows of text, for training and held out, split as in pretraining; None without a corpus."""
    if not corpus:
        return (lambda i: None), (lambda i: None)
    context.check_length(length)
    sources = tokenized_texts(context.tokenizer, parse_sources(corpus, BUILT_IN_KINDS, option="data.corpus"), held_out)

    def batches_of(sources: Sequence[TokenizedSource], documents: Sequence[np.ndarray]) -> TextBatches:
        packed = [text_rows(*each, length, "stream") for each in zip(sources, documents)]
        order = source_order(sources, packed, temperature=temperature, batch_size=rows, seed=context.seed)
        return lambda i: mixed_rows(packed, order(i))

    held_out_sources = [source for source in sources if len(source.held_out)]
    return (
        batches_of(sources, [source.train for source in sources]),
        batches_of(held_out_sources, [source.held_out for source in held_out_sources]),
    )


def rollout_table(
    context: StageContext, temperature: float
) -> Callable[[TrainState, Rollouts, int], Iterator[dict[str, Any]]]:
    """(state, batch, rows) -> the first rows of a batch for people: prompt, response, each reward, KL to the
    reference."""
    model, tokenizer = context.model, context.tokenizer
    logprobs = context.jit(lambda ref, tokens, temperature: model.token_logprobs(ref, tokens, temperature=temperature))

    def table_rows(state: TrainState, batch: Rollouts, rows: int) -> Iterator[dict[str, Any]]:
        part = jax.device_get(jax.tree.map(lambda x: x[:rows], batch.replace(text_tokens=None)))
        w = part.tokens.weights
        ref = np.asarray(logprobs(state.frozen["ref"], part.tokens, temperature))
        for b in range(len(w)):
            trained = w[b] > 0
            first, *_, last = np.flatnonzero(trained).repeat(2)
            yield {
                "prompt": "".join(tokenizer.pieces(part.tokens.inputs[b, : first + 1])),
                "response": "".join(tokenizer.pieces(part.tokens.targets[b, first : last + 1])),
                "reward": float(part.rewards[b]),
                **{name: float(score[b]) for name, score in part.row_metrics.items()},
                "kl": float(np.sum((part.sampler_logprobs[b] - ref[b]) * trained)),
                "tokens": int(trained.sum()),
                "stopped": bool(part.stopped[b]),
            }

    return table_rows

"""Rollouts: the current policy answers prompts, rewards say what answers are worth, a table shows them to people."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm.core.errors import UserError, check_at_least
from lm.core.types import Rollouts, Tokens, TrainState
from lm.data.conversations import Conversation
from lm.data.loading import NO_COLUMNS
from lm.data.mixture import parse_sources
from lm.data.mixture_rows import source_order, text_rows
from lm.data.origins import RowOrigin, SegmentOrigin, source_of
from lm.data.prompt_sources import prompt_sources
from lm.data.prompts import Prompts, prompts_at
from lm.data.sources import BUILT_IN_KINDS
from lm.data.token_rows import mixed_rows
from lm.data.tokenized_sources import TokenizedSource, tokenized_texts
from lm.generate.sampler import SamplingParams, check_sampling
from lm.losses.advantages import overlong_penalty
from lm.model import Model
from lm.rewards import Reward, WeightedRewards, named_reward, reward_form, reward_weights, weighted_reward
from lm.rewards.environments import ENVIRONMENTS
from lm.rewards.reward_model import reward_row_length
from lm.stages.context import Batches, StageContext
from lm.stages.rl.multi_turn import (
    REPLY_MARKER_TOKENS,
    AnswerSampler,
    SampledAnswers,
    multi_turn_sampler,
    rollout_program,
    single_turn_sampler,
)
from lm.stages.rl.policy_gradient import SQUARED
from lm.tokenizer import Tokenizer

REWARD_MODEL_NAME = "model"  # the name of the learnt reward among `rewards`
REWARD_MODEL_ONLY: Mapping[str, float] = {REWARD_MODEL_NAME: 1.0}
# Roles folded into the key, above every step: an update folds its step in, and no two draws may share a key.
ROLLOUT_KEY, HELD_OUT_KEY = 2**30, 2**30 + 1


def batches(
    context: StageContext,
    *,
    reward_model: str = "",
    rewards: Mapping[str, float] | str = REWARD_MODEL_ONLY,
    pessimism: float = 0.0,
    rater: str = "",
    reward_timeout: float = 0.0,
    sources: str | Sequence[Mapping[str, Any]] = "chitchat",
    columns: Mapping[str, str] = NO_COLUMNS,
    skip_bad_rows: int = 0,
    turns: int = 3,
    prompt_length: int = 64,
    max_new: int = 32,
    rollouts: int = 64,
    group: int = 1,
    temperature: float = 1.0,
    truncation_penalty: float = 1.0,
    overlong_buffer: int = 0,
    resample_rounds: int = 0,
    environment: str = "",
    exchanges: int = 2,
    reply_length: int = 16,
    corpus: str | Sequence[Mapping[str, Any]] = "",
    text_length: int = 128,
    source_temperature: float = 1.0,
    held_out: float = 0.02,
    held_out_rollouts: int = 128,
) -> Batches:
    """`rollouts` answers of the current policy, `group` to each prompt from `sources`, and what they are worth.

    `sources` and `corpus`: text, or lists of {source, weight, kind, epochs} that are mixed prompt by prompt and row by
    row (see data.mixture); where none of a list has a weight, by size^(1/`source_temperature`).
    `columns`, `skip_bad_rows`: see lm.data.loading; a row's other fields go to the rewards.

    The reward is a sum of `rewards`, by name and weight, or as text, "rule=1.0,my_rewards.py:accuracy=2.0": "model" is
    the reward model of the workdir `reward_model` (of several, with commas between them: their mean less `pessimism`
    standard deviations), the others are lm.rewards.REWARDS, or functions of one's own, file.py:function or
    package.module:function (lm.rewards tells their forms); where there are several, each is logged as reward/NAME.
    `rater` names one that is logged as score/NAME but never learned from. `reward_timeout`: seconds that one call of a
    function of one's own may take; 0: no limit. A reward per token goes to Rollouts.token_rewards: PPO and REINFORCE++
    leave it with its token, all others sum it over the answer. An answer that the limit cut off loses
    `truncation_penalty`; one within `overlong_buffer` tokens of the limit loses a share of 1
    (lm.losses.advantages.overlong_penalty). Prompts longer than `prompt_length` tokens, and those that came before, are
    left out and counted.

    `resample_rounds`: prompts whose answers all got the same reward teach nothing within a group; they are replaced by
    further ones, in at most so many rounds (dynamic sampling, arXiv 2503.14476). `environment`: one of
    lm.rewards.environments', which replies to an answer of the policy with up to `reply_length` tokens, for at most
    `exchanges` answers a row; what it says is context, never trained. `corpus`: adds rows of `text_length` tokens of it
    to each batch, one a rollout, for stages that go on learning from text.
    """
    model, tokenizer = context.model, context.tokenizer
    sampling = SamplingParams(max_new, temperature)
    check_rollout_options(model, prompt_length, sampling, rollouts=rollouts, group=group)
    check_at_least(1, "data", turns=turns, held_out_rollouts=held_out_rollouts, exchanges=exchanges)
    check_at_least(0, "data", resample_rounds=resample_rounds, overlong_buffer=overlong_buffer)
    more = (exchanges - 1) * (max_new + reply_length) if environment else 0
    length, longest = prompt_length + max_new - 1 + more, max_new  # tokens of a row, and sampled ones in it
    if environment:
        longest = exchanges * max_new
        context.check_length(length)
    answer = answer_sampler(context, environment, sampling, exchanges=exchanges, reply_length=reply_length)
    parts = reward_parts(
        context,
        reward_weights(rewards, "data.rewards"),
        reward_model,
        pessimism,
        reward_row_length(prompt_length, max_new + more),
    )
    worth = rollout_rewards(tokenizer, parts, rater, reward_timeout)

    def drawn(state, prompts: Prompts, role: int, number: int) -> Rollouts:
        key = jax.random.fold_in(jax.random.fold_in(state.key, role), number)
        rows = prompts_at(prompts, np.repeat(np.arange(len(prompts.ids)), group))
        with context.sampling_phase(state):
            found = answer(state.params["lm"], rows, key)
        with context.timed_phase("reward"):
            total, token_rewards, scores = worth(found)
        total = total - truncation_penalty * ~found.stopped
        if overlong_buffer:
            total = total + np.asarray(overlong_penalty(found.lengths, limit=longest, buffer=overlong_buffer))
        return Rollouts(
            found.tokens, np.float32(total), scores, found.stopped, found.logprobs, token_rewards, group=group
        )

    prompts = rollouts // group
    found = prompt_sources(
        tokenizer,
        sources,
        columns=columns,
        skip_bad_rows=skip_bad_rows,
        turns=turns,
        prompt_length=prompt_length,
        held_out=held_out,
        batch_size=prompts,
        seed=context.seed,
        temperature=source_temperature,
        draws_per_step=resample_rounds + 1,
    )
    train, unseen, order = found.train, found.held_out, found.drawn
    asked = held_out_prompts(len(unseen.ids), held_out_rollouts=held_out_rollouts, rollouts=rollouts, group=group)
    text, unseen_text = text_batches(context, corpus, text_length, rollouts, held_out, source_temperature)
    about = {"length": length, **found.counts}

    def held_out_batches(state):
        for start in range(0, asked, prompts):
            part = prompts_at(unseen, np.arange(start, start + prompts))
            batch = with_squared_scores(drawn(state, part, HELD_OUT_KEY, start))
            yield batch.replace(text_tokens=unseen_text(start // prompts))

    def train_batch(state, i):
        first = i * (resample_rounds + 1)  # every round has prompts and keys of its own
        batch, rounds = drawn(state, prompts_at(train, order(first)), ROLLOUT_KEY, first), 1
        while rounds <= resample_rounds and equal_reward_groups(batch).any():
            number = first + rounds
            batch, rounds = (
                resampled_batch(batch, drawn(state, prompts_at(train, order(number)), ROLLOUT_KEY, number)),
                rounds + 1,
            )
        if resample_rounds:
            batch = batch.replace(row_metrics={**batch.row_metrics, "rounds": np.full(rollouts, rounds, np.float32)})
        return batch.replace(text_tokens=text(i))

    origins = prompt_origins(train, found.distinct, found.names, writer="policy")
    return Batches(
        train_batch,
        held_out_batches,
        about,
        rollout_table(context, temperature),
        row_origins=lambda state, batch, i: origins(batch.tokens),
        truncation=prompt_truncation(",".join(found.names), turns=turns, prompt_length=prompt_length, max_new=max_new),
    )


def with_squared_scores(batch: Rollouts) -> Rollouts:
    """The batch with the squares of reward and scores among its row metrics: their means give standard errors."""
    scores = {"reward": batch.rewards, **{n: x for n, x in batch.row_metrics.items() if n.startswith("score/")}}
    squares = {f"{name}{SQUARED}": np.square(np.asarray(values)) for name, values in scores.items()}
    return batch.replace(row_metrics={**batch.row_metrics, **squares})


def prompt_truncation(sources: str, *, turns: int, prompt_length: int, max_new: int) -> str:
    """What becomes of prompts and answers that are longer, in words."""
    return (
        f"{sources}: prompts of the last {turns} messages (rows of files whole), one longer than {prompt_length} "
        f"tokens left out; an answer is cut off after {max_new} tokens"
    )


def prompt_origins(
    prompts: Prompts, conversations: Sequence[Conversation], sources: Sequence[str], *, writer: str
) -> Callable[[Tokens], list[RowOrigin]]:
    """rows -> where the prompt of each is from, found by its ids. `conversations` hold those of the prompts."""

    def origins(tokens: Tokens) -> list[RowOrigin]:
        names = {tuple(message["content"] for message in c.messages): c.name for c in conversations}
        places = {ids[:n].tobytes(): k for k, (ids, n) in enumerate(zip(prompts.ids, prompts.lengths))}
        found = []
        for inputs, weights in zip(np.asarray(tokens.inputs, np.int32), np.asarray(tokens.weights)):
            k = places[inputs[: int(np.argmax(weights > 0)) + 1].tobytes()]
            name = names[tuple(message["content"] for message in prompts.examples[k]["messages"])]
            found.append(RowOrigin([SegmentOrigin(name, source_of(name, sources), document=k)], k, writer=writer))
        return found

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
    context: StageContext, environment: str, sampling: SamplingParams, *, exchanges: int, reply_length: int
) -> AnswerSampler:
    """How the policy answers: once or, with the environment of this name, in exchanges."""
    sampled, tokenizer = rollout_program(context, sampling), context.tokenizer
    if not environment:
        return single_turn_sampler(sampled, tokenizer)
    if environment not in ENVIRONMENTS:
        raise UserError(
            f"data.environment is {environment!r}; choose one of {', '.join(ENVIRONMENTS)}, or leave it empty"
        )
    check_at_least(REPLY_MARKER_TOKENS + 1, "data", reply_length=reply_length)
    return multi_turn_sampler(sampled, tokenizer, ENVIRONMENTS[environment], exchanges, sampling.max_new, reply_length)


def rollout_rewards(
    tokenizer: Tokenizer, parts: Mapping[str, tuple[float, Reward]], rater: str, timeout: float
) -> Callable[[SampledAnswers], tuple[np.ndarray, np.ndarray | None, dict[str, np.ndarray]]]:
    """Answers -> their reward f32[B], what of it belongs to single tokens f32[B,T] (None: nothing), and what is logged
    beside it: its parts where there are several, the rater's."""
    check_at_least(0, "data", reward_timeout=timeout)
    watching = {rater: (0.0, named_reward(rater, "data.rater"))} if rater else {}
    worth, watched = (weighted_reward(each, timeout=timeout) for each in (parts, watching))
    needs_tokens = any(reward_form(reward, name).per_token for name, (_, reward) in {**parts, **watching}.items())

    def judged(found: SampledAnswers):
        tokens = [tokenizer.pieces(ids) for ids in found.last_ids] if needs_tokens else ()
        said: WeightedRewards = worth(found.examples, found.texts, tokens)
        seen = watched(found.examples, found.texts, tokens).parts
        labels = reward_labels(parts) if len(parts) > 1 else {}
        scores = {f"reward/{label}": said.parts[name] for name, label in labels.items()}
        scores |= {f"score/{label}": seen[name] for name, label in reward_labels(watching).items()}
        on_tokens = None if said.token_rewards is None else answer_token_rewards(found.tokens, said.token_rewards)
        return said.total, on_tokens, scores

    return judged


def answer_token_rewards(tokens: Tokens, token_rewards: Sequence[np.ndarray]) -> np.ndarray:
    """f32[B,T]: the rewards of each answer's tokens at the positions that predict them, the last sampled ones of a
    row."""
    weights = np.asarray(tokens.weights)
    found = np.zeros(weights.shape, np.float32)
    for row, values in enumerate(token_rewards):
        sampled = np.flatnonzero(weights[row] > 0)
        found[row, sampled[len(sampled) - len(values) :]] = values
    return found


def reward_labels(names: Iterable[str]) -> dict[str, str]:
    """What each reward is called in metrics: itself, or the function of a file; whole where two would be alike."""
    short = {name: name.rpartition(":")[2] for name in names}
    return {name: label if list(short.values()).count(label) == 1 else name for name, label in short.items()}


def reward_parts(
    context: StageContext, rewards: Mapping[str, float], reward_model: str, pessimism: float, longest: int
) -> dict[str, tuple[float, Reward]]:
    """Weight and function of each reward whose weight is not 0. UserError for a name that is none."""
    functions = {
        name: named_reward(name, "the name in data.rewards", (REWARD_MODEL_NAME,))
        for name in rewards
        if name != REWARD_MODEL_NAME
    }
    if not any(rewards.values()):
        raise UserError(
            f"data.rewards gives no reward a weight: there is nothing to learn; set e.g. {REWARD_MODEL_NAME} to 1.0"
        )
    return {
        name: (
            weight,
            context.load_reward_model(reward_model, pessimism, longest)
            if name == REWARD_MODEL_NAME
            else functions[name],
        )
        for name, weight in rewards.items()
        if weight
    }


def equal_reward_groups(batch: Rollouts) -> np.ndarray:
    """bool[prompts]: whether all answers of the group got the same reward."""
    rewards = np.asarray(batch.rewards).reshape(-1, batch.group)
    return rewards.max(axis=1) == rewards.min(axis=1)


def resampled_batch(batch: Rollouts, further: Rollouts) -> Rollouts:
    """The batch with groups of equal rewards replaced by such of `further` as are not, as far as these go."""
    free, useful = np.flatnonzero(equal_reward_groups(batch)), np.flatnonzero(~equal_reward_groups(further))
    free = free[: len(useful)]

    def replaced(old, new):
        old, new = (np.array(x).reshape(-1, batch.group, *x.shape[1:]) for x in (old, new))
        old[free] = new[useful[: len(free)]]
        return old.reshape(-1, *old.shape[2:])

    return jax.tree.map(replaced, batch, further)


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

    def drawn_from(sources: Sequence[TokenizedSource], documents: Sequence[np.ndarray]) -> TextBatches:
        own = [text_rows(*each, length, "stream") for each in zip(sources, documents)]
        drawn = source_order(sources, own, temperature=temperature, batch_size=rows, seed=context.seed)
        return lambda i: mixed_rows(own, drawn(i))

    unseen = [source for source in sources if len(source.held_out)]
    return (
        drawn_from(sources, [source.train for source in sources]),
        drawn_from(unseen, [source.held_out for source in unseen]),
    )


def rollout_table(
    context: StageContext, temperature: float
) -> Callable[[TrainState, Rollouts, int], Iterator[dict[str, Any]]]:
    """(state, batch, rows) -> the first rows of a batch for people: prompt, response, each reward, KL to the
    reference."""
    model, tokenizer = context.model, context.tokenizer
    logprobs = context.jit(lambda ref, tokens, temperature: model.token_logprobs(ref, tokens, temperature=temperature))

    def shown(state: TrainState, batch: Rollouts, rows: int) -> Iterator[dict[str, Any]]:
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

    return shown

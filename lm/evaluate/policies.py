"""Policies on held-out prompts: their answers, and how far they have moved from their start.

All programs that compare policies use this. Prompts of one conversation are alike, prompts of different conversations
are not. So scores are averaged over the prompts of each conversation first, and an interval counts conversations.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.errors import UserError, check_at_least
from lm.core.types import Array, Params
from lm.data.conversations import prompt_contexts
from lm.data.loading import load_conversations
from lm.data.prompts import PromptOptions, Prompts, prompt_chunks, prompts_at, prompts_within_length
from lm.data.sources import split_held_out
from lm.generate.sampler import SamplingParams
from lm.runs.workdir import TrainedModel
from lm.stages.rl.multi_turn import rollout_rows, single_turn_sampler
from lm.tokenizer import Tokenizer


class HeldOutPrompts(NamedTuple):
    prompts: Prompts
    conversation_ids: np.ndarray  # i32[n]  which one each prompt is from: 0, 1, ...


class PolicyAnswers(NamedTuple):
    texts: Sequence[str]
    lengths: np.ndarray  # i32[n]  sampled tokens, the end token included
    stopped: np.ndarray  # bool[n]  ended by itself within the limit
    kl: np.ndarray  # f32[n]  log(p / p_start) of each answer: its mean is the KL, in nats an answer


def held_out_prompts(
    tokenizer: Tokenizer,
    *,
    options: PromptOptions = PromptOptions(),
    conversations: int = 0,
    prompts_per_conversation: int = 3,
    held_out_from: float = 0.0,
) -> HeldOutPrompts:
    """Prompts of held-out conversations, some of each, drawn by a hash among those of at most
    `options.prompt_length` tokens.

    `conversations`: how many of them; 0: all. `held_out_from` > 0 leaves out those that a smaller `held_out` would
    hold out already: settings can be chosen on the one part and judged on the other.
    """
    sources, turns, prompt_length, held_out = options
    check_at_least(1, "prompts", turns=turns, prompts_per_conversation=prompts_per_conversation)
    check_at_least(0, "prompts", conversations=conversations)
    if not 0 <= held_out_from < held_out:
        raise UserError(
            f"prompts.held_out_from is {held_out_from}; it must be below prompts.held_out, which is {held_out}"
        )
    _, unseen = split_held_out(load_conversations(sources), held_out)
    if held_out_from:
        unseen, _ = split_held_out(unseen, held_out_from)
    contexts = prompt_contexts(unseen, turns=turns, per_conversation=0)
    name_of = {id(context.messages): context.name for context in contexts}
    fit, _ = prompts_within_length(tokenizer, contexts, prompt_length)
    rows_of: dict[str, list[int]] = {}
    for row, example in enumerate(fit.examples):
        rows_of.setdefault(name_of[id(example["messages"])], []).append(row)
    groups = [rows[:prompts_per_conversation] for rows in rows_of.values()][: conversations or None]
    return HeldOutPrompts(
        prompts_at(fit, np.concatenate(groups)), np.repeat(np.arange(len(groups)), [len(rows) for rows in groups])
    )


def policy_answerer(
    start: TrainedModel, sampling: SamplingParams, *, rows_at_once: int = 128
) -> Callable[[Params, Prompts, Array], PolicyAnswers]:
    """(lm, prompts, key) -> the answers of a policy of start's shape, sampled as in RL, and their KL to `start`.

    UserError for sampling that cuts the distribution: its log-probs are not those that KL is made of.
    """
    check_at_least(1, "evaluate", rows_at_once=rows_at_once)
    if sampling != SamplingParams(sampling.max_new, sampling.temperature) or sampling.temperature == 0:
        raise UserError(
            "evaluate: the KL of sampled answers needs the whole distribution; leave temperature above 0, and top_k, "
            "top_p, min_p and repetition_penalty at their defaults"
        )
    model, tokenizer = start.model, start.tokenizer
    sampling = sampling._replace(stop=tokenizer.stop_ids)
    sampled = jax.jit(lambda *args: rollout_rows(model, *args, sampling))
    answer = single_turn_sampler(sampled, tokenizer)
    logprobs = jax.jit(lambda lm, tokens: model.token_logprobs(lm, tokens, temperature=sampling.temperature))
    reference = jax.tree.map(jnp.asarray, start.params["lm"])  # on the device once, not for every chunk

    def ask(lm: Params, prompts: Prompts, key: Array) -> PolicyAnswers:
        lm, texts, columns = jax.tree.map(jnp.asarray, lm), [], []
        for first, part in prompt_chunks(prompts, rows_at_once):
            rollouts = answer(lm, part, jax.random.fold_in(key, first))
            answer_kl = np.sum(
                (rollouts.logprobs - logprobs(reference, rollouts.tokens)) * rollouts.tokens.weights, axis=1
            )
            texts += rollouts.texts
            columns.append((rollouts.lengths, rollouts.stopped, answer_kl))
        lengths, stopped, kl = (np.concatenate(column)[: len(prompts.ids)] for column in zip(*columns))
        return PolicyAnswers(texts[: len(prompts.ids)], lengths, stopped, kl)

    return ask


def conversation_means(values: np.ndarray, conversations: np.ndarray) -> np.ndarray:
    """f64[..., C] from values [..., n]: the mean over the prompts of each conversation."""
    member = conversations[:, None] == np.arange(conversations.max() + 1)
    return np.asarray(values, np.float64) @ (member / member.sum(axis=0))

"""Prompts of several sources: which are held out, and which of them batch i asks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.data.conversations import CONVERSATION_KINDS, Conversation, distinct_conversations, repeated_prompt_contexts
from lm.data.loading import ConversationRows
from lm.data.mixture import mixture_order, mixture_weights, parse_sources
from lm.data.prompts import Prompts, joined_prompts, prompts_within_length
from lm.data.sources import split_sources_held_out
from lm.tokenizer import Tokenizer


class PromptSources(NamedTuple):
    """The prompts of a mixture, those of one source side by side."""

    train: Prompts
    held_out: Prompts  # those of the sources take turns, so that the first of them are of all
    drawn: Callable[[int], np.ndarray]  # i -> the prompts of batch i, i64[batch_size]
    distinct: Sequence[Conversation]  # all of them, whatever their length
    names: Sequence[str]  # of the sources
    counts: Mapping[str, int]  # prompts, held out, too long, repeated


def prompt_sources(
    tokenizer: Tokenizer,
    sources: str | Sequence[Mapping[str, Any]],
    *,
    columns: Mapping[str, str],
    skip_bad_rows: int,
    turns: int,
    prompt_length: int,
    held_out: float,
    batch_size: int,
    seed: int,
    temperature: float,
    draws_per_step: int = 1,
) -> PromptSources:
    """The prompts of `sources` (text, or a list of {source, weight, kind, epochs}: lm.data.mixture), the last `turns`
    messages of each; what is longer than `prompt_length` tokens, or came before, is left out and counted.

    temperature: where no source has a weight, prompts are drawn by size^(1/temperature). draws_per_step: batches of
    prompts that a step may take, so that schedules go by steps.
    """
    mixture = parse_sources(sources, CONVERSATION_KINDS)
    rows = [
        ConversationRows(each.source, columns=columns, skip_bad_rows=skip_bad_rows, needs_reply=False)
        for each in mixture
    ]
    contexts = [repeated_prompt_contexts(list(each), turns=turns) for each in rows]
    distinct = distinct_conversations([context for each in contexts for context in each])
    first = {id(context) for context in distinct}
    own = [[context for context in each if id(context) in first] for each in contexts]
    splits = split_sources_held_out(own, held_out)
    train, skipped = zip(*(prompts_within_length(tokenizer, side, prompt_length) for side, _ in splits))
    unseen, unseen_skipped = zip(*(prompts_within_length(tokenizer, side, prompt_length) for _, side in splits if side))
    sizes = [len(part.ids) for part in train]
    order = mixture_order(
        sizes,
        weights=mixture_weights(mixture, sizes, temperature=temperature),
        epochs=[each.epochs for each in mixture],
        batch_size=batch_size,
        seed=seed,
        draws_per_step=draws_per_step,
    )
    begin = np.cumsum(sizes) - sizes

    def drawn(i: int) -> np.ndarray:
        rows = order(i)
        return begin[rows.source] + rows.number

    counts = {
        "prompts": sum(sizes),
        "held_out_prompts": sum(len(part.ids) for part in unseen),
        "skipped": sum(skipped),
        "held_out_skipped": sum(unseen_skipped),
        "repeated": sum(map(len, contexts)) - len(distinct),
        **{name: sum(each.counts[name] for each in rows) for name in rows[0].counts},
    }
    names = [name for each in mixture for name in each.names]
    return PromptSources(joined_prompts(train), _in_turns(unseen), drawn, distinct, names, counts)


def _in_turns(parts: Sequence[Prompts]) -> Prompts:
    """The prompts of all parts, each spread evenly over the whole."""
    place = np.concatenate([np.arange(len(part.ids)) / len(part.ids) for part in parts])
    joined, order = joined_prompts(parts), np.argsort(place, kind="stable")
    return Prompts(joined.ids[order], joined.lengths[order], [joined.examples[i] for i in order])

"""Prompts of several sources: which are held out, and which of them batch i asks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.data.conversations import CONVERSATION_KINDS, Conversation, distinct_conversations, repeated_prompt_contexts
from lm.data.loading import NO_COLUMNS, ConversationRows
from lm.data.mixture import mixture_order, mixture_weights, parse_sources
from lm.data.prompts import Prompts, joined_prompts, prompts_at, prompts_within_length
from lm.data.sources import split_sources_held_out
from lm.tokenizer import Tokenizer


class PromptSourceOptions(NamedTuple):
    """Which prompts a policy answers while it is trained. The stages that sample answers share these options."""

    sources: str | Sequence[Mapping[str, Any]] = "chitchat"  # text, or a list of {source, weight, kind, epochs}
    columns: Mapping[str, str] = NO_COLUMNS  # our name of a field -> that of the rows (lm.data.loading)
    skip_bad_rows: int = 0  # so many rows that cannot be used are passed over
    turns: int = 3  # the last messages of a conversation that a prompt holds, at most
    prompt_length: int = 64  # tokens of a prompt at most; a longer one is left out and counted
    source_temperature: float = 1.0  # where no source has a weight, sources are drawn by size^(1/source_temperature)
    held_out: float = 0.02  # share of the conversations that no stage trains on


class PromptSources(NamedTuple):
    """The prompts of a mixture, those of one source side by side."""

    train: Prompts
    held_out: Prompts  # those of the sources take turns, so that the first of them are of all
    order: Callable[[int], np.ndarray]  # i -> the training prompts of batch i, i64[batch_size]
    distinct: Sequence[Conversation]  # all of them, whatever their length
    names: Sequence[str]  # of the sources
    counts: Mapping[str, int]  # prompts, held out, too long, repeated

    def train_batch(self, i: int) -> Prompts:
        """The prompts of training batch i."""
        return prompts_at(self.train, self.order(i))

    def held_out_batches(self, count: int, size: int) -> Iterator[tuple[int, Prompts]]:
        """(number of its first prompt, `size` prompts) for the first `count` held-out prompts, a multiple of `size`."""
        for start in range(0, count, size):
            yield start, prompts_at(self.held_out, np.arange(start, start + size))


def prompt_sources(
    tokenizer: Tokenizer, options: PromptSourceOptions, *, batch_size: int, seed: int, draws_per_step: int = 1
) -> PromptSources:
    """The prompts of `options.sources` (a list is a mixture: lm.data.mixture), the last `turns` messages of each; what
    is longer than `prompt_length` tokens, or came before, is left out and counted.

    draws_per_step: batches of prompts that a step may take, so that schedules go by steps.
    """
    mixture = parse_sources(options.sources, CONVERSATION_KINDS)
    rows = [
        ConversationRows(each.source, columns=options.columns, skip_bad_rows=options.skip_bad_rows, needs_reply=False)
        for each in mixture
    ]
    contexts = [repeated_prompt_contexts(list(each), turns=options.turns) for each in rows]
    distinct = distinct_conversations([context for each in contexts for context in each])
    distinct_ids = {id(context) for context in distinct}
    by_source = [[context for context in each if id(context) in distinct_ids] for each in contexts]
    splits = split_sources_held_out(by_source, options.held_out)
    length = options.prompt_length
    train, skipped = zip(*(prompts_within_length(tokenizer, side, length) for side, _ in splits))
    held_out, held_out_skipped = zip(*(prompts_within_length(tokenizer, side, length) for _, side in splits if side))
    sizes = [len(part.ids) for part in train]
    order = mixture_order(
        sizes,
        weights=mixture_weights(mixture, sizes, temperature=options.source_temperature),
        epochs=[each.epochs for each in mixture],
        batch_size=batch_size,
        seed=seed,
        draws_per_step=draws_per_step,
    )
    first_row = np.cumsum(sizes) - sizes  # of each source among the joined prompts

    def joined_order(i: int) -> np.ndarray:
        rows = order(i)
        return first_row[rows.source] + rows.number

    counts = {
        "prompts": sum(sizes),
        "held_out_prompts": sum(len(part.ids) for part in held_out),
        "skipped": sum(skipped),
        "held_out_skipped": sum(held_out_skipped),
        "repeated": sum(map(len, contexts)) - len(distinct),
        **{name: sum(each.counts[name] for each in rows) for name in rows[0].counts},
    }
    names = [name for each in mixture for name in each.names]
    return PromptSources(joined_prompts(train), _in_turns(held_out), joined_order, distinct, names, counts)


def _in_turns(parts: Sequence[Prompts]) -> Prompts:
    """The prompts of all parts, each spread evenly over the whole."""
    place = np.concatenate([np.arange(len(part.ids)) / len(part.ids) for part in parts])
    joined, order = joined_prompts(parts), np.argsort(place, kind="stable")
    return Prompts(joined.ids[order], joined.lengths[order], [joined.examples[i] for i in order])

"""Conversations as batches: rows in which the assistant's replies are trained and all else is context."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.core.errors import UserError, check_at_least
from lm.core.types import Tokens
from lm.data.batches import BatchSizeRamp
from lm.data.conversations import CONVERSATION_KINDS, Conversation, conversation_excerpts
from lm.data.loading import NO_COLUMNS
from lm.data.mixture import parse_sources
from lm.data.mixture_rows import mixture_origins, packed_conversations, source_order
from lm.data.packing import packed_rows
from lm.data.token_rows import SegmentRows, mixed_rows, padded_batches
from lm.data.tokenized_sources import TokenizedSource, documents_within_bytes, tokenized_conversations
from lm.stages.context import Batches, HeldOutPart, StageContext
from lm.tokenizer import Tokenizer, encode_chats


def batches(
    context: StageContext,
    *,
    sources: str | Sequence[Mapping[str, Any]] = "chitchat,docstrings",
    columns: Mapping[str, str] = NO_COLUMNS,
    skip_bad_rows: int = 0,
    turns: int = 4,
    length: int = 256,
    batch_size: int = 32,
    ramp: BatchSizeRamp = (),
    source_temperature: float = 1.0,
    held_out: float = 0.02,
    held_out_bytes: int = 600_000,
) -> Batches:
    """Rows of `length` tokens of conversations from `sources`, the built-in ones cut into excerpts of `turns` messages.

    `sources`: built-in names, files, folders, globs or hf:NAME, with commas between them. `columns`: our name of a
    field -> that of the rows. `skip_bad_rows`: so many rows that cannot be used are passed over (lm.data.formats).

    A list of {source, weight, kind, epochs} as `sources` is mixed row by row (see data.mixture); where none has a
    weight, by size^(1/`source_temperature`). The same documents are held out as in pretraining; of each source up to
    `held_out_bytes` of them are scored, a seeded choice, and the others are counted as unscored. An excerpt longer than
    a row, or in which nothing is trained, is left out and counted. A `ramp` begins with other batches, as in stage
    pretrain.
    """
    context.check_length(length)
    check_at_least(2, "data", turns=turns)
    if turns % 2:
        raise UserError(f"data.turns is {turns}; it must be even, or every other excerpt would open with the assistant")
    mixture = parse_sources(sources, CONVERSATION_KINDS)
    tokenized = tokenized_conversations(
        context.tokenizer, mixture, held_out, turns=turns, columns=columns, skip_bad_rows=skip_bad_rows
    )
    train = [packed_conversations(source, source.train, length) for source in tokenized]
    scored = [np.sort(documents_within_bytes(source, held_out_bytes)) for source in tokenized]
    held_out_rows = [
        (source, *packed_conversations(source, documents, length))
        for source, documents in zip(tokenized, scored)
        if len(documents)
    ]
    rows = [each for each, _ in train]
    order = source_order(
        tokenized, rows, temperature=source_temperature, batch_size=batch_size, seed=context.seed, ramp=ramp
    )
    parts = [
        HeldOutPart(source.label, source.source.kind, -(-len(packed) // batch_size), {})
        for source, packed, _ in held_out_rows
    ]
    rule = f"excerpts of {turns} messages (rows of files whole), one longer than {length + 1} tokens left out"
    return Batches(
        lambda state, i: mixed_rows(rows, order(i)),
        lambda state: (batch for _, packed, _ in held_out_rows for batch in padded_batches(packed, batch_size)),
        {"length": length, **dataset_info(tokenized, train, scored, [counts for *_, counts in held_out_rows])},
        row_origins=lambda state, batch, i: mixture_origins(tokenized, rows, order(i), writer="people"),
        held_out_parts=parts if len(tokenized) > 1 else (),
        truncation="; ".join(f"{source.source.source}: {rule}" for source in tokenized),
    )


def dataset_info(
    sources: Sequence[TokenizedSource],
    train: Sequence[tuple[SegmentRows, Mapping[str, int]]],
    scored: Sequence[np.ndarray],
    held_out_counts: Sequence[Mapping[str, int]],
) -> dict[str, int]:
    """What the rows to train on and the `scored` held-out conversations hold, and what was left out of them."""
    rows, scored_count = [each for each, _ in train], sum(map(len, scored))
    return {
        "conversations": sum(len(source.train) for source in sources),
        "rows": sum(map(len, rows)),
        "tokens": sum(each.filled for each in rows),
        "trained_tokens": sum(each.trained for each in rows),
        **_summed_counts([counts for _, counts in train]),
        "held_out_conversations": scored_count,
        "held_out_unscored": sum(len(source.held_out) for source in sources) - scored_count,
        **{f"held_out_{name}": n for name, n in _summed_counts(held_out_counts).items()},
        **_summed_counts([source.store.counts for source in sources]),
    }


def conversation_rows(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], turns: int, length: int
) -> tuple[Tokens, dict[str, int]]:
    """Excerpts packed into rows, and how many were left out."""
    excerpts = conversation_excerpts(conversations, turns=turns)
    return packed_rows(encode_chats(tokenizer, [excerpt.messages for excerpt in excerpts]), length)


def _summed_counts(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Name by name; what one lacks is 0."""
    names = dict.fromkeys(name for each in counts for name in each)
    return {name: sum(each[name] for each in counts if name in each) for name in names}

"""Conversations as batches: rows in which the assistant's replies are trained and all else is context."""

from collections.abc import Mapping, Sequence

from lm.core.errors import UserError, check_at_least
from lm.core.types import Tokens
from lm.data.batches import BatchSizeRamp, batch_function, drawn_rows, sequential_batches
from lm.data.conversations import Conversation, conversation_excerpts, excerpt_places
from lm.data.loading import NO_COLUMNS, load_counted_conversations
from lm.data.origins import SegmentOrigin, drawn_origins, source_of
from lm.data.packing import packed_rows, packed_rows_and_contents
from lm.data.sources import split_held_out
from lm.stages.context import Batches, StageContext
from lm.tokenizer import Tokenizer, encode_chats


def batches(
    context: StageContext,
    *,
    sources: str = "chitchat,docstrings",
    columns: Mapping[str, str] = NO_COLUMNS,
    skip_bad_rows: int = 0,
    turns: int = 4,
    length: int = 256,
    batch_size: int = 32,
    ramp: BatchSizeRamp = (),
    held_out: float = 0.02,
) -> Batches:
    """Rows of `length` tokens of conversations from `sources`, the built-in ones cut into excerpts of `turns` messages.

    `sources`: built-in names, files, folders, globs or hf:NAME, with commas between them. `columns`: our name of a
    field -> that of the rows. `skip_bad_rows`: so many rows that cannot be used are passed over (lm.data.formats).

    The same documents are held out as in pretraining; an excerpt longer than a row, or in which nothing is trained, is
    left out and counted. A `ramp` begins with other batches, as in stage pretrain.
    """
    context.check_length(length)
    check_at_least(2, "data", turns=turns)
    if turns % 2:
        raise UserError(f"data.turns is {turns}; it must be even, or every other excerpt would open with the assistant")
    loaded = load_counted_conversations(sources, columns=columns, skip_bad_rows=skip_bad_rows, needs_reply=True)
    train, unseen = split_held_out(loaded.items, held_out)
    excerpts = conversation_excerpts(train, turns=turns)
    examples = encode_chats(context.tokenizer, [excerpt.messages for excerpt in excerpts])
    train_rows, left_out, contents = packed_rows_and_contents(examples, length)
    unseen_rows, more = conversation_rows(context.tokenizer, unseen, turns, length)
    batch = batch_function(train_rows, batch_size=batch_size, seed=context.seed, ramp=ramp)
    about = {
        "length": length,
        "conversations": len(train),
        "rows": len(train_rows.inputs),
        "tokens": int((train_rows.segments > 0).sum()),
        "trained_tokens": int(train_rows.weights.sum()),
        **left_out,
        "held_out_conversations": len(unseen),
        **{f"held_out_{name}": count for name, count in more.items()},
        **loaded.counts,
    }
    drawn = drawn_rows(len(train_rows.inputs), batch_size=batch_size, seed=context.seed, ramp=ramp)
    named = [name.strip() for name in sources.split(",")]
    places, sizes = excerpt_places(train, turns=turns), [len(example.ids) for example in examples]

    def segment_origin(i: int) -> SegmentOrigin:
        document, start = places[i]
        name = train[document].name
        return SegmentOrigin(name, source_of(name, named), document=document, start=start, size=sizes[i])

    return Batches(
        lambda state, i: batch(i),
        lambda state: sequential_batches(unseen_rows, batch_size),
        about,
        row_origins=lambda state, batch, i: drawn_origins(drawn(i), contents, segment_origin, writer="people"),
        truncation=f"{sources}: excerpts of {turns} messages (rows of files whole), one longer than {length + 1} "
        "tokens left out",
    )


def conversation_rows(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], turns: int, length: int
) -> tuple[Tokens, dict[str, int]]:
    """Excerpts packed into rows, and how many were left out."""
    excerpts = conversation_excerpts(conversations, turns=turns)
    return packed_rows(encode_chats(tokenizer, [excerpt.messages for excerpt in excerpts]), length)

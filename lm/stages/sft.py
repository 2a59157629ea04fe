"""Supervised fine-tuning: pretraining's objective on conversations; it differs only in its data.

Objective: the mean of -log p over the assistant's tokens and their end token; system, user and role markers are context
(weight 0). Nothing is frozen. A batch is rows of packed conversations (`Tokens`), isolated from each other.
Ouyang et al. 2022, sec. 3.5, arXiv 2203.02155.
"""

from collections.abc import Sequence

import optax

from lm.data import batches as rows_to_batches, chats, corpus as corpora, rows as packing
from lm.errors import UserError, at_least
from lm.metrics import Metrics, values
from lm.model import Model
from lm.stages.context import Batches, Context
from lm.stages.next_token import next_token
from lm.tokenizer import Tokenizer, chats as templated
from lm.types import Tokens
from lm.update import Update, gradient

SHOWN = ("loss",)  # in the live line
LIMITS: dict[str, float] = {}  # metrics the loop keeps below a bound


def make(
    model: Model, optimizer: optax.GradientTransformation, *, z_loss: float = 1e-4, microbatches: int = 1
) -> Update:
    """gradient(next_token)."""
    return gradient(next_token(model, z_loss=z_loss), optimizer, microbatches=microbatches)


def batches(
    context: Context,
    *,
    sources: str = "chitchat,docstrings",
    turns: int = 4,
    length: int = 256,
    batch_size: int = 32,
    held_out: float = 0.02,
) -> Batches:
    """Rows of `length` tokens of conversations from `sources` (see data.chats), cut into excerpts of `turns` messages.

    The same documents are held out as in pretraining; an excerpt longer than a row is skipped and counted.
    """
    context.admit(length)
    at_least(2, "data", turns=turns)
    if turns % 2:
        raise UserError(f"data.turns is {turns}; it must be even, or every other excerpt would open with the assistant")
    train, unseen = corpora.split(chats.conversations(sources), held_out)
    (train_rows, skipped), (unseen_rows, _) = (rows(context.tokenizer, side, turns, length) for side in (train, unseen))
    batch = rows_to_batches.batches(train_rows, batch_size=batch_size, seed=context.seed)
    about = {
        "length": length,
        "conversations": len(train),
        "rows": len(train_rows.inputs),
        "tokens": int((train_rows.segments > 0).sum()),
        "trained_tokens": int(train_rows.weights.sum()),
        "skipped": skipped,
        "held_out_conversations": len(unseen),
    }
    return Batches(lambda state, i: batch(i), lambda state: rows_to_batches.every(unseen_rows, batch_size), about)


def rows(
    tokenizer: Tokenizer, conversations: Sequence[chats.Conversation], turns: int, length: int
) -> tuple[Tokens, int]:
    """Excerpts packed into rows, and how many were too long for one."""
    excerpts = chats.excerpts(conversations, turns=turns)
    return packing.pack(templated(tokenizer, [excerpt.messages for excerpt in excerpts]), length)


def summary(metrics: Metrics, about) -> dict[str, float]:
    """Held-out nats per trained token."""
    return values(metrics)

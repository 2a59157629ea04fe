"""Pretraining: predict every next token of a mixed corpus.

Objective: the mean of -log p(x[t+1] | x[..t]) over all tokens. Nothing is frozen. A batch is rows of packed documents
(`Tokens`, every weight 1 but across a document's edge); attention never crosses from one document to another.
Radford et al. 2019; packing as Krell et al. 2021, arXiv 2107.02027.
"""

import lzma
import math

import optax

from lm.data import batches as rows_to_batches, corpus as corpora, rows as packing
from lm.metrics import Metrics, values
from lm.model import Model
from lm.stages.context import Batches, Context
from lm.stages.next_token import next_token
from lm.update import Update, gradient

SHOWN = ("loss", "bits_per_byte")  # in the live line
LIMITS: dict[str, float] = {}  # metrics the loop keeps below a bound
START: dict[str, tuple[float, float]] = {}  # held-out metrics before the first step: (value, tolerance)


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    z_loss: float = 1e-4,
    balance: float = 0.0,
    router_z: float = 0.0,
    microbatches: int = 1,
) -> Update:
    """gradient(next_token). `balance` and `router_z`: of a mixture of experts (see `next_token`)."""
    loss = next_token(model, z_loss=z_loss, balance=balance, router_z=router_z)
    return gradient(loss, optimizer, microbatches=microbatches)


def batches(
    context: Context,
    *,
    corpus: str = "stdlib,chitchat",
    length: int = 256,
    batch_size: int = 32,
    ramp: rows_to_batches.Ramp = (),
    held_out: float = 0.02,
    held_out_bytes: int = 400_000,
) -> Batches:
    """Rows of `length` tokens from `corpus` (see data.corpus); a fraction `held_out` of its documents is never trained.

    A ramp of pairs (step, rows) begins with other batches: ((100, 4), (200, 8)) takes 4 rows before step 100, 8 before
    step 200, and `batch_size` from there on. The held-out score uses whole held-out documents up to `held_out_bytes`,
    in a seeded order; those beyond are counted as skipped.
    """
    context.admit(length)
    train, unseen = corpora.split(corpora.documents(corpus), held_out)
    scored = corpora.within(unseen, held_out_bytes)
    train_rows, unseen_rows = (
        packing.documents(context.tokenizer, [document.text for document in side], length) for side in (train, scored)
    )
    batch = rows_to_batches.batches(train_rows, batch_size=batch_size, seed=context.seed, ramp=ramp)
    about = {
        "length": length,
        "documents": len(train),
        "rows": len(train_rows.inputs),
        "tokens": int(train_rows.weights.sum()),
        "held_out_documents": len(scored),
        "held_out_skipped": len(unseen) - len(scored),
        "held_out_bytes": len(text := "".join(document.text for document in scored).encode()),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
    return Batches(lambda state, i: batch(i), lambda state: rows_to_batches.every(unseen_rows, batch_size), about)


def summary(metrics: Metrics, about) -> dict[str, float]:
    """Held-out nats per token and bits per byte: all nats of the held-out documents over their raw UTF-8 bytes."""
    nats = float(metrics["loss"].total)
    return {**values(metrics), "bits_per_byte": nats / math.log(2) / about["held_out_bytes"]}

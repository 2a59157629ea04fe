"""Pretraining: predict every next token of a mixed corpus.

Objective: the mean of -log p(x[t+1] | x[..t]) over all tokens. Nothing is frozen. A batch is rows of packed documents
(`Tokens`, every weight 1 but across a document's edge); attention never crosses from one document to another.
Radford et al. 2019; packing as Krell et al. 2021, arXiv 2107.02027.
"""

import lzma
import math

import optax

from lm.core.metrics import Metrics, metric_values
from lm.data.batches import BatchSizeRamp, batch_function, drawn_rows, sequential_batches
from lm.data.origins import SegmentOrigin, drawn_origins, source_of
from lm.data.packing import (
    DOCUMENT_PACKINGS,
    PACKING_RULES,
    DocumentPiece,
    Packing,
    check_packing,
    document_rows,
    encoded_documents,
    packing_efficiency,
)
from lm.data.sources import documents_within_bytes, load_documents, split_held_out
from lm.model import Model
from lm.optim.update import Update
from lm.stages.context import Batches, StageContext
from lm.stages.pretraining.next_token import next_token_update
from lm.stages.stage import Stage


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    z_loss: float = 1e-4,
    balance_loss: float = 0.0,
    router_z_loss: float = 0.0,
    microbatches: int = 1,
) -> Update:
    """next_token_update. `balance_loss` and `router_z_loss`: of a mixture of experts (see `next_token_loss`)."""
    return next_token_update(
        model,
        optimizer,
        z_loss=z_loss,
        balance_loss=balance_loss,
        router_z_loss=router_z_loss,
        microbatches=microbatches,
    )


def batches(
    context: StageContext,
    *,
    corpus: str = "stdlib,chitchat",
    length: int = 256,
    batch_size: int = 32,
    ramp: BatchSizeRamp = (),
    packing: Packing = "stream",
    held_out: float = 0.02,
    held_out_bytes: int = 400_000,
) -> Batches:
    """Rows of `length` tokens from `corpus` (see data.corpus); a fraction `held_out` of its documents is never trained.

    `packing` "stream" lays documents end to end and cuts them every `length` tokens, which wastes no position;
    "best_fit" cuts only documents that are longer than a row (see data.packing). Held-out documents are laid as a
    stream either way, so that scores compare.

    A ramp of pairs (step, rows) begins with other batches: ((100, 4), (200, 8)) takes 4 rows before step 100, 8 before
    step 200, and `batch_size` from there on. The held-out score uses whole held-out documents up to `held_out_bytes`,
    in a seeded order; those beyond are counted as skipped.
    """
    context.check_length(length)
    train, unseen = split_held_out(load_documents(corpus), held_out)
    scored = documents_within_bytes(unseen, held_out_bytes)
    check_packing(packing)
    lay_rows, row_contents = DOCUMENT_PACKINGS[packing]
    ids = encoded_documents(context.tokenizer, [document.text for document in train])
    train_rows, contents = lay_rows(ids, length), row_contents([len(each) for each in ids], length)
    unseen_rows = document_rows(context.tokenizer, [document.text for document in scored], length)
    batch = batch_function(train_rows, batch_size=batch_size, seed=context.seed, ramp=ramp)
    about = {
        "length": length,
        "documents": len(train),
        "rows": len(train_rows.inputs),
        "tokens": int(train_rows.weights.sum()),
        **packing_efficiency(contents, train_rows),
        "held_out_documents": len(scored),
        "held_out_skipped": len(unseen) - len(scored),
        "held_out_bytes": len(text := "".join(document.text for document in scored).encode()),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
    drawn = drawn_rows(len(train_rows.inputs), batch_size=batch_size, seed=context.seed, ramp=ramp)
    sizes, sources = [len(each) for each in ids], [name.strip() for name in corpus.split(",")]

    def segment_origin(piece: DocumentPiece) -> SegmentOrigin:
        name, place = train[piece.document].name, piece.document
        return SegmentOrigin(name, source_of(name, sources), document=place, start=piece.start, size=sizes[place])

    return Batches(
        lambda state, i: batch(i),
        lambda state: sequential_batches(unseen_rows, batch_size),
        about,
        row_origins=lambda state, batch, i: drawn_origins(drawn(i), contents, segment_origin),
        truncation=f"{corpus}: {PACKING_RULES[packing].format(length=length)}",
    )


def summary(metrics: Metrics, about) -> dict[str, float]:
    """Held-out nats per token and bits per byte: all nats of the held-out documents over their raw UTF-8 bytes."""
    nats = float(metrics["loss"].total)
    return {**metric_values(metrics), "bits_per_byte": nats / math.log(2) / about["held_out_bytes"]}


PRETRAIN = Stage(__name__, make, batches, summary, shown_metrics=("loss", "bits_per_byte"))

"""Pretraining: predict every next token of a mixed corpus.

Objective: the mean of -log p(x[t+1] | x[..t]) over all tokens. Nothing is frozen. A batch is rows of packed documents
(`Tokens`, every weight 1 but across a document's edge); attention never crosses from one document to another.
Radford et al. 2019; packing as Krell et al. 2021, arXiv 2107.02027.
"""

import lzma
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax

from lm.core.metrics import Metrics, metric_values
from lm.data.batches import BatchSizeRamp
from lm.data.loading import NO_COLUMNS
from lm.data.mixture import parse_sources
from lm.data.mixture_rows import mixture_origins, source_order, text_rows
from lm.data.packing import PACKING_RULES, Packing, check_packing, packing_efficiency
from lm.data.sources import BUILT_IN_KINDS
from lm.data.token_rows import TokenRows, mixed_rows, padded_batches
from lm.data.tokenized_sources import TokenizedSource, documents_text, documents_within_bytes, tokenized_texts
from lm.model import Model
from lm.optim.update import Update
from lm.stages.context import Batches, HeldOutPart, StageContext
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
    corpus: str | Sequence[Mapping[str, Any]] = "stdlib,chitchat",
    columns: Mapping[str, str] = NO_COLUMNS,
    skip_bad_rows: int = 0,
    length: int = 256,
    batch_size: int = 32,
    ramp: BatchSizeRamp = (),
    packing: Packing = "stream",
    source_temperature: float = 1.0,
    held_out: float = 0.02,
    held_out_bytes: int = 400_000,
) -> Batches:
    """Rows of `length` tokens from `corpus`; a fraction `held_out` of its documents is never trained.

    `corpus`: built-in names, files, folders, globs or hf:NAME, with commas between them (see data.sources), or a list
    of {source, weight, kind, epochs} that are mixed row by row (see data.mixture); where none has a weight, by
    size^(1/`source_temperature`). `columns`: {"text": NAME}, where a row's text is called so. `skip_bad_rows`: so many
    rows that cannot be used are passed over.

    `packing` "stream" lays documents end to end and cuts them every `length` tokens, which wastes no position;
    "best_fit" cuts only documents that are longer than a row (see data.packing). Held-out documents are laid as a
    stream either way, so that scores compare.

    A ramp of pairs (step, rows) begins with other batches: ((100, 4), (200, 8)) takes 4 rows before step 100, 8 before
    step 200, and `batch_size` from there on. The held-out score uses whole held-out documents up to `held_out_bytes`
    of each source, in a seeded order; those beyond are counted as skipped.
    """
    context.check_length(length)
    check_packing(packing)
    mixture = parse_sources(corpus, BUILT_IN_KINDS, option="data.corpus")
    sources = tokenized_texts(context.tokenizer, mixture, held_out, columns=columns, skip_bad_rows=skip_bad_rows)
    train_rows = [text_rows(source, source.train, length, packing) for source in sources]
    drawn = source_order(
        sources, train_rows, temperature=source_temperature, batch_size=batch_size, seed=context.seed, ramp=ramp
    )
    parts = [held_out_part(source, length, batch_size, held_out_bytes) for source in sources if len(source.held_out)]
    text = "".join(documents_text(context.tokenizer, part.source, part.documents) for part in parts).encode()
    about = {
        "length": length,
        "documents": sum(len(source.train) for source in sources),
        "rows": sum(map(len, train_rows)),
        "tokens": sum(rows.trained for rows in train_rows),
        **packing_efficiency(train_rows),
        "held_out_documents": sum(len(part.documents) for part in parts),
        "held_out_skipped": sum(len(part.source.held_out) - len(part.documents) for part in parts),
        "held_out_bytes": sum(part.bytes for part in parts),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
    return Batches(
        lambda state, i: mixed_rows(train_rows, drawn(i)),
        lambda state: (batch for part in parts for batch in padded_batches(part.rows, batch_size)),
        about,
        row_origins=lambda state, batch, i: mixture_origins(sources, train_rows, drawn(i)),
        held_out_parts=[part.held_out_description(batch_size) for part in parts] if len(sources) > 1 else (),
        truncation="; ".join(f"{s.source.source}: {PACKING_RULES[packing].format(length=length)}" for s in sources),
    )


class HeldOutText(NamedTuple):
    """The documents of a source that are scored."""

    source: TokenizedSource
    documents: np.ndarray  # i64[n]
    rows: TokenRows
    bytes: int  # UTF-8, of the documents

    def held_out_description(self, batch_size: int) -> HeldOutPart:
        count = -(-len(self.rows) // batch_size)
        return HeldOutPart(self.source.label, self.source.source.kind, count, {"held_out_bytes": self.bytes})


def held_out_part(source: TokenizedSource, length: int, batch_size: int, size: int) -> HeldOutText:
    """As many held-out documents of a source as `size` bytes allow, in rows."""
    documents = documents_within_bytes(source, size)
    rows = text_rows(source, documents, length, "stream")
    return HeldOutText(source, documents, rows, int(source.store.bytes[documents].sum()))


def summary(metrics: Metrics, about) -> dict[str, float]:
    """Held-out nats per token and bits per byte: all nats of the held-out documents over their raw UTF-8 bytes."""
    nats = float(metrics["loss"].total)
    return {**metric_values(metrics), "bits_per_byte": nats / math.log(2) / about["held_out_bytes"]}


PRETRAIN = Stage(__name__, make, batches, summary, shown_metrics=("loss", "bits_per_byte"))

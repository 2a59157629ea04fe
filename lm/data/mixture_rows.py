"""Rows of sources, and the order in which a mixture draws them: what stages share that learn from texts or chats."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lm.data.batches import BatchSizeRamp
from lm.data.mixture import DrawnRows, mixture_order, mixture_weights
from lm.data.origins import RowOrigin, SegmentOrigin, source_of
from lm.data.packing import DOCUMENT_PACKINGS, packed_examples
from lm.data.token_rows import SegmentRows, TokenRows
from lm.data.tokenized_sources import TokenizedSource


def text_rows(source: TokenizedSource, documents: np.ndarray, length: int, packing: str) -> TokenRows:
    """These documents of a source of texts in rows, by a packing of that name; the rows hold nothing else."""
    store = source.store
    return DOCUMENT_PACKINGS[packing](store.ids, store.offsets[documents], store.sizes[documents], length)


def packed_conversations(
    source: TokenizedSource, documents: np.ndarray, length: int
) -> tuple[SegmentRows, Mapping[str, int]]:
    """The excerpts of these conversations of a source packed into rows, and how many were left out."""
    store, examples = source.store, source.examples(documents)
    sizes, trained = store.sizes[examples], store.trained[examples]
    return packed_examples(store.ids, store.weights, store.offsets[examples], sizes, trained, length)


def source_order(
    sources: Sequence[TokenizedSource],
    rows: Sequence[TokenRows],
    *,
    temperature: float,
    batch_size: int,
    seed: int,
    ramp: BatchSizeRamp = (),
) -> Callable[[int], DrawnRows]:
    """i -> the rows of batch i (lm.data.mixture.mixture_order), by the weights and caps of the sources."""
    entries = [source.source for source in sources]
    weights = mixture_weights(entries, [each.filled for each in rows], temperature=temperature)
    epochs = [entry.epochs for entry in entries]
    sizes = [len(each) for each in rows]
    return mixture_order(sizes, weights=weights, epochs=epochs, batch_size=batch_size, seed=seed, ramp=ramp)


def mixture_origins(
    sources: Sequence[TokenizedSource], rows: Sequence[TokenRows], drawn: DrawnRows, *, writer: str = ""
) -> list[RowOrigin]:
    """Where the rows of a batch came from. Documents are numbered through all sources, those that are trained on."""
    first_row = np.cumsum([0, *(len(each) for each in rows)])
    first_document = np.cumsum([0, *(len(source.train) for source in sources)])
    origins = []
    for s, number, epoch in zip(drawn.source.tolist(), drawn.number.tolist(), drawn.epoch.tolist()):
        source, examples = sources[s], sources[s].examples(sources[s].train)
        segments = []
        for piece in rows[s].pieces(number):
            example = int(examples[piece.document])
            document = int(source.store.document[example])
            name = source.store.name(document)
            segments.append(
                SegmentOrigin(
                    name,
                    source_of(name, source.source.names) if len(source.source.names) > 1 else source.label,
                    source.source.kind,
                    document=int(first_document[s] + np.searchsorted(source.train, document)),
                    start=piece.start or int(source.store.start[example]),
                    size=int(source.store.sizes[example]),
                )
            )
        origins.append(RowOrigin(segments, int(first_row[s] + number), epoch, writer))
    return origins

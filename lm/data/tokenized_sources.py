"""Sources as tokens on disk, split by document into those to train on and those held out."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from lm.data.conversations import Conversation, conversation_excerpts
from lm.data.loading import NO_COLUMNS, ConversationRows
from lm.data.mixture import MixtureSource, source_labels
from lm.data.sources import Document, TextSource, one_sided_error, text_source
from lm.data.token_rows import concatenated_ranges
from lm.data.token_store import EncodedDocument, EncodedExample, TokenStore, cached_store, document_keys, store_key
from lm.tokenizer import TokenizedExample, Tokenizer, encode_chats

ENCODED_CHARACTERS = 1_000_000  # of text that is encoded in one call; some 30 bytes of memory for each
SHARED_CHARACTERS = 1000  # of a piece, where a part of a source is read
Item = TypeVar("Item")


class TokenizedSource(NamedTuple):
    """A source of a mixture, encoded and split."""

    source: MixtureSource
    label: str  # a short name of it, for metrics
    store: TokenStore
    train: np.ndarray  # i64[n]  documents, in the order of the source
    held_out: np.ndarray  # i64[m]

    def examples(self, documents: np.ndarray) -> np.ndarray:
        """i64[...]: the examples of these documents, in their order."""
        if len(self.store.document) == self.store.documents:  # texts: each is one
            return documents
        begin, end = (np.searchsorted(self.store.document, documents, side) for side in ("left", "right"))
        return concatenated_ranges(begin, end - begin)


def tokenized_texts(
    tokenizer: Tokenizer,
    sources: Sequence[MixtureSource],
    held_out: float,
    *,
    columns: Mapping[str, str] = NO_COLUMNS,
    skip_bad_rows: int = 0,
) -> list[TokenizedSource]:
    """The texts of each source, a document each, as pretraining sees them."""

    def store(source: MixtureSource) -> TokenStore:
        text = text_source(source.source, columns=columns, skip_bad_rows=skip_bad_rows)
        encoded = lambda: encoded_texts(tokenizer, text.documents())
        key = store_key("texts", text.digest, tokenizer.fingerprint)
        return cached_store(key, encoded, vocab_size=tokenizer.vocab_size)

    return split_stores(sources, [store(source) for source in sources], held_out)


def tokenized_conversations(
    tokenizer: Tokenizer,
    sources: Sequence[MixtureSource],
    held_out: float,
    *,
    turns: int,
    columns: Mapping[str, str] = NO_COLUMNS,
    skip_bad_rows: int = 0,
) -> list[TokenizedSource]:
    """The conversations of each source, cut into excerpts of `turns` messages, as the chat template lays them."""

    def store(source: MixtureSource) -> TokenStore:
        rows = ConversationRows(source.source, columns=columns, skip_bad_rows=skip_bad_rows, needs_reply=True)
        encoded = lambda: encoded_conversations(tokenizer, rows, turns=turns)
        key = store_key("conversations", rows.digest(), tokenizer.fingerprint, tokenizer.date, f"turns {turns}")
        return cached_store(key, encoded, vocab_size=tokenizer.vocab_size, counts=lambda: rows.counts)

    return split_stores(sources, [store(source) for source in sources], held_out)


def encoded_texts(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[EncodedDocument]:
    """Documents with their ids, many encoded at a time."""

    def encoded(part: list[Document]) -> Iterator[tuple[Document, list[int]]]:
        return zip(part, tokenizer.encode_batch([document.text for document in part]))

    parts = prepared_ahead(parts_by_size(documents, lambda document: len(document.text)))
    for part in prepared_ahead(map(encoded, parts)):
        for document, ids in part:
            example = EncodedExample(tokenizer.document_ids(ids), None)
            size = len(document.text.encode(errors="surrogatepass"))
            yield EncodedDocument(document.name, document.content, size, [example])


def encoded_conversations(
    tokenizer: Tokenizer, conversations: Iterable[Conversation], *, turns: int
) -> Iterator[EncodedDocument]:
    """Conversations with the ids of their excerpts, many encoded at a time."""

    def encoded(part: list[Conversation]) -> Iterator[tuple[Conversation, list[TokenizedExample]]]:
        excerpts = [conversation_excerpts([conversation], turns=turns) for conversation in part]
        chats = iter(encode_chats(tokenizer, [excerpt.messages for each in excerpts for excerpt in each]))
        return zip(part, [[next(chats) for _ in each] for each in excerpts])

    parts = prepared_ahead(
        parts_by_size(conversations, lambda each: sum(len(message["content"]) for message in each.messages))
    )
    for part in prepared_ahead(map(encoded, parts)):
        for conversation, found in part:
            size = sum(len(message["content"].encode(errors="surrogatepass")) for message in conversation.messages)
            examples = [EncodedExample(ids, weights, i * turns) for i, (ids, weights) in enumerate(found)]
            yield EncodedDocument(conversation.name, conversation.content, size, examples)


def parts_by_size(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """The items in lists, each the shortest that has ENCODED_CHARACTERS or more; the last may have fewer."""
    part, total = [], 0
    for item in items:
        part.append(item)
        total += size(item)
        if total >= ENCODED_CHARACTERS:
            yield part
            part, total = [], 0
    if part:
        yield part


def prepared_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items, the next one made in a thread of its own meanwhile: Python reads while the tokenizer, which holds no
    interpreter lock, encodes."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def split_stores(
    sources: Sequence[MixtureSource], stores: Sequence[TokenStore], held_out: float
) -> list[TokenizedSource]:
    """The sources with their documents split. UserError where one has nothing to train on, or none holds any out."""
    sides = held_out_documents([(store.name_keys, store.content_keys) for store in stores], held_out)
    splits = [
        TokenizedSource(source, label, store, np.flatnonzero(~side), np.flatnonzero(side))
        for source, label, store, side in zip(sources, source_labels(sources), stores, sides)
    ]
    for each in splits:
        store = each.store
        if not len(each.train) or len(splits) == 1 and not len(each.held_out):
            distinct = 1 if min(len(np.unique(keys)) for keys in (store.name_keys, store.content_keys)) == 1 else 0
            name = store.name(0) if store.documents else ""
            side = bool(len(each.train))
            raise one_sided_error(store.documents, distinct, held_out, held_out=side, name=name)
    if not any(len(each.held_out) for each in splits):
        raise one_sided_error(sum(store.documents for store in stores), 0, held_out, held_out=True)
    return splits


class SplitTexts:
    """The texts on one side of a split, read from their sources each time they are iterated over."""

    def __init__(
        self, sources: Sequence[TextSource], chosen: Sequence[np.ndarray], fractions: Sequence[float] | None = None
    ):
        """chosen: bool[D] of each source, by document. fractions: so much of each source's texts is read, in pieces
        evenly spread; None: all."""
        self._sources, self._chosen = sources, chosen
        self._fractions = [1.0] * len(sources) if fractions is None else fractions

    def __len__(self) -> int:
        return sum(int(np.count_nonzero(each)) for each in self._chosen)

    def __iter__(self) -> Iterator[str]:
        for source, chosen, fraction in zip(self._sources, self._chosen, self._fractions):
            texts = (document.text for document, is_chosen in zip(source.documents(), chosen) if is_chosen)
            yield from texts if fraction >= 1 else _even_share(texts, fraction)

    def weighted(self, weights: Sequence[float], size: int) -> "SplitTexts":
        """Of `size` bytes each source has its share by weight, or all that it holds if that is less."""
        sizes = [sum(len(text.encode(errors="surrogatepass")) for text in part) for part in self._parts()]
        shares = [size * weight / sum(weights) / max(own, 1) for weight, own in zip(weights, sizes)]
        return SplitTexts(self._sources, self._chosen, shares)

    def _parts(self) -> list["SplitTexts"]:
        return [SplitTexts([source], [chosen]) for source, chosen in zip(self._sources, self._chosen)]


def _even_share(texts: Iterable[str], fraction: float) -> Iterator[str]:
    """This fraction of the texts' pieces of SHARED_CHARACTERS."""
    pieces = (text[i : i + SHARED_CHARACTERS] for text in texts for i in range(0, len(text), SHARED_CHARACTERS))
    for i, piece in enumerate(pieces):
        if int((i + 1) * fraction) > int(i * fraction):
            yield piece


def split_texts(sources: Sequence[TextSource], fraction: float) -> tuple[SplitTexts, SplitTexts]:
    """(to train on, held out), split as their tokens are. UserError where a side is empty."""
    keys = []
    for source in sources:
        names, contents = array("Q"), array("Q")
        for document in source.documents():
            name, content, _ = document_keys(document.name, document.content)
            names.append(name)
            contents.append(content)
        keys.append((np.frombuffer(names, np.uint64), np.frombuffer(contents, np.uint64)))
    sides = held_out_documents(keys, fraction)
    train, unseen = SplitTexts(sources, [~side for side in sides]), SplitTexts(sources, sides)
    if not len(train) or not len(unseen):
        names, contents = (np.concatenate(each) for each in zip(*keys))
        distinct = min(len(np.unique(names)), len(np.unique(contents)))
        raise one_sided_error(len(names), distinct, fraction, held_out=bool(len(train)))
    return train, unseen


def held_out_documents(keys: Sequence[tuple[np.ndarray, np.ndarray]], fraction: float) -> list[np.ndarray]:
    """bool[D] of each source, from its documents' keys by name and by content, u64[D] (token_store.document_keys).

    The name decides; where one content comes under several names of a source, the content does, as in
    `lm.data.sources.split_held_out`. What an earlier source has of the same content, it has decided: so a source that
    is added at the end moves nothing of the others', and nothing is trained on that another source holds out.
    """
    held_out_masks = []
    known, known_side = np.zeros(0, np.uint64), np.zeros(0, bool)
    for names, contents in keys:
        distinct, group = np.unique(contents, return_inverse=True)
        lowest, highest = np.full(len(distinct), np.iinfo(np.uint64).max, np.uint64), np.zeros(len(distinct), np.uint64)
        np.minimum.at(lowest, group, names)
        np.maximum.at(highest, group, names)
        side = keys_below(np.where(lowest == highest, lowest, distinct), fraction)  # of each content
        if len(known):
            place = np.minimum(np.searchsorted(known, distinct), len(known) - 1)
            side = np.where(known[place] == distinct, known_side[place], side)
        held_out_masks.append(side[group])
        known, first = np.unique(np.concatenate([known, distinct]), return_index=True)
        known_side = np.concatenate([known_side, side])[first]
    return held_out_masks


def keys_below(keys: np.ndarray, fraction: float) -> np.ndarray:
    """bool: whether each key is below this fraction of all 2^64, as `lm.data.sources.is_held_out` compares."""
    limit = fraction * 2**64  # exact: a power of two
    if limit >= 2**64:
        return np.ones(len(keys), bool)
    threshold = int(limit)
    return (keys < np.uint64(threshold)) | ((keys == np.uint64(threshold)) & (limit > threshold))


def documents_within_bytes(source: TokenizedSource, size: int) -> np.ndarray:
    """i64[n]: as many held-out documents as `size` bytes allow, at least one if there is one, in an order drawn from
    their names."""
    documents = source.held_out[np.argsort(source.store.order_keys[source.held_out], kind="stable")]
    used = np.cumsum(source.store.bytes[documents])
    return documents[: max(int(np.count_nonzero(used <= size)), 1)]


def documents_text(tokenizer: Tokenizer, source: TokenizedSource, documents: Sequence[int]) -> str:
    """The texts of these documents, one after another, as the tokenizer gives them back."""
    return "".join(tokenizer.decode(source.store.example_ids(int(document))) for document in documents)

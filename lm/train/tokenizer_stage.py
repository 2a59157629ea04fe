"""The first stage: learns a vocabulary from a corpus."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.core.errors import check_at_least
from lm.data.loading import NO_COLUMNS
from lm.data.mixture import parse_sources, weight_at
from lm.data.sources import BUILT_IN_KINDS, text_source
from lm.data.tokenized_sources import parts_by_size, split_texts
from lm.runs.console import say
from lm.runs.partial_results import PartialResults
from lm.runs.workdir import Workdir
from lm.tokenizer import load_tokenizer, train_tokenizer


def fit_tokenizer(
    workdir: Workdir,
    *,
    corpus: str | Sequence[Mapping[str, Any]],
    columns: Mapping[str, str] = NO_COLUMNS,
    skip_bad_rows: int = 0,
    held_out: float = 0.02,
    vocab_size: int = 2048,
    max_bytes: int = 32_000_000,
) -> dict[str, Any]:
    """Trains the tokenizer on the documents that are not held out; reports bytes per token on those that are.

    `corpus`, `columns`, `skip_bad_rows`: as in stage pretrain. `max_bytes`: of more text an even share of every
    document is read; of a mixture whose sources have weights, their shares of it by the weights that they begin with.
    """
    check_at_least(1, "data", vocab_size=vocab_size, max_bytes=max_bytes)
    start = time.monotonic()
    mixture = parse_sources(corpus, BUILT_IN_KINDS, option="data.corpus")
    sources = [text_source(each.source, columns=columns, skip_bad_rows=skip_bad_rows) for each in mixture]
    texts, held_out_texts = split_texts(sources, held_out)
    say(f"tokenizer: {len(texts)} documents to learn from, {len(held_out_texts)} held out")

    if all(each.weight is not None for each in mixture):
        start_weights = [float(weight_at(each.weight, np.zeros(1))[0]) for each in mixture]
        learned = texts.weighted(start_weights, max_bytes)
    else:
        learned = texts

    def learn() -> str:
        tokenizer = train_tokenizer(learned, vocab_size=vocab_size, max_bytes=max_bytes)
        tokenizer.save(workdir.tokenizer_path)
        return tokenizer.fingerprint

    parts = PartialResults(workdir.path / "vocabulary.parts.jsonl")
    fingerprint = parts.once("fingerprint", learn)  # saved before it is measured, so that a kill does not lose it
    tokenizer = load_tokenizer(workdir.tokenizer_path)
    size = tokens = 0
    for part in parts_by_size(iter(held_out_texts), len):
        size += sum(len(text.encode()) for text in part)
        tokens += sum(map(len, tokenizer.encode_batch(part)))
    parts.remove()
    return {
        "stage": "tokenizer",
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": size / tokens,
        "held_out_bytes": size,
        "seconds": time.monotonic() - start,
        "fingerprint": fingerprint,
    }

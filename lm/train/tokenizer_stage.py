"""The stage before all others: a vocabulary learned from a corpus."""

import time
from typing import Any

from lm.core.errors import check_at_least
from lm.data.sources import load_documents, split_held_out
from lm.runs.console import say
from lm.runs.partial_results import PartialResults
from lm.runs.workdir import Workdir
from lm.tokenizer import load_tokenizer, train_tokenizer


def fit_tokenizer(
    workdir: Workdir, *, corpus: str, held_out: float = 0.02, vocab_size: int = 2048, max_bytes: int = 32_000_000
) -> dict[str, Any]:
    """Trains the tokenizer on the documents that are not held out; reports bytes per token on those that are."""
    check_at_least(1, "data", vocab_size=vocab_size, max_bytes=max_bytes)
    start = time.monotonic()
    seen, unseen = split_held_out(load_documents(corpus), held_out)
    say(f"tokenizer: {len(seen)} documents to learn from, {len(unseen)} held out")

    def learn() -> str:
        found = train_tokenizer((document.text for document in seen), vocab_size=vocab_size, max_bytes=max_bytes)
        found.save(workdir.tokenizer_path)
        return found.fingerprint

    parts = PartialResults(workdir.path / "vocabulary.parts.jsonl")
    fingerprint = parts.once("fingerprint", learn)  # a kill while it is measured must not cost it
    tokenizer = load_tokenizer(workdir.tokenizer_path)
    size = sum(len(document.text.encode()) for document in unseen)
    ids = tokenizer.encode_batch(document.text for document in unseen)
    parts.remove()
    return {
        "stage": "tokenizer",
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": size / sum(map(len, ids)),
        "held_out_bytes": size,
        "seconds": time.monotonic() - start,
        "fingerprint": fingerprint,
    }

"""Tokens a second of the loader against those of training, and megabytes a second of encoding.

The loader is the stages' own: rows of texts (pretrain), packed conversations (sft), and a mixture of three sources with
a schedule, in batches of the size's shape, gathered from the token store on disk. Training is that of `lm bench
training`. Encoding a list of texts is compared with the tokenizer library's own call on the same list. Everything is
timed within one step, so that other load on the machine affects all of it.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lm.bench import training
from lm.bench.sizes import BenchmarkSize
from lm.bench.turns import TimedSteps, Timings, phase_seconds
from lm.core.types import Tokens
from lm.data.sources import load_documents
from lm.model import make_model
from lm.stages.context import Batches, StageContext
from lm.stages.pretraining import conversation_batches, pretrain
from lm.tokenizer import SPECIAL_TOKENS, train_tokenizer
from lm.tokenizer.sentencepiece import SentencePieceTokenizer

LOADED_BATCHES = 20  # in each step
ENCODED_BYTES = 2_000_000  # in each step
TOKENIZER_BYTES = 1_000_000  # that its pieces are learned from
LEAST_RATIO = 20.0  # the loader's tokens a second over training's
CORPUS, SOURCES = "stdlib,chitchat", "chitchat,docstrings"
MIXTURE = (
    {"source": "stdlib", "weight": ((0, 1.0), (1000, 0.5))},
    {"source": "chitchat", "weight": 1.0},
    {"source": "drills", "weight": ((0, 0.0), (1000, 1.0)), "epochs": 4},
)


def benchmark_tokenizer(size: BenchmarkSize) -> SentencePieceTokenizer:
    """One of the size's vocabulary, or of as many pieces as 256 bytes need."""
    texts = [document.text for document in load_documents(CORPUS)]
    vocab_size = max(size.config.vocab_size, len(SPECIAL_TOKENS) + 2 * 256)
    return train_tokenizer(texts, vocab_size=vocab_size, max_bytes=TOKENIZER_BYTES)


def loaders(size: BenchmarkSize, tokenizer: SentencePieceTokenizer) -> dict[str, Batches]:
    """The batches of each kind, in the shape of the size."""
    context = StageContext(make_model(size.config.for_backend("cpu")), tokenizer, 0, jax.jit, _no_reward_model)
    shape = {"length": size.length, "batch_size": size.rows}
    return {
        "texts": pretrain.batches(context, corpus=CORPUS, **shape),
        "conversations": conversation_batches.batches(context, sources=SOURCES, **shape),
        "mixture": pretrain.batches(context, corpus=MIXTURE, **shape),
    }


def timed_steps(size: BenchmarkSize, dtype: str) -> TimedSteps:
    """Steps of loading, training and encoding, with the seconds of each; the first does not count."""
    tokenizer = benchmark_tokenizer(size)
    kinds, train = loaders(size, tokenizer), training.timed_steps(size, dtype)
    texts = encoded_sample()
    tokenizer.processor.encode(texts[:1])
    number = 0

    def step() -> dict[str, float]:
        nonlocal number
        times = {}
        for name, batches in kinds.items():
            times[name] = elapsed_seconds(lambda: [loaded_tokens(batches, number + k) for k in range(LOADED_BATCHES)])
        number += LOADED_BATCHES
        times["encode"] = elapsed_seconds(lambda: tokenizer.encode_batch(texts))
        times["library"] = elapsed_seconds(lambda: tokenizer.processor.encode(texts))
        return times

    def run(count: int):
        step()
        return [{**step(), "training": row["step"]} for row in train(count)]

    return run


def loaded_tokens(batches: Batches, i: int) -> int:
    """Positions of batch i that are no padding."""
    batch: Tokens = batches.train(None, i)
    return int(np.count_nonzero(batch.segments))


def encoded_sample() -> list[str]:
    """Documents of some ENCODED_BYTES."""
    texts_sample, size = [], 0
    for document in load_documents("chitchat"):
        texts_sample.append(document.text)
        size += len(document.text.encode())
        if size >= ENCODED_BYTES:
            break
    return texts_sample


def elapsed_seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def result(name: str, size: BenchmarkSize, timed: Timings) -> dict[str, Any]:
    """Tokens a second of each loader and of training, and their ratios; bytes a second of both ways to encode.

    The loaders' tokens are whole rows with padding, because training computes padding too.
    """
    median = phase_seconds(timed.ours)["median"]
    tokens = size.rows * size.length
    trained = tokens / median["training"]
    loaded = {kind: tokens * LOADED_BATCHES / median[kind] for kind in ("texts", "conversations", "mixture")}
    sample = sum(len(text.encode()) for text in encoded_sample())
    rows = [row for turn in timed.ours for row in turn]
    return {
        "size": name,
        "trained_per_second": trained,
        "loaded_per_second": loaded,
        "ratio": {kind: rate / trained for kind, rate in loaded.items()},
        "aim": LEAST_RATIO,
        "encoded_bytes_per_second": {side: sample / median[side] for side in ("encode", "library")},
        "encode_ratio": float(np.median([row["library"] / row["encode"] for row in rows])),
    }


def _no_reward_model(*_: Any) -> Any:
    raise AssertionError("the loader of texts and conversations asks for no reward model")

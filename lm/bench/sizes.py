"""The models that are timed, by name, and the training batch of each."""

import dataclasses
import os
from collections.abc import Mapping
from typing import NamedTuple

import jax

from lm.core.errors import UserError
from lm.model import ModelConfig, presets

DTYPES = ("auto", "float32", "bfloat16")


class BenchmarkSize(NamedTuple):
    config: ModelConfig
    rows: int
    length: int  # tokens a row


def llama_config(**sizes: int) -> ModelConfig:
    """As Llama: no normalised queries and keys, as many kv heads as heads; a tied head as in the small ones."""
    return ModelConfig(**sizes, kv_heads=sizes["heads"], qk_norm=False, norm_eps=1e-5, context=4096)


# Of SwiGLU's three matrices 683 columns have the parameters of 1,024 in GPT-2's two; 704 is a multiple of 64.
SIZES: Mapping[str, BenchmarkSize] = {
    "tiny": BenchmarkSize(llama_config(vocab_size=256, layers=2, width=32, heads=2, head_size=16, hidden=64), 2, 32),
    "S": BenchmarkSize(llama_config(vocab_size=4096, layers=4, width=256, heads=4, head_size=64, hidden=704), 16, 256),
    "M": BenchmarkSize(
        llama_config(vocab_size=32_768, layers=12, width=768, heads=12, head_size=64, hidden=2048), 4, 512
    ),
    "smollm2-135m": BenchmarkSize(ModelConfig(**presets.smollm2_135m()), 4, 512),
    # of an accelerator: a block and 512 positions' logits at a time
    "1B": BenchmarkSize(ModelConfig(**presets.llama3_2_1b(), remat="block", loss_chunk=512), 2, 4096),
}


def backend_config(config: ModelConfig, dtype: str) -> ModelConfig:
    """The config as this backend computes it, in `dtype`, or in the backend's own if that is auto."""
    return dataclasses.replace(config, dtype=dtype).for_backend(jax.default_backend())


def sizes_named(names: str) -> dict[str, BenchmarkSize]:
    """Of names with commas between them."""
    return {name: SIZES[name] for name in parsed_names("sizes", names, SIZES)}


def parsed_names(flag: str, names: str, known) -> list[str]:
    """The names with commas between them, each once. UserError for one that is not known."""
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in chosen:
        if name not in known:
            raise UserError(f"--{flag}={names}: there is no {name!r}; choose from {', '.join(known)}")
    return chosen


def parsed_counts(flag: str, text: str) -> list[int]:
    """Numbers from 1 up, with commas between them."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--{flag}={text}: give numbers from 1 up with commas between them, such as 1,32")
    return list(dict.fromkeys(map(int, parts)))


def thread_count() -> int:
    """Of XLA's pool on a CPU, which is also what a peer is told to use."""
    return os.cpu_count() or 1

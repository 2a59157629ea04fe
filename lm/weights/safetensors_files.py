"""The tensors in the safetensors files of a folder, by name, each found once or as exact copies of one another."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lm.core.errors import UserError
from lm.core.textfiles import file_text
from lm.model.config import ModelConfig
from lm.model.rope import ROPE_SCALINGS, rope_frequencies

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
READABLE_DTYPES = ("F32", "F16", "BF16", "F64")
BLOCK_SIZE = 1 << 24  # numbers that a comparison holds at a time


class StoredTensor(NamedTuple):
    """A tensor that is still in its file."""

    opened: Any  # what safetensors opened
    name: str
    file: Path

    def __str__(self) -> str:
        return f"tensor {self.name} of {self.file}"

    @property
    def dtype(self) -> str:
        return self.opened.get_slice(self.name).get_dtype()

    @property
    def shape(self) -> list[int]:
        return self.opened.get_slice(self.name).get_shape()

    def read(self) -> np.ndarray:
        self.check_dtype()
        return self.opened.get_tensor(self.name)

    def check_dtype(self) -> None:
        if self.dtype not in READABLE_DTYPES:
            raise UserError(f"{self} is {self.dtype}: we read {', '.join(READABLE_DTYPES)}, nothing quantised")

    def equals(self, other: "StoredTensor") -> bool:
        """Whether both hold the same numbers; no more than a block of rows of each is in memory."""
        self.check_dtype(), other.check_dtype()
        if self.shape != other.shape:
            return False
        if not self.shape:
            return bool(np.array_equal(self.read(), other.read()))
        rows = max(1, BLOCK_SIZE // max(1, math.prod(self.shape[1:])))
        one, two = (each.opened.get_slice(each.name) for each in (self, other))
        blocks = (slice(at, min(at + rows, self.shape[0])) for at in range(0, self.shape[0], rows))
        return all(np.array_equal(one[block].astype(np.float64), two[block].astype(np.float64)) for block in blocks)


@contextmanager
def open_tensors(source: Path) -> Iterator[dict[str, StoredTensor]]:
    """Every tensor of a folder by name: those of all its safetensors files, whether its index names them or not.

    Raises UserError for an index that its files contradict, and for two tensors of one name that differ.
    """
    index = _index(source)
    with ExitStack() as stack:
        tensors: dict[str, StoredTensor] = {}
        for file in _files(source, index):
            try:
                handle = stack.enter_context(safe_open(file, framework="np"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is torn or no safetensors ({error}): download it again") from error
            inside = {name: StoredTensor(handle, name, file) for name in handle.keys()}  # noqa: SIM118
            for name in sorted(tensors.keys() & inside.keys()):
                if not tensors[name].equals(inside[name]):
                    raise UserError(
                        f"{inside[name]} differs from that of the same name in {tensors[name].file.name}: "
                        "move the file that is not of this model out of the folder"
                    )
            tensors = {**inside, **tensors}
            lacking = sorted(name for name, there in index.items() if source / there == file and name not in inside)
            if lacking:
                raise UserError(
                    f"{source / INDEX_FILE} names tensor {lacking[0]} in {file.name}, which lacks it: "
                    "download both again"
                )
        yield tensors


def _index(source: Path) -> Mapping[str, str]:
    """The file of each tensor, as the folder's index has it; empty if there is none."""
    if not (source / INDEX_FILE).exists():
        return {}
    index = read_json(source / INDEX_FILE).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise UserError(f"{source / INDEX_FILE} has no weight_map from tensors to files: download it again")
    return index


def _files(source: Path, index: Mapping[str, str]) -> list[Path]:
    """All safetensors files of a folder but for consolidated*: the same weights again, in Mistral's own names."""
    if not index and not (source / SINGLE_FILE).exists():
        other = next(source.glob("*.bin"), None)
        hint = f" ({other.name} is a pickle, which may run any code: convert it to safetensors first)" if other else ""
        raise UserError(f"{source} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}: download the folder again")
    for file in sorted(set(index.values())):
        if not (source / file).exists():
            raise UserError(f"{source} lacks {file}, which {INDEX_FILE} names: download it again")
    there = {file for file in source.glob("*.safetensors") if not file.name.startswith("consolidated")}
    return sorted(there | {source / file for file in index.values()})


def is_computed(tensor: StoredTensor, c: ModelConfig) -> bool:
    """Whether a tensor only repeats what the config says.

    Old files have rotary frequencies, a causal mask, and the scalar that GPT-2 put where that mask is 0.
    """
    kind = tensor.name.rsplit(".", 2)[-2:]
    if c.positions == "rope":
        return kind == ["rotary_emb", "inv_freq"] and _are_frequencies(tensor, c)
    if kind == ["attn", "bias"] and tensor.shape == [1, 1, c.context, c.context]:
        mask = tensor.opened.get_tensor(tensor.name) if tensor.dtype in ("U8", "BOOL") else tensor.read()
        return bool(np.array_equal(mask[0, 0].astype(np.float32), np.tri(c.context, dtype=np.float32)))
    return kind == ["attn", "masked_bias"] and tensor.shape in ([], [1]) and float(tensor.read().item()) <= -1e4


def _are_frequencies(tensor: StoredTensor, c: ModelConfig) -> bool:
    """Whether it holds the config's frequencies, rounded to the file's dtype; older files leave out a linear
    scaling."""
    value, plain = tensor.read(), rope_frequencies(c.head_size, c.rope_base)
    limits = ml_dtypes.finfo(value.dtype)
    tolerance = dict(rtol=max(float(limits.eps), 1e-5), atol=float(limits.smallest_subnormal))
    tables = [ROPE_SCALINGS[c.rope_scaling](plain, c)] + [plain] * (c.rope_scaling == "linear")
    return any(value.shape == x.shape and np.allclose(value.astype(np.float64), x, **tolerance) for x in tables)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. UserError for none, and for a key that has two values."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for key, value in pairs:
            if key in merged and merged[key] != value:
                raise UserError(
                    f"{path} has {key} twice, as {merged[key]!r} and as {value!r}: keep the one that is right"
                )
            merged[key] = value
        return merged

    try:
        merged = json.loads(file_text(path), object_pairs_hook=once)
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): give the folder of a model from Hugging Face"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(merged, dict):
        raise UserError(f"{path} is not a JSON object: download it again")
    return merged

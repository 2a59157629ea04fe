"""A Hugging Face folder: config.json, and safetensors in one file or in shards with an index."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from lm.core.errors import UserError
from lm.core.types import Params
from lm.model.config import ModelConfig
from lm.weights import config_map, names, tensors
from lm.weights.safetensors_files import INDEX_FILE, SINGLE_FILE, StoredTensor, is_computed, open_tensors, read_json

Json = Mapping[str, Any]
CONFIG_FILE = "config.json"
EXPORT_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
SHARD_BYTES = 5_000_000_000  # bytes of a file at most, as the Hub has them


def read_config(source: Path) -> dict[str, Any]:
    return read_json(source / CONFIG_FILE)


def read_folder(
    source: Path, on_progress: tensors.ProgressCallback = lambda done, total: None
) -> tuple[ModelConfig, Params]:
    """The model in a folder: Config, and float32 parameters. Only one of their tensors is in memory at a time.

    Every tensor is used, or equals a used one, or repeats what config.json says; otherwise UserError. A head beside the
    embedding decides whether they are tied, as in transformers: if the two differ they are not, whatever
    tie_word_embeddings says.
    """
    hf = read_config(source)
    c = config_map.model_config_from_json(hf)
    with open_tensors(source) as stored:
        c, entries, copies = _entries(c, hf["model_type"], stored)
        needed = {name for name, _, _ in tensors.tensor_places(c, entries)}
        unused = stored.keys() - needed - copies
        _check_tensor_names(stored, needed, unused, hf, c, source)
        return c, tensors.read_params(
            c, entries, lambda name: stored[name].read(), on_progress, place=lambda name: str(stored[name])
        )


def _entries(
    c: ModelConfig, kind: str, tensors: Mapping[str, StoredTensor]
) -> tuple[ModelConfig, list[names.TensorEntry], set[str]]:
    """Config and entries, tied or not as the tensors have it; and the names of second copies."""

    def of(c: ModelConfig) -> list[names.TensorEntry]:
        entries = names.tensor_entries(c, kind)
        if kind == "gpt2" and not any(name.startswith("transformer.") for name in tensors):  # as OpenAI's own file
            entries = [entry._replace(tensor_name=entry.tensor_name.removeprefix("transformer.")) for entry in entries]
        return entries

    entries = of(c)
    embedding = next(entry.tensor_name for entry in entries if entry.leaf_names == ("embedding",))
    if not c.tie_embeddings or names.HEAD_TENSOR not in tensors:
        return c, entries, set()
    if embedding not in tensors:  # the one matrix goes by the head's name
        return (
            c,
            [e._replace(tensor_name=names.HEAD_TENSOR) if e.tensor_name == embedding else e for e in entries],
            set(),
        )
    if tensors[names.HEAD_TENSOR].equals(tensors[embedding]):
        return c, entries, {names.HEAD_TENSOR}
    untied = dataclasses.replace(c, tie_embeddings=False)
    return untied, of(untied), set()


def write_folder(
    destination: Path,
    c: ModelConfig,
    params: Mapping,
    *,
    dtype: str,
    ids: Mapping[str, Any],
    kind: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """config.json and safetensors of a model, for transformers to load. Only one of the files is in memory at a time.

    ids: bos_token_id and the like. kind: the model_type to write if it can express this config. config.json is written
    last.
    """
    if dtype not in EXPORT_DTYPES:
        raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(EXPORT_DTYPES)}")
    hf = {**config_map.config_json(c, kind), **ids, "dtype": dtype, "torch_dtype": dtype}
    entries = names.tensor_entries(c, hf["model_type"])
    tensors.check_params(c, params)
    sizes = {name: tensors.tensor_size(c, index, entry) for name, index, entry in tensors.tensor_places(c, entries)}
    sizes = {name: size * np.dtype(EXPORT_DTYPES[dtype]).itemsize for name, size in sizes.items()}
    files, stream = _shard_contents(sizes, shard_bytes), tensors.named_tensors(c, entries, params)
    for file, inside in files.items():
        part = ((name, value.astype(EXPORT_DTYPES[dtype])) for name, value in itertools.islice(stream, len(inside)))
        save_file(dict(part), destination / file, metadata={"format": "pt"})
    if len(files) > 1:
        where = {name: file for file, inside in files.items() for name in inside}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (destination / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    (destination / CONFIG_FILE).write_text(json.dumps(hf, indent=2) + "\n")


def _shard_contents(sizes: Mapping[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """What each file holds: as many tensors in order as fit, but at least one."""
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": inside for i, inside in enumerate(shards, 1)}


def _check_tensor_names(
    tensors: Mapping[str, StoredTensor], needed: set[str], unused: set[str], hf: Json, c: ModelConfig, source: Path
) -> None:
    """UserError for a missing tensor, and for one that the model of config.json does not use."""
    missing = sorted(needed - tensors.keys())
    extra = sorted(name for name in unused if not is_computed(tensors[name], c))
    for name in missing[:1]:
        raise UserError(
            f"{source} lacks tensor {name}{_more(missing)}, which config.json with "
            f"{_flag_text(name, hf, c, tensors)} needs: "
            "correct that, or download the folder again"
        )
    for name in extra[:1]:
        raise UserError(
            f"{tensors[name]}{_more(extra)} has no place in a model whose config.json says "
            f"{_flag_text(name, hf, c, tensors)}: "
            "correct that, or take away what is not of this model"
        )


def _more(names_: list[str]) -> str:
    return f" and {len(names_) - 1} more" if len(names_) > 1 else ""


def _flag_text(name: str, hf: Json, c: ModelConfig, tensor_names: Iterable[str]) -> str:
    """What config.json says that decides whether the model has this tensor."""
    layer, expert = (re.search(rf"\b(?:{axis})\.(\d+)\.", name) for axis in ("layers|h", "experts"))
    key = "model_type"
    if name == names.HEAD_TENSOR:
        key = "tie_word_embeddings"
    elif layer and (int(layer[1]) >= c.layers or not any(layer[0] in other for other in tensor_names)):
        key = "n_layer" if hf["model_type"] == "gpt2" else "num_hidden_layers"
    elif expert and (int(expert[1]) >= c.experts or not any(expert[0] in other for other in tensor_names)):
        key = "num_local_experts" if "num_local_experts" in hf else "num_experts"
    elif name.endswith(".bias") and hf["model_type"] == "llama":
        key = "mlp_bias" if ".mlp." in name else "attention_bias"
    return f"{key} = {json.dumps(hf.get(key))}"

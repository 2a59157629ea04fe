"""A Hugging Face folder: config.json, and safetensors in one file or in shards with an index."""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lm.errors import UserError
from lm.model.config import Config
from lm.textfiles import text_of
from lm.types import Params
from lm.weights import names, shapes, tensors

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# What files hold beside weights: tables that are computed anew, and GPT-2's causal mask.
COMPUTED = re.compile(r"rotary_emb\.inv_freq$|h\.\d+\.attn\.(masked_)?bias$")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
SHARD = 5_000_000_000  # bytes of a file at most, as the Hub has them


def read_config(source: Path) -> dict[str, Any]:
    return _json(source / CONFIG)


def read(source: Path, note: tensors.Note = lambda done, total: None) -> tuple[Config, Params]:
    """The model in a folder: Config, and float32 parameters. Only one of their tensors is in memory at a time."""
    hf = read_config(source)
    c = shapes.shape(hf)
    with _opened(source) as tensor:
        names_there = tensor.keys()
        entries = names.entries(c, hf["model_type"])
        bare = hf["model_type"] == "gpt2" and not any(name.startswith("transformer.") for name in names_there)
        if bare:  # as OpenAI's own file
            entries = [entry._replace(theirs=entry.theirs.removeprefix("transformer.")) for entry in entries]
        _agree(names_there, {name for name, _, _ in tensors.places(c, entries)}, c, source)
        return c, tensors.read(c, entries, lambda name: tensor[name](), note)


def write(
    destination: Path,
    c: Config,
    params: Mapping,
    *,
    dtype: str,
    ids: Mapping[str, Any],
    kind: str = "",
    shard_bytes: int = SHARD,
) -> None:
    """config.json and safetensors of a model, for transformers to load. Only one of the files is in memory at a time.

    ids: bos_token_id and the like. kind: the model_type to write if it can say this Config. config.json comes last.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    hf = {**shapes.config_json(c, kind), **ids, "dtype": dtype, "torch_dtype": dtype}
    entries = names.entries(c, hf["model_type"])
    sizes = {name: tensors.size(c, index, entry) for name, index, entry in tensors.places(c, entries)}
    sizes = {name: size * np.dtype(DTYPES[dtype]).itemsize for name, size in sizes.items()}
    files, stream = _files(sizes, shard_bytes), tensors.written(c, entries, params)
    for file, inside in files.items():
        part = ((name, value.astype(DTYPES[dtype])) for name, value in itertools.islice(stream, len(inside)))
        save_file(dict(part), destination / file, metadata={"format": "pt"})
    if len(files) > 1:
        where = {name: file for file, inside in files.items() for name in inside}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (destination / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (destination / CONFIG).write_text(json.dumps(hf, indent=2) + "\n")


def _files(sizes: Mapping[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """What each file holds: as many tensors in order as fit, but at least one."""
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {WHOLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": inside for i, inside in enumerate(shards, 1)}


def _agree(there: set[str], needed: set[str], c: Config, source: Path) -> None:
    missing = sorted(needed - there)
    extra = sorted(name for name in there - needed if not COMPUTED.search(name))
    if c.tied and extra == ["lm_head.weight"]:
        extra = []  # a second copy of the embedding
    for what, names_ in (("lacks", missing), ("has a tensor more than we use:", extra)):
        if names_:
            more = f" and {len(names_) - 1} more" if len(names_) > 1 else ""
            raise UserError(f"{source} {what} {names_[0]}{more}: is config.json that of these weights?")


@contextmanager
def _opened(source: Path) -> Iterator[dict[str, Callable[[], np.ndarray]]]:
    """By name, what reads each tensor."""
    if (source / INDEX).exists():
        files = sorted(set(_json(source / INDEX)["weight_map"].values()))
    elif (source / WHOLE).exists():
        files = [WHOLE]
    else:
        other = next(source.glob("*.bin"), None)
        hint = f" ({other.name} is a pickle, which may run any code: convert it to safetensors first)" if other else ""
        raise UserError(f"{source} has neither {WHOLE} nor {INDEX}{hint}: download the folder again")
    with ExitStack() as stack:
        found = {}
        for file in files:
            if not (source / file).exists():
                raise UserError(f"{source} lacks {file}, which {INDEX} names: download it again")
            try:
                opened = stack.enter_context(safe_open(source / file, framework="np"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{source / file} is torn or no safetensors ({error}): download it again") from error
            found |= {name: _reader(opened, name, source / file) for name in opened.keys()}  # noqa: SIM118
        yield found


def _reader(opened, name: str, file: Path) -> Callable[[], np.ndarray]:
    def read():
        kind = opened.get_slice(name).get_dtype()
        if kind not in ("F32", "F16", "BF16", "F64"):
            raise UserError(f"tensor {name} of {file} is {kind}: we read F32, F16, BF16 and F64, nothing quantised")
        return opened.get_tensor(name)

    return read


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text_of(path))
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): give the folder of a model from Hugging Face"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object: download it again")
    return found

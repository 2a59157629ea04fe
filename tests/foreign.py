"""Models of transformers, as tests/peers/weights.json has them: config.json, names and shapes, and its logits.

Their tensors are drawn by name, here and where transformers computed with them, so that no weights are stored.
"""

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

FIXTURES = Path(__file__).parent / "peers" / "weights.json"
STORED = json.loads(FIXTURES.read_text()) if FIXTURES.exists() else {"models": {}}
LENGTHS = (9, 6, 2)  # of the rows; right of its length a row holds other ids
VOCAB, LONGEST = 24, max(LENGTHS)
IDS = np.array([[(5 * row + 7 * t + t * t) % VOCAB for t in range(LONGEST)] for row in range(len(LENGTHS))], np.int32)
REAL = np.arange(LONGEST) < np.array(LENGTHS)[:, None]

ABSENT = object()  # a key of config.json that is taken away
# Folders whose tie_word_embeddings says what the tensors do not: of which stored model the logits are, and if untied.
MISLABELLED = {"two matrices": ("llama", True), "one by the head's name": ("llama 3", False)}

LAYER, EXPERT = re.compile(r"(layers|h)\.\d+\."), re.compile(r"(experts)\.\d+\.")


def drawn(name: str, shape) -> np.ndarray:
    """Uniform in +-1/2 for matrices, so that a layer neither dies nor explodes at width 16; near 1 for vectors."""
    uniform = np.random.default_rng(zlib.crc32(name.encode())).random(shape) - 0.5
    return (uniform if len(shape) > 1 else 1 + 0.6 * uniform).astype(np.float32)


def collapsed(shapes: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Shapes by name, those of all layers as one, and those of all experts: their numbers are * and #."""
    return {re.sub(EXPERT, r"\1.#.", re.sub(LAYER, r"\1.*.", name)): shape for name, shape in shapes.items()}


def expanded(shapes: Mapping[str, list[int]], hf: Mapping) -> dict[str, list[int]]:
    """And back, in order of their names."""
    layers = hf.get("num_hidden_layers") or hf["n_layer"]
    experts = hf.get("num_local_experts") or hf.get("num_experts") or 1
    of_layers = {name.replace("*", str(i)): shape for name, shape in shapes.items() for i in range(layers)}
    every = {name.replace("#", str(e)): shape for name, shape in of_layers.items() for e in range(experts)}
    return dict(sorted(every.items()))


def tensors(name: str) -> dict[str, np.ndarray]:
    stored = STORED["models"][name]
    return {tensor: drawn(tensor, shape) for tensor, shape in expanded(stored["tensors"], stored["config"]).items()}


def folder_of(name: str, path: Path, **changes) -> Path:
    """A Hugging Face folder of a stored model, in `path`; `changes` of its config.json."""
    path.mkdir(parents=True, exist_ok=True)
    write_config(path, {**STORED["models"][name]["config"], **changes})
    save_file(tensors(name), path / "model.safetensors", metadata={"format": "pt"})
    return path


def config_of(name: str, **changes) -> dict:
    """A stored config.json with some keys changed, or gone where ABSENT."""
    hf = {**STORED["models"][name]["config"], **changes}
    return {key: value for key, value in hf.items() if value is not ABSENT}


def write_config(path: Path, hf: Mapping) -> None:
    (path / "config.json").write_text(json.dumps(hf))


def of_file(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def changed(path: Path, **replaced) -> None:
    """The folder's tensors with some of them replaced, or gone where None."""
    found = {
        name: value for name, value in (of_file(path / "model.safetensors") | replaced).items() if value is not None
    }
    save_file(found, path / "model.safetensors")


def mislabelled_folder(name: str, path: Path) -> Path:
    truth, untied = MISLABELLED[name]
    folder_of(truth, path, tie_word_embeddings=True)
    if not untied:
        embedding = "model.embed_tokens.weight"
        changed(path, **{"lm_head.weight": tensors(truth)[embedding], embedding: None})
    return path

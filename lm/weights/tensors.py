"""Parameters from a stream of named tensors and back, one tensor at a time."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from lm.core.errors import UserError
from lm.core.types import Params
from lm.model.config import ModelConfig
from lm.model.params import param_specs
from lm.weights.names import TensorEntry

TensorPlaces = Iterator[tuple[str, tuple[int, ...], TensorEntry]]
ProgressCallback = Callable[[int, int], None]  # called after each tensor: (done, total)


def tensor_places(c: ModelConfig, entries: Iterable[TensorEntry]) -> TensorPlaces:
    """Every tensor of theirs: its name, where it lies on our leading axes, and its entry."""
    for entry in entries:
        axes = [("i", c.layers)] * ("{i}" in entry.tensor_name) + [("e", c.experts)] * ("{e}" in entry.tensor_name)
        for index in itertools.product(*(range(size) for _, size in axes)):
            yield entry.tensor_name.format(**{name: n for (name, _), n in zip(axes, index)}), index, entry


def tensor_size(c: ModelConfig, index: tuple[int, ...], entry: TensorEntry) -> int:
    """How many numbers the tensor of a place holds."""
    tree = param_specs(c)
    home = tree["layers"] if index else tree
    return sum(math.prod(home[ours].shape[len(index) :]) for ours in entry.leaf_names)


def read_params(
    c: ModelConfig,
    entries: Iterable[TensorEntry],
    tensor: Callable[[str], np.ndarray],
    on_progress: ProgressCallback = lambda done, total: None,
    *,
    place: Callable[[str], str],
    says: str = "config.json",
) -> Params:
    """Our parameters, float32, from `tensor(name)`. UserError for one of another shape than the config `says`.

    place: what a message calls the tensor of a name.
    """
    tree = param_specs(c)
    params = {name: np.empty(spec.shape, np.float32) for name, spec in tree.items() if name != "layers"}
    params["layers"] = {name: np.empty(spec.shape, np.float32) for name, spec in tree["layers"].items()}
    places = list(tensor_places(c, entries))
    for done, (name, index, entry) in enumerate(places, 1):
        home = params["layers"] if index else params
        targets = [home[ours][index] for ours in entry.leaf_names]
        stored = tensor(name)
        value = stored.T if entry.is_transposed else stored
        expected = (*targets[0].shape[:-1], sum(target.shape[-1] for target in targets))
        if value.shape != expected:
            stored_shape = list(reversed(expected)) if entry.is_transposed else list(expected)
            raise UserError(
                f"{place(name)} is {list(stored.shape)}, but {says} makes it {stored_shape}{_sizes(c, entry)}: "
                "take both from the same model"
            )
        edges = np.cumsum([target.shape[-1] for target in targets])[:-1]
        for target, part in zip(targets, np.split(value, edges, axis=-1)):
            target[...] = part
        on_progress(done, len(places))
    return params


def _sizes(c: ModelConfig, entry: TensorEntry) -> str:
    return f" (vocabulary {c.vocab_size})" if entry.leaf_names[0] in ("embedding", "head") else ""


def check_params(c: ModelConfig, params: Mapping) -> None:
    """UserError for parameters that do not fit the config: a file of both would contradict itself."""
    tree = param_specs(c)
    for wanted, there, home in ((tree["layers"], params["layers"], "layers."), (tree, params, "")):
        for name in sorted(wanted.keys() ^ there.keys()):
            what = (
                f"lack {home}{name}, which their config has"
                if name in wanted
                else f"have {home}{name} beyond their config"
            )
            raise UserError(f"the parameters {what}: load both from the same checkpoint")
        for name in sorted(wanted.keys() - {"layers"}):
            if there[name].shape != wanted[name].shape:
                raise UserError(
                    f"parameter {home}{name} is {list(there[name].shape)}, but its config makes it "
                    f"{list(wanted[name].shape)}: load both from the same checkpoint"
                )


def named_tensors(c: ModelConfig, entries: Iterable[TensorEntry], params: Mapping) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors, by name, float32."""
    for name, index, entry in tensor_places(c, entries):
        home = params["layers"] if index else params
        value = np.concatenate([np.asarray(home[ours][index], np.float32) for ours in entry.leaf_names], axis=-1)
        yield name, np.ascontiguousarray(value.T if entry.is_transposed else value)

"""Parameters from a stream of named tensors and back, one tensor at a time."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from lm.errors import UserError
from lm.model.config import Config
from lm.model.params import specs
from lm.types import Params
from lm.weights.names import Entry

Places = Iterator[tuple[str, tuple[int, ...], Entry]]
Note = Callable[[int, int], None]  # told of each tensor: how many are done, of how many


def places(c: Config, entries: Iterable[Entry]) -> Places:
    """Every tensor of theirs: its name, where it lies on our leading axes, and its entry."""
    for entry in entries:
        axes = [("i", c.layers)] * ("{i}" in entry.theirs) + [("e", c.experts)] * ("{e}" in entry.theirs)
        for index in itertools.product(*(range(size) for _, size in axes)):
            yield entry.theirs.format(**{name: n for (name, _), n in zip(axes, index)}), index, entry


def size(c: Config, index: tuple[int, ...], entry: Entry) -> int:
    """How many numbers the tensor of a place holds."""
    tree = specs(c)
    home = tree["layers"] if index else tree
    return sum(math.prod(home[ours].shape[len(index) :]) for ours in entry.ours)


def read(
    c: Config, entries: Iterable[Entry], tensor: Callable[[str], np.ndarray], note: Note = lambda done, total: None
) -> Params:
    """Our parameters, float32, from `tensor(name)`. UserError for one of another shape."""
    tree = specs(c)
    params = {name: np.empty(spec.shape, np.float32) for name, spec in tree.items() if name != "layers"}
    params["layers"] = {name: np.empty(spec.shape, np.float32) for name, spec in tree["layers"].items()}
    wanted = list(places(c, entries))
    for done, (name, index, entry) in enumerate(wanted, 1):
        home = params["layers"] if index else params
        targets = [home[ours][index] for ours in entry.ours]
        found = tensor(name)
        value = found.T if entry.transposed else found
        expected = (*targets[0].shape[:-1], sum(target.shape[-1] for target in targets))
        if value.shape != expected:
            theirs = list(reversed(expected)) if entry.transposed else list(expected)
            raise UserError(
                f"tensor {name} is {list(found.shape)}, but config.json makes it {theirs}: they do not match"
            )
        edges = np.cumsum([target.shape[-1] for target in targets])[:-1]
        for target, part in zip(targets, np.split(value, edges, axis=-1)):
            target[...] = part
        note(done, len(wanted))
    return params


def written(c: Config, entries: Iterable[Entry], params: Mapping) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors, by name, float32."""
    for name, index, entry in places(c, entries):
        home = params["layers"] if index else params
        value = np.concatenate([np.asarray(home[ours][index], np.float32) for ours in entry.ours], axis=-1)
        yield name, np.ascontiguousarray(value.T if entry.transposed else value)

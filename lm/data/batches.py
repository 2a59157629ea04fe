"""batch(i): a pure function of (seed, i), so that resuming needs no iterator and any step can be replayed."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import grain
import jax
import numpy as np

from lm.errors import UserError, at_least

Rows = TypeVar("Rows")  # a pytree of arrays with the same leading N


def batches(rows: Rows, *, batch_size: int, seed: int, shuffle: bool = True) -> Callable[[int], Rows]:
    """i -> rows [batch_size, ...] of the same pytree type, numpy.

    Epoch follows epoch without a seam, each in a new order; fewer rows than `batch_size` repeat. Grain draws the row
    *numbers* and numpy gathers the rows once: per-row Python would cost more than a small model's step.
    """
    at_least(1, "data", batch_size=batch_size)
    sizes = {len(leaf) for leaf in jax.tree.leaves(rows)}
    if len(sizes) != 1 or 0 in sizes:
        raise UserError(f"cannot draw batches from {sorted(sizes)} rows: every array needs the same number, at least 1")
    numbers = grain.MapDataset.range(sizes.pop()).seed(seed)
    numbers = (numbers.shuffle() if shuffle else numbers).repeat().batch(batch_size)

    def batch(i: int) -> Rows:
        drawn = numbers[int(i)]
        return jax.tree.map(lambda leaf: np.asarray(leaf[drawn]), rows)

    return batch


def every(rows: Rows, batch_size: int) -> Iterator[Rows]:
    """All rows once, in order; the last batch is filled up with zeros, which weigh nothing."""
    count = len(jax.tree.leaves(rows)[0])
    for start in range(0, count, batch_size):
        part = jax.tree.map(lambda leaf: leaf[start : start + batch_size], rows)
        missing = batch_size - min(batch_size, count - start)
        yield jax.tree.map(lambda leaf: np.pad(leaf, ((0, missing),) + ((0, 0),) * (leaf.ndim - 1)), part)

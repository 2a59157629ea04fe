"""batch(i): a pure function of (seed, i), so that resuming needs no iterator and any step can be replayed."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import grain
import jax
import numpy as np

from lm.core.errors import UserError, check_at_least

Rows = TypeVar("Rows")  # a pytree of arrays with the same leading N
BatchSizeRamp = Sequence[
    tuple[int, int]
]  # ((100, 4), (200, 8)): 4 rows before step 100, 8 before step 200, then batch_size


def batch_function(
    rows: Rows, *, batch_size: int, seed: int, shuffle: bool = True, ramp: BatchSizeRamp = ()
) -> Callable[[int], Rows]:
    """i -> rows [batch_size, ...] of the same pytree type, numpy; fewer or more while the ramp lasts.

    Epochs follow each other without a gap, each in a new order, which no ramp changes: a batch takes the rows after
    those of the earlier batches. Fewer rows than `batch_size` repeat. Grain draws the row *numbers* and numpy gathers
    the rows once: per-row Python would cost more than a small model's step.
    """
    check_at_least(1, "data", batch_size=batch_size)
    check_ramp(ramp)
    sizes = {len(leaf) for leaf in jax.tree.leaves(rows)}
    if len(sizes) != 1 or 0 in sizes:
        raise UserError(f"cannot draw batches from {sorted(sizes)} rows: every array needs the same number, at least 1")
    drawn = drawn_rows(sizes.pop(), batch_size=batch_size, seed=seed, shuffle=shuffle, ramp=ramp)

    def batch(i: int) -> Rows:
        numbers, _ = drawn(i)
        return jax.tree.map(lambda leaf: np.asarray(leaf[numbers]), rows)

    return batch


def drawn_rows(
    count: int, *, batch_size: int, seed: int, shuffle: bool = True, ramp: BatchSizeRamp = ()
) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """i -> which of `count` rows batch i of `batch_function` takes, i64[batch_size], and in which epoch, from 0 on."""
    numbers = grain.MapDataset.range(count).seed(seed)
    numbers = (numbers.shuffle() if shuffle else numbers).repeat()

    def drawn(i: int) -> tuple[np.ndarray, np.ndarray]:
        places = batch_row_range(int(i), batch_size=batch_size, ramp=ramp)
        return np.array([numbers[j] for j in places]), np.array(places) // count

    return drawn


def batch_row_range(i: int, *, batch_size: int, ramp: BatchSizeRamp) -> range:
    """The numbers of the rows of batch i among all rows that are drawn, one epoch after another."""
    start = begin = 0
    for end, size in (*ramp, (math.inf, batch_size)):
        if i < end:
            return range(start + (i - begin) * size, start + (i + 1 - begin) * size)
        start, begin = start + (end - begin) * size, end


def check_ramp(ramp: BatchSizeRamp) -> None:
    """UserError unless the ramp is pairs (step, rows), the steps growing, no batch empty."""
    pairs = [pair for pair in ramp if isinstance(pair, (tuple, list)) and len(pair) == 2]
    if len(pairs) < len(ramp) or not all(isinstance(n, int) for pair in pairs for n in pair):
        raise UserError(
            f"data.ramp is {ramp}; it must be pairs of a step and the rows of a batch before it, such as ((100, 4),)"
        )
    steps = [0, *(step for step, _ in ramp)]
    if any(after <= before for before, after in zip(steps, steps[1:])):
        raise UserError(f"data.ramp has the steps {', '.join(map(str, steps[1:]))}; each must be larger than the last")
    for _, rows in ramp:
        check_at_least(1, "data.ramp", rows=rows)


def check_ramp_microbatches(ramp: BatchSizeRamp, microbatches: int) -> None:
    """UserError for a batch that does not divide into the microbatches, before the first step."""
    for step, rows in ramp:
        if rows % microbatches:
            raise UserError(
                f"data.ramp has {rows} rows before step {step}, which cannot be cut into {microbatches} equal parts: "
                "change them, or stage.microbatches"
            )


def sequential_batches(rows: Rows, batch_size: int) -> Iterator[Rows]:
    """All rows once, in order; the last batch is padded with zeros, which have weight 0."""
    count = len(jax.tree.leaves(rows)[0])
    for start in range(0, count, batch_size):
        part = jax.tree.map(lambda leaf: leaf[start : start + batch_size], rows)
        missing = batch_size - min(batch_size, count - start)
        yield jax.tree.map(lambda leaf: np.pad(leaf, ((0, missing),) + ((0, 0),) * (leaf.ndim - 1)), part)

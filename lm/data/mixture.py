"""Mixtures of sources: who is named in a config, and which rows of whom batch i takes, a pure function of (seed, i).

A batch takes whole rows of each source in proportion to its weight, by systematic sampling: with one offset u for each
step, the row at (u + k) / B of the cumulative weights, k = 0 .. B - 1. So a source of weight w among weights that sum
to 1 gets floor(w B) or ceil(w B) rows, w B on average (Cochran 1977, Sampling Techniques, ch. 8).

Every source keeps an order of its own (lm.data.batches), from which a batch takes the next rows: what else is in the
mixture changes when a row comes, never which one is next.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np

from lm.core.config import did_you_mean
from lm.core.errors import UserError, check_at_least
from lm.data.batches import BatchSizeRamp, batch_row_range, batch_size_at, check_ramp, shuffled_numbers

KINDS = ("website", "book", "encyclopedia", "code", "forum", "documentation", "paper", "education")
COUNTED_STEPS = 1024  # steps whose rows are counted at once; between them only sums are kept

# A number, or points (step, weight): linear between them, constant before the first and after the last. Two points of
# one step are a jump.
Weight = float | Sequence[tuple[int, float]]


class MixtureSource(NamedTuple):
    """An entry of data.sources or data.corpus."""

    source: str  # a built-in name, several with commas between them (one pool), or what lm.data.sources reads
    weight: Weight | None = None  # its share of the rows, relative to the others'; None: by size
    kind: str = ""  # one of KINDS; empty: none is known
    epochs: float = math.inf  # how often its rows may be seen; then its weight is 0

    @property
    def names(self) -> list[str]:
        """The names in `source`: several where it is a pool."""
        return [name.strip() for name in self.source.split(",")]


class DrawnRows(NamedTuple):
    """The rows of a batch, those of one source side by side."""

    source: np.ndarray  # i64[B]  its place in the mixture
    number: np.ndarray  # i64[B]  of the row among the source's
    epoch: np.ndarray  # i64[B]  how often all rows of the source had been drawn before


def parse_sources(
    value: str | Sequence[Mapping[str, Any]], built_in: Mapping[str, str], *, option: str = "data.sources"
) -> list[MixtureSource]:
    """The sources that a config names: one for a string, one each for a sequence of mappings.

    A string of several built-in names with commas between them is one source: a pool, sampled evenly. `built_in`: the
    kind of each built-in name; a mapping may say another. `option`: what messages call it. UserError for an entry that
    is none, a source that is named twice, weights that are given for some only, or that are all 0 at a step.
    """
    if isinstance(value, str):
        if not value.strip():
            names = ", ".join(built_in)
            raise UserError(f"{option} names no source: give a file, a folder, or built-in names ({names})")
        return [_with_kind(MixtureSource(value), built_in)]
    if not isinstance(value, Sequence) or not value:
        raise UserError(f"{option} is {value!r}; it must be text, or a list such as [{{'source': 'stdlib'}}, ...]")
    entries = [_with_kind(_checked_entry(entry, f"{option}[{i}]"), built_in) for i, entry in enumerate(value)]
    for i, each in enumerate(entries):
        if each.source in [other.source for other in entries[:i]]:
            raise UserError(f"{option} names {each.source!r} twice: give it one entry, with the sum of the weights")
    unweighted = [each.source for each in entries if each.weight is None]
    if unweighted and len(unweighted) < len(entries):
        raise UserError(
            f"{option}: {unweighted[0]!r} has no weight, though others have: give each a weight, or none of them"
        )
    if not unweighted:
        _check_weights(entries, option)
    return entries


def _checked_entry(entry: Any, place: str) -> MixtureSource:
    named = isinstance(entry, Mapping) and "source" in entry and isinstance(entry["source"], str)
    if not named or not entry["source"].strip():
        raise UserError(f"{place} is {entry!r}; it must be a mapping such as {{'source': 'stdlib', 'weight': 1.0}}")
    for key in entry:
        if key not in MixtureSource._fields:
            near = did_you_mean(key, MixtureSource._fields)
            raise UserError(f"{place}.{key} is no part of a source ({', '.join(MixtureSource._fields)}){near}")
    checked = MixtureSource(**entry)
    if checked.kind and checked.kind not in KINDS:
        raise UserError(f"{place}.kind is {checked.kind!r}; choose one of {', '.join(KINDS)}, or leave it out")
    if not _is_number(checked.epochs) or not checked.epochs > 0:
        raise UserError(f"{place}.epochs is {checked.epochs!r}; it must be a number above 0, or left out: without end")
    return checked._replace(weight=_checked_weight(checked.weight, place))


def _checked_weight(weight: Any, place: str) -> Weight | None:
    if weight is None:
        return None
    if _is_number(weight):
        if not 0 <= weight < math.inf:
            raise UserError(f"{place}.weight is {weight}; it must be 0 or more")
        return float(weight)
    points = weight if isinstance(weight, (tuple, list)) else ()
    pairs = [tuple(p) for p in points if isinstance(p, (tuple, list)) and len(p) == 2 and all(map(_is_number, p))]
    pairs = [pair for pair in pairs if isinstance(pair[0], int)]
    if not pairs or len(pairs) < len(points):
        raise UserError(
            f"{place}.weight is {weight!r}; it must be a number, or pairs of a step and a weight, such as "
            "((0, 1.0), (1000, 0.0))"
        )
    for (step, value), (later, _) in zip(pairs, [*pairs[1:], pairs[-1]]):
        if not 0 <= step <= later:
            raise UserError(f"{place}.weight has step {later} after step {step}: steps begin at 0 and never fall")
        if not 0 <= value < math.inf:
            raise UserError(f"{place}.weight is {value} at step {step}; it must be 0 or more")
    return tuple(pairs)


def _check_weights(sources: Sequence[MixtureSource], option: str) -> None:
    """UserError for a step at which all weights are 0. Between the points of schedules their sum is linear, so only
    the points, and the steps before them, can be such."""
    points = [step for each in sources if isinstance(each.weight, tuple) for step, _ in each.weight]
    at = np.array(sorted({0, *points, *(max(step - 1, 0) for step in points)}))
    total = sum(weight_at(each.weight, at) for each in sources)
    if not total.all():
        raise UserError(f"{option}: every weight is 0 at step {at[np.argmin(total > 0)]}: give one source a weight")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _with_kind(source: MixtureSource, built_in: Mapping[str, str]) -> MixtureSource:
    """With the kind of its built-in name (that of "facts:PATH" is that of "facts"), or of all the names of its pool if
    they are of one, unless it says one."""
    names = [name.partition(":")[0] for name in source.names]
    kinds = {built_in[name] if name in built_in else "" for name in names}
    return source if source.kind or len(kinds) > 1 else source._replace(kind=kinds.pop())


def source_labels(sources: Sequence[MixtureSource]) -> list[str]:
    """A short name of each, for metrics: a file's or folder's own name without its endings, or of "facts:PATH" what
    stands before the colon, where no other has it."""

    def short(source: str) -> str:
        if source.startswith("hf:") or "," in source:
            return source
        built_in, colon, _ = source.partition(":")
        if colon and built_in.isidentifier():
            return built_in
        name = PurePath(source).name
        return name.partition(".")[0] or name or source

    names = [short(each.source) for each in sources]
    return [name if names.count(name) == 1 else each.source for name, each in zip(names, sources)]


def weight_at(weight: Weight, steps: np.ndarray) -> np.ndarray:
    """f64[n]: the weight at each of the steps."""
    if isinstance(weight, (int, float)):
        return np.full(len(steps), float(weight))
    at, values = (np.array(side, float) for side in zip(*weight))
    after = np.searchsorted(at, steps, "right")  # a jump's later value holds from its step on
    before, after = np.maximum(after - 1, 0), np.minimum(after, len(at) - 1)
    width = at[after] - at[before]
    share = np.where(width > 0, (steps - at[before]) / np.where(width > 0, width, 1.0), 0.0)
    return values[before] + np.clip(share, 0.0, 1.0) * (values[after] - values[before])


def mixture_weights(sources: Sequence[MixtureSource], sizes: Sequence[int], *, temperature: float) -> list[Weight]:
    """Those of the sources or, where they have none, size^(1/temperature): 1 is in proportion to size, and the higher
    the more even (Raffel et al. 2020, sec. 3.5.2, arXiv 1910.10683)."""
    if not temperature > 0:
        raise UserError(f"data.source_temperature is {temperature}; it must be above 0: 1 weighs sources by their size")
    largest = max(sizes)
    return [(n / largest) ** (1 / temperature) if s.weight is None else s.weight for s, n in zip(sources, sizes)]


def systematic_counts(weights: np.ndarray, rows: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """i64[n,S]: how many of `rows` i64[n] each source gets at its weights f64[n,S] with the offsets f64[n] in [0, 1).

    Row k stands at (u + k) / B of the cumulative weights, so that ceil(B c - u) rows stand before c.
    """
    edges = np.cumsum(weights, axis=1)
    edges = edges / edges[:, -1:]  # the last is 1 exactly, and sources of weight 0 share an edge exactly
    before = np.ceil(rows[:, None] * edges - offsets[:, None]).clip(0, rows[:, None])
    return np.diff(before, axis=1, prepend=0.0).astype(np.int64)


def mixture_order(
    sizes: Sequence[int],
    *,
    weights: Sequence[Weight],
    epochs: Sequence[float],
    batch_size: int,
    seed: int,
    ramp: BatchSizeRamp = (),
    draws_per_step: int = 1,
) -> Callable[[int], DrawnRows]:
    """i -> the rows of batch i, from sources of `sizes` rows each; weights are those at step i // draws_per_step.

    The rows of a source are those that its own order has next. A source that was seen `epochs` times gets weight 0,
    within a batch too, and the others' weights are what remains. UserError, at its step, for a batch that nobody is
    left to fill. Of a single source without a cap this is the order of `batch_function`.
    """
    check_at_least(1, "data", batch_size=batch_size)
    check_ramp(ramp)
    if not sizes or min(sizes) < 1:
        raise UserError(f"cannot draw batches from sources of {list(sizes)} rows: each needs one at least")
    limits = np.array([math.inf if cap == math.inf else max(int(cap * n), 1) for cap, n in zip(epochs, sizes)])
    counts_before = _lazy_counts(
        weights, limits, batch_size=batch_size, seed=seed, ramp=ramp, draws_per_step=draws_per_step
    )
    numbers = [shuffled_numbers(size, seed=seed) for size in sizes]

    def drawn(i: int) -> DrawnRows:
        before, counts = counts_before(int(i))
        places = [range(first, first + count) for first, count in zip(before.tolist(), counts.tolist())]
        return DrawnRows(
            np.repeat(np.arange(len(sizes)), counts),
            np.array([numbers[s][j] for s, own in enumerate(places) for j in own], np.int64),
            np.array([j // sizes[s] for s, own in enumerate(places) for j in own], np.int64),
        )

    return drawn


def _lazy_counts(
    weights: Sequence[Weight],
    limits: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    ramp: BatchSizeRamp,
    draws_per_step: int,
) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """i -> (rows of each source drawn before batch i, in it), both i64[S].

    Counted block by block from the start on, and remembered, so that any step costs what its first asking cost.
    """
    if len(limits) == 1 and limits[0] == math.inf:  # the closed form
        places = lambda i: batch_row_range(i, batch_size=batch_size, ramp=ramp)
        return lambda i: (np.array([places(i).start]), np.array([len(places(i))]))
    starts = [np.zeros(len(limits), np.int64)]  # rows drawn before each block
    blocks: dict[int, np.ndarray] = {}  # the newest block's counts, by its number
    ended: list[int] = []  # the first step that cannot be filled, once it is known

    def block_counts(block: int) -> np.ndarray:
        if block not in blocks:
            steps = np.arange(block * COUNTED_STEPS, (block + 1) * COUNTED_STEPS)
            given = np.stack([weight_at(weight, steps // draws_per_step) for weight in weights], axis=1)
            rows = np.array([batch_size_at(int(step), batch_size=batch_size, ramp=ramp) for step in steps])
            offsets = np.random.Generator(np.random.Philox(key=[seed, block])).random(COUNTED_STEPS)
            blocks.clear()
            blocks[block] = _capped_counts(given, rows, offsets, starts[block], limits)
        return blocks[block]

    def counts_at(i: int) -> tuple[np.ndarray, np.ndarray]:
        block, place = divmod(i, COUNTED_STEPS)
        while len(starts) <= block and not ended:
            counts = block_counts(len(starts) - 1)
            if len(counts) < COUNTED_STEPS:
                ended.append((len(starts) - 1) * COUNTED_STEPS + len(counts))
            starts.append(starts[-1] + counts.sum(axis=0))
        counts = block_counts(block) if not ended or i < ended[0] else np.zeros((0, len(limits)), np.int64)
        if place >= len(counts):
            last = ended[0] if ended else block * COUNTED_STEPS + len(counts)
            raise UserError(
                f"the sources are used up at step {last // draws_per_step + 1}: every one that has a weight was seen "
                "as often as its `epochs` allow; raise them, add a source, or lower train.steps"
            )
        return starts[block] + counts[:place].sum(axis=0), counts[place]

    return counts_at


def _capped_counts(
    weights: np.ndarray, rows: np.ndarray, offsets: np.ndarray, drawn: np.ndarray, limits: np.ndarray
) -> np.ndarray:
    """i64[m,S]: the counts of a block of n steps, m < n where step m cannot be filled.

    weights f64[n,S], rows i64[n], offsets f64[n]; drawn i64[S] before; at most `limits` f64[S] in all.
    """
    found, done = [], 0
    while done < len(rows):
        open_weights = weights[done:] * (drawn < limits)
        usable = open_weights.any(axis=1)
        stop = len(usable) if usable.all() else int(np.argmin(usable))  # steps that anyone can fill
        counts = systematic_counts(open_weights[:stop], rows[done : done + stop], offsets[done : done + stop])
        total = drawn + np.cumsum(counts, axis=0)
        over = (total > limits).any(axis=1)
        fit = int(np.argmax(over)) if over.any() else stop
        found.append(counts[:fit])
        drawn, done = (total[fit - 1] if fit else drawn), done + fit
        if done < len(rows):  # a source ends within this step, or has ended
            one = _shared_rest(weights[done], int(rows[done]), float(offsets[done]), limits - drawn)
            if one is None:
                break
            found.append(one[None])
            drawn, done = drawn + one, done + 1
    return np.concatenate(found) if found else np.zeros((0, len(limits)), np.int64)


def _shared_rest(weights: np.ndarray, rows: int, offset: float, room: np.ndarray) -> np.ndarray | None:
    """i64[S]: the counts of one step where source s has `room` f64[S] left: what one cannot give the others do, by
    their weights. None where they cannot either."""
    counts = np.zeros(len(weights), np.int64)
    while counts.sum() < rows:
        left = weights * (counts < room)
        if not left.any():
            return None
        more = systematic_counts(left[None], np.array([rows - counts.sum()]), np.array([offset]))[0]
        counts = np.minimum(counts + more, room).astype(np.int64)
    return counts

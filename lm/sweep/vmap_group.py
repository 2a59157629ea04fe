"""Several runs of one program as one: each in a thread, the functions that they compile called together under vmap.

    group = VmapGroup(3)
    results = group.run_members(lambda member: train(configs[member], jit=group.jit))

A member that calls a compiled function waits until all others wait too; then the calls of the same function are stacked
and made as one call. Each member gets its own part back. Members may part ways (another number of batches, an error, an
early end): those that wait at the same function continue together, and the places of the others are filled with copies.
The program always has the same shape, so what a member computes does not depend on the members beside it.

Why threads that meet, and not an explicit `jax.vmap(update.update)` over stacked states? A member is a whole run of
`lm train`. Rollouts, rewards, evaluations, gates, checkpoints and resuming are host code, and members reach them at
different times: one resumes at step 40, one stops at a limit, one samples again because its rewards were all equal. An
explicit vmap needs a second loop, and a second version of every stage that samples or evaluates, which takes lists of
states. Here the loop and the stages stay as they are: they get `jit` as an argument, and that is where members meet.
Sampling, reward models and reference log-probs are vmapped too, not only updates. The price is this file, a thread a
member, and programs told apart by the code of the function that is compiled.
"""

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import CodeType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.errors import UserError


class StackedArray:
    """An array f[members, ...] on the device, and, once asked for, on the host."""

    def __init__(self, array: jax.Array):
        self.array = array
        self._host: np.ndarray | None = None

    def host_array(self) -> np.ndarray:
        if self._host is None:
            self._host = np.asarray(self.array)
        return self._host


class MemberArray:
    """A member's part of a stacked array, left where it is."""

    sharding = None  # one device

    def __init__(self, stacked: StackedArray, member: int):
        self.stacked, self.member = stacked, member
        self.shape, self.dtype = stacked.array.shape[1:], stacked.array.dtype

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.stacked.host_array()[self.member], dtype)


def own_arrays(tree: Any) -> Any:
    """`tree` with every `MemberArray` as an array of its own."""
    return jax.tree.map(lambda leaf: leaf.stacked.array[leaf.member] if isinstance(leaf, MemberArray) else leaf, tree)


class VmapGroup:
    """`count` members that compute together."""

    def __init__(self, count: int):
        self.count = count
        self.stopped = threading.Event()  # members read it: set when the thread that waits for them is interrupted
        self._turn = threading.Condition()
        self._alive: set[int] = set()
        self._programs: dict[tuple[CodeType, int], VmappedProgram] = {}
        self._compiled: Counter = Counter()  # how often a member has compiled a piece of code
        self._made: dict[Hashable, Future] = {}
        self._member = threading.local()

    def run_members(self, work: Callable[[int], Any]) -> list[Any]:
        """work(member) of every member, each in a thread. If a member raises an exception, that is its result."""
        self._alive = set(range(self.count))

        def alone(member: int) -> Any:
            self._member.number = member
            try:
                return work(member)
            except Exception as error:
                return error
            finally:
                with self._turn:
                    self._alive.discard(member)
                    self._run_ready_program()

        with ThreadPoolExecutor(self.count) as threads:
            futures = [threads.submit(alone, member) for member in range(self.count)]
            try:
                return [future.result() for future in futures]
            except BaseException:  # ctrl-C, while this waits
                self.stopped.set()
                raise

    def make_once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """make(), by the first member that asks for this key; the others wait. It may compile, but must not compute."""
        with self._turn:
            is_first = key not in self._made
            if is_first:
                self._made[key] = Future()
            future = self._made[key]
        if is_first:
            try:
                future.set_result(make())
            except Exception as error:
                future.set_exception(error)
        return future.result()

    def jit(self, function: Callable, *, donate_argnums: int | tuple[int, ...] = (), out_shardings=None) -> Callable:
        """As jax.jit. The n-th function that a member compiles from a piece of code is the same program as the n-th of
        the others.

        Numbers in which members differ must be arguments, because one member's function is compiled for all. With
        out_shardings (ignored, as there is one device) the leaves of its results are `MemberArray`s, else arrays of the
        host. Raises UserError if members compile code with different numbers in it.
        """
        with self._turn:
            member = self._member.number, function.__code__
            key = function.__code__, self._compiled[member]
            self._compiled[member] += 1
            if key not in self._programs:
                donated = donate_argnums if isinstance(donate_argnums, tuple) else (donate_argnums,)
                self._programs[key] = VmappedProgram(function, self.count, donated, lazily=out_shardings is not None)
            program = self._programs[key]
        program.check_constants(function)
        return lambda *args: self._call_in_turn(program, args)

    def _call_in_turn(self, program: "VmappedProgram", args: tuple) -> Any:
        member = self._member.number
        with self._turn:
            program.waiting[member] = args
            self._run_ready_program()
            while member not in program.results:
                self._turn.wait()
            result = program.results.pop(member)
        if isinstance(result, Exception):
            raise result
        return result

    def _run_ready_program(self) -> None:
        """Makes the calls of one function, if every living member waits."""
        programs = self._programs.values()
        waiting = sum(len(program.waiting) for program in programs)
        if not self._alive or waiting < len(self._alive) or any(program.results for program in programs):
            return
        program = max(programs, key=lambda program: len(program.waiting))
        program.run_waiting_calls()
        self._turn.notify_all()


class VmappedProgram:
    """One function, compiled once for all members."""

    def __init__(self, function: Callable, count: int, donated: tuple[int, ...], *, lazily: bool):
        self._function, self._count, self._donated, self._lazily = function, count, donated, lazily
        self._jitted: dict[Any, Callable] = {}  # by which leaves are stacked
        self._axes: dict[Any, tuple[int | None, ...]] = {}  # which those are, of calls of a structure
        self.waiting: dict[int, tuple] = {}
        self.results: dict[int, Any] = {}

    def check_constants(self, function: Callable) -> None:
        """UserError if `function`, of the same code, is bound to other numbers or words."""
        for (name, ours), theirs in zip(
            closure_constants(self._function).items(), closure_constants(function).values(), strict=True
        ):
            if ours != theirs:
                raise UserError(
                    f"runs that compute together cannot differ in {name} ({ours} and {theirs}), which is compiled into "
                    f"{function.__qualname__}: sweep it without --vectorised"
                )

    def run_waiting_calls(self) -> None:
        """Makes the waiting calls and distributes their results."""
        waiting, self.waiting = self.waiting, {}
        try:
            first = min(waiting)
            calls = [waiting[member] if member in waiting else waiting[first] for member in range(self._count)]
            leaves, trees = zip(*(jax.tree.flatten(call) for call in calls))
            columns = list(zip(*leaves))
            # Copies in the places of members that are not here look like something that all share.
            knows_axes = len(waiting) == self._count or trees[0] not in self._axes
            axes = tuple(map(stacking_axis, columns)) if knows_axes else self._axes[trees[0]]
            self._axes[trees[0]] = axes
            stacked = [
                own_arrays(column[0]) if one is None else stacked_leaves(column) for column, one in zip(columns, axes)
            ]
            out = self._jitted_program(trees[0], axes)(*jax.tree.unflatten(trees[0], stacked))
            self.results = member_results(out, waiting, lazily=self._lazily)
        except Exception as error:
            self.results = dict.fromkeys(waiting, error)

    def _jitted_program(self, tree: Any, axes: Sequence[int | None]) -> Callable:
        key = tree, axes
        if key not in self._jitted:
            function = jax.vmap(self._function, in_axes=jax.tree.unflatten(tree, axes), axis_size=self._count)
            self._jitted[key] = jax.jit(function, donate_argnums=self._donated)
        return self._jitted[key]


def closure_constants(function: Callable) -> dict[str, Any]:
    """The numbers and words of a function's closure, by name; None for anything else there."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or ())
    contents = {name: cell.cell_contents for name, cell in cells}
    return {name: x if type(x) in (bool, int, float, str) else None for name, x in contents.items()}


def stacking_axis(leaves: Sequence[Any]) -> int | None:
    """0 where the members' leaves must be stacked; None for one that all of them share."""
    first = leaves[0]
    number = type(first) in (int, float) and all(type(leaf) is type(first) and leaf == first for leaf in leaves)
    return None if number or all(leaf is first for leaf in leaves) else 0


def stacked_leaves(leaves: Sequence[Any]) -> Any:
    """The members' leaves as one array [members, ...]."""
    first = leaves[0]
    if all(isinstance(leaf, MemberArray) and leaf.stacked is leaves[0].stacked for leaf in leaves):
        if [leaf.member for leaf in leaves] == list(range(len(leaves))):
            return first.stacked.array
    arrays = [own_arrays(leaf) for leaf in leaves]
    return (jnp if any(isinstance(array, jax.Array) for array in arrays) else np).stack(arrays)


def member_results(out: Any, members: Iterable[int], *, lazily: bool) -> dict[int, Any]:
    """What each member gets of the stacked results: `MemberArray`s, or arrays of the host. Keys are always arrays."""

    def lazy(leaf: jax.Array) -> Callable[[int], Any]:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return lambda member: leaf[member]
        stacked = StackedArray(leaf)
        return lambda member: MemberArray(stacked, member)

    def eager(leaf: jax.Array) -> Callable[[int], Any]:
        host = np.asarray(leaf)
        return lambda member: host[member]

    leaves, tree = jax.tree.flatten(out)
    takers = [(lazy if lazily else eager)(leaf) for leaf in leaves]
    return {member: jax.tree.unflatten(tree, [take(member) for take in takers]) for member in members}

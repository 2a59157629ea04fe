"""lm.sweep.vmap_group: members that compute together get what each would get alone, whatever the others do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.errors import UserError
from lm.sweep.vmap_group import MemberArray, VmapGroup, own_arrays


def descend(jit, rate: float, steps: int, start: float) -> np.ndarray:
    """`steps` of gradient descent on (x - 5)^2 / 2 from `start`: x - 5 shrinks by 1 - rate at each."""
    step = jit(lambda rate, x: x - rate * (x - 5.0), donate_argnums=1, out_shardings=())
    x = jnp.full(3, start)
    for _ in range(steps):
        x = step(np.float32(rate), x)
    return np.asarray(x)


def test_members_get_what_they_would_get_alone():
    group = VmapGroup(3)
    found = group.run_members(lambda m: descend(group.jit, 0.1 * (m + 1), 4, float(m)))
    for m, x in enumerate(found):
        np.testing.assert_allclose(x, 5 - (5 - m) * (1 - 0.1 * (m + 1)) ** 4, rtol=1e-6)


def test_members_may_part_ways():
    group = VmapGroup(4)

    def work(m):
        if m == 2:
            descend(group.jit, 0.5, 1, 0.0)
            raise ValueError("this one is out")
        return descend(group.jit, 0.5, m + 1, 0.0)

    found = group.run_members(work)
    assert isinstance(found[2], ValueError)
    for m in (0, 1, 3):
        np.testing.assert_allclose(found[m], 5 - 5 * 0.5 ** (m + 1), rtol=1e-6)


def test_another_function_may_come_first():
    """Member 1 asks for the second function before the first: both are made in turn."""
    group = VmapGroup(2)

    def work(m):
        double, square = group.jit(lambda x: 2 * x), group.jit(lambda x: x * x)
        first, second = (double, square) if m == 0 else (square, double)
        return float(second(first(np.float32(m + 3))))

    assert group.run_members(work) == [36.0, 32.0]  # (2 * 3)^2 and 2 * 4^2


def test_one_program_is_compiled_and_what_is_shared_is_not_copied():
    group, traced, table = VmapGroup(3), [], jnp.arange(4.0)

    def work(m):
        def look(table, i):
            traced.append(table.shape)
            return table[i] + m * 0

        return float(group.jit(lambda table, i: look(table, i))(table, np.int32(m)))

    assert group.run_members(work) == [0.0, 1.0, 2.0]
    assert traced == [(4,)]


def test_numbers_in_a_closure_must_agree():
    group = VmapGroup(2)
    found = group.run_members(lambda rate: group.jit(lambda x: x * rate)(np.float32(1)))
    errors = [error for error in found if isinstance(error, UserError)]
    assert len(errors) == 1 and "cannot differ in rate" in str(errors[0])


def test_an_error_of_the_computation_reaches_every_member():
    group = VmapGroup(2)
    found = group.run_members(lambda m: group.jit(lambda x: x if x > 0 else -x)(np.float32(m)))
    assert all(isinstance(error, jax.errors.TracerBoolConversionError) for error in found)


def test_once_is_made_once_and_its_error_is_everybodys():
    group, made = VmapGroup(3), []
    assert group.run_members(lambda m: group.make_once("key", lambda: made.append(m) or len(made))) == [1, 1, 1]

    def torn():
        raise UserError("torn")

    group = VmapGroup(2)
    assert [str(error) for error in group.run_members(lambda m: group.make_once("key", torn))] == ["torn", "torn"]


def test_results_of_a_program_that_keeps_them_are_parts_and_keys_are_keys():
    group = VmapGroup(2)

    def work(m):
        keep = group.jit(lambda key, x: (jax.random.fold_in(key, 1), x + 1), out_shardings=())
        key, x = keep(jax.random.key(m), jnp.zeros(2))
        assert isinstance(x, MemberArray) and (x.shape, x.dtype, x.sharding) == ((2,), jnp.float32, None)
        assert isinstance(own_arrays(x), jax.Array)
        return jax.random.bits(key), np.asarray(x)

    for m, (bits, x) in enumerate(group.run_members(work)):
        assert bits == jax.random.bits(jax.random.fold_in(jax.random.key(m), 1)) and x.tolist() == [1, 1]


@pytest.mark.parametrize("count", [1, 5])
def test_any_number_of_members(count):
    group = VmapGroup(count)
    assert group.run_members(lambda m: float(group.jit(lambda x: x + 1)(np.float32(m)))) == [
        m + 1.0 for m in range(count)
    ]

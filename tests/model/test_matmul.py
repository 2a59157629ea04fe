"""Products and scores with gradient rules of their own: what autodiff finds by the plain formula, in another order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.sharding import make_mesh, shard
from lm.model.logprobs import target_logprobs
from lm.model.matmul import attention_output, linear, query_key_scores, row_major

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # bfloat16 keeps 8 bits: sums of a dozen such products


def normal(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def same_gradients(ours, plain, *args, dtype):
    """Value and gradients of both, for one cotangent; the plain formula is taken in float32."""
    cotangent = normal(*jax.eval_shape(ours, *args).shape, seed=9)
    whole = [a.astype(jnp.float32) for a in args]
    found = jax.jit(jax.value_and_grad(lambda *a: jnp.vdot(ours(*a).astype(jnp.float32), cotangent), range(len(args))))
    expected = jax.value_and_grad(lambda *a: jnp.vdot(plain(*a), cotangent), range(len(args)))(*whole)
    value, gradients = found(*args)
    assert [g.dtype for g in gradients] == [a.dtype for a in args]
    for a, b in zip((value, *gradients), (expected[0], *expected[1])):
        scale = np.abs(b).max()
        np.testing.assert_allclose(np.asarray(a, np.float32) / scale, b / scale, atol=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("shape", [(3, 5, 8, 12), (2, 7, 12, 4)], ids=["wider", "narrower"])
def test_a_linear_layer(shape, dtype):
    B, T, D, F = shape
    same_gradients(linear, jnp.matmul, normal(B, T, D, dtype=dtype), normal(D, F, seed=1, dtype=dtype), dtype=dtype)


def test_a_head_gives_float32_from_bfloat16():
    x, table = normal(2, 3, 8, dtype="bfloat16"), normal(11, 8, seed=1, dtype="bfloat16")
    head = lambda x, table: linear(x, table.T, jnp.float32)
    assert head(x, table).dtype == jnp.float32
    np.testing.assert_allclose(head(x, table), x.astype(jnp.float32) @ table.astype(jnp.float32).T, rtol=1e-5)
    same_gradients(head, lambda x, table: x @ table.T, x, table, dtype="bfloat16")


@DTYPES
def test_products_of_attention(dtype):
    q, k, weights = (
        normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 5, 7)])
    )
    same_gradients(query_key_scores, lambda q, k: jnp.einsum("bkth,bksh->bkts", q, k), q, k, dtype=dtype)
    same_gradients(attention_output, lambda w, v: jnp.einsum("bkts,bksh->bkth", w, v), weights, k, dtype=dtype)
    assert query_key_scores(q, k).dtype == jnp.float32 and attention_output(weights, k).dtype == q.dtype


def test_a_row_major_array_is_the_same_array_under_vmap_and_over_devices():
    x = normal(3, 4, 8)
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda a: row_major(a.T)))(x), x.swapaxes(1, 2))
    with jax.set_mesh(make_mesh()):
        np.testing.assert_array_equal(jax.jit(lambda a: row_major(a.swapaxes(1, 2)))(x), x.swapaxes(1, 2))
        assert "optimization_barrier" not in str(jax.make_jaxpr(row_major)(x))  # it would gather what is split


@pytest.mark.parametrize("split", [False, True], ids=["one device", "a split vocabulary"])
def test_scores_of_targets(split):
    """log softmax and logsumexp, and the gradient of a mixture of both; by hand: two equal logits give log 1/2."""
    logits, targets = 3 * normal(8, 5, 16), jnp.asarray(np.random.default_rng(1).integers(0, 16, (8, 5)))

    def plain(logits):
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        return picked, jax.nn.logsumexp(logits, axis=-1)

    def mixture(pair):
        return jnp.sum(normal(8, 5, seed=2) * pair[0] + normal(8, 5, seed=3) * jnp.square(pair[1]))

    expected = jax.value_and_grad(lambda x: mixture(plain(x)))(logits)
    ours = jax.jit(jax.value_and_grad(lambda x: mixture(target_logprobs(shard(x, "batch", None, "vocab"), targets))))
    if split:
        with jax.set_mesh(make_mesh(data=4, tensor=2)):
            found = ours(logits)
    else:
        found = ours(logits)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    halves = target_logprobs(jnp.zeros((1, 1, 2)), jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(jnp.stack(halves).ravel(), [-np.log(2), np.log(2)], rtol=1e-6)

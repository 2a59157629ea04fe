"""Update: the optax pair, one level up. Every way of training is a composition of these over TrainState."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.core.errors import UserError
from lm.core.metrics import Mean, Metrics, scalar_metric
from lm.core.types import Array, Params, TrainState

Batch = Any
# A loss returns its terms, a pytree of Means, and metrics. Each term is divided by its *own* global weight, which may
# depend on the batch alone; a coefficient is part of a term: 0.1 * mean(...). Only argument 0 is differentiated.
Loss = Callable[[Params, Mapping[str, Params], Batch, Array], tuple[Any, Metrics]]


class Update(NamedTuple):
    init: Callable[[Array, Params, Mapping[str, Params]], TrainState]  # (key, params, frozen)
    update: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    evaluate: Callable[[TrainState, Batch], Metrics]  # the loss's metrics on a batch, without learning from it
    # the batch as it is learnt from (advantages, reference log-probs); None: as it comes
    annotated_batch: Callable[[TrainState, Batch], Batch] | None = None


def is_mean(x) -> bool:
    """Whether a leaf is a `Mean`, for the walk over a tree of terms."""
    return isinstance(x, Mean)


def gradient(loss: Loss, optimizer: optax.GradientTransformation, *, microbatches: int = 1) -> Update:
    """One optimizer step on the gradient of sum over terms of total / weight, both summed over all microbatches.

    Gradients are summed in float32. A batch of weight 0 gives a zero gradient. Metrics gain `grad_norm` (before
    clipping), where the optimizer injects it `learning_rate`, and of several microbatches their `noise_scale`. Of a
    loss that calls a model take lm.optim.combinators.decoder_gradient, which also trains low-rank adapters.
    """

    def init(key, params, frozen):
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key, frozen)

    def objective(params, frozen, part, key, weights):
        terms, metrics = loss(params, frozen, part, key)
        divided = jax.tree.map(lambda term, w: Mean(term.total, w).value(), terms, weights, is_leaf=is_mean)
        return sum(jax.tree.leaves(divided)), metrics

    def update(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(microbatches))
        parts = batch_parts(batch, microbatches), keys

        def weights(part, key):  # nothing else of the loss is used: its forward pass is dropped as dead code
            terms, _ = loss(state.params, state.frozen, part, key)
            return jax.tree.map(lambda term: jax.lax.stop_gradient(term.weight), terms, is_leaf=is_mean)

        total = scan_sum(weights, parts, microbatches)

        def grads_of(part, key):
            grads, metrics = jax.grad(objective, has_aux=True)(state.params, state.frozen, part, key, total)
            return grads, metrics, optax.tree.norm(grads, squared=True)

        grads, metrics, squares = scan_sum(grads_of, parts, microbatches)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        square = optax.tree.norm(grads, squared=True)
        metrics = dict(metrics, grad_norm=scalar_metric(jnp.sqrt(square)))
        if microbatches > 1:
            rows = jax.tree.leaves(batch)[0].shape[0]
            metrics["noise_scale"] = gradient_noise_scale(squares, square, rows=rows, microbatches=microbatches)
        learning_rate = optax.tree.get(
            opt_state, "learning_rate", filtering=lambda _, value: isinstance(value, jax.Array)
        )
        if learning_rate is not None:
            metrics["learning_rate"] = scalar_metric(learning_rate)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    def evaluate(state, batch):
        return loss(state.params, state.frozen, batch, jax.random.fold_in(state.key, state.step))[1]

    return Update(init, update, evaluate)


def gradient_noise_scale(part_squared_norms: Array, squared_norm: Array, *, rows: int, microbatches: int) -> Mean:
    """S / |G|^2, in rows: of a batch of so many, the noise of the gradient is as large as the gradient itself.

    squares: the sum of |g|^2 over the `count` microbatches' parts g of the gradient; square: |sum of g|^2; rows: of the
    whole batch. S, the trace of one row's covariance, and |G|^2, of the true gradient, are unbiased one by one, and may
    be negative: sum both over many steps before they are divided.
    McCandlish et al. 2018, app. A.1, arXiv 1812.06162. Rows are taken to be independent, and count times a part to be a
    microbatch's own gradient, as if all weighed alike: where rows differ in weight, that adds to the noise, by the
    squared coefficient of variation of a row's weight.
    """
    small = microbatches * part_squared_norms  # the mean over microbatches of |count g|^2
    noise = rows * (small - squared_norm) / (microbatches - 1)
    return Mean(noise, (microbatches * squared_norm - small) / (microbatches - 1))


def batch_parts(batch: Batch, count: int) -> Batch:
    """Leaves [B, ...] as [count, B / count, ...]; part i takes rows i, i + count, ..., so it spans every device."""

    def parts(x):
        if x.shape[0] % count:
            raise UserError(
                f"a batch of {x.shape[0]} rows cannot be cut into {count} equal parts: change one of the two"
            )
        return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(parts, batch)


def scan_sum(function, xs, count: int):
    """Sum of function(*x) over the leading axis of xs; a scan, unless there is only one."""
    if count == 1:
        return function(*jax.tree.map(lambda x: x[0], xs))
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, *jax.tree.map(lambda x: x[0], xs))
    )
    return jax.lax.scan(lambda total, x: (jax.tree.map(jnp.add, total, function(*x)), None), zeros, xs)[0]

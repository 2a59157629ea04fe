"""Update: the optax pair, one level up. Every way of training is a composition of these over TrainState."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.errors import UserError
from lm.metrics import Mean, Metrics, scalar
from lm.model import lora
from lm.types import Array, Params, TrainState

Batch = Any
# A loss returns its terms, a pytree of Means, and metrics. Each term is divided by its *own* global weight, which may
# depend on the batch alone; a coefficient is part of a term: 0.1 * mean(...). Only argument 0 is differentiated.
Loss = Callable[[Params, Mapping[str, Params], Batch, Array], tuple[Any, Metrics]]

SHUFFLE = 2**30  # a role folded into a step's key, above every microbatch's number: no two draws share a key


class Update(NamedTuple):
    init: Callable[[Array, Params, Mapping[str, Params]], TrainState]  # (key, params, frozen)
    update: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    evaluate: Callable[[TrainState, Batch], Metrics]  # the loss's metrics on a batch, without learning from it


def _is_mean(x) -> bool:
    return isinstance(x, Mean)


def gradient(loss: Loss, optimizer: optax.GradientTransformation, *, microbatches: int = 1) -> Update:
    """One optimizer step on the gradient of sum over terms of total / weight, both summed over all microbatches.

    Gradients are summed in float32. A batch of weight 0 gives a zero gradient. Metrics gain `grad_norm` (before
    clipping), where the optimizer injects it `learning_rate`, and of several microbatches their `noise_scale`.
    """

    def init(key, params, frozen):
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key, frozen)

    def objective(params, frozen, part, key, weights):
        terms, metrics = loss(*whole(params, frozen), part, key)
        divided = jax.tree.map(lambda term, w: Mean(term.total, w).value(), terms, weights, is_leaf=_is_mean)
        return sum(jax.tree.leaves(divided)), metrics

    def update(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(microbatches))
        parts = split(batch, microbatches), keys

        def weights(part, key):  # nothing else of the loss is used: its forward pass is dropped as dead code
            terms, _ = loss(*whole(state.params, state.frozen), part, key)
            return jax.tree.map(lambda term: jax.lax.stop_gradient(term.weight), terms, is_leaf=_is_mean)

        total = summed(weights, parts, microbatches)

        def grads_of(part, key):
            grads, metrics = jax.grad(objective, has_aux=True)(state.params, state.frozen, part, key, total)
            return grads, metrics, optax.tree.norm(grads, squared=True)

        grads, metrics, squares = summed(grads_of, parts, microbatches)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        square = optax.tree.norm(grads, squared=True)
        metrics = dict(metrics, grad_norm=scalar(jnp.sqrt(square)))
        if microbatches > 1:
            rows = jax.tree.leaves(batch)[0].shape[0]
            metrics["noise_scale"] = noise_scale(squares, square, rows=rows, count=microbatches)
        learning_rate = optax.tree.get(
            opt_state, "learning_rate", filtering=lambda _, value: isinstance(value, jax.Array)
        )
        if learning_rate is not None:
            metrics["learning_rate"] = scalar(learning_rate)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    def evaluate(state, batch):
        return loss(*whole(state.params, state.frozen), batch, jax.random.fold_in(state.key, state.step))[1]

    return Update(init, update, evaluate)


def whole(params: Params, frozen: Mapping[str, Any]) -> tuple[Params, Mapping[str, Any]]:
    """The same with decoders as their forward pass reads them: adapters laid on the frozen base, if there is one."""
    if lora.BASE not in frozen:
        return params, frozen
    params = {**params, "lm": lora.joined(params["lm"], frozen)} if "lm" in params else params
    return params, {**frozen, **({"ref": lora.joined(frozen["ref"], frozen)} if "ref" in frozen else {})}


def seen(state: TrainState) -> TrainState:
    """The state as losses, annotations and samplers see it: see `whole`. Not to be trained."""
    state = lent(state)
    params, frozen = whole(state.params, state.frozen)
    return state.replace(params=params, frozen=frozen, memory={k: v for k, v in state.memory.items() if k != "ref"})


def noise_scale(squares: Array, square: Array, *, rows: int, count: int) -> Mean:
    """S / |G|^2, in rows: of a batch of so many, the noise of the gradient is as large as the gradient itself.

    squares: the sum of |g|^2 over the `count` microbatches' parts g of the gradient; square: |sum of g|^2; rows: of the
    whole batch. S, the trace of one row's covariance, and |G|^2, of the true gradient, are unbiased one by one, and may
    be negative: sum both over many steps before they are divided.
    McCandlish et al. 2018, app. A.1, arXiv 1812.06162. Rows are taken to be independent, and count times a part to be a
    microbatch's own gradient, as if all weighed alike: where rows differ in weight, that adds to the noise, by the
    squared coefficient of variation of a row's weight.
    """
    small = count * squares  # the mean over microbatches of |count g|^2
    noise = rows * (small - square) / (count - 1)
    return Mean(noise, (count * square - small) / (count - 1))


def split(batch: Batch, count: int) -> Batch:
    """Leaves [B, ...] as [count, B / count, ...]; part i takes rows i, i + count, ..., so it spans every device."""

    def parts(x):
        if x.shape[0] % count:
            raise UserError(
                f"a batch of {x.shape[0]} rows cannot be cut into {count} equal parts: change one of the two"
            )
        return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(parts, batch)


def summed(function, xs, count: int):
    """Sum of function(*x) over the leading axis of xs; a scan, unless there is only one."""
    if count == 1:
        return function(*jax.tree.map(lambda x: x[0], xs))
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, *jax.tree.map(lambda x: x[0], xs))
    )
    return jax.lax.scan(lambda total, x: (jax.tree.map(jnp.add, total, function(*x)), None), zeros, xs)[0]


def annotate(function: Callable[[TrainState, Batch], tuple[Batch, Metrics]], inner: Update) -> Update:
    """`function` completes the batch once (advantages, reference log-probs), noting metrics, before `inner` learns."""

    def update(state, batch):
        batch, noted = function(seen(state), batch)
        state, metrics = inner.update(state, batch)
        return state, {**noted, **metrics}

    def evaluate(state, batch):
        batch, noted = function(seen(state), batch)
        return {**noted, **inner.evaluate(state, batch)}

    return Update(inner.init, update, evaluate)


def minibatches(inner: Update, *, epochs: int, count: int) -> Update:
    """`epochs` passes over one batch, each freshly shuffled and cut into `count` minibatches for `inner`."""
    if epochs == count == 1:
        return inner

    def update(state, batch):
        rows = jax.tree.leaves(batch)[0].shape[0]

        def epoch(state, i):
            key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), SHUFFLE + i)
            order = jax.random.permutation(key, rows)
            return jax.lax.scan(inner.update, state, split(jax.tree.map(lambda x: jnp.asarray(x)[order], batch), count))

        state, metrics = jax.lax.scan(epoch, state, jnp.arange(epochs))
        return state, jax.tree.map(jnp.sum, metrics)

    return Update(inner.init, update, inner.evaluate)


def reference(inner: Update, name: str = "ref") -> Update:
    """Keeps a frozen *copy* of the starting decoder as `name`: shared buffers would die with the first donated step."""

    def init(key, params, frozen):
        if name not in frozen:
            frozen = {**frozen, name: jax.tree.map(jnp.copy, params["lm"])}
        return inner.init(key, params, frozen)

    return inner._replace(init=init)


def renewed(inner: Update, *, every: int, name: str = "ref") -> Update:
    """`reference`, which becomes a copy of the current decoder after each `every` optimizer updates; 0: never.

    A reference that moves is part of what the run remembers, so it lies in state.memory and is saved; `inner` is lent
    it as if it were frozen. Gorbatovski et al. 2024 (TR-DPO, hard updates), arXiv 2404.09656.
    """
    if every == 0:
        return reference(inner, name)

    def init(key, params, frozen):
        start = frozen[name] if name in frozen else params["lm"]
        state = inner.init(key, params, {k: v for k, v in frozen.items() if k != name})
        return state.replace(memory={**state.memory, name: jax.tree.map(jnp.copy, start)})

    def update(state, batch):
        after, metrics = inner.update(lent(state, name), batch)
        due = after.step % every == 0
        ref = jax.tree.map(lambda new, old: jnp.where(due, new, old), after.params["lm"], state.memory[name])
        return after.replace(frozen=state.frozen, memory={**after.memory, name: ref}), metrics

    def evaluate(state, batch):
        return inner.evaluate(lent(state, name), batch)

    return Update(init, update, evaluate)


def lent(state: TrainState, name: str = "ref") -> TrainState:
    """The state with its renewed network among the frozen ones, where every loss looks for it."""
    if name not in state.memory:
        return state
    return state.replace(frozen={**state.frozen, name: state.memory[name]})


def mix(**losses: tuple[float, Loss]) -> Loss:
    """The sum of several losses of one batch, each with its coefficient. Every term keeps its own denominator.

    PPO-ptx is mix(ppo=(1.0, surrogate), text=(coefficient, next-token loss)): Ouyang et al. 2022, eq. 2,
    arXiv 2203.02155.
    """

    def loss(params, frozen, batch, key):
        terms, metrics = {}, {}
        for name, (coefficient, part) in losses.items():
            found, noted = part(params, frozen, batch, key)
            terms[name] = jax.tree.map(lambda term: coefficient * term, found, is_leaf=_is_mean)
            metrics |= noted
        return terms, metrics

    return loss


def value_head(init_value: Callable[[Array], Params], inner: Update) -> Update:
    """Adds the scalar head params["value"] where the starting parameters have none."""

    def init(key, params, frozen):
        if "value" not in params:
            params = {**params, "value": init_value(key)}
        return inner.init(key, params, frozen)

    return inner._replace(init=init)

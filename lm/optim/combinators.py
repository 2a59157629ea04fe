"""Combinators: each wraps an `Update` (or a loss) and gives another, as optax chains transformations."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lm.core.metrics import Metrics
from lm.core.types import Array, Params, TrainState
from lm.model.lora import join_adapters
from lm.optim.update import Batch, Loss, Update, batch_parts, gradient, is_mean

SHUFFLE_ROLE = 2**30  # a role folded into a step's key, above every microbatch's number: no two draws share a key


def inference_state(state: TrainState) -> TrainState:
    """The state as losses, annotations and samplers see it: see `join_adapters`. Not to be trained."""
    state = with_moving_reference(state)
    params, frozen = join_adapters(state.params, state.frozen)
    return state.replace(params=params, frozen=frozen, memory={k: v for k, v in state.memory.items() if k != "ref"})


def decoder_gradient(loss: Loss, optimizer: optax.GradientTransformation, *, microbatches: int = 1) -> Update:
    """`gradient` of a loss that is given decoders as their forward pass reads them: see `join_adapters`."""

    def on_decoders(params, frozen, batch, key):
        return loss(*join_adapters(params, frozen), batch, key)

    return gradient(on_decoders, optimizer, microbatches=microbatches)


def annotate(function: Callable[[TrainState, Batch], tuple[Batch, Metrics]], inner: Update) -> Update:
    """`function` completes the batch once (advantages, reference log-probs), noting metrics, before `inner` learns."""

    def update(state, batch):
        batch, noted = function(inference_state(state), batch)
        state, metrics = inner.update(state, batch)
        return state, {**noted, **metrics}

    def evaluate(state, batch):
        batch, noted = function(inference_state(state), batch)
        return {**noted, **inner.evaluate(state, batch)}

    def annotated_batch(state, batch):
        return function(inference_state(state), batch)[0]

    return Update(inner.init, update, evaluate, annotated_batch)


def minibatches(inner: Update, *, epochs: int, count: int) -> Update:
    """`epochs` passes over one batch, each freshly shuffled and cut into `count` minibatches for `inner`."""
    if epochs == count == 1:
        return inner

    def update(state, batch):
        rows = jax.tree.leaves(batch)[0].shape[0]

        def epoch(state, i):
            key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), SHUFFLE_ROLE + i)
            order = jax.random.permutation(key, rows)
            return jax.lax.scan(
                inner.update, state, batch_parts(jax.tree.map(lambda x: jnp.asarray(x)[order], batch), count)
            )

        state, metrics = jax.lax.scan(epoch, state, jnp.arange(epochs))
        return state, jax.tree.map(jnp.sum, metrics)

    return inner._replace(update=update)


def frozen_reference(inner: Update, name: str = "ref") -> Update:
    """Keeps a frozen *copy* of the starting decoder as `name`: shared buffers would die with the first donated step."""

    def init(key, params, frozen):
        if name not in frozen:
            frozen = {**frozen, name: jax.tree.map(jnp.copy, params["lm"])}
        return inner.init(key, params, frozen)

    return inner._replace(init=init)


def refreshed_reference(inner: Update, *, every: int, name: str = "ref") -> Update:
    """`frozen_reference` whose copy is replaced by the current decoder after each `every` optimizer updates; 0: never.

    A moving reference is part of state.memory, which is saved; `inner` finds it in state.frozen, like any other.
    Gorbatovski et al. 2024 (TR-DPO, hard updates), arXiv 2404.09656.
    """
    if every == 0:
        return frozen_reference(inner, name)

    def init(key, params, frozen):
        start = frozen[name] if name in frozen else params["lm"]
        state = inner.init(key, params, {k: v for k, v in frozen.items() if k != name})
        return state.replace(memory={**state.memory, name: jax.tree.map(jnp.copy, start)})

    def update(state, batch):
        after, metrics = inner.update(with_moving_reference(state, name), batch)
        due = after.step % every == 0
        ref = jax.tree.map(lambda new, old: jnp.where(due, new, old), after.params["lm"], state.memory[name])
        return after.replace(frozen=state.frozen, memory={**after.memory, name: ref}), metrics

    def evaluate(state, batch):
        return inner.evaluate(with_moving_reference(state, name), batch)

    return inner._replace(init=init, update=update, evaluate=evaluate)


def with_moving_reference(state: TrainState, name: str = "ref") -> TrainState:
    """The state with its moving reference among the frozen networks, where every loss looks for it."""
    if name not in state.memory:
        return state
    return state.replace(frozen={**state.frozen, name: state.memory[name]})


def combined_loss(**losses: tuple[float, Loss]) -> Loss:
    """The sum of several losses of one batch, each with its coefficient. Every term keeps its own denominator.

    PPO-ptx is combined_loss(ppo=(1.0, surrogate), text=(coefficient, next-token loss)): Ouyang et al. 2022, eq. 2,
    arXiv 2203.02155.
    """

    def loss(params, frozen, batch, key):
        terms, metrics = {}, {}
        for name, (coefficient, part) in losses.items():
            part_terms, part_metrics = part(params, frozen, batch, key)
            terms[name] = jax.tree.map(lambda term: coefficient * term, part_terms, is_leaf=is_mean)
            metrics |= part_metrics
        return terms, metrics

    return loss


def with_value_head(init_value: Callable[[Array], Params], inner: Update) -> Update:
    """Adds the scalar head params["value"] where the starting parameters have none."""

    def init(key, params, frozen):
        if "value" not in params:
            params = {**params, "value": init_value(key)}
        return inner.init(key, params, frozen)

    return inner._replace(init=init)

"""A custom network, a Flax module of linen or nnx, as the Model that every stage works with.

The module is called with inputs, positions and segments, i32[B,T] each (see types.Tokens), and returns logits f[B,T,V];
or states f[B,T,D], if `head` names the method that turns those into logits: then losses with `loss_chunk` need no
f[B,T,V], and reward and value heads read D numbers. It must be causal, keep segments apart and not be seen by padding,
segment 0; `verified_model` checks that.

What such a model does not have is a cache. Sampling works, but goes over all tokens again for each new one. In a run it
is named by its file (lm.model.imported); programs that convert, quantise or time weights know lm's own decoder only.
Weight decay spares parameters by name (see lm.optim.optimizers): call norms "norm", embeddings "embedding".
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx, struct

from lm.core.errors import UserError
from lm.core.types import Array, Params, Tokens
from lm.model import Model, ModelConfig, TargetStats, decoder
from lm.model.kv_cache import updated_slots
from lm.model.logprobs import chunked_target_stats
from lm.model.params import initial_params, logical_axes, value_head_specs

ModuleCall = Callable[..., Array]  # (lm, method, *arrays): the module with these parameters; method "" calls it itself


@struct.dataclass
class TokenCache:
    """Takes the place of a cache: the tokens themselves."""

    inputs: Array  # i32[B,S]
    positions: Array  # i32[B,S]
    segments: Array  # i32[B,S]; 0: empty or padding
    length: Array  # i32[]  slots written, or i32[B]


def model_from_linen(
    module: linen.Module, *, context: int, head: str = "", loss_chunk: int = 0, axes: Mapping[str, Any] | None = None
) -> Model:
    """The Model of a linen module that has no variables but its parameters and draws nothing at random.

    context: the longest row it is used with. axes: logical axes in the structure of its parameters (a tuple of names a
    leaf, see lm.core.sharding.LOGICAL_AXIS_RULES); None: every device holds all. UserError for a module that will
    not do.
    """

    def call(lm: Params, method: str, *arrays: Array) -> Array:
        return module.apply({"params": lm}, *arrays, method=method or None)

    def whole(bound, *arrays):
        return getattr(bound, head)(bound(*arrays)) if head else bound(*arrays)

    def variables(key: Array) -> Mapping[str, Any]:
        return linen.init(whole, module)(key, *_smallest_row())

    others = sorted(set(jax.eval_shape(variables, jax.random.key(0))) - {"params"})
    _check_no_other_variables(others, module)
    return _flax_model(lambda key: variables(key)["params"], call, context, head, loss_chunk, axes)


def model_from_nnx(
    create: Callable[[nnx.Rngs], nnx.Module],
    *,
    context: int,
    head: str = "",
    loss_chunk: int = 0,
    axes: Mapping[str, Any] | None = None,
) -> Model:
    """The same of an nnx module, which `create` makes from random numbers: lambda rngs: Mine(width=64, rngs=rngs)."""
    abstract = nnx.eval_shape(lambda: create(nnx.Rngs(0)))
    definition, shapes, others = nnx.split(abstract, nnx.Param, ...)
    _check_no_other_variables(sorted({type(variable).__name__ for _, variable in nnx.to_flat_state(others)}), abstract)

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(create(nnx.Rngs(key)), nnx.Param))

    def call(lm: Params, method: str, *arrays: Array) -> Array:
        state = jax.tree.map(lambda shape: shape, shapes)
        nnx.replace_by_pure_dict(state, lm)
        module = nnx.merge(definition, state)
        return getattr(module, method)(*arrays) if method else module(*arrays)

    return _flax_model(init, call, context, head, loss_chunk, axes)


def verified_model(model: Model, lm: Params, *, length: int = 8) -> Model:
    """The model, once it is measured that no position sees a later one, another segment, or padding.

    Every token of a row of two segments and padding is exchanged in turn. UserError tells what has seen what.
    """
    inputs = jnp.arange(length) % model.config.vocab_size
    middle, end = length // 2, length - 1
    slots = jnp.arange(length)
    segments = jnp.where(slots < middle, 1, jnp.where(slots < end, 2, 0))
    positions = jnp.where(segments == 2, slots - middle, jnp.where(segments == 0, 0, slots))
    changed = jnp.where(jnp.eye(length, dtype=bool), (inputs + 1) % model.config.vocab_size, inputs)
    rows = jnp.concatenate([inputs[None], changed])
    states = model.hidden_states(lm, rows, *(jnp.broadcast_to(x, rows.shape) for x in (positions, segments)))
    influences = jnp.any(states[1:] != states[:1], axis=-1)  # [s, t]: whether token s changes what stands at position t
    for s, t in zip(*(x.tolist() for x in jnp.nonzero(influences))):
        if segments[t] and s > t and segments[s] == segments[t]:
            raise UserError(
                f"the module is not causal: position {t} changes with the later token {s}; mask its attention"
            )
        if segments[t] and segments[s] != segments[t]:
            what = "padding" if segments[s] == 0 else "another segment"
            raise UserError(
                f"the module mixes segments: position {t} changes with token {s} of {what}; mask them apart"
            )
    return model


def _flax_model(
    init: Callable[[Array], Params],
    call: ModuleCall,
    context: int,
    head: str,
    loss_chunk: int,
    axes: Mapping[str, Any] | None,
) -> Model:
    def hidden_states_of(lm: Params, inputs: Array, positions: Array, segments: Array) -> Array:
        return call(lm, "", inputs, positions, segments)

    def logits(lm: Params, x: Array) -> Array:
        return (call(lm, head, x) if head else x).astype(jnp.float32)

    def scores(lm: Params, x: Array, targets: Array, *, temperature: float = 1.0) -> TargetStats:
        return chunked_target_stats(
            functools.partial(logits, lm), x, targets, temperature=temperature, chunk_size=loss_chunk
        )

    def token_logprobs(lm: Params, tokens: Tokens, *, temperature: float = 1.0) -> Array:
        x = hidden_states_of(lm, tokens.inputs, tokens.positions, tokens.segments)
        return scores(lm, x, tokens.targets, temperature=temperature).logprobs

    shapes = jax.eval_shape(init, jax.random.key(0))
    states = jax.eval_shape(hidden_states_of, shapes, *_smallest_row())
    vocabulary = jax.eval_shape(logits, shapes, states)
    for what, output in (("the module", states), (f"its {head}" if head else "the module", vocabulary)):
        if output.ndim != 3 or output.shape[:2] != (1, 1):
            raise UserError(f"{what} gives {output.shape} for rows of shape (1, 1); it must give (1, 1, features)")
    config = ModelConfig(
        vocab_size=vocabulary.shape[-1], width=states.shape[-1], context=context, loss_chunk=loss_chunk
    )
    value_specs = value_head_specs(config)
    return Model(
        config=config,  # of its entries only these four speak of the module
        init=init,
        init_value_head=functools.partial(initial_params, value_specs),
        logical_axes={
            "lm": axes if axes is not None else jax.tree.map(lambda leaf: (None,) * leaf.ndim, shapes),
            "value": logical_axes(value_specs),
        },
        hidden_states=hidden_states_of,
        hidden_and_routing=lambda *given: (hidden_states_of(*given), None),
        decoding_params=lambda lm: lm,
        cached_hidden_states=functools.partial(_recomputed_hidden_states, hidden_states_of),
        empty_cache=_empty_token_cache,
        logits=logits,
        value=decoder.value,
        target_stats=scores,
        token_logprobs=token_logprobs,
    )


def _recomputed_hidden_states(
    hidden_states_of, lm: Params, inputs: Array, positions: Array, segments: Array, prefix: TokenCache
) -> tuple[Array, TokenCache]:
    """The states of T more positions, by a pass over all slots."""

    new, old, start = (inputs, positions, segments), (prefix.inputs, prefix.positions, prefix.segments), prefix.length
    rows = [updated_slots(before, after.astype(before.dtype), start) for before, after in zip(old, new)]
    slots = start[..., None] + jnp.arange(inputs.shape[1])  # [T], or [B,T]
    x = hidden_states_of(lm, *rows)
    x = jnp.take_along_axis(x, jnp.broadcast_to(slots, inputs.shape)[..., None], axis=1)
    return x, TokenCache(*rows, length=prefix.length + inputs.shape[1])


def _empty_token_cache(*, batch: int, capacity: int, rollback_slots: int = 0) -> TokenCache:
    """rollback_slots: slots that may be taken back; nothing is overwritten here, so there is room for any number."""
    slots = jnp.zeros((batch, capacity), jnp.int32)
    return TokenCache(slots, slots, slots, jnp.zeros((), jnp.int32))


def _smallest_row() -> tuple[Array, Array, Array]:
    """The smallest inputs, positions and segments."""
    return jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32)


def _check_no_other_variables(others: list[str], module: Any) -> None:
    if others:
        raise UserError(
            f"{type(module).__name__} holds variables that are no parameters ({', '.join(others)}), such as "
            "statistics of batches or the state of dropout; a Model is a pure function of its parameters: take them out"
        )

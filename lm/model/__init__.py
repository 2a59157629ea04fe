"""A model is a tuple of pure functions closed over its Config; parameters are plain nested dicts."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from lm.core.types import Array, Params, Tokens
from lm.model import decoder, lora
from lm.model.config import ModelConfig
from lm.model.kv_cache import KVCache, empty_cache
from lm.model.logprobs import TargetStats
from lm.model.moe import Routing
from lm.model.params import initial_params, logical_axes, param_specs, value_head_specs

__all__ = ["KVCache", "Model", "ModelConfig", "Routing", "TargetStats", "make_model"]


class Model(NamedTuple):
    """Pure functions. `lm` is the decoder's parameters."""

    config: ModelConfig
    init: Callable[..., Params]  # (key) -> lm; with config.lora_rank its adapters: see lora.join_adapters
    init_value_head: Callable[..., Params]  # (key) -> head, all zero
    logical_axes: dict  # logical axes of {"lm": ..., "value": ...}
    hidden_states: Callable[..., Array]  # (lm, inputs, positions, segments) -> f[B,T,D]
    hidden_and_routing: Callable[..., tuple[Array, Routing | None]]  # the same, and which experts it went through
    decoding_params: Callable[
        ..., Params
    ]  # (lm) -> lm as `cached_hidden_states` reads it in a loop: cut into its layers once, before it
    cached_hidden_states: Callable[
        ..., tuple[Array, KVCache]
    ]  # (lm, inputs, positions, segments, cache) -> f[B,T,D], Cache
    empty_cache: Callable[..., KVCache]  # (batch=, capacity=, rollback_slots=0) -> Cache
    logits: Callable[..., Array]  # (lm, f[...,D]) -> f32[...,V]
    value: Callable[..., Array]  # (head, f[...,D]) -> f32[...]
    target_stats: Callable[..., TargetStats]  # (lm, f[B,T,D], targets, temperature=1.0) -> Scores
    token_logprobs: Callable[..., Array]  # (lm, Tokens, temperature=1.0) -> f32[B,T]


def make_model(config: ModelConfig) -> Model:
    """The decoder-only transformer of `config`, every "auto" already settled (see Config.on)."""
    specs, value_specs = param_specs(config), value_head_specs(config)
    trainable, axes = specs, logical_axes(specs)
    if config.lora_rank:
        trainable = lora.lora_specs(config)
        axes = lora.adapters_over_base(
            logical_axes(trainable), {lora.FROZEN_BASE: axes}
        )  # adapters and base are sharded by one table
    hidden = functools.partial(decoder.hidden_states, config)
    scores = functools.partial(decoder.target_stats, config)

    def token_logprobs(lm: Params, tokens: Tokens, *, temperature: float = 1.0) -> Array:
        x = hidden(lm, tokens.inputs, tokens.positions, tokens.segments)
        return scores(lm, x, tokens.targets, temperature=temperature).logprobs

    return Model(
        config=config,
        init=functools.partial(initial_params, trainable),
        init_value_head=functools.partial(initial_params, value_specs),
        logical_axes={"lm": axes, "value": logical_axes(value_specs)},
        hidden_states=hidden,
        hidden_and_routing=functools.partial(decoder.hidden_and_routing, config),
        decoding_params=functools.partial(decoder.decoding_params, config),
        cached_hidden_states=functools.partial(decoder.cached_hidden_states, config),
        empty_cache=functools.partial(
            empty_cache,
            windows=tuple(config.window if local else 0 for local in config.local_layers),
            kv_heads=config.kv_heads,
            head_size=config.head_size,
            dtype=jnp.dtype(config.cache_dtype),
        ),
        logits=functools.partial(decoder.logits, config),
        value=decoder.value,
        target_stats=scores,
        token_logprobs=token_logprobs,
    )

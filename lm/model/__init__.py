"""A model is a tuple of pure functions closed over its Config; parameters are plain nested dicts."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from lm.core.types import Array, Params, Tokens
from lm.model import decoder, lora, params as parameters
from lm.model.config import ModelConfig
from lm.model.kv_cache import KVCache, empty_cache
from lm.model.logprobs import TargetStats
from lm.model.moe import Routing

__all__ = ["KVCache", "Model", "ModelConfig", "Routing", "TargetStats", "make_model"]


class Model(NamedTuple):
    """Pure functions. `lm` is the decoder's parameters, `head` the scalar head's."""

    config: ModelConfig
    init: Callable[..., Params]  # (key) -> lm; with config.lora_rank its adapters: see lora.join_adapters
    init_value: Callable[..., Params]  # (key) -> head, all zero
    axes: dict  # logical axes of {"lm": ..., "value": ...}
    hidden: Callable[..., Array]  # (lm, inputs, positions, segments) -> f[B,T,D]
    routed: Callable[..., tuple[Array, Routing | None]]  # the same, and which experts it went through
    unrolled: Callable[..., Params]  # (lm) -> lm as `cached` reads it in a loop: cut into its layers once, before it
    cached: Callable[..., tuple[Array, KVCache]]  # (lm, inputs, positions, segments, cache) -> f[B,T,D], Cache
    cache: Callable[..., KVCache]  # (batch=, capacity=, slack=0) -> Cache
    logits: Callable[..., Array]  # (lm, f[...,D]) -> f32[...,V]
    value: Callable[..., Array]  # (head, f[...,D]) -> f32[...]
    scores: Callable[..., TargetStats]  # (lm, f[B,T,D], targets, temperature=1.0) -> Scores
    token_logprobs: Callable[..., Array]  # (lm, Tokens, temperature=1.0) -> f32[B,T]


def make_model(config: ModelConfig) -> Model:
    """The decoder-only transformer of `config`, every "auto" already settled (see Config.on)."""
    specs, value_specs = parameters.param_specs(config), parameters.value_head_specs(config)
    learnt, axes = specs, parameters.logical_axes(specs)
    if config.lora_rank:
        learnt = lora.lora_specs(config)
        axes = lora.adapters_over_base(
            parameters.logical_axes(learnt), {lora.FROZEN_BASE: axes}
        )  # adapters and base are sharded by one table
    hidden = functools.partial(decoder.hidden_states, config)
    scores = functools.partial(decoder.target_stats, config)

    def token_logprobs(lm: Params, tokens: Tokens, *, temperature: float = 1.0) -> Array:
        x = hidden(lm, tokens.inputs, tokens.positions, tokens.segments)
        return scores(lm, x, tokens.targets, temperature=temperature).logprobs

    return Model(
        config=config,
        init=functools.partial(parameters.initial_params, learnt),
        init_value=functools.partial(parameters.initial_params, value_specs),
        axes={"lm": axes, "value": parameters.logical_axes(value_specs)},
        hidden=hidden,
        routed=functools.partial(decoder.hidden_and_routing, config),
        unrolled=functools.partial(decoder.decoding_params, config),
        cached=functools.partial(decoder.cached_hidden_states, config),
        cache=functools.partial(
            empty_cache,
            windows=tuple(config.window if local else 0 for local in config.local),
            kv_heads=config.kv_heads,
            head_size=config.head_size,
            dtype=jnp.dtype(config.cache),
        ),
        logits=functools.partial(decoder.logits, config),
        value=decoder.value,
        scores=scores,
        token_logprobs=token_logprobs,
    )

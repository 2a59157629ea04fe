"""Sampling: prefill the prompts, then decode one token at a time in one loop. Pure; a row's draws are its own."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.core.errors import UserError
from lm.core.types import Array, Completions, Params, Tokens
from lm.model import KVCache, Model
from lm.model.logits import is_static_temperature, repetition_penalized_logits, sampling_logits, values_at_ids


class SamplingParams(NamedTuple):
    """How to sample. Rollouts, chat, ranking, evaluation and the studies all describe it with this."""

    max_new: int  # tokens of an answer at most, its stop token included
    temperature: float | Array = 1.0  # 0 is greedy; a traced one must be above 0
    top_k: int = 0  # only the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # only the likeliest tokens whose probability reaches p, in (0, 1]; 1 keeps all
    min_p: float = 0.0  # only tokens at least this times as probable as the likeliest; 0 keeps all
    repetition_penalty: float = 1.0  # of tokens that prompt or answer hold already; 1 is none
    samples: int = 1  # answers to each prompt
    stop: Sequence[int] = ()  # ids; an answer ends with the first of them, which it keeps

    set_by_code = ("samples", "stop")  # no options of configs, see lm.core.options.record_options

    def adjusted_logits(self, logits: Array) -> Array:
        """Logits f32[...,V] of the distribution to draw from, see lm.model.logits.sampling_logits."""
        return sampling_logits(
            logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
        )

    def record(self) -> dict[str, Any]:
        """For a summary: max_new, temperature, and those other fields that are not at their defaults."""
        defaults = self._field_defaults
        others = {name: value for name, value in self._asdict().items() if name in defaults and value != defaults[name]}
        return {"max_new": self.max_new, "temperature": self.temperature, **others}


def check_sampling(model: Model, prompt_length: int, sampling: SamplingParams) -> None:
    """UserError for a request that this model cannot serve, with prompts of at most `prompt_length` tokens."""
    context = model.config.context
    max_new, temperature, top_k, top_p, min_p, repetition_penalty, samples, _ = sampling
    if prompt_length < 1:
        raise UserError("the prompt is empty; give at least one token")
    if max_new < 1:
        raise UserError(f"max_new_tokens is {max_new}; it must be at least 1")
    if prompt_length + max_new > context:
        raise UserError(
            f"the prompt has {prompt_length} tokens and {max_new} more were asked for, but the model's context is "
            f"{context}: shorten the prompt or lower max_new_tokens to {max(context - prompt_length, 0)}"
        )
    if not isinstance(temperature, Array) and not 0 <= temperature < math.inf:
        raise UserError(f"temperature is {temperature}; it must be 0 (greedy) or above")
    if top_k < 0 or not 0 < top_p <= 1:
        raise UserError(f"top_k is {top_k} and top_p {top_p}; top_k must be 0 (all) or above, top_p in (0, 1]")
    if not 0 <= min_p <= 1:
        raise UserError(f"min_p is {min_p}; it must be from 0 (all) to 1 (the likeliest alone)")
    if not 0 < repetition_penalty < math.inf:
        raise UserError(f"repetition_penalty is {repetition_penalty}; it must be above 0, and 1 is none")
    if samples < 1:
        raise UserError(f"samples is {samples}; it must be at least 1")


def prefill(
    model: Model, lm: Params, prompts: Array, lengths: Array, *, capacity: int, rollback_slots: int = 0
) -> tuple[Array, KVCache]:
    """Logits f32[B,V] after each prompt, and the cache of `capacity` slots from which decoding continues.

    prompts i32[B,P] are padded on the right to their lengths i32[B]; here they are aligned to the right, so that all
    rows write the same slot from now on. rollback_slots: slots that may be taken back, see KVCache.
    """
    P = prompts.shape[1]
    positions = jnp.arange(P) - (P - lengths[:, None])
    segments = (positions >= 0).astype(jnp.int32)
    positions = jnp.maximum(positions, 0)
    aligned = jnp.where(segments > 0, jnp.take_along_axis(prompts, positions, axis=1), 0)
    cache = model.empty_cache(batch=prompts.shape[0], capacity=capacity, rollback_slots=rollback_slots)
    x, cache = model.cached_hidden_states(lm, aligned, positions, segments, cache)
    return model.logits(lm, x[:, -1]), cache


def decode_step(model: Model, lm: Params, tokens: Array, positions: Array, cache: KVCache) -> tuple[Array, KVCache]:
    """Logits f32[B,V] after one more token i32[B] at positions i32[B]."""
    x, cache = model.cached_hidden_states(
        lm, tokens[:, None], positions[:, None], jnp.ones_like(tokens)[:, None], cache
    )
    return model.logits(lm, x[:, 0]), cache


def draw_tokens(keys: Array, logits: Array, sampling: SamplingParams) -> tuple[Array, Array]:
    """One token i32[B] a row from softmax(sampling.adjusted_logits(logits f32[B,V])), and its log-probability f32[B].

    keys [B]: a row's own. At temperature 0 there is nothing to draw: the first largest, of log-probability 0.
    """
    if is_static_temperature(sampling.temperature, 0):
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros(logits.shape[0])
    return draw_categorical(keys, sampling.adjusted_logits(logits))


def draw_categorical(keys: Array, logits: Array) -> tuple[Array, Array]:
    """One token i32[B] a row from softmax(logits f32[B,V]), and its log-probability f32[B]; keys [B]."""
    tokens = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    return tokens, values_at_ids(jax.nn.log_softmax(logits, axis=-1), tokens)


def row_keys(key: Array, rows: Array) -> Array:
    """A key a row: fold_in(key, row number), so that a row's sample does not depend on its batch mates."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def prompt_token_mask(prompts: Array, lengths: Array, vocabulary: int) -> Array:
    """bool[B,V]: the tokens of right-padded prompts i32[B,P]; padding is none of them."""
    B, P = prompts.shape
    mask = jnp.zeros((B, vocabulary), bool)
    return mask.at[jnp.arange(B)[:, None], prompts].max(jnp.arange(P) < lengths[:, None])


def updated_token_mask(mask: Array, tokens: Array) -> Array:
    """bool[B,V]: and these tokens i32[B]."""
    return mask | (jnp.arange(mask.shape[1]) == tokens[:, None])


def repeated_rows(tree, times: int):
    """A cache, or arrays, with every row so many times, the copies adjacent."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0) if x.ndim else x, tree)


def sample(
    model: Model, lm: Params, prompts: Array, lengths: Array, key: Array, sampling: SamplingParams
) -> Completions:
    """Completions of at most `sampling.max_new` tokens for right-padded prompts i32[B,P] of lengths i32[B] >= 1.

    Token t of row b is drawn with fold_in(fold_in(key, b), t); temperature 0 is argmax. After its stop id a row is all
    zeros, and the loop ends with the last row. Of several samples, the rows are those of prompts repeated so often,
    adjacent, but for the rounding of a prefill that each prompt has once. UserError as of `check_sampling`.
    """
    check_sampling(model, prompts.shape[1], sampling)
    max_new, penalty = sampling.max_new, sampling.repetition_penalty
    stops = jnp.asarray(tuple(sampling.stop), jnp.int32)
    lm = model.decoding_params(lm)
    logits, cache = prefill(model, lm, prompts, lengths, capacity=prompts.shape[1] + max_new)
    used = None if penalty == 1 else prompt_token_mask(prompts, lengths, logits.shape[1])
    if sampling.samples > 1:
        logits, cache, used, lengths = repeated_rows((logits, cache, used, lengths), sampling.samples)
    B = logits.shape[0]
    keys = row_keys(key, jnp.arange(B))
    out = Completions(
        jnp.zeros((B, max_new), jnp.int32), jnp.zeros((B, max_new)), jnp.zeros(B, jnp.int32), jnp.zeros(B, bool)
    )

    def unfinished(carry):
        t, _, _, _, out = carry
        return (t < max_new) & ~jnp.all(out.stopped)

    def step(carry):
        t, logits, cache, used, out = carry
        now = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, t)
        logits = logits if used is None else repetition_penalized_logits(logits, used, penalty)
        tokens, logprobs = draw_tokens(now, logits, sampling)
        live = ~out.stopped
        tokens, logprobs = jnp.where(live, tokens, 0), jnp.where(live, logprobs, 0.0)
        out = Completions(
            tokens=jax.lax.dynamic_update_slice_in_dim(out.tokens, tokens[:, None], t, axis=1),
            logprobs=jax.lax.dynamic_update_slice_in_dim(out.logprobs, logprobs[:, None], t, axis=1),
            lengths=out.lengths + live,
            stopped=out.stopped | jnp.any(tokens[:, None] == stops, axis=1),
        )
        logits, cache = decode_step(model, lm, tokens, lengths + t, cache)
        return t + 1, logits, cache, None if used is None else updated_token_mask(used, tokens), out

    return jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), logits, cache, used, out))[-1]


def prompt_completion_rows(prompts: Array, lengths: Array, completions: Completions) -> tuple[Tokens, Array]:
    """Prompts i32[B,P] and their completions as rows of P + N - 1 tokens, and the sampler's log-probs f32[B,P+N-1].

    Weights are 1 on sampled targets, stop token included, and 0 on prompt and padding.
    """
    P, N = prompts.shape[1], completions.tokens.shape[1]
    slots = jnp.arange(P + N)
    start, stop = lengths[:, None], (lengths + completions.lengths)[:, None]
    new = jnp.clip(slots - start, 0, N - 1)
    old = jnp.pad(prompts, ((0, 0), (0, N)))
    ids = jnp.where(slots < start, old, jnp.take_along_axis(completions.tokens, new, axis=1))
    ids = jnp.where(slots < stop, ids, 0)
    sampled = (slots >= start) & (slots < stop)
    logprobs = jnp.where(sampled, jnp.take_along_axis(completions.logprobs, new, axis=1), 0.0)
    filled = (slots < stop)[:, :-1]
    tokens = Tokens(
        inputs=ids[:, :-1],
        targets=ids[:, 1:],
        weights=sampled[:, 1:].astype(jnp.float32),
        positions=jnp.where(filled, slots[:-1], 0),
        segments=filled.astype(jnp.int32),
    )
    return tokens, logprobs[:, 1:]

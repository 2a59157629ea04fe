"""What the engine compiles: a chunk of a prompt into pages, and one more token of every row. Pure.

Each row of `decode` has a request of its own, with its own settings as arrays: one program serves them all, and a row
computes what it would alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.types import Array, Params
from lm.generate.paged_cache import Pages, gathered_cache, pages_with_chunk, pages_with_tokens
from lm.generate.sampler import decode_step, draw_categorical, updated_token_mask
from lm.model import KVCache, Model
from lm.model.logits import repetition_penalized_logits, row_sampling_logits, values_at_ids

TOP_LOGPROBS = 20  # likeliest tokens that a request may ask for


class DecodeRows(NamedTuple):
    """Where B rows stand, and how each samples. An idle row has length 0, only page 0 and temperature 0."""

    tokens: Array  # i32[B]  the last of each, which is fed next
    lengths: Array  # i32[B]  tokens before it: those whose keys and values are there
    draws: Array  # i32[B]  tokens drawn so far
    live: Array  # bool[B]
    keys: Array  # u32[B,2]  data of each row's key; token t is drawn with fold_in(key, t)
    temperature: Array  # f32[B]  0 is greedy
    top_k: Array  # i32[B]  0 keeps all
    top_p: Array  # f32[B]
    log_min_p: Array  # f32[B]  -inf keeps all
    repetition_penalty: Array  # f32[B]
    wants_top: Array  # bool[B]  the likeliest tokens, too
    table: Array  # i32[B,n]  pages


class DrawnTokens(NamedTuple):
    """One token of each row. `top_*` are zeros where no row wants them."""

    tokens: Array  # i32[B]
    logprobs: Array  # f32[B]  log softmax(logits) of the model
    sampling_logprobs: Array  # f32[B]  of the distribution drawn from, as lm.generate.sampler.sample's; 0 if greedy
    top_ids: Array  # i32[B,k]  the likeliest by the model, in order
    top_logprobs: Array  # f32[B,k]


def idle_rows(slots: int, table_width: int) -> DecodeRows:
    """Rows of no request, as numpy arrays."""
    ints, flags = (lambda: np.zeros(slots, np.int32)), (lambda: np.zeros(slots, bool))
    floats = lambda value: np.full(slots, value, np.float32)
    return DecodeRows(
        tokens=ints(),
        lengths=ints(),
        draws=ints(),
        live=flags(),
        keys=np.zeros((slots, 2), np.uint32),
        temperature=floats(0),
        top_k=ints(),
        top_p=floats(1),
        log_min_p=floats(-np.inf),
        repetition_penalty=floats(1),
        wants_top=flags(),
        table=np.zeros((slots, table_width), np.int32),
    )


def prefill_chunk(model: Model, lm: Params, pages: Pages, ids: Array, start: Array, count: Array, table: Array):
    """`pages` with the keys and values of ids i32[C] of one row, of which i32[] count, from position i32[] on.

    start and C are multiples of the page size; table i32[n]: the row's pages, page 0 beyond them, with room for all C.
    The last token of a prompt is no part of it: `decode` feeds that, so nothing is drawn here.
    """
    size = pages[0][0].shape[2]
    slots, at = jnp.arange(table.shape[0] * size), start + jnp.arange(ids.shape[0])
    cache = gathered_cache(pages, table[None], start)
    cache = cache.replace(segments=(slots < start).astype(jnp.int32)[None])
    real = (jnp.arange(ids.shape[0]) < count).astype(jnp.int32)
    _, cache = model.cached_hidden_states(lm, ids[None], at[None], real[None], cache)
    places = jax.lax.dynamic_slice_in_dim(table, start // size, ids.shape[0] // size)
    return pages_with_chunk(pages, cache, start, places)


def decode(
    model: Model, lm: Params, pages: Pages, cache: KVCache, used: Array, rows: DecodeRows, allowed: Array
) -> tuple[Pages, KVCache, Array, DecodeRows, DrawnTokens]:
    """One more token of every live row: pages and cache that hold the one fed, the tokens used, the rows, the draws.

    cache: the rows' pages side by side, with room for the token fed; used bool[B,V]: what a repetition penalty is of;
    allowed bool[B,V]: what a constraint lets through.
    """
    size, held = pages[0][0].shape[2], jnp.arange(cache.segments.shape[1]) < rows.lengths[:, None]
    cache = cache.replace(segments=held.astype(jnp.int32), length=rows.lengths)
    logits, cache = decode_step(model, lm, rows.tokens, rows.lengths, cache)
    places = jnp.take_along_axis(rows.table, rows.lengths[:, None] // size, axis=1)[:, 0]
    pages = pages_with_tokens(pages, cache, rows.lengths, places, rows.lengths % size)
    drawn = drawn_tokens(logits, rows, used, allowed)
    more = rows.live.astype(jnp.int32)
    rows = rows._replace(
        tokens=jnp.where(rows.live, drawn.tokens, 0), lengths=rows.lengths + more, draws=rows.draws + more
    )
    return pages, cache, updated_token_mask(used, drawn.tokens), rows, drawn


def drawn_tokens(logits: Array, rows: DecodeRows, used: Array, allowed: Array) -> DrawnTokens:
    """A token of each row from its logits f32[B,V], as `sample` draws it: penalty, then what is allowed, then the cuts.

    Sorting, noise and the likeliest tokens are computed only while a row needs them.
    """
    B, V = logits.shape
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    penalized = repetition_penalized_logits(logits, used, rows.repetition_penalty[:, None])
    penalized = jnp.where(allowed, penalized, -jnp.inf)
    best, is_drawn = jnp.argmax(penalized, axis=-1).astype(jnp.int32), rows.temperature > 0

    def draw(penalized: Array) -> tuple[Array, Array]:
        adjusted = row_sampling_logits(
            penalized,
            temperature=jnp.where(is_drawn, rows.temperature, 1.0),
            top_k=rows.top_k,
            top_p=rows.top_p,
            log_min_p=rows.log_min_p,
        )
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(rows.keys), rows.draws)
        tokens, of_them = draw_categorical(keys, adjusted)
        return jnp.where(is_drawn, tokens, best), jnp.where(is_drawn, of_them, 0.0)

    tokens, of_them = jax.lax.cond(jnp.any(is_drawn), draw, lambda _: (best, jnp.zeros(B)), penalized)
    k = min(TOP_LOGPROBS, V)
    none = jnp.zeros((B, k)), jnp.zeros((B, k), jnp.int32)
    top, top_ids = jax.lax.cond(jnp.any(rows.wants_top), lambda x: tuple(jax.lax.top_k(x, k)), lambda _: none, logprobs)
    return DrawnTokens(tokens, values_at_ids(logprobs, tokens), of_them, top_ids, top)

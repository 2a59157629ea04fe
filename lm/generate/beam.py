"""Beam search: a search for the likeliest completions of several prompts at a time. Pure.

Each step extends the `beam_width` likeliest unfinished hypotheses of a prompt by every token. The likeliest of the
results stay on the beam; those that end with a stop id go to a list of the best finished ones instead, so they take no
place on the beam. Hypotheses of different lengths are compared by their log-probability over a power of their
length (Wu et al. 2016, eq. 14, arXiv 1609.08144; without its coverage penalty, which is of an encoder's attention):

    score(y) = log p(y | prompt) / lp(y),    lp(y) = ((5 + |y|) / (5 + 1)) ** length_penalty

Hypotheses that the limit cuts off compete with the finished ones by the same score.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.core.errors import UserError
from lm.core.types import Array, Completions, Params
from lm.generate.sampler import SamplingParams, check_sampling, decode_step, prefill, repeated_rows
from lm.model import Model


class Hypotheses(NamedTuple):
    """K hypotheses to each of B prompts. An empty place has the value -inf."""

    values: Array  # f32[B,K]  log-probability of the unfinished, score of the finished
    tokens: Array  # i32[B,K,N]
    logprobs: Array  # f32[B,K,N]
    lengths: Array  # i32[B,K]  stop token included
    stopped: Array  # bool[B,K]


def beam_search(
    model: Model,
    lm: Params,
    prompts: Array,
    lengths: Array,
    *,
    beam_width: int,
    max_new: int,
    length_penalty: float = 0.0,
    stop: Sequence[int] = (),
) -> tuple[Completions, Array]:
    """The `beam_width` best completions found for right-padded prompts i32[B,P] of lengths i32[B] >= 1, and scores.

    Completions are rows as of lm.generate.sampler.sample with samples=beam_width: those of a prompt are adjacent, best
    first. Log-probs are of softmax(logits), the scores f32[B,beam_width] as above. If there are fewer sequences than
    places, the last rows have length 0 and the score -inf. Width 1 without stop ids is greedy decoding.
    """
    check_sampling(model, prompts.shape[1], SamplingParams(max_new))
    if beam_width < 1:
        raise UserError(f"the beam's width is {beam_width}; it must be at least 1")
    if not 0 <= length_penalty < math.inf:
        raise UserError(f"length_penalty is {length_penalty}; it must be 0 (none) or above")
    lm = model.decoding_params(lm)
    logits, cache = prefill(model, lm, prompts, lengths, capacity=prompts.shape[1] + max_new)
    B, V = logits.shape
    stops = jnp.asarray(sorted({s for s in stop if 0 <= s < V}), jnp.int32)
    logits, cache, lengths = repeated_rows((logits, cache, lengths), beam_width)
    penalty = lambda length: ((5 + jnp.asarray(length, jnp.float32)) / 6) ** length_penalty
    live = done = empty_hypotheses(B, beam_width, max_new)
    live = live._replace(values=live.values.at[:, 0].set(0.0))  # one start, not `width` equal ones

    def unfinished(carry):
        t, _, _, live, done = carry
        hope = live.values[:, 0] / penalty(max_new)  # what no longer row can exceed: log-probabilities only fall
        return (t < max_new) & jnp.any(hope > done.values[:, -1])

    def step(carry):
        t, logits, cache, live, done = carry
        new = jnp.minimum(jax.nn.log_softmax(logits, axis=-1), 0.0).reshape(B, beam_width * V)
        ends = jnp.broadcast_to((jnp.arange(beam_width)[:, None] * V + stops).ravel(), (B, beam_width * stops.size))
        ended = extended_hypotheses(live, ends, new, t)
        ended = ended._replace(values=ended.values / penalty(t + 1), stopped=jnp.ones_like(ended.stopped))
        going = (live.values[..., None] + new.reshape(B, beam_width, V)).at[..., stops].set(-jnp.inf)
        values, places = jax.lax.top_k(going.reshape(B, beam_width * V), beam_width)
        tokens, parents = (places % V).ravel(), (places // V + beam_width * jnp.arange(B)[:, None]).ravel()
        cache = jax.tree.map(lambda x: x[parents] if x.ndim else x, cache)
        logits, cache = decode_step(model, lm, tokens, lengths + t, cache)
        live = extended_hypotheses(live, places, new, t)._replace(
            values=values
        )  # -inf for what should have been an end
        return t + 1, logits, cache, live, best_hypotheses(done, ended, beam_width)

    t, _, _, live, done = jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), logits, cache, live, done))
    cut = live._replace(values=jnp.where(t == max_new, live.values / penalty(max_new), -jnp.inf))
    return hypothesis_rows(best_hypotheses(done, cut, beam_width))


def empty_hypotheses(prompts: int, width: int, length: int) -> Hypotheses:
    """Empty places for hypotheses of at most that length."""
    shape = (prompts, width)
    return Hypotheses(
        jnp.full(shape, -jnp.inf),
        jnp.zeros((*shape, length), jnp.int32),
        jnp.zeros((*shape, length)),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, bool),
    )


def extended_hypotheses(live: Hypotheses, places: Array, new: Array, t: Array) -> Hypotheses:
    """Hypotheses of t + 1 tokens at places i32[B,M]: place k V + v is hypothesis k with the token v behind it.

    new f32[B,K V]: the log-probabilities of all of them.
    """
    V = new.shape[1] // live.values.shape[1]
    chosen = hypotheses_at(live, places // V)
    logprobs = jnp.take_along_axis(new, places, axis=1)
    return Hypotheses(
        values=chosen.values + logprobs,
        tokens=jax.lax.dynamic_update_slice_in_dim(chosen.tokens, (places % V)[..., None], t, axis=2),
        logprobs=jax.lax.dynamic_update_slice_in_dim(chosen.logprobs, logprobs[..., None], t, axis=2),
        lengths=chosen.lengths + 1,
        stopped=chosen.stopped,
    )


def hypotheses_at(hypotheses: Hypotheses, places: Array) -> Hypotheses:
    """The hypotheses at places i32[B,M] of each prompt."""
    wide = lambda x: places.reshape(places.shape + (1,) * (x.ndim - 2))
    return jax.tree.map(lambda x: jnp.take_along_axis(x, wide(x), axis=1), hypotheses)


def best_hypotheses(first: Hypotheses, second: Hypotheses, count: int) -> Hypotheses:
    """The `count` of greatest value among both, in order; of equals, the earlier ones."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)
    return hypotheses_at(both, jax.lax.top_k(both.values, count)[1])


def hypothesis_rows(hypotheses: Hypotheses) -> tuple[Completions, Array]:
    """Completions of B K rows, and the values f32[B,K]; an empty place is an empty row."""
    filled = hypotheses.values > -jnp.inf
    tokens, logprobs = (jnp.where(filled[..., None], x, 0) for x in (hypotheses.tokens, hypotheses.logprobs))
    completions = Completions(tokens, logprobs, hypotheses.lengths * filled, hypotheses.stopped & filled)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), completions), hypotheses.values

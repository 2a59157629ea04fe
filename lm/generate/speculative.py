"""Speculative sampling: a small model proposes tokens, the large one checks all of them in a single pass. Pure.

Leviathan et al. 2023, alg. 1, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318. Each round the draft proposes
`draft_tokens` one by one, x_i ~ q_i, and one pass of the target gives p_i after each of them. They are accepted in
order, x_i with probability min(1, p_i(x_i) / q_i(x_i)); the first rejected one is drawn again from
max(p_i - q_i, 0) over its sum; if none is rejected, one more token is drawn from the last p of the pass. p and q are
the distributions sampled at these settings (temperature, top-k, top-p, min-p), so what comes out is distributed as
lm.generate.sampler.sample's, whatever the draft: a better draft makes it faster, not better.

Rows accept different numbers of tokens, so each writes its cache at slots of its own, and takes back rejected ones.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.core.errors import UserError
from lm.core.types import Array, Completions, Params
from lm.generate.sampler import SamplingParams, check_sampling, decode_step, draw_categorical, prefill, row_keys
from lm.model import KVCache, Model
from lm.model.kv_cache import updated_slots
from lm.model.logits import values_at_ids


class TargetDraft(NamedTuple):
    """A pair of models, decoders or caches."""

    target: Any
    draft: Any


class SpeculativeState(NamedTuple):
    """Where B rows stand. The caches hold what comes before each row's last token, which no model has been fed yet."""

    tokens: Array  # i32[B]  the last of each
    positions: Array  # i32[B]  its own
    caches: TargetDraft  # of KVCache, with length i32[B]


class SpeculativeRound(NamedTuple):
    """What one round gave, for A proposals a row: of the A + 1 places the first accepted + 1 count."""

    tokens: Array  # i32[B,A+1]
    logprobs: Array  # f32[B,A+1]  the target's
    accepted: Array  # i32[B]  0 to A


class AcceptanceCounts(NamedTuple):
    """What became of the proposals, i32[B] each; those beyond the limit or a stop id count nowhere."""

    proposed: Array
    accepted: Array
    rounds: Array  # passes of the target behind the prompt's


def acceptance_probability(p: Array, q: Array) -> Array:
    """min(1, p / q), from log-probabilities; 1 where q is 0, which is never proposed."""
    return jnp.where(q == -jnp.inf, 1.0, jnp.exp(jnp.minimum(p - q, 0.0)))


def residual_logits(p: Array, q: Array) -> Array:
    """Logits f32[...,V] of max(p - q, 0) over its sum, from log-probabilities f32[...,V].

    Where rounding leaves no difference, p and q are the same, and they are p's.
    """
    residual = jnp.maximum(jnp.exp(p) - jnp.exp(q), 0.0)
    return jnp.where(jnp.any(residual > 0, axis=-1, keepdims=True), jnp.log(residual), p)


def initial_speculative_state(
    models: TargetDraft, lms: TargetDraft, prompts: Array, lengths: Array, *, capacity: int, draft_tokens: int
) -> SpeculativeState:
    """Right-padded prompts i32[B,P] of lengths i32[B] >= 1 as a SpeculativeState, with caches for `capacity` tokens,
    prompt included.

    A last round may write `draft_tokens` slots more. The prompt's last token is taken back: the first round feeds it
    again.
    """

    def cache(model: Model, lm: Params) -> KVCache:
        _, filled = prefill(model, lm, prompts, lengths, capacity=capacity + draft_tokens, rollback_slots=draft_tokens)
        return filled.replace(length=jnp.full(prompts.shape[0], filled.length - 1))

    last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]
    return SpeculativeState(
        last, lengths - 1, TargetDraft(cache(models.target, lms.target), cache(models.draft, lms.draft))
    )


def speculative_round(
    models: TargetDraft,
    lms: TargetDraft,
    rows: SpeculativeState,
    keys: Array,
    sampling: SamplingParams,
    *,
    draft_tokens: int,
) -> tuple[SpeculativeState, SpeculativeRound]:
    """The rows after one more round, and what it gave; keys [B].

    Place i of a round draws with fold_in(key, i), split in three: proposal, judgement, and the token drawn again.
    """
    places, each_row = jnp.arange(draft_tokens + 1), jnp.arange(len(keys))
    of_row = lambda key: jax.vmap(lambda place: jax.random.split(jax.random.fold_in(key, place), 3))(places)
    proposing, judging, again = jnp.moveaxis(jax.vmap(of_row)(keys), 2, 0)  # [B,A+1] each

    def propose(carry, xs):
        (tokens, cache), (place, key) = carry, xs
        logits, cache = decode_step(models.draft, lms.draft, tokens, rows.positions + place, cache)
        logits = sampling.adjusted_logits(logits)
        tokens, _ = draw_categorical(key, logits)
        return (tokens, cache), (tokens, jax.nn.log_softmax(logits, axis=-1))

    # One pass more than there are proposals: the last one's place in the draft's cache, should all be accepted.
    start = rows.tokens, rows.caches.draft
    (_, draft), proposals = jax.lax.scan(propose, start, (places, proposing.swapaxes(0, 1)))
    drawn, q = (x.swapaxes(0, 1) for x in proposals)  # [B,A+1], [B,A+1,V]
    fed = jnp.concatenate([rows.tokens[:, None], drawn[:, :-1]], axis=1)
    at = rows.positions[:, None] + places
    x, target = models.target.cached_hidden_states(lms.target, fed, at, jnp.ones_like(fed), rows.caches.target)
    p = jax.nn.log_softmax(sampling.adjusted_logits(models.target.logits(lms.target, x)), axis=-1)
    q = q.at[:, -1].set(-jnp.inf)  # nothing is proposed for the last place: its residual is p
    chances = acceptance_probability(values_at_ids(p, drawn), values_at_ids(q, drawn))[:, :-1]
    passed = jax.vmap(jax.vmap(jax.random.uniform))(judging[:, :-1]) < chances
    accepted = jnp.sum(jnp.cumprod(passed.astype(jnp.int32), axis=1), axis=1)

    last = each_row, accepted  # the place that is drawn again, or beyond all proposals
    tokens, _ = draw_categorical(again[last], residual_logits(p[last], q[last]))
    drawn, count = drawn.at[last].set(tokens), accepted + 1
    caches = TargetDraft(*(new.replace(length=old.length + count) for new, old in zip((target, draft), rows.caches)))
    return SpeculativeState(tokens, rows.positions + count, caches), SpeculativeRound(
        drawn, values_at_ids(p, drawn), accepted
    )


def speculative_sample(
    target: Model,
    draft: Model,
    lm: Params,
    draft_lm: Params,
    prompts: Array,
    lengths: Array,
    key: Array,
    sampling: SamplingParams,
    *,
    draft_tokens: int = 4,
) -> tuple[Completions, AcceptanceCounts]:
    """Completions as of lm.generate.sampler.sample, of the target's distribution; log-probs are the target's.

    Temperature 0 gives sample's tokens, unless rounding decides between two. At other temperatures the draws differ,
    but their distribution does not. Round r of row b draws with fold_in(fold_in(key, b), r), see `speculative_round`,
    so a row's tokens do not depend on its batch mates. `lm` and `draft_lm` are the decoders of `target` and `draft`,
    which share a vocabulary.
    """
    models, (B, P), max_new = TargetDraft(target, draft), prompts.shape, sampling.max_new
    check_speculation(models, P, sampling, draft_tokens=draft_tokens)
    lms = TargetDraft(target.decoding_params(lm), draft.decoding_params(draft_lm))
    stops, keys = jnp.asarray(tuple(sampling.stop), jnp.int32), row_keys(key, jnp.arange(B))
    width, none = max_new + draft_tokens + 1, jnp.zeros(B, jnp.int32)
    out = Completions(jnp.zeros((B, width), jnp.int32), jnp.zeros((B, width)), none, jnp.zeros(B, bool))
    unfinished = lambda out: (out.lengths < max_new) & ~out.stopped

    def step(carry):
        t, rows, out, accepted_counts = carry
        now = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, t)
        moved, new = speculative_round(models, lms, rows, now, sampling, draft_tokens=draft_tokens)
        live = unfinished(out)
        out, accepted_counts = extended_completions(
            out, accepted_counts, new, jnp.where(live, max_new - out.lengths, 0), stops
        )
        # A finished row stands still: what it writes lies beyond `filled`, which like all [B] is as it was.
        rows = jax.tree.map(lambda new, old: jnp.where(live, new, old) if new.ndim == 1 else new, moved, rows)
        return t + 1, rows, out, accepted_counts

    rows = initial_speculative_state(models, lms, prompts, lengths, capacity=P + max_new, draft_tokens=draft_tokens)
    start = jnp.zeros((), jnp.int32), rows, out, AcceptanceCounts(none, none, none)
    *_, out, accepted_counts = jax.lax.while_loop(lambda carry: jnp.any(unfinished(carry[2])), step, start)
    return out.replace(tokens=out.tokens[:, :max_new], logprobs=out.logprobs[:, :max_new]), accepted_counts


def extended_completions(
    out: Completions, counts: AcceptanceCounts, new: SpeculativeRound, room: Array, stops: Array
) -> tuple[Completions, AcceptanceCounts]:
    """The rows with what counts of a round: up to `room` i32[B] tokens, and not beyond the first stop id."""
    draft_tokens, places = new.tokens.shape[1] - 1, jnp.arange(new.tokens.shape[1])
    ends = jnp.any(new.tokens[..., None] == stops, axis=-1) & (places <= new.accepted[:, None])
    end = jnp.where(jnp.any(ends, axis=1), jnp.argmax(ends, axis=1) + 1, draft_tokens + 1)
    limit = jnp.minimum(end, room)
    count = jnp.minimum(new.accepted + 1, limit)
    within_room = places < count[:, None]
    out = Completions(
        tokens=updated_slots(out.tokens, jnp.where(within_room, new.tokens, 0), out.lengths),
        logprobs=updated_slots(out.logprobs, jnp.where(within_room, new.logprobs, 0.0), out.lengths),
        lengths=out.lengths + count,
        stopped=out.stopped | jnp.any(ends & within_room, axis=1),
    )
    proposed, accepted = jnp.minimum(draft_tokens, limit), jnp.minimum(new.accepted, limit)
    return out, AcceptanceCounts(counts.proposed + proposed, counts.accepted + accepted, counts.rounds + (room > 0))


def check_speculation(models: TargetDraft, prompt_length: int, sampling: SamplingParams, *, draft_tokens: int) -> None:
    """UserError for a request that these two cannot serve, with prompts of at most `prompt_length` tokens."""
    target, draft, max_new = models.target.config, models.draft.config, sampling.max_new
    check_sampling(models.target, prompt_length, sampling)
    if sampling.repetition_penalty != 1:
        raise UserError("repetition_penalty does not go with a draft, whose proposals it would change: leave one out")
    if sampling.samples != 1:
        raise UserError(f"samples is {sampling.samples}; with a draft each prompt gets 1: repeat the prompts")
    if draft_tokens < 1:
        raise UserError(f"draft_tokens is {draft_tokens}; the draft must propose at least 1 token a round")
    if draft.vocab_size != target.vocab_size:
        raise UserError(
            f"the draft's vocabulary has {draft.vocab_size} tokens and the target's {target.vocab_size}: "
            "a draft must share the target's ids, take one trained with the same tokenizer"
        )
    if prompt_length + max_new > draft.context:
        raise UserError(
            f"the prompt has {prompt_length} tokens and {max_new} more were asked for, but the draft's context is "
            f"{draft.context}: shorten the prompt, lower max_new_tokens to "
            f"{max(draft.context - prompt_length, 0)}, or take "
            "another draft"
        )

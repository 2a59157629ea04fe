"""One answer token by token, each as soon as it is sampled, for chat."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.types import Params
from lm.data.prompts import BUCKET_SIZE, bucket_length
from lm.generate.sampler import (
    SamplingParams,
    decode_step,
    draw_tokens,
    prefill,
    prompt_token_mask,
    row_keys,
    updated_token_mask,
)
from lm.generate.speculative import TargetDraft, initial_speculative_state, speculative_round
from lm.model import Model
from lm.model.logits import repetition_penalized_logits


def token_streamer(model: Model, sampling: SamplingParams) -> Callable[..., Iterator[int]]:
    """stream(lm, ids, key, *, max_new, stop): the tokens of generate.sampler.sample's row 0, each once it is drawn.

    max_new and stop are those of each answer, in place of those in `sampling`. The keys are sample's, and so are the
    tokens, unless rounding decides between two: the padding differs. Prompts are aligned to the right of their bucket,
    so a cache of the context and one bucket more holds every allowed answer.
    """
    capacity, penalty = model.config.context + BUCKET_SIZE, sampling.repetition_penalty

    def draw_next(logits, keys, t, used):
        """The next token i32[1], and the mask of tokens so far; None where there is no penalty."""
        now = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, t)
        logits = logits if used is None else repetition_penalized_logits(logits, used, penalty)
        tokens, _ = draw_tokens(now, logits, sampling)
        return tokens, None if used is None else updated_token_mask(used, tokens)

    @jax.jit
    def first(lm, prompts, lengths, keys):
        logits, cache = prefill(model, lm, prompts, lengths, capacity=capacity)
        used = None if penalty == 1 else prompt_token_mask(prompts, lengths, logits.shape[1])
        return *draw_next(logits, keys, 0, used), cache

    @functools.partial(jax.jit, donate_argnames="cache")
    def next_token(lm, tokens, lengths, keys, t, used, cache):
        logits, cache = decode_step(model, lm, tokens, lengths + t - 1, cache)
        return *draw_next(logits, keys, t, used), cache

    def stream(lm, ids, key, *, max_new: int, stop) -> Iterator[int]:
        prompts, lengths = single_prompt_row(ids, model.config.context)
        lm, keys = model.decoding_params(lm), row_keys(key, jnp.arange(1))
        tokens, used, cache = first(lm, prompts, lengths, keys)
        for t in range(1, max_new + 1):
            yield int(tokens[0])
            if t == max_new or int(tokens[0]) in stop:
                return
            tokens, used, cache = next_token(lm, tokens, lengths, keys, t, used, cache)

    return stream


def single_prompt_row(ids: Sequence[int], context: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompt as i32[1,P], padded to its bucket, and its length i32[1]."""
    prompts = np.zeros((1, bucket_length(len(ids), context)), np.int32)
    prompts[0, : len(ids)] = ids
    return prompts, np.array([len(ids)], np.int32)


def speculative_token_streamer(
    models: TargetDraft,
    draft_lm: Params,
    on_round: Callable[[int, int], None],
    sampling: SamplingParams,
    *,
    draft_tokens: int,
) -> Callable[..., Iterator[int]]:
    """`token_streamer` with a draft: the tokens of speculative_sample's row 0, those of a round at a time.

    on_round: given how many tokens each round proposed and how many of them the target accepted.
    """
    context = min(model.config.context for model in models)
    first = jax.jit(
        functools.partial(initial_speculative_state, models, capacity=context + BUCKET_SIZE, draft_tokens=draft_tokens)
    )
    next_token = jax.jit(
        functools.partial(speculative_round, models, sampling=sampling, draft_tokens=draft_tokens),
        donate_argnames="rows",
    )
    draft_lm = models.draft.decoding_params(jax.device_put(draft_lm))

    def stream(lm, ids, key, *, max_new: int, stop) -> Iterator[int]:
        lms, key = TargetDraft(models.target.decoding_params(lm), draft_lm), row_keys(key, jnp.arange(1))[0]
        rows = first(lms, *single_prompt_row(ids, context))
        for t in itertools.count():
            rows, new = next_token(lms, rows, jax.random.fold_in(key, t)[None])
            tokens, accepted = new.tokens[0].tolist(), int(new.accepted[0])
            end = next((i + 1 for i, token in enumerate(tokens[: accepted + 1]) if token in stop), max_new)
            limit = min(end, max_new)
            on_round(min(draft_tokens, limit), min(accepted, limit))
            yield from tokens[: min(accepted + 1, limit)]
            max_new -= accepted + 1
            if end <= accepted + 1 or max_new < 1:
                return

    return stream

"""Many prompts in, many texts out: how ranking and evaluation ask a model."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.errors import UserError
from lm.core.types import Array, Params
from lm.data.prompts import Prompts, bucket_length, prompt_chunks
from lm.generate.sampler import SamplingParams, check_sampling, sample
from lm.model import Model
from lm.tokenizer import Tokenizer


class GeneratedAnswer(NamedTuple):
    text: str
    length: int  # sampled tokens, the stop token included
    stopped: bool  # ended by itself, or with a stop string, within the limit


def check_stop_strings(stops: Sequence[str]) -> None:
    """UserError for an empty one, which every text contains."""
    if not all(stops):
        raise UserError("a stop string is empty: give it at least one character, or leave it out")


def text_before_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """What comes before the stop string that is complete first, and whether there is one. More text changes neither."""
    places = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(places)[1]], True) if places else (text, False)


def text_without_partial_stop(text: str, stops: Sequence[str]) -> str:
    """`text`, which may go on and has no stop string, without an end that may still become one."""
    begun = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return text[: len(text) - max(begun, default=0)]


def answer_from_ids(tokenizer: Tokenizer, ids: Sequence[int], stopped: bool, stops: Sequence[str]) -> GeneratedAnswer:
    """The answer of sampled ids, which ends before a stop string; the string's own tokens count in its length."""
    text, has_stop = text_before_stop(tokenizer.decode(ids), stops)
    if not has_stop:
        return GeneratedAnswer(text, len(ids), stopped)
    return GeneratedAnswer(
        text, next(n for n in range(1, len(ids) + 1) if text_before_stop(tokenizer.decode(ids[:n]), stops)[1]), True
    )


def batch_answerer(
    model: Model,
    lm: Params,
    tokenizer: Tokenizer,
    sampling: SamplingParams,
    *,
    rows_at_once: int,
    jit,
    stop_strings: Sequence[str] = (),
) -> Callable[[Prompts, Array], list[GeneratedAnswer]]:
    """(prompts, key) -> `sampling.samples` answers a prompt, adjacent, those to `rows_at_once` prompts at a time.

    An answer ends with a stop id of the tokenizer or of `sampling`, and before the first of `stop_strings`; sampling
    goes on to the stop id, as the program knows tokens and no text. Chunk c draws with fold_in(key, c), so an answer
    depends on its place in the list, not on how many follow. Prompts are padded to the width of their bucket, so that
    a new width seldom compiles; their real length must fit into the context.
    """
    check_stop_strings(stop_strings)
    sampling = sampling._replace(stop=(*tokenizer.stop_ids, *sampling.stop))
    run = jit(lambda lm, ids, lengths, key: sample(model, lm, ids, lengths, key, sampling))
    lm = jax.tree.map(jnp.asarray, lm)  # on the device once, not for every chunk

    def answers(prompts: Prompts, key: Array) -> list[GeneratedAnswer]:
        results, padded_length = [], prompts.ids.shape[1]
        longest = int(max(prompts.lengths, default=1))
        check_sampling(model, longest, sampling)
        width = bucket_length(padded_length, model.config.context - sampling.max_new)
        prompts = prompts._replace(ids=np.pad(prompts.ids[:, :width], ((0, 0), (0, max(width - padded_length, 0)))))
        for first, part in prompt_chunks(prompts, rows_at_once):
            completions = jax.device_get(
                run(lm, part.ids, part.lengths, jax.random.fold_in(key, first // rows_at_once))
            )
            for row in range(min(rows_at_once, len(prompts.ids) - first) * sampling.samples):
                length = int(completions.lengths[row])
                results.append(
                    answer_from_ids(
                        tokenizer, completions.tokens[row, :length], bool(completions.stopped[row]), stop_strings
                    )
                )
        return results

    return answers

"""Many prompts in, many texts out: how ranking and evaluation ask a model."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.prompts import Prompts
from lm.model import Model
from lm.sample import sample
from lm.tokenizer import Tokenizer
from lm.types import Array, Params


class Answer(NamedTuple):
    text: str
    length: int  # sampled tokens, the stop token included
    stopped: bool  # ended by itself within the limit


def answerer(
    model: Model, lm: Params, tokenizer: Tokenizer, *, rows_at_once: int, jit, **options
) -> Callable[[Prompts, Array], list[Answer]]:
    """(prompts, key) -> one answer a prompt, sampled `rows_at_once` at a time.

    `options` are those of sample (max_new, temperature, ...). Chunk c draws with fold_in(key, c), so an answer depends
    on its place in the list, not on how many follow.
    """
    run = jit(lambda lm, ids, lengths, key: sample(model, lm, ids, lengths, key, stop=tokenizer.stops, **options))
    lm = jax.tree.map(jnp.asarray, lm)  # on the device once, not for every chunk

    def answers(prompts: Prompts, key: Array) -> list[Answer]:
        found = []
        for chunk, start in enumerate(range(0, len(prompts.ids), rows_at_once)):
            ids, lengths = (x[start : start + rows_at_once] for x in (prompts.ids, prompts.lengths))
            missing = rows_at_once - len(ids)
            ids, lengths = np.pad(ids, ((0, missing), (0, 0))), np.pad(lengths, (0, missing), constant_values=1)
            drawn = jax.device_get(run(lm, ids, lengths, jax.random.fold_in(key, chunk)))
            for row in range(rows_at_once - missing):
                length = int(drawn.lengths[row])
                found.append(Answer(tokenizer.decode(drawn.tokens[row, :length]), length, bool(drawn.stopped[row])))
        return found

    return answers

"""A reward model as a reward: a transformer with a scalar head, read at the last real token."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.types import Array, Params, Tokens
from lm.data.conversations import conversation_with_answer
from lm.data.packing import padded_rows
from lm.data.truncation import truncated_rows
from lm.model import Model
from lm.rewards import Reward
from lm.tokenizer import TokenizedExample, Tokenizer, encode_chats


def reward_scores(model: Model, params: Params, tokens: Tokens) -> Array:
    """f32[B,A]: each axis' head at each row's last real token, found by length; 0 for a row that is all padding."""
    x = model.hidden_states(params["lm"], tokens.inputs, tokens.positions, tokens.segments)
    lengths = jnp.sum(tokens.segments > 0, axis=1)
    last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where(lengths[:, None] > 0, model.value(params["value"], last), 0.0)


def reward_rows(tokenizer: Tokenizer, conversations: list[list[dict]], length: int) -> Tokens:
    """One conversation a row, its closing end token among the inputs: that is where it is scored.

    A row holds `length` tokens; of a longer conversation what lm.data.truncation keeps, always with the end token.
    """
    whole = encode_chats(tokenizer, conversations, last=True)
    fit = truncated_rows(whole, length, cut="answer", start=tokenizer.start_ids, trained=False)
    return padded_rows([reward_row(tokenizer, row) for row in fit.kept], length)


def reward_row(tokenizer: Tokenizer, row: TokenizedExample) -> TokenizedExample:
    """A conversation whose last token is an input too. No target of it has a weight."""
    return TokenizedExample(np.append(row.ids, tokenizer.eos).astype(np.int32), np.zeros(len(row.ids) + 1, np.float32))


def reward_row_length(prompt: int, new: int) -> int:
    """Tokens of the longest row of a prompt of `prompt` and an answer of `new` tokens: the template closes an answer
    that was cut off with one more token."""
    return prompt + new + 1


def reward_from_model(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    *,
    weights: Sequence[float],
    offset: float,
    scale: float,
    length: int,
    rows_at_once: int,
    jit,
    name: str,
    warn: Callable[[str], None],
) -> Reward:
    """(score - offset) / scale of each answer, the score being the sum of weights[a] * axis a.

    With the moments of the reward model's held-out answers: centred, and of unit deviation. Longer
    conversations are truncated, and `warn` gets one line about it with the judge's `name`.
    """
    run = jit(lambda params, tokens: reward_scores(model, params, tokens) @ jnp.asarray(weights))
    params = jax.tree.map(jnp.asarray, params)  # on the device once, not at every call
    told = []

    def reward(examples, texts):
        conversations = [conversation_with_answer(e["messages"], t) for e, t in zip(examples, texts, strict=True)]
        tokens = reward_rows(tokenizer, conversations, length)
        if not told and (fault := truncation_warning(tokenizer, conversations, tokens)):
            told.append(fault)
            warn(f"{name} {fault}")
        parts = []
        for start in range(0, len(texts), rows_at_once):
            part = jax.tree.map(lambda x: x[start : start + rows_at_once], tokens)
            missing = rows_at_once - len(part.inputs)
            part = jax.tree.map(lambda x: np.pad(x, ((0, missing), (0, 0))), part)
            parts.append(np.asarray(run(params, part))[: rows_at_once - missing])
        return (np.concatenate(parts) - offset) / scale

    return reward


def truncation_warning(tokenizer: Tokenizer, conversations: Sequence[list[dict]], tokens: Tokens) -> str:
    """What the rows `tokens` lack of the conversations, in words; empty where they hold all of it."""
    length = tokens.inputs.shape[1]
    full = [conversations[i] for i in np.flatnonzero((tokens.segments > 0).all(axis=1))]  # no others can be longer
    longer = [len(chat.ids) for chat in encode_chats(tokenizer, full) if len(chat.ids) > length]
    if not longer:
        return ""
    return (
        f"reads rows of {length} tokens, but {len(longer)} of {len(conversations)} conversations are longer (up to "
        f"{max(longer)}): they are judged cut, and such as differ in what is cut get the same score; train it with "
        f"--config.data.length={max(longer)}, or shorten the answers"
    )


def reward_ensemble(members: Sequence[Reward], *, pessimism: float) -> Reward:
    """Mean of the members' rewards minus `pessimism` times their standard deviation, where they disagree.

    Coste et al. 2023, "uncertainty-weighted optimization", arXiv 2310.02743 (theirs subtracts the variance).
    """

    def reward(examples, texts):
        each = np.stack([member(examples, texts) for member in members])
        return each.mean(axis=0) - pessimism * each.std(axis=0)

    return reward

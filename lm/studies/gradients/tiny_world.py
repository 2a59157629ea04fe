"""Worlds small enough to enumerate: two prompts, every answer to each, and networks that give them probabilities.

The exact side is written from the definitions, on log_softmax(logits) after plain lists of token ids. It shares no
mask, no shift, no sum and no average with the losses that it checks.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.types import Array, Completions, Params, Tokens
from lm.generate.sampler import prompt_completion_rows
from lm.model import Model, ModelConfig, make_model

VOCAB_SIZE, MAX_ANSWER_LENGTH = 4, 3  # tokens, and tokens an answer
PROMPTS = ((2, 1), (3, 1, 2))  # of different lengths, as in a batch; one repeated token would look like two of it
ROW_LENGTH = max(map(len, PROMPTS)) + MAX_ANSWER_LENGTH  # tokens a row
ALL_STRINGS = tuple(itertools.product(range(VOCAB_SIZE), repeat=MAX_ANSWER_LENGTH))


class Networks(NamedTuple):
    """A model and its decoders: the policy that learns, its reference, another sampler, a teacher; a wrong head."""

    model: Model
    policy: Params
    reference: Params
    sampler: Params
    teacher: Params
    value_head: Params  # an untrained scalar head


class TinyWorld(NamedTuple):
    """Every answer to every prompt; row x * Y + y of `tokens` is answer y to prompt x."""

    nets: Networks
    answers: tuple[tuple[int, ...], ...]
    tokens: Tokens  # leaves [X*Y,T], from lm.generate.sampler.prompt_completion_rows, as rollouts are
    rewards: Array  # f32[X,Y], some of them equal

    @property
    def answer_mask(self) -> np.ndarray:
        """f64[Y,N]: 1 on an answer's own tokens."""
        return np.array([[n < len(answer) for n in range(MAX_ANSWER_LENGTH)] for answer in self.answers], np.float64)

    @property
    def answer_lengths(self) -> np.ndarray:
        """f64[Y]: tokens an answer."""
        return self.answer_mask.sum(axis=1)


def ragged_world(nets: Networks) -> TinyWorld:
    """40 answers of 1 to 3 tokens: 0 ends them."""
    return enumerated_world(nets, stops=(0,), longest=3)


def fixed_length_world(nets: Networks) -> TinyWorld:
    """16 answers of 2 tokens: nothing ends them but the limit."""
    return enumerated_world(nets, stops=(), longest=2)


def short_answer_world(nets: Networks) -> TinyWorld:
    """7 answers of 1 or 2 tokens: all but 1 end them."""
    return enumerated_world(nets, stops=(0, 2, 3), longest=2)


def single_token_world(nets: Networks) -> TinyWorld:
    """4 answers of 1 token."""
    return enumerated_world(nets, stops=(), longest=1)


def enumerated_world(nets: Networks, *, stops: Sequence[int], longest: int) -> TinyWorld:
    """All answers of at most `longest` tokens that end with their first stop token, or at the limit."""
    answers = tuple(
        ids
        for n in range(1, longest + 1)
        for ids in itertools.product(range(VOCAB_SIZE), repeat=n)
        if not set(ids[:-1]) & set(stops) and (n == longest or ids[-1] in stops)
    )
    rows = list(itertools.product(PROMPTS, answers))
    completions = Completions(
        tokens=_padded_rows([answer for _, answer in rows], MAX_ANSWER_LENGTH),
        logprobs=jnp.zeros((len(rows), MAX_ANSWER_LENGTH)),
        lengths=jnp.array([len(answer) for _, answer in rows]),
        stopped=jnp.ones(len(rows), bool),
    )
    prompts = _padded_rows([prompt for prompt, _ in rows], ROW_LENGTH - MAX_ANSWER_LENGTH)
    tokens, _ = prompt_completion_rows(prompts, jnp.array([len(prompt) for prompt, _ in rows]), completions)
    # Steps of one half, so that some answers are worth the same; the second prompt is harder.
    draw = np.random.default_rng(len(answers)).normal(size=(len(PROMPTS), len(answers)))
    return TinyWorld(nets, answers, tokens, jnp.array(np.round(2 * draw + [[4], [2]]) / 2, jnp.float32))


def _padded_rows(rows: Sequence[Sequence[int]], size: int) -> Array:
    return jnp.array([[*row, *[0] * (size - len(row))] for row in rows])


def next_token_logprobs(w: TinyWorld, lm: Params, *, temperature: float = 1.0) -> Array:
    """log p(v | prompt, the answer's first n tokens), f32[X,Y,N,V]; without meaning after an answer's end."""
    model, X, T = w.nets.model, len(PROMPTS), ROW_LENGTH - 1
    inputs = _padded_rows([(*prompt, *string) for prompt in PROMPTS for string in ALL_STRINGS], ROW_LENGTH)[:, :-1]
    positions = jnp.broadcast_to(jnp.arange(T), inputs.shape)
    # One segment to the end of each row: causality alone hides what follows.
    logits = model.logits(lm, model.hidden_states(lm, inputs, positions, jnp.ones_like(inputs)))
    logits = logits.reshape(X, len(ALL_STRINGS), T, VOCAB_SIZE)
    after = jnp.stack([logits[x, :, len(prompt) - 1 :][:, :MAX_ANSWER_LENGTH] for x, prompt in enumerate(PROMPTS)])
    opens = [ALL_STRINGS.index((*answer, *[0] * (MAX_ANSWER_LENGTH - len(answer)))) for answer in w.answers]
    return jax.nn.log_softmax(after[:, np.array(opens)] / temperature, axis=-1)


def realized_logprobs(w: TinyWorld, logprobs: Array) -> Array:
    """log p of each token of each answer, f32[X,Y,N], picked from `logprobs` f32[X,Y,N,V]; 0 after an answer's end."""
    ids = np.asarray(_padded_rows(w.answers, MAX_ANSWER_LENGTH))
    written = (ids[:, :, None] == np.arange(VOCAB_SIZE)) & (w.answer_mask[:, :, None] > 0)
    return jnp.sum(jnp.where(written, logprobs, 0.0), axis=-1)


def answer_logprobs(w: TinyWorld, logprobs: Array) -> Array:
    """log p of each answer, f32[X,Y]."""
    return jnp.sum(realized_logprobs(w, logprobs), axis=-1)


def answer_probabilities(w: TinyWorld, lm: Params, *, temperature: float = 1.0) -> np.ndarray:
    """p(y|x), f64[X,Y]."""
    return np.exp(np.asarray(answer_logprobs(w, next_token_logprobs(w, lm, temperature=temperature)), np.float64))


def tabular_networks(seed: int = 0) -> Networks:
    """A free distribution after every prefix: the real model, but its trunk is the number of the prefix, one-hot."""
    heard = [string for n in range(MAX_ANSWER_LENGTH) for string in itertools.product(range(VOCAB_SIZE), repeat=n)]
    prefixes = [(*prompt, *string) for prompt in PROMPTS for string in heard]
    table = np.array([[*prefix, *[-1] * (ROW_LENGTH - len(prefix))] for prefix in prefixes])

    def hidden(lm, inputs, positions, segments):
        T = inputs.shape[1]
        seen = jnp.where(np.tri(T, dtype=bool), inputs[:, None, :], -1)
        return jnp.all(seen[:, :, None, :] == table[:, :T], axis=-1).astype(jnp.float32)

    model = make_model(_tiny_config(width=len(prefixes), hidden=1, tie_embeddings=False))._replace(hidden_states=hidden)
    start = {"head": np.zeros((len(prefixes), VOCAB_SIZE))}
    return _perturbed_networks(model, start, seed, shaken=0.8, apart=0.5)


def transformer_networks(seed: int = 0) -> Networks:
    """A decoder of lm.model: one layer of width 12, two query heads that share one of keys."""
    model = make_model(_tiny_config(width=12, hidden=16, tie_embeddings=True))
    return _perturbed_networks(model, jax.jit(model.init)(jax.random.key(seed)), seed, shaken=0.2, apart=0.2)


def _tiny_config(**sizes) -> ModelConfig:
    config = ModelConfig(
        vocab_size=VOCAB_SIZE, layers=1, heads=2, kv_heads=1, head_size=4, context=ROW_LENGTH, query_blocks=1, **sizes
    )
    return config.for_backend("cpu")


def _perturbed_networks(model: Model, start: Params, seed: int, *, shaken: float, apart: float) -> Networks:
    """The policy is `start` moved by `shaken` everywhere, the others are the policy moved by `apart`."""
    draw = np.random.default_rng(seed)

    def perturbed_params(tree: Params, deviation: float) -> Params:
        return jax.tree.map(lambda x: jnp.array(x + deviation * draw.normal(size=x.shape), jnp.float32), tree)

    policy = perturbed_params(start, shaken)
    others = [perturbed_params(policy, apart) for _ in range(3)]
    nothing = {"score": np.zeros(model.config.width), "offset": np.zeros(())}
    return Networks(_compiled_by_function(model), policy, *others, perturbed_params(nothing, 0.5))


def _compiled_by_function(model: Model) -> Model:
    """The model, each of its functions compiled once."""
    hidden, scores = jax.jit(model.hidden_states), jax.jit(model.target_stats, static_argnames="temperature")

    def token_logprobs(lm, tokens, *, temperature=1.0):
        x = hidden(lm, tokens.inputs, tokens.positions, tokens.segments)
        return scores(lm, x, tokens.targets, temperature=temperature).logprobs

    return model._replace(hidden_states=hidden, target_stats=scores, token_logprobs=token_logprobs)


POLICIES: Mapping[str, Callable[[], Networks]] = {"tabular": tabular_networks, "transformer": transformer_networks}

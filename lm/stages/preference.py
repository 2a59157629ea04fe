"""Offline preferences: the batches, log-probs and measures that all ways of learning a policy from verdicts share.

The answers of a verdict are given, not sampled. All of a prompt's go through one forward pass, all their decided pairs
are compared, and each prompt counts once, however many pairs its ranking gives: as in stage reward, and from the same
verdicts, of which the same prompts are held out.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.data import batches as rows_to_batches, rankings as records
from lm.data.rows import pad
from lm.errors import UserError, at_least
from lm.losses.ranking import preferred
from lm.metrics import Mean, Metrics, values
from lm.model import Model
from lm.stages.context import Batches, Context
from lm.stages.ranked import limited, per_prompt, right, sides
from lm.tokenizer import Example, Tokenizer, prompts
from lm.types import Array, Params, Ranked, Tokens

NOTHING = Example(np.zeros(1, np.int32), np.zeros(1, np.float32))  # a row of it is all padding


class Verdict(NamedTuple):
    """A ranking in tokens."""

    prompt: np.ndarray  # i32[n]  with the assistant's marker
    answers: list[np.ndarray]  # i32[n] each, with its end token
    ranks: list[int]  # 1 is best, equal is a tie, 0 takes no part

    def pairs(self) -> int:
        """How many pairs of answers it decides."""
        return sum(0 < a < b for a in self.ranks for b in self.ranks)


def answer_logprobs(model: Model, lm: Params, tokens: Tokens, *, temperature: float = 1.0) -> Array:
    """f32[...]: log p of each answer, summed over its own tokens and its end token; leaves of `tokens` are [...,T]."""
    *lead, T = tokens.inputs.shape
    rows = jax.tree.map(lambda x: x.reshape(-1, T), tokens)
    logprobs = model.token_logprobs(lm, rows, temperature=temperature)
    return jnp.sum(jnp.where(rows.weights > 0, logprobs * rows.weights, 0.0), axis=1).reshape(lead)


def answer_lengths(tokens: Tokens) -> Array:
    """f32[...]: how many tokens `answer_logprobs` sums up; 1 where there is no answer, so that one may divide by it."""
    return jnp.maximum(jnp.sum(tokens.weights, axis=-1), 1.0)


def over_pairs(loss: Callable[[Array, Array], Array], x: Array, ranks: Array) -> Mean:
    """The mean over prompts of the mean of loss(x_i, x_j) over the pairs in which answer i is preferred to answer j.

    x f32[P,K]; `loss` is elementwise. Its weight is the number of prompts that decide a pair.
    """
    return per_prompt(loss(x[:, :, None], x[:, None, :]), better(ranks))


def better(ranks: Array) -> Array:
    """f32[P,K,K] from ranks i32[P,K,A]: 1 where answer i is preferred to answer j overall."""
    return preferred(ranks[..., 0]).astype(jnp.float32)


def measures(loss: Mean, rewards: Array, logprobs: Array, ranks: Array) -> Metrics:
    """What every method here is watched by, over the decided pairs: rewards and logprobs are f32[P,K] of each answer.

    A rising margin with a falling `chosen_logprob` is a policy that leaves both answers (Pal et al. 2024, sec. 3,
    arXiv 2402.13228).
    """
    counted = better(ranks)
    of_chosen = lambda x: per_prompt(x[:, :, None], counted)
    of_rejected = lambda x: per_prompt(x[:, None, :], counted)
    lead = rewards[:, :, None] - rewards[:, None, :]
    return {
        "loss": loss,
        "accuracy": per_prompt(right(lead), counted),
        "margin": per_prompt(lead, counted),
        "reward_chosen": of_chosen(rewards),
        "reward_rejected": of_rejected(rewards),
        "chosen_logprob": of_chosen(logprobs),
        "rejected_logprob": of_rejected(logprobs),
    }


def grouped(verdicts: Sequence[Verdict], length: int, most: int) -> Ranked:
    """Leaves [verdicts, `most` answers, ...]; an answer that takes no part is a row of nothing."""
    slots = [
        [(example(v.prompt, a), rank) if rank else (NOTHING, 0) for a, rank in zip(v.answers, v.ranks)]
        + [(NOTHING, 0)] * (most - len(v.answers))
        for v in verdicts
    ]
    rows = pad([row for verdict in slots for row, _ in verdict], length)
    ranks = np.array([[[rank] for _, rank in verdict] for verdict in slots], np.int32)
    return Ranked(jax.tree.map(lambda x: x.reshape(len(verdicts), most, length), rows), ranks)


def example(prompt: np.ndarray, answer: np.ndarray) -> Example:
    """The template's ids of a prompt and its answer; the answer alone is trained, whatever was said before it."""
    return Example(np.concatenate([prompt, answer]), np.repeat(np.float32([0, 1]), [len(prompt), len(answer)]))


def fits(prompt: np.ndarray, answer: np.ndarray, length: int) -> bool:
    """Whether both fit a row of `length` inputs: the last token is a target only."""
    return len(prompt) + len(answer) - 1 <= length


def batches(
    context: Context,
    group: Callable[[Sequence[Verdict], int, int], Ranked] = grouped,
    /,
    *,
    rankings: str,
    length: int = 128,
    prompts_per_batch: int = 32,
    held_out: float = 0.15,
    limit: int = 0,
) -> Batches:
    """Ranked answers, split by prompt as in stage reward and laid out by `group`, `length` tokens a row.

    `rankings` is a file or database of verdicts (see data.rankings, data.store), or "chitchat" (data.ratings). A
    verdict that prefers a text to the same text is dropped and counted as equal; an answer that is longer than a row is
    skipped and counted; an empty one, counted too, is its end token. `limit` > 0 trains on that many verdicts only.
    """
    context.admit(length)
    at_least(1, "data", prompts_per_batch=prompts_per_batch)
    at_least(0, "data", limit=limit)
    train, unseen, undecided = sides(rankings, held_out)
    train, counts = tokenised(context.tokenizer, limited(train, limit, context.seed), length)
    unseen, more = tokenised(context.tokenizer, unseen, length)
    counts = {name: count + more[name] for name, count in counts.items()}
    for side, name in ((train, "to learn from"), (unseen, "held out")):
        if not side:
            raise UserError(
                f"{rankings}: no verdict is left {name} ({counts['equal']} prefer a text to itself, "
                f"{counts['skipped']} answers are longer than data.length {length}): raise it, or rank other answers"
            )
    most = max(len(verdict.answers) for verdict in [*train, *unseen])
    train_rows, unseen_rows = (group(side, length, most) for side in (train, unseen))
    batch = rows_to_batches.batches(train_rows, batch_size=prompts_per_batch, seed=context.seed)
    about = {
        "length": length,
        "prompts": len(train),
        "pairs": sum(verdict.pairs() for verdict in train),
        "held_out_prompts": len(unseen),
        "held_out_pairs": sum(verdict.pairs() for verdict in unseen),
        **counts,
        "undecided": undecided + counts["undecided"],
    }
    held_out_batches = lambda state: rows_to_batches.every(unseen_rows, prompts_per_batch)
    return Batches(lambda state, i: batch(i), held_out_batches, about)


def tokenised(
    tokenizer: Tokenizer, rankings: Sequence[records.Ranking], length: int
) -> tuple[list[Verdict], dict[str, int]]:
    """The verdicts that can be learnt from, and how much is left out or odd: see `batches`."""
    found, counts = [], {"undecided": 0, "equal": 0, "skipped": 0, "empty": 0}
    contents = iter(tokenizer.encode_all(text for r in rankings for text in r.responses))
    for ranking, prompt in zip(rankings, prompts(tokenizer, [r.prompt for r in rankings])):
        answers = [np.array([*next(contents), tokenizer.end], np.int32) for _ in ranking.responses]
        if any(ranking.responses[i] == ranking.responses[j] for i, j in records.pairs(ranking)):
            counts["equal"] += 1
            continue
        ranks = [rank if fits(prompt, a, length) else 0 for a, rank in zip(answers, ranking.ranking)]
        counts["skipped"] += ranks.count(0)
        verdict = Verdict(prompt, answers, ranks)
        if not verdict.pairs():
            counts["undecided"] += 1
            continue
        counts["empty"] += sum(rank > 0 and len(a) == 1 for a, rank in zip(answers, ranks))
        found.append(verdict)
    return found, counts


def summary(metrics: Metrics, about) -> dict[str, float]:
    """Held-out metrics, the accuracy with its standard error, which counts prompts: a prompt's pairs are not
    independent."""
    found = values(metrics)
    accuracy = found["accuracy"]
    return {**found, "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / about["held_out_prompts"])}

"""Verdicts in tokens: the rows of a ranking's answers, and which of them somebody can learn from."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lm.data.chats import answered
from lm.data.rankings import OVERALL, Ranking, axis_ranks
from lm.data.rows import pad
from lm.data.truncation import NOTHING, Cut, fitted
from lm.tokenizer import Example, Tokenizer, chats
from lm.types import Ranked


class Verdict(NamedTuple):
    """A ranking in tokens."""

    ranking: Ranking
    rows: list[Example]  # prompt and answer, the answer trained; NOTHING for an answer that is left out
    ranks: np.ndarray  # i32[answers,axes]  1 is best, equal is a tie, 0 takes no part

    def pairs(self) -> int:
        """How many pairs of answers it decides, on the first axis."""
        return len(_decided(self.ranks[:, 0]))


def laid_out(
    tokenizer: Tokenizer,
    rankings: Sequence[Ranking],
    tokens: int,
    *,
    axes: Sequence[str] = (OVERALL,),
    cut: Cut,
    trained: bool = True,
) -> tuple[list[Verdict], dict[str, int]]:
    """The verdicts that can be learnt from, rows of at most `tokens` tokens (see truncation.fitted), and what is left
    out or odd: "undecided" and "equal" verdicts, "skipped", "shortened", "untrained" and "empty" answers.

    A verdict is equal if it prefers an answer to one whose row is the same, as two texts may be after the template, or
    after they were cut: nobody can learn that. It is undecided if what is left out leaves it no preference.
    """
    whole = chats(tokenizer, [answered(r.prompt, text) for r in rankings for text in r.responses], last=True)
    fit = fitted(whole, tokens, cut=cut, start=tokenizer.start, trained=trained)
    given = iter(zip(whole, fit.rows))
    found, counts = [], {"undecided": 0, "equal": 0, **fit.counts, "empty": 0}
    for ranking in rankings:
        before, rows = zip(*(next(given) for _ in ranking.responses))
        ranks = np.array([axis_ranks(ranking, axis) for axis in axes], np.int32).T
        if any(_same(before[i], before[j]) or _same(rows[i], rows[j]) for of in ranks.T for i, j in _decided(of)):
            counts["equal"] += 1
            continue
        ranks[[row is None for row in rows]] = 0
        verdict = Verdict(ranking, [NOTHING if row is None else row for row in rows], ranks)
        if not verdict.pairs():
            counts["undecided"] += 1
            continue
        counts["empty"] += sum(float(row.weights.sum()) == 1 for row in verdict.rows)
        found.append(verdict)
    return found, counts


def grouped(verdicts: Sequence[Verdict], length: int, most: int) -> Ranked:
    """Leaves [verdicts, `most` answers, ...]; an answer that takes no part is a row of nothing, ranked 0."""
    rows = pad([row for v in verdicts for row in [*v.rows, *[NOTHING] * (most - len(v.rows))]], length)
    ranks = np.stack([np.pad(v.ranks, ((0, most - len(v.ranks)), (0, 0))) for v in verdicts])
    return Ranked(jax.tree.map(lambda x: x.reshape(len(verdicts), most, length), rows), ranks)


def _decided(ranks: np.ndarray) -> list[tuple[int, int]]:
    """(better, worse) of every strict preference among the answers that take part."""
    return [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if 0 < a < b]


def _same(a: Example | None, b: Example | None) -> bool:
    return a is not None and b is not None and np.array_equal(a.ids, b.ids)

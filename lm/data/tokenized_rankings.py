"""Rankings in tokens: the rows of a ranking's answers, and which of them can be learned from."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lm.core.types import RankedAnswers
from lm.data.conversations import conversation_with_answer
from lm.data.packing import padded_rows
from lm.data.preferences import LABEL_AXIS, OVERALL_AXIS, Ranking, axis_ranks
from lm.data.truncation import EMPTY_ROW, Cuttable, truncated_rows
from lm.tokenizer import TokenizedExample, Tokenizer, encode_chats


class TokenizedRanking(NamedTuple):
    """A ranking in tokens."""

    ranking: Ranking
    rows: list[TokenizedExample]  # prompt and answer, the answer trained; no tokens for an answer that is left out
    ranks: np.ndarray  # i32[answers,axes]  1 is best, equal is a tie, 0 takes no part

    def pair_count(self) -> int:
        """How many pairs of answers it decides, on the first axis."""
        return len(_decided_pairs(self.ranks[:, 0]))


def tokenized_rankings(
    tokenizer: Tokenizer,
    rankings: Sequence[Ranking],
    tokens: int,
    *,
    axes: Sequence[str] = (OVERALL_AXIS,),
    cut: Cuttable,
    trained: bool = True,
) -> tuple[list[TokenizedRanking], dict[str, int]]:
    """The rankings that can be learned from, rows of at most `tokens` tokens (see lm.data.truncation), and counts of
    what is left out or unusual: "undecided" and "equal" rankings, "skipped", "shortened", "untrained" and "empty"
    answers.

    A ranking is equal if it prefers an answer to one whose row is the same, as two texts may be after the template, or
    after they were cut: there is nothing to learn. It is undecided if no preference is left without the skipped
    answers.
    """
    encoded = encode_chats(
        tokenizer, [conversation_with_answer(r.prompt, text) for r in rankings for text in r.responses], last=True
    )
    fit = truncated_rows(encoded, tokens, cut=cut, start=tokenizer.start_ids, trained=trained)
    given = iter(zip(encoded, fit.rows))
    verdicts, counts = [], {"undecided": 0, "equal": 0, **fit.counts, "empty": 0}
    for ranking in rankings:
        before, rows = zip(*(next(given) for _ in ranking.responses))
        ranks = np.array([axis_ranks(ranking, axis) for axis in axes], np.int32).T
        if any(
            _is_same_row(before[i], before[j]) or _is_same_row(rows[i], rows[j])
            for of in ranks.T
            for i, j in _decided_pairs(of)
        ):
            counts["equal"] += 1
            continue
        ranks[[row is None for row in rows]] = 0
        verdict = TokenizedRanking(ranking, [EMPTY_ROW if row is None else row for row in rows], ranks)
        is_labelled = LABEL_AXIS in axes and ranks[:, list(axes).index(LABEL_AXIS)].any()
        if not verdict.pair_count() and not is_labelled:
            counts["undecided"] += 1
            continue
        counts["empty"] += sum(float(row.weights.sum()) == 1 for row in verdict.rows)
        verdicts.append(verdict)
    return verdicts, counts


def ranked_answers_batch(verdicts: Sequence[TokenizedRanking], length: int, most: int) -> RankedAnswers:
    """Leaves [verdicts, `most` answers, ...]; an answer that takes no part is a row of padding, ranked 0."""
    rows = padded_rows([row for v in verdicts for row in [*v.rows, *[EMPTY_ROW] * (most - len(v.rows))]], length)
    ranks = np.stack([np.pad(v.ranks, ((0, most - len(v.ranks)), (0, 0))) for v in verdicts])
    return RankedAnswers(jax.tree.map(lambda x: x.reshape(len(verdicts), most, length), rows), ranks)


def _decided_pairs(ranks: np.ndarray) -> list[tuple[int, int]]:
    """(better, worse) of every strict preference among the answers that take part."""
    return [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if 0 < a < b]


def _is_same_row(a: TokenizedExample | None, b: TokenizedExample | None) -> bool:
    return a is not None and b is not None and np.array_equal(a.ids, b.ids)

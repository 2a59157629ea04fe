"""What a row keeps of a longer conversation, and which rows can be learned from: one rule for every stage.

A conversation that fits is kept as it is. Of one that does not, the whole last answer is kept and, before it, the end
of its prompt: see `truncated_rows`. What is left out or cut is counted, and a run that has nothing left stops with an
error.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from lm.core.errors import UserError
from lm.tokenizer import TokenizedExample

Cuttable = Literal[
    "nothing", "prompt", "answer"
]  # what may be shortened: "answer" means the prompt first, then the answer
EMPTY_ROW = TokenizedExample(np.zeros(1, np.int32), np.zeros(1, np.float32))  # a row of it is all padding


class TruncatedRows(NamedTuple):
    """Examples that have at most so many tokens."""

    rows: list[TokenizedExample | None]  # one for each example; None: left out
    counts: dict[str, int]  # "skipped": too long; "shortened"; "untrained": without a token that is trained

    @property
    def kept(self) -> list[TokenizedExample]:
        return [row for row in self.rows if row is not None]


def truncated_rows(
    examples: Sequence[TokenizedExample],
    tokens: int,
    *,
    cut: Cuttable = "nothing",
    start: Sequence[int] = (),
    trained: bool = True,
) -> TruncatedRows:
    """The examples with at most `tokens` tokens each. The weights say which are the answer.

    cut "nothing": one that is longer is left out. "prompt": it loses the beginning of its prompt, all but the ids
    `start` that open a document, and is left out if not even one token of the prompt has room. "answer": then half of
    the row is the prompt's end, and the answer loses what stands before its last token. trained: whether a row without
    a weight, as a target, is left out too.
    """
    rows: list[TokenizedExample | None] = []
    skipped = shortened = untrained = 0
    for example in examples:
        row = example if len(example.ids) <= tokens else _truncated_example(example, tokens, cut, start)
        if row is None:
            skipped += 1
        elif trained and not row.weights[1:].any():
            row, untrained = None, untrained + 1
        elif row is not example:
            shortened += 1
        rows.append(row)
    counts = {"skipped": skipped}
    if cut != "nothing":
        counts["shortened"] = shortened
    if trained:
        counts["untrained"] = untrained
    return TruncatedRows(rows, counts)


def nothing_left_error(what: str, counts: Mapping[str, int], *, things: str, limit: str, way: str) -> UserError:
    """One line: `what` is missing, the counts that say why, and `way`, the way out; `things`: what the counts of rows
    count."""
    words = {
        "skipped": f"{things} longer than {limit}",
        "shortened": f"{things} shortened to {limit}",
        "untrained": f"{things} with no token to learn (no answer, weight zero, or it shares a token with the marker)",
        "equal": "verdicts that prefer an answer to the same one",
        "undecided": "verdicts with no preference left",
    }
    reasons = [f"{count} {words[name]}" for name, count in counts.items() if count and name in words]
    return UserError(f"{what} ({', '.join(reasons) or 'there was none'}): {way}")


def _truncated_example(
    example: TokenizedExample, tokens: int, cut: Cuttable, start: Sequence[int]
) -> TokenizedExample | None:
    """`example`, which is longer, with `tokens` tokens; None where that may not be."""
    if cut == "nothing":
        return None
    size, answer = len(example.ids), int(np.argmax(example.weights > 0)) if example.weights.any() else 0
    head = len(start) if example.ids[: len(start)].tolist() == list(start) else 0
    room = tokens - head - (size - answer)  # for the prompt's end
    if not example.weights.any():  # no token is known to be an answer's
        head = min(head, tokens - 1)
        kept = [*range(head), *range(size - tokens + head, size)]
    elif room > 0:
        kept = [*range(head), *range(answer - room, size)]
    elif cut == "prompt":
        return None
    else:
        begun = min(answer, tokens // 2)  # tokens of the prompt, those of `start` among them
        opening = min(head, begun)
        prompt = [*range(opening), *range(answer - begun + opening, answer)]
        kept = [*prompt, *range(answer, answer + tokens - begun - 1), size - 1]
    return TokenizedExample(*(x[kept] for x in example))

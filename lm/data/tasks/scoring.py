"""How far an answer is from the right one."""

import math
from collections.abc import Sequence


def compared_text(text: str, target: str) -> str:
    """The part of a model's answer that is compared with the target: its first line, newline included, where the
    target ends in a newline; else as many characters as the target has."""
    if target.endswith("\n"):
        first, newline, _ = text.partition("\n")
        return first + newline
    return text[: len(target)]


def edit_distance(a: Sequence, b: Sequence) -> int:
    """The fewest insertions, deletions and substitutions that make b of a (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that one of k samples is right, from n samples of which `correct` were: 1 - C(n-c,k) / C(n,k).

    Unbiased for k <= n. Chen et al. 2021, eq. 1, arXiv 2107.03374.
    """
    if not 0 < k <= n:
        raise ValueError(f"k must be from 1 to n, not {k} of {n}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def expected_exact_match(logprobs: Sequence[float], tokens: Sequence[int]) -> float:
    """The exact match to expect from the average token, p^n: p = exp(mean log-probability of a token), n = mean
    length of a target. What is smooth in p is sharp in p^n. Schaeffer et al. 2023, sec. 2, arXiv 2304.15004.

    logprobs: of whole targets, nats. tokens: their lengths.
    """
    return math.exp(sum(logprobs) / len(tokens))

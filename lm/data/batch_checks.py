"""What must be true of a batch, whatever the stage: each check counts what it looked at and what is wrong."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.core.types import RankedAnswers, Rollouts, Tokens
from lm.data.inspect import Answer, TokenIds, found_answers, is_chat, segment_ranges, token_parts
from lm.data.origins import RowOrigin


class Check(NamedTuple):
    """What was looked at, and what of it is wrong."""

    name: str  # what must be true
    count: int  # things looked at; 0: there were none
    faults: int
    first: str = ""  # where the first fault is
    unit: str = ""  # what the counts count: "answers", "tokens", ...

    def __add__(self, other: "Check") -> "Check":
        """The same check of two batches."""
        return self._replace(
            count=self.count + other.count, faults=self.faults + other.faults, first=self.first or other.first
        )


def batch_checks(
    batch: Any, ids: TokenIds, *, is_sampled: bool = False, trains_reward_model: bool = False
) -> list[Check]:
    """All checks of a batch but `trained_once`, which may look at several. A failing one is a bug.

    is_sampled: whether the model that is trained wrote it, so that a limit may have cut an answer off.
    """
    all_checks: list[Check] = []
    for name, tokens in token_parts(batch).items():
        sampled = is_sampled and name == "tokens"
        part = f" ({name.removesuffix('_tokens')})" if name != "tokens" else ""
        checks = [ids_in_vocabulary(tokens, ids), targets_in_segment(tokens, ids), positions_restart(tokens)]
        if trains_reward_model:
            checks.append(scored_at_the_end(tokens, ids))
        elif sampled or is_chat(tokens, ids):
            checks += answer_checks(tokens, ids, sampled=sampled)
        else:
            checks.append(text_trained(tokens))
        all_checks += [check._replace(name=check.name + part) for check in checks]
    if isinstance(batch, RankedAnswers):
        all_checks += [ranked_answers_there(batch)]
    if isinstance(batch, Rollouts):
        all_checks += [groups_share_prompt(batch), numbers_finite(batch)]
    return all_checks


def ids_in_vocabulary(tokens: Tokens, ids: TokenIds) -> Check:
    """Inputs and targets are ids of the tokenizer."""
    both = np.stack([tokens.inputs, tokens.targets])
    wrong = ((both < 0) | (both >= ids.vocab_size)).any(axis=0)
    first = _place(wrong)
    return Check("ids inside the vocabulary", both.size, int(wrong.sum()), first, "ids")


def targets_in_segment(tokens: Tokens, ids: TokenIds) -> Check:
    """A trained target is the next token of its own segment: not another's, not padding's, not one that is skipped.

    The last target of a segment stands in no input. It is another's where it is the first input of the next segment;
    but an end token that follows what is none is its segment's own.
    """
    trained = tokens.weights > 0
    wrong = trained & (tokens.segments == 0)
    here, after = tokens.segments[:, :-1], tokens.segments[:, 1:]
    same, is_next = here == after, tokens.targets[:, :-1] == tokens.inputs[:, 1:]
    own_end = np.isin(tokens.targets[:, :-1], ids.stop) & ~np.isin(tokens.inputs[:, :-1], ids.stop)
    wrong[:, :-1] |= trained[:, :-1] & np.where(same, ~is_next, (after > 0) & is_next & ~own_end)
    return Check("no target across a segment boundary", int(trained.sum()), int(wrong.sum()), _place(wrong), "targets")


def positions_restart(tokens: Tokens) -> Check:
    """Positions count from 0 in each segment, and a row's segments are stretches numbered 1, 2, ..."""
    count, wrong, expected, row_before = 0, [], 0, -1
    for row, begin, end in segment_ranges(tokens):
        expected = 1 if row != row_before else expected + 1
        row_before, count = row, count + 1
        counted = np.array_equal(tokens.positions[row, begin:end], np.arange(end - begin))
        if not counted or tokens.segments[row, begin] != expected:
            wrong.append((row, begin))
    return Check("positions restart in each segment", count, len(wrong), _first(wrong), "segments")


def answer_checks(tokens: Tokens, ids: TokenIds, *, sampled: bool) -> Iterator[Check]:
    """Of conversations: what is trained are whole answers, from their first token to their end token.

    An answer of which nothing is trained is context. sampled: an answer may be cut off, and have no end token.
    """
    answers = found_answers(tokens, ids)
    inside = np.zeros(tokens.weights.shape, bool)
    for answer in answers:
        inside[answer.row, answer.begin : answer.end + 1] = True
    taught = [answer for answer in answers if _weights(tokens, answer).any()]
    no_end = [a for a in taught if not (_weights(tokens, a)[-1] > 0 if a.is_ended else sampled)]
    no_first = [a for a in taught if not _weights(tokens, a)[0] > 0]
    gaps = [a for a in taught if not (_weights(tokens, a)[1:-1] > 0).all()]
    outside = (tokens.weights > 0) & ~inside
    yield Check(
        "every assistant end token trained", len(taught), len(no_end), _first((a.row, a.end) for a in no_end), "answers"
    )
    yield Check(
        "first assistant token trained",
        len(taught),
        len(no_first),
        _first((a.row, a.begin) for a in no_first),
        "answers",
    )
    yield Check(
        "no gap inside a trained answer", len(taught), len(gaps), _first((a.row, a.begin) for a in gaps), "answers"
    )
    trained = int((tokens.weights > 0).sum())
    yield Check("only answers trained", trained, int(outside.sum()), _place(outside), "targets")


def text_trained(tokens: Tokens) -> Check:
    """Of documents: every token is trained whose predecessor in the row is of the same document; end tokens too."""
    expected = np.zeros(tokens.segments.shape, bool)
    expected[:, :-1] = (tokens.segments[:, :-1] > 0) & (tokens.segments[:, :-1] == tokens.segments[:, 1:])
    wrong = expected & ~(tokens.weights > 0)
    return Check("every token of a document trained", int(expected.sum()), int(wrong.sum()), _place(wrong), "targets")


def scored_at_the_end(tokens: Tokens, ids: TokenIds) -> Check:
    """Of a reward model, which reads a row's score at its last token: that token ends the answer."""
    ends = [(row, end - 1) for row, _, end in segment_ranges(tokens)]
    wrong = [(row, end) for row, end in ends if tokens.inputs[row, end] not in ids.stop]
    return Check("every answer scored at its end token", len(ends), len(wrong), _first(wrong), "answers")


def ranked_answers_there(batch: RankedAnswers) -> Check:
    """An answer with a rank has tokens, and one that is not there has no rank."""
    there = (np.asarray(batch.tokens.segments) > 0).any(axis=-1)
    ranked = (np.asarray(batch.ranks) > 0).any(axis=-1)
    wrong = ranked & ~there
    return Check("every ranked answer there", int(ranked.sum()), int(wrong.sum()), _place(wrong), "answers")


def groups_share_prompt(batch: Rollouts) -> Check:
    """The answers of a group follow the same prompt: up to the first sampled token their rows are equal."""
    tokens = token_parts(batch)["tokens"]
    rows = np.arange(len(tokens.inputs))
    first = np.argmax(tokens.weights > 0, axis=1)
    leader = rows - rows % batch.group
    wrong = [
        (row, 0)
        for row in rows
        if first[row] != first[leader[row]]
        or not np.array_equal(
            tokens.inputs[row, : first[row] + 1], tokens.inputs[leader[row], : first[leader[row]] + 1]
        )
    ]
    return Check("answers of a group share their prompt", len(rows), len(wrong), _first(wrong), "rows")


def numbers_finite(batch: Rollouts) -> Check:
    """Rewards and the sampler's log-probs are numbers, and no log-prob is above 0."""
    rewards, logprobs = np.asarray(batch.rewards), np.asarray(batch.sampler_logprobs)
    trained = np.asarray(batch.tokens.weights) > 0
    wrong = ~np.isfinite(rewards)
    wrong |= (trained & ~(np.isfinite(logprobs) & (logprobs <= 1e-4))).any(axis=1)
    first = f"row {int(np.argmax(wrong)) + 1}" if wrong.any() else ""
    return Check("rewards and log-probs are numbers", len(rewards), int(wrong.sum()), first, "rows")


def trained_tokens(tokens: Tokens, ids: TokenIds, origins: Sequence[RowOrigin]) -> np.ndarray:
    """i64[n,3] of everything trained in rows of known origin: (epoch, document, place in the document).

    The place is that of the token in a text and, in a conversation, that of the message: an excerpt that begins with
    another message is laid out anew.
    """
    places_trained = []
    chat = is_chat(tokens, ids)
    answers: dict[tuple[int, int], list[Answer]] = {}
    for answer in found_answers(tokens, ids) if chat else ():
        if _weights(tokens, answer).any():
            answers.setdefault((answer.row, int(tokens.segments[answer.row, answer.begin])), []).append(answer)
    for row, begin, end in segment_ranges(tokens):
        segment = int(tokens.segments[row, begin])
        if row >= len(origins) or segment > len(origins[row].segments):
            continue
        origin = origins[row].segments[segment - 1]
        if chat:
            segment_answers = answers[row, segment] if (row, segment) in answers else []
            ends = np.flatnonzero(np.isin(tokens.targets[row, begin:end], ids.stop)) + begin
            places = [origin.start + int((ends < answer.begin).sum()) for answer in segment_answers]
        else:
            places = origin.start + 1 + np.flatnonzero(tokens.weights[row, begin:end] > 0)
        places_trained += [(origins[row].epoch, origin.document, int(place)) for place in places]
    return np.array(places_trained, np.int64).reshape(-1, 3)


def trained_once(places: Iterable[np.ndarray], names: Mapping[int, str]) -> Check:
    """No token of a text, or message of a conversation, is trained twice in an epoch, as overlapping excerpts would.

    places: `trained_tokens` of each batch. names: of documents, for the message.
    """
    trained = np.concatenate([np.zeros((0, 3), np.int64), *places])
    each, counts = np.unique(trained, axis=0, return_counts=True)
    twice = each[counts > 1]
    first = f"{names[int(twice[0, 1])]}, place {twice[0, 2]}" if len(twice) else ""
    return Check("no token trained twice in an epoch", len(each), len(twice), first, "tokens or messages")


def summed_checks(batches: Iterable[Sequence[Check]]) -> list[Check]:
    """The checks of several batches, each check once."""
    sums: dict[str, Check] = {}
    for checks in batches:
        for check in checks:
            sums[check.name] = sums[check.name] + check if check.name in sums else check
    return list(sums.values())


def _weights(tokens: Tokens, answer: Answer) -> np.ndarray:
    return tokens.weights[answer.row, answer.begin : answer.end + 1]


def _place(wrong: np.ndarray) -> str:
    return _first(map(tuple, np.argwhere(wrong)[:1]))


def _first(places: Iterable[tuple[int, int]]) -> str:
    """The first of (row, place) pairs, counted from 1 and from 0 as they are shown."""
    for row, place in places:
        return f"row {row + 1}, token {place}"
    return ""

"""How a reward is asked, whatever its form, and held to one finite number an answer, or one a token.

A reward is `(examples, texts) -> f32[B]`. A function of one's own may have three other forms, told by its signature:

- `(example, text) -> float`: the first parameter is called `example`: it is asked for one answer at a time.
- `async def` of either: it is awaited; one answer's calls all together, and so are several rewards.
- with a parameter `tokens`, `(examples, texts, tokens)` or `(example, text, tokens)`: a number for each token of an
  answer. tokens[i] are the pieces of the answer's sampled tokens, its end token included, as text; the result holds for
  each answer as many numbers (or is an array f32[B,T], 0 behind an answer's end).
"""

import asyncio
import inspect
import textwrap
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.core.errors import UserError
from lm.core.imports import error_origin, is_import_path
from lm.data.conversations import Example, last_user_message

Reward = Callable[..., Any]  # see lm.rewards.Reward
WAY_OUT = "mend it; the same command continues from the last checkpoint"
SHOWN_WORDS = 40  # characters of a prompt or an answer in a message
BLOCKED_SECONDS = 1.0  # an async function that is this late did not let itself be cancelled: it blocks its loop


class RewardForm(NamedTuple):
    """How a reward wants to be called."""

    per_answer: bool  # for one example and text at a time
    per_token: bool  # it takes the tokens and gives a number for each
    is_async: bool


class RewardRows(NamedTuple):
    """What rewards are asked about: B answers."""

    examples: Sequence[Example]
    texts: Sequence[str]
    tokens: Sequence[Sequence[str]] = ()  # the pieces of each answer; empty where nobody knows them

    def arguments(self, form: RewardForm, row: int | None = None) -> tuple[Any, ...]:
        """The arguments of one call: of all rows, or of this one."""
        columns = (self.examples, self.texts, self.tokens)[: 3 if form.per_token else 2]
        return tuple(column if row is None else column[row] for column in columns)

    def only(self, row: int) -> "RewardRows":
        return RewardRows(*(column[row : row + 1] for column in self))

    def description(self, row: int) -> str:
        """ "row 3 of 16 ('What is 2 + 2?', answered 'Five.')" """
        asked = last_user_message(self.examples[row]["messages"])
        said = [textwrap.shorten(text, SHOWN_WORDS, placeholder="...") for text in (asked, self.texts[row])]
        return f"row {row + 1} of {len(self.texts)} ({said[0]!r}, answered {said[1]!r})"


class WeightedRewards(NamedTuple):
    """What answers are worth."""

    total: np.ndarray  # f32[B]  the weighted sum; of a reward per token the sum over its tokens
    parts: Mapping[str, np.ndarray]  # f32[B] each, without its weight
    token_rewards: list[np.ndarray] | None  # f32[tokens of the answer] each: what of `total` belongs to which token


def reward_form(reward: Reward, name: str) -> RewardForm:
    """The form that the signature tells. UserError for a function that cannot be given an example and a text."""
    parameters = inspect.signature(reward).parameters
    per_token = "tokens" in parameters
    given = ["example", "text", "tokens"][: 3 if per_token else 2]
    try:
        inspect.signature(reward).bind(*given)
    except TypeError as error:
        raise UserError(
            f"reward {name} takes ({', '.join(parameters)}), but a reward is a function (examples, texts), (example, "
            f"text), or one of these with a third parameter `tokens` ({error})"
        ) from error
    first = next(iter(parameters), "")
    is_async = inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)
    return RewardForm(first == "example", per_token, is_async)


def weighted_reward(
    parts: Mapping[str, tuple[float, Reward]], *, timeout: float = 0.0
) -> Callable[..., WeightedRewards]:
    """(examples, texts, tokens=()) -> what the answers are worth: the weighted sum of the parts, and each as it is.

    timeout: seconds that a call of a function of one's own may take (a name with a colon), the library's own have no
    limit; 0: none. What runs longer is left behind in its thread and the run stops.
    """
    forms = {name: reward_form(reward, name) for name, (_, reward) in parts.items()}

    def total(examples, texts, tokens=()) -> WeightedRewards:
        rows = RewardRows(examples, texts, tokens)
        for name, form in forms.items():
            if form.per_token and len(tokens) != len(texts):
                raise UserError(
                    f"reward {name} gives a number for each token, but here answers are texts only: take a reward "
                    "without a parameter `tokens`"
                )
        said = {}
        if any(form.is_async for form in forms.values()):
            said = _awaited_replies({n: parts[n][1] for n, f in forms.items() if f.is_async}, forms, rows, timeout)
        found, of_tokens = {}, None
        for name, (weight, reward) in parts.items():
            limit = timeout if is_import_path(name) else 0.0
            reply = said[name] if name in said else _reply(name, reward, forms[name], rows, limit)
            if forms[name].per_token:
                each = token_values(name, reply, rows)
                found[name] = np.array([values.sum() for values in each], np.float32)
                earlier = of_tokens or [np.zeros(len(pieces), np.float32) for pieces in rows.tokens]
                of_tokens = [old + np.float32(weight) * new for old, new in zip(earlier, each)]
            else:
                found[name] = answer_values(name, reply, rows)
        worth = sum((weight * found[name] for name, (weight, _) in parts.items()), np.zeros(len(texts), np.float32))
        return WeightedRewards(worth, found, of_tokens)

    return total


def answer_values(name: str, reply: Any, rows: RewardRows) -> np.ndarray:
    """What a reward has said, f32[B]. UserError names one that miscounts, or says what is no number."""
    found, count = _array(name, reply, rows), len(rows.texts)
    if found.shape != (count,):
        way = f"not one number each: {WAY_OUT}"
        if found.ndim == 2 and len(found) == count:
            way = f"not one number each; a reward per token has a third parameter `tokens`: {WAY_OUT}"
        raise UserError(f"reward {name} gave shape {found.shape} for {count} answers, {way}")
    wrong = np.flatnonzero(~np.isfinite(found))
    if len(wrong):
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"reward {name} is {found[wrong[0]]} for {rows.description(wrong[0])}{more}: {WAY_OUT}")
    return found


def token_values(name: str, reply: Any, rows: RewardRows) -> list[np.ndarray]:
    """What a reward has said of each token, f32[tokens of the answer] for each answer; UserError as above."""
    try:
        count = len(reply)
    except TypeError:
        count = -1
    if count != len(rows.texts):
        what = f"{count} rows" if count >= 0 else f"{type(reply).__name__}, no rows,"
        raise UserError(f"reward {name} gave {what} for {len(rows.texts)} answers, not one of numbers each: {WAY_OUT}")
    found = []
    for i, pieces in enumerate(rows.tokens):
        values = _array(name, reply[i], rows)
        behind = values.ndim == 1 and len(values) > len(pieces) and not values[len(pieces) :].any()
        if values.shape != (len(pieces),) and not behind:
            raise UserError(
                f"reward {name} gave shape {values.shape} for the {len(pieces)} tokens of {rows.description(i)}, not "
                f"one number each: {WAY_OUT}"
            )
        found.append(values[: len(pieces)])
        wrong = np.flatnonzero(~np.isfinite(found[-1]))
        if len(wrong):
            where = f"token {wrong[0] + 1} ({pieces[wrong[0]]!r}) of {rows.description(i)}"
            raise UserError(f"reward {name} is {found[-1][wrong[0]]} for {where}: {WAY_OUT}")
    return found


def _array(name: str, reply: Any, rows: RewardRows) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused as that
            return np.asarray(reply, np.float32)
    except (TypeError, ValueError) as error:
        shown = textwrap.shorten(repr(reply), SHOWN_WORDS, placeholder="...")
        raise UserError(f"reward {name} gave {shown} for {len(rows.texts)} answers, no numbers: {WAY_OUT}") from error


def _reply(name: str, reward: Reward, form: RewardForm, rows: RewardRows, timeout: float) -> Any:
    """What a plain function says of all rows. A row is named where it raises: a batch is asked again row by row."""
    if form.per_answer:
        return [_reward_reply(name, reward, form, rows, i, timeout) for i in range(len(rows.texts))]
    return _reward_reply(name, reward, form, rows, None, timeout)


def _reward_reply(
    name: str, reward: Reward, form: RewardForm, rows: RewardRows, row: int | None, timeout: float
) -> Any:
    arguments = rows.arguments(form, row)
    try:
        return _within_seconds(lambda: reward(*arguments), timeout) if timeout else reward(*arguments)
    except UserError:
        raise
    except _TimeUpError as error:
        raise _timeout_error(name, rows, row, timeout) from error
    except Exception as error:
        faulty = _faulty_row(reward, form, rows) if row is None and not timeout else row
        raise _reward_error(name, reward, error, rows, faulty) from error


def _faulty_row(reward: Reward, form: RewardForm, rows: RewardRows) -> int | None:
    """The first row that a function of a batch does not take even alone; None where it takes all."""
    for i in range(len(rows.texts)):
        try:
            reward(*rows.only(i).arguments(form))
        except Exception:
            return i
    return None


def _awaited_replies(
    rewards: Mapping[str, Reward], forms: Mapping[str, RewardForm], rows: RewardRows, timeout: float
) -> dict[str, Any]:
    """What async functions say, all of them awaited together, in a thread: a notebook's own has a running loop."""

    async def one(name: str, row: int | None) -> Any:
        call: Awaitable[Any] = rewards[name](*rows.arguments(forms[name], row))
        try:
            return await asyncio.wait_for(call, timeout or None)
        except UserError:
            raise
        except TimeoutError as error:
            if not timeout:
                raise _reward_error(name, rewards[name], error, rows, row) from error
            raise _timeout_error(name, rows, row, timeout) from error
        except Exception as error:
            raise _reward_error(name, rewards[name], error, rows, row) from error

    async def every(name: str) -> Any:
        if not forms[name].per_answer:
            return await one(name, None)
        return await asyncio.gather(*(one(name, i) for i in range(len(rows.texts))))

    async def together() -> list[Any]:
        return await asyncio.gather(*(every(name) for name in rewards))

    try:
        said = _within_seconds(lambda: asyncio.run(together()), timeout + BLOCKED_SECONDS if timeout else None)
    except _TimeUpError as error:
        raise _timeout_error(", ".join(rewards), rows, None, timeout) from error
    return dict(zip(rewards, said))


class _TimeUpError(Exception):
    """A call has not come back in time; its own TimeoutError is another thing."""


def _within_seconds(call: Callable[[], Any], seconds: float | None) -> Any:
    """call() in a thread, which is left behind if it takes longer: Python cannot end one."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise _TimeUpError
    return results[0]


def _timeout_error(name: str, rows: RewardRows, row: int | None, timeout: float) -> UserError:
    return UserError(
        f"reward {name} has not answered within data.reward_timeout, {timeout:g} s, on {_rows_text(rows, row)}: make "
        "it faster or raise the limit; the same command continues from the last checkpoint"
    )


def _reward_error(name: str, reward: Reward, error: Exception, rows: RewardRows, row: int | None) -> UserError:
    file = inspect.getsourcefile(inspect.unwrap(reward)) if inspect.isroutine(reward) else ""
    return UserError(f"reward {name} raised {error_origin(error, file or '')} on {_rows_text(rows, row)}: {WAY_OUT}")


def _rows_text(rows: RewardRows, row: int | None) -> str:
    if row is not None:
        return rows.description(row)
    return f"a batch of {len(rows.texts)} rows, the first {rows.description(0)}" if rows.texts else "a batch of no rows"

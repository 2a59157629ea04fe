"""What one model makes of every task: greedy answers, samples, and the log-probability of what is right."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.answers import answerer
from lm.data.batches import every
from lm.data.prompts import bucketed, padded
from lm.data.rows import pad
from lm.parts import Parts
from lm.skills.scores import answered, edit_distance
from lm.skills.tasks import TASKS, Item, examined, examples
from lm.tokenizer import Example, Tokenizer
from lm.workdir import Trained

ROWS = 128  # at a time
MORE = 4  # tokens that an answer may be longer than the longest target
SHOWN = 3  # greedy answers that are kept to be read


class Asked(NamedTuple):
    """A level of a task in a tokenizer's ids."""

    items: Sequence[Item]
    prompts: Sequence[Sequence[int]]
    targets: Sequence[Sequence[int]]
    shots: int  # examples before each prompt
    room: int  # of a prompt, rounded up so that few programs are compiled


def asked(
    name: str, level: int | str, tokenizer: Tokenizer, room: int, *, items: int, shots: int, seed: int
) -> Asked | None:
    """The level's questions, each with as many examples before it, up to `shots`, as let all of them fit `room` tokens;
    None where they do not fit at all. The examples are other ones for each question."""
    found = examined(name, level, count=items, seed=seed)
    shown = examples(name, level, count=shots * len(found), seed=seed)
    targets = tokenizer.encode_all(item.target for item in found)
    for count in range(shots if shown else 0, -1, -1):
        around = itertools.cycle(shown)
        texts = ["".join(next(around).line for _ in range(count)) + item.prompt for item in found]
        prompts = [[*tokenizer.start, *ids] for ids in tokenizer.encode_all(texts)]
        longest = max(map(len, prompts))
        if longest <= room:
            return Asked(found, prompts, targets, count, bucketed(longest, room))
    return None


def scored(
    trained: Trained,
    tasks: Sequence[str],
    *,
    items: int,
    samples: int,
    shots: int,
    seed: int,
    tell: Callable[[str, str], None],
    parts: Parts,
) -> dict[str, dict[str, Any]]:
    """{task: {level: item by item what came of it}}; a level that does not fit the model's context is left out.

    exact: whether the greedy answer is right. edit: its edit distance over the characters of the target. logprob: nats
    of the whole target. tokens: its length. correct: how many of `samples` answers, at temperature 1, are right. parts:
    keeps what is known of each level.
    """
    levels = [(name, level) for name in tasks for level in TASKS[name].levels]
    targets = [item.target for name, level in levels for item in examined(name, level, count=items, seed=seed)]
    answer = max(map(len, trained.tokenizer.encode_all(targets))) + MORE
    programs = Programs(trained, answer, samples)
    room = trained.shape.context - answer
    found: dict[str, dict[str, Any]] = {}
    for number, (name, level) in enumerate(levels):
        tell(name, str(level))
        questions = asked(name, level, trained.tokenizer, room, items=items, shots=shots, seed=seed)
        if questions:
            key = jax.random.fold_in(jax.random.key(seed), number)
            score = functools.partial(judged, programs, questions, samples, key)
            found.setdefault(name, {})[str(level)] = parts.once(f"{name}, level {level}", score)
    return found


def judged(programs: "Programs", questions: Asked, samples: int, key) -> dict[str, Any]:
    """The scores of one level, item by item."""
    targets = [item.target for item in questions.items]
    greedy = [answered(*pair) for pair in zip(programs.answers(questions, key, greedy=True), targets)]
    drawn = programs.answers(questions, key, greedy=False)
    right = [answered(text, targets[i // samples]) == targets[i // samples] for i, text in enumerate(drawn)]
    return {
        "shots": questions.shots,
        "exact": [answer == target for answer, target in zip(greedy, targets)],
        "edit": [edit_distance(answer, target) / len(target) for answer, target in zip(greedy, targets)],
        "logprob": programs.logprobs(questions),
        "tokens": [len(ids) for ids in questions.targets],
        "correct": np.reshape(right, (-1, samples)).sum(axis=1).tolist(),
        "shown": [[item.prompt, item.target, answer] for item, answer in list(zip(questions.items, greedy))[:SHOWN]],
    }


class Programs:
    """A model's compiled programs, one for each shape that is asked for."""

    def __init__(self, trained: Trained, answer: int, samples: int):
        """answer: the tokens that an answer may have. samples: answers drawn to each question."""
        self._answer = answer
        self._lm = jax.tree.map(jnp.asarray, trained.params["lm"])  # on the device once
        self._logprobs = jax.jit(trained.model.token_logprobs)
        given = trained.model, self._lm, trained.tokenizer
        shared = {"jit": jax.jit, "max_new": answer, "stop": newlines(trained.tokenizer)}
        self._greedy = answerer(*given, rows_at_once=ROWS, temperature=0.0, **shared)
        self._sampled = answerer(*given, rows_at_once=max(ROWS // samples, 1), samples=samples, **shared)

    def answers(self, questions: Asked, key, *, greedy: bool) -> list[str]:
        """A text for each question, or adjacent samples; each ends with its first newline."""
        ask = self._greedy if greedy else self._sampled
        return [answer.text for answer in ask(padded(questions.prompts, questions.items, questions.room), key)]

    def logprobs(self, questions: Asked) -> list[float]:
        """Nats of each target after its prompt."""
        examples = [
            Example(np.array([*prompt, *target], np.int32), np.repeat(np.float32([0, 1]), [len(prompt), len(target)]))
            for prompt, target in zip(questions.prompts, questions.targets)
        ]
        parts = every(pad(examples, questions.room + self._answer - 1), ROWS)
        found = [np.sum(np.asarray(self._logprobs(self._lm, part)) * part.weights, axis=1) for part in parts]
        return np.concatenate(found)[: len(examples)].tolist()


def newlines(tokenizer: Tokenizer) -> list[int]:
    """Every piece with a newline in it."""
    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    return [i for i, piece in enumerate(pieces) if "\n" in piece or piece == "<0x0A>"]


def tasks_for(corpora: Mapping[str, None] | Sequence[str]) -> list[str]:
    """The tasks that make sense for runs on these corpora: facts and idioms only where they were told."""
    return [name for name, task in TASKS.items() if not task.corpus or task.corpus in corpora]

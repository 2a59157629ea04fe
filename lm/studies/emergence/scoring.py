"""Scores one model on every task: greedy answers, samples, and the log-probability of the right answer."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.batches import sequential_batches
from lm.data.packing import padded_rows
from lm.data.prompts import bucket_length, padded_prompts
from lm.data.tasks.scoring import compared_text, edit_distance
from lm.data.tasks.skills import TASKS, TaskItem, evaluation_items, example_items
from lm.generate.answers import batch_answerer
from lm.generate.sampler import SamplingParams
from lm.runs.partial_results import PartialResults
from lm.runs.workdir import TrainedModel
from lm.tokenizer import TokenizedExample, Tokenizer

ROWS_AT_ONCE = 128  # at a time
EXTRA_ANSWER_TOKENS = 4  # tokens that an answer may be longer than the longest target
SHOWN_ANSWERS = 3  # greedy answers that the page shows


class TaskQuestions(NamedTuple):
    """A level of a task in a tokenizer's ids."""

    items: Sequence[TaskItem]
    prompts: Sequence[Sequence[int]]
    targets: Sequence[Sequence[int]]
    shots: int  # examples before each prompt
    prompt_length: int  # of a prompt, rounded up so that few programs are compiled


def task_questions(
    name: str, level: int | str, tokenizer: Tokenizer, max_prompt_length: int, *, items: int, shots: int, seed: int
) -> TaskQuestions | None:
    """The level's questions. Each has different examples before it: up to `shots`, as many as fit all questions into
    `max_prompt_length` tokens. None if the questions do not fit without examples."""
    questions = evaluation_items(name, level, count=items, seed=seed)
    examples = example_items(name, level, count=shots * len(questions), seed=seed)
    targets = tokenizer.encode_batch(item.target for item in questions)
    for count in range(shots if examples else 0, -1, -1):
        around = itertools.cycle(examples)
        texts = ["".join(next(around).line for _ in range(count)) + item.prompt for item in questions]
        prompts = [[*tokenizer.start_ids, *ids] for ids in tokenizer.encode_batch(texts)]
        longest = max(map(len, prompts))
        if longest <= max_prompt_length:
            return TaskQuestions(questions, prompts, targets, count, bucket_length(longest, max_prompt_length))
    return None


def task_scores(
    trained: TrainedModel,
    tasks: Sequence[str],
    *,
    items: int,
    samples: int,
    shots: int,
    seed: int,
    on_level: Callable[[str, str], None],
    parts: PartialResults,
) -> dict[str, dict[str, Any]]:
    """{task: {level: the result of each item}}; a level that does not fit the model's context is left out.

    exact: whether the greedy answer is right. edit: its edit distance over the characters of the target. logprob: nats
    of the whole target. tokens: its length. correct: how many of `samples` answers, at temperature 1, are right. parts:
    keeps what is known of each level.
    """
    levels = [(name, level) for name in tasks for level in TASKS[name].levels]
    targets = [item.target for name, level in levels for item in evaluation_items(name, level, count=items, seed=seed)]
    answer = max(map(len, trained.tokenizer.encode_batch(targets))) + EXTRA_ANSWER_TOKENS
    programs = TaskPrograms(trained, answer, samples)
    room = trained.model_config.context - answer
    scores: dict[str, dict[str, Any]] = {}
    for number, (name, level) in enumerate(levels):
        on_level(name, str(level))
        questions = task_questions(name, level, trained.tokenizer, room, items=items, shots=shots, seed=seed)
        if questions:
            key = jax.random.fold_in(jax.random.key(seed), number)
            score = functools.partial(level_scores, programs, questions, samples, key)
            scores.setdefault(name, {})[str(level)] = parts.once(f"{name}, level {level}", score)
    return scores


def level_scores(programs: "TaskPrograms", questions: TaskQuestions, samples: int, key) -> dict[str, Any]:
    """The scores of one level, item by item."""
    targets = [item.target for item in questions.items]
    greedy = [compared_text(*pair) for pair in zip(programs.answers(questions, key, greedy=True), targets)]
    sampled = programs.answers(questions, key, greedy=False)
    right = [compared_text(text, targets[i // samples]) == targets[i // samples] for i, text in enumerate(sampled)]
    return {
        "shots": questions.shots,
        "exact": [answer == target for answer, target in zip(greedy, targets)],
        "edit": [edit_distance(answer, target) / len(target) for answer, target in zip(greedy, targets)],
        "logprob": programs.logprobs(questions),
        "tokens": [len(ids) for ids in questions.targets],
        "correct": np.reshape(right, (-1, samples)).sum(axis=1).tolist(),
        "shown": [
            [item.prompt, item.target, answer] for item, answer in list(zip(questions.items, greedy))[:SHOWN_ANSWERS]
        ],
    }


class TaskPrograms:
    """A model's compiled programs, one for each shape that is asked for."""

    def __init__(self, trained: TrainedModel, answer: int, samples: int):
        """answer: the tokens that an answer may have. samples: answers drawn to each question."""
        self._answer = answer
        self._lm = jax.tree.map(jnp.asarray, trained.params["lm"])  # on the device once
        self._logprobs = jax.jit(trained.model.token_logprobs)
        given = trained.model, self._lm, trained.tokenizer
        drawn = SamplingParams(answer, samples=samples, stop=newline_ids(trained.tokenizer))
        greedy = drawn._replace(temperature=0.0, samples=1)
        self._greedy = batch_answerer(*given, greedy, rows_at_once=ROWS_AT_ONCE, jit=jax.jit)
        self._sampled = batch_answerer(*given, drawn, rows_at_once=max(ROWS_AT_ONCE // samples, 1), jit=jax.jit)

    def answers(self, questions: TaskQuestions, key, *, greedy: bool) -> list[str]:
        """A text for each question, or adjacent samples; each ends with its first newline."""
        ask = self._greedy if greedy else self._sampled
        return [
            answer.text
            for answer in ask(padded_prompts(questions.prompts, questions.items, questions.prompt_length), key)
        ]

    def logprobs(self, questions: TaskQuestions) -> list[float]:
        """Nats of each target after its prompt."""
        examples = [
            TokenizedExample(
                np.array([*prompt, *target], np.int32), np.repeat(np.float32([0, 1]), [len(prompt), len(target)])
            )
            for prompt, target in zip(questions.prompts, questions.targets)
        ]
        parts = sequential_batches(padded_rows(examples, questions.prompt_length + self._answer - 1), ROWS_AT_ONCE)
        nats = [np.sum(np.asarray(self._logprobs(self._lm, part)) * part.weights, axis=1) for part in parts]
        return np.concatenate(nats)[: len(examples)].tolist()


def newline_ids(tokenizer: Tokenizer) -> list[int]:
    """Every piece with a newline in it."""
    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    return [i for i, piece in enumerate(pieces) if "\n" in piece or piece == "<0x0A>"]


def tasks_for_corpora(corpora: Mapping[str, None] | Sequence[str]) -> list[str]:
    """The tasks that make sense for runs on these corpora: facts and idioms only where the corpus contains them."""
    return [name for name, task in TASKS.items() if not task.required_corpus or task.required_corpus in corpora]

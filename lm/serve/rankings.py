"""Verdicts of the chat page on two answers, written into the store that `lm rank` and stage `reward` read."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.core.errors import UserError
from lm.data.annotations import Annotation, AnnotationStore, DuplicateVerdict
from lm.data.messages import RowFault, bare_messages, checked_conversation
from lm.feedback.app import checked_rater_name
from lm.serve.served_model import ServedModel

VERDICTS = {"a": [1, 2], "b": [2, 1], "tie": [1, 1]}  # the rank of each answer
SAMPLER_FIELDS = ("temperature", "top_p", "max_tokens")  # what is recorded of how an answer was sampled
FIELDS = {"key", "rater", "messages", "answers", "verdict"}


class RankingBook:
    """A store that is made with the first verdict."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._store: AnnotationStore | None = None

    @property
    def store(self) -> AnnotationStore:
        with self._lock:
            if self._store is None:
                self._store = AnnotationStore(self.path)
            return self._store

    def close(self) -> None:
        with self._lock:
            if self._store is not None:
                self._store.close()
                self._store = None

    def record(self, body: Mapping[str, Any], models: Mapping[str, ServedModel]) -> dict[str, Any]:
        """Adds both answers and the verdict on them; the same key twice is one verdict.

        body: {"key": the client's own, "rater", "messages": the conversation that was answered, "answers": two of
        {"model", "text", and how it was sampled}, "verdict": "a", "b" or "tie"}.
        """
        if set(body) != FIELDS:
            raise UserError(f"a verdict has the fields {', '.join(sorted(FIELDS))}, not {', '.join(sorted(body))}")
        rater = checked_rater_name(body["rater"], ())
        if not isinstance(body["key"], str) or not body["key"]:
            raise UserError(f"key is {body['key']!r}, not a text of the client's own")
        if body["verdict"] not in list(VERDICTS):
            raise UserError(f"verdict is {body['verdict']!r:.40}; it must be one of {', '.join(VERDICTS)}")
        try:
            prompt = bare_messages(checked_conversation(body["messages"], ends="user"))
        except RowFault as fault:
            raise UserError(f"messages: {fault}") from fault
        texts, sources = checked_answers(body["answers"], models)
        item = self.store.add_item("chat page", prompt, texts, sources)
        ranking = VERDICTS[body["verdict"]]
        try:
            self.store.record_verdict(Annotation(body["key"], item, rater, ranking, shown=[0, 1]))
        except DuplicateVerdict as error:
            raise UserError(f"{rater} has judged these two answers before, and that verdict stays") from error
        return {"recorded": body["key"]}

    def undo(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Takes the rater's latest verdict back."""
        rater = checked_rater_name(body["rater"] if "rater" in body else None, ())
        if self.store.undo_latest(rater) is None:
            raise UserError(f"{rater} has no verdict to take back")
        return {"undone": rater}


def checked_answers(given: Any, models: Mapping[str, ServedModel]) -> tuple[list[str], list[dict[str, Any]]]:
    """The two texts, and of each its model, the fingerprint of its parameters, and how it was sampled."""
    if not isinstance(given, list) or len(given) != 2:
        raise UserError("answers must be a list of two")
    texts, sources = [], []
    for answer in given:
        if not isinstance(answer, Mapping) or not {"model", "text"} <= set(answer):
            raise UserError(f"an answer is {answer!r:.60}, not an object with model and text")
        if answer["model"] not in list(models) or not isinstance(answer["text"], str):
            raise UserError(f"an answer is of {answer['model']!r:.60}: give a model of this server, and its text")
        sampler = {name: answer[name] for name in SAMPLER_FIELDS if name in answer}
        if not all(isinstance(value, (int, float)) for value in sampler.values()):
            raise UserError(f"how an answer was sampled is {sampler!r:.80}: give numbers")
        texts.append(answer["text"])
        sources.append({
            "model": answer["model"],
            "fingerprint": models[answer["model"]].fingerprint,
            "sampler": sampler,
        })  # fmt: skip
    return texts, sources

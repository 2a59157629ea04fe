"""Parts of a long computation, each on disk as soon as it is done: a kill costs only the part that is being made.

    parts = PartialResults(workdir.path / "models.parts.jsonl")
    scores = {name: parts.once(name, lambda: scored(name)) for name in names}
    write_text(path, json.dumps(scores))
    parts.remove()

A part is always returned as JSON reads it back, so a result does not depend on whether there was a kill.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm.core.errors import UserError


class PartialResults:
    """Values by name in a file of JSON lines; an incomplete last line, left by a kill, is dropped."""

    def __init__(self, path: Path):
        self._path, self._found = path, {}
        if path.exists():
            complete_lines = path.read_bytes()
            complete_lines = complete_lines[: complete_lines.rfind(b"\n") + 1]
            os.truncate(path, len(complete_lines))
            try:
                self._found = dict(json.loads(line) for line in complete_lines.split(b"\n")[:-1])
            except (ValueError, TypeError) as error:
                raise UserError(f"{path} is not what an interrupted start leaves ({error}): remove it") from error

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """make() as JSON gives it back, or what it gave when an earlier start asked for this name."""
        if name not in self._found:
            line = json.dumps([name, make()])
            try:
                with self._path.open("a") as stream:
                    stream.write(f"{line}\n")
                    stream.flush()
                    os.fsync(stream.fileno())
            except OSError as error:
                raise UserError(f"cannot write {self._path}: {error.strerror}; make room there") from error
            self._found[name] = json.loads(line)[1]
        return self._found[name]

    def remove(self) -> None:
        """Forgets everything: the result that the parts were for has been written."""
        self._path.unlink(missing_ok=True)
        self._found = {}

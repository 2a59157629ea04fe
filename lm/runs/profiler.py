"""A profile of a few steps: what host and devices did when, as a file that ui.perfetto.dev opens."""

from contextlib import ExitStack
from pathlib import Path

import jax

from lm.core.errors import UserError
from lm.runs.console import say, warn

VIEWER_URL = "https://ui.perfetto.dev"


def profile_steps(text: str) -> range:
    """The steps that --profile=FIRST:LAST names, both included, counted as metrics.jsonl counts them: from 1."""
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile={text} is no range of steps: give the first and the last, such as --profile=10:13")
    return range(int(first), int(last) + 1)


class StepProfiler:
    """Traces the steps of a range into a folder; a context manager, as a trace must be ended to be written."""

    def __init__(self, steps: range, folder: Path):
        self._wanted, self._folder = steps, folder
        self._open: ExitStack | None = None
        self._begun = False

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *exception) -> None:
        if self._open:
            self._write()
        if self._wanted and not self._begun:
            warn(f"--profile={self._wanted[0]}:{self._wanted[-1]}: this process took none of these steps")

    def begin_step(self, step: int) -> None:
        """Before the first thing that is done for a step. A run that continues within the range traces its rest."""
        if step not in self._wanted:
            return
        if not self._open:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # else every call of a Python function is an event, a million a second
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
            self._open, self._begun = ExitStack(), True
        self._open.enter_context(jax.profiler.StepTraceAnnotation("step", step_num=step))

    def end_step(self, step: int, results) -> None:
        """After the last; `results` are waited for, so that the devices' part of the step is in the trace."""
        if step not in self._wanted:
            return
        jax.block_until_ready(results)
        self._open.close()
        if step == self._wanted[-1]:
            self._write()

    def _write(self) -> None:
        self._open.close()
        self._open = None
        try:
            jax.profiler.stop_trace()
        except Exception as error:  # such as a full disk: the run is worth more than its profile
            warn(f"the profile could not be written to {self._folder}: {error}")
            return
        newest = max(self._folder.rglob("perfetto_trace.json.gz"), key=lambda file: file.stat().st_mtime)
        say(f"profile: {newest}: open it at {VIEWER_URL}")

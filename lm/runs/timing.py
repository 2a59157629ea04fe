"""Where the seconds of a run go: data, rollout, reward, update, eval, save, and other."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

TRAINING_PHASES = ("data", "rollout", "reward", "update")  # what makes and learns from batches
PHASES = (*TRAINING_PHASES, "eval", "save")
OTHER_PHASE = "other"  # start-up, logging, whatever no phase claims


class PhaseTimer:
    """A timer of phases: `with phases("data"):` counts the seconds within as "data".

    Phases nest, and time belongs to the innermost: a rollout within data is a rollout. But all of an evaluation is
    eval, its rollouts too: the other phases say what training takes. So the parts add up to the time since the clock
    was made. Compilation counts for the phase that waits for it. Work that devices do in the background is not seen: to
    count it, wait for it within its phase. In a profile each phase is a span.
    """

    def __init__(self):
        self._seconds = dict.fromkeys((*PHASES, OTHER_PHASE), 0.0)
        self._open, self._since = [OTHER_PHASE], time.monotonic()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._turn()
        self._open.append("eval" if "eval" in self._open else name)
        try:
            with jax.profiler.TraceAnnotation(name):
                yield
        finally:
            self._turn()
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """Of each phase until now, "other" last."""
        self._turn()
        return dict(self._seconds)

    def training(self) -> float:
        """Seconds until now of all TRAINING_PHASES."""
        spent = self.seconds()
        return sum(spent[name] for name in TRAINING_PHASES)

    def _turn(self) -> None:
        now = time.monotonic()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now

"""What a run says of itself while it trains: metrics of the steps as lines, for the terminal, TensorBoard and later."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from lm import metrics as means
from lm.console import Progress, Writers, warn
from lm.errors import UserError
from lm.phases import OTHER, PHASES, Phases
from lm.workdir import Workdir, read_metrics

# Metrics at or above a level that say something is amiss, though nothing is lost: said once.
ADVICE: Mapping[str, tuple[float, str]] = {
    "equal_groups": (
        1.0,
        "in every group all answers got the same reward, so nothing is learnt from them: raise data.temperature or "
        "data.group, or take a reward that tells answers apart",
    ),
    "empty": (
        0.5,
        "over half of the answers are empty: see rollouts.jsonl; raise stage.beta, or penalise data.rewards",
    ),
}


class Log:
    """Metrics of the steps since the last line, kept on the devices so that the loop need not wait for them."""

    def __init__(self, stage, workdir: Workdir, writers: Writers, progress: Progress, phases: Phases):
        self._stage, self._workdir, self._writers, self._progress = (
            stage.__name__.split(".")[-1],
            workdir,
            writers,
            progress,
        )
        self._limits = stage.LIMITS
        self._shown = [prefix + name for prefix in ("", "held_out/") for name in stage.SHOWN]
        rows = read_metrics(workdir.metrics)
        self._tokens = rows[-1]["tokens"] if rows else 0
        self._phases, self._before = phases, by_phase(rows[-1]) if rows else dict.fromkeys((*PHASES, OTHER), 0.0)
        self.scored = bool(rows) and any(name.startswith("held_out/") for name in rows[-1])  # where this run takes up
        self._trained = phases.training()  # seconds until the last line of means; start-up is behind it
        self._pending: list[tuple[int, Mapping[str, Any], int]] = []
        self._advised: set[str] = set()

    def note(self, step: int, metrics, tokens: int) -> None:
        self._pending.append((step, metrics, tokens))

    def flush(self) -> None:
        """One line of means over the noted steps, and the tokens learnt from in a second of training them: evaluation,
        saving and logging do not count. Raises UserError at the first that is not finite, or over a limit."""
        with self._phases("update"):  # this waits for the devices
            fetched = [(step, jax.device_get(dict(metrics)), tokens) for step, metrics, tokens in self._pending]
        self._pending = []
        total = None
        for step, found, _ in fetched:
            self._stop_unless_finite(step, {name: float(m.total) for name, m in found.items()})
            total = found if total is None else means.add(total, found)
        values = means.values(total)
        for name, limit in self._limits.items():
            if values[name] > limit:
                raise UserError(
                    f"{self._stage}: {name} is {values[name]:.3g} by step {fetched[-1][0]}, over its limit of "
                    f"{limit}: see LIMITS in lm/stages/{self._stage}.py for what it means"
                )
        for name, (level, advice) in ADVICE.items():
            if name in values and values[name] >= level and name not in self._advised:
                self._advised.add(name)
                warn(f"{self._stage}: {name} is {values[name]:.3g} by step {fetched[-1][0]}: {advice}")
        trained = self._phases.training()
        tokens = sum(tokens for *_, tokens in fetched)
        self._tokens += tokens
        values["tokens_per_second"] = tokens / (trained - self._trained)
        self._trained = trained
        self.write(fetched[-1][0], values)

    def seconds(self) -> dict[str, float]:
        """Spent on each phase until now, by every process that had a part in the run."""
        return {name: spent + self._before[name] for name, spent in self._phases.seconds().items()}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line to metrics.jsonl, TensorBoard and the terminal. Raises UserError if a value is not finite."""
        self._stop_unless_finite(step, values)
        spent = self.seconds()
        clock = {"tokens": self._tokens, "seconds": sum(spent.values())}
        clock |= {f"seconds/{phase}": spent[phase] for phase in PHASES}
        self._workdir.append_metrics({"step": step, **values, **clock})
        self._writers.write(step, values)
        shown = {name: values[name] for name in self._shown if name in values}
        self._progress.update(step, shown, values.get("tokens_per_second"))

    def _stop_unless_finite(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            if not math.isfinite(number):
                # What is held out is scored after its step was saved.
                good = "earlier checkpoints stay" if name.startswith("held_out/") else "the last good checkpoint stays"
                raise UserError(
                    f"{self._stage}: {name} is {number} at step {step}; {good} in "
                    f"{self._workdir.checkpoints}: lower optimizer.learning_rate and take a new --workdir"
                )


def by_phase(row: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each phase as a row of metrics.jsonl tells them; "other" is what is left of all seconds."""
    known = {phase: row[f"seconds/{phase}"] if f"seconds/{phase}" in row else 0.0 for phase in PHASES}
    return {**known, OTHER: row["seconds"] - sum(known.values())}

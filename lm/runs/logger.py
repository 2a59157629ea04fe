"""The metrics of a run while it trains, a line for several steps: to metrics.jsonl, the terminal and TensorBoard."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lm.core.errors import UserError
from lm.core.metrics import metric_sum, metric_values
from lm.runs.console import MetricWriters, Progress, warn
from lm.runs.timing import OTHER_PHASE, PHASES, PhaseTimer
from lm.runs.workdir import Workdir, read_metrics


class MetricWarning(NamedTuple):
    """The warning about an unusual metric, given once; the run goes on."""

    amiss: Callable[[float], bool]
    lines: int  # in a row, before the warning
    advice: str


METRIC_WARNINGS: Mapping[str, MetricWarning] = {
    "equal_groups": MetricWarning(
        lambda share: share >= 1,
        1,
        "in every group all answers got the same reward, so nothing is learned from them: raise data.temperature or "
        "data.group, or take a reward that tells answers apart",
    ),
    "empty": MetricWarning(
        lambda share: share >= 0.5,
        1,
        "over half of the answers are empty: see rollouts.jsonl; raise stage.beta, or penalise data.rewards",
    ),
    "kl": MetricWarning(
        lambda nats: nats < -0.01,
        5,
        "a KL is never below 0, and a mean that stays there says that answers are not drawn from the policy that is "
        "measured: look at sampler_gap, data.temperature and stage.temperature",
    ),
}
LOSS_METRICS = ("loss", "policy_loss", "divergence")  # what is learned from; of weight 0 where every token is masked


class MetricsLogger:
    """Metrics of the steps since the last line, kept on the devices so that the loop need not wait for them."""

    def __init__(self, stage, workdir: Workdir, writers: MetricWriters, progress: Progress, phases: PhaseTimer):
        self._stage, self._path = stage.name, stage.path
        self._workdir, self._writers, self._progress = workdir, writers, progress
        self._limits = stage.metric_limits
        self._shown = [prefix + name for prefix in ("", "held_out/") for name in stage.shown_metrics]
        rows = read_metrics(workdir.metrics_path)
        self._tokens = rows[-1]["tokens"] if rows else 0
        self._phases, self._before = (
            phases,
            phase_seconds(rows[-1]) if rows else dict.fromkeys((*PHASES, OTHER_PHASE), 0.0),
        )
        # Whether the last row, from which this run continues, is scored.
        self.has_held_out_scores = bool(rows) and any(name.startswith("held_out/") for name in rows[-1])
        self._trained = phases.training()  # seconds until the last line of means; start-up is behind it
        self._pending: list[tuple[int, Mapping[str, Any], int]] = []
        self._amiss: Counter = Counter()  # by metric, lines on end
        self._advised: set[str] = set()

    def add_step(self, step: int, metrics, tokens: int) -> None:
        self._pending.append((step, metrics, tokens))

    def flush(self) -> None:
        """One line of means over the noted steps, and the tokens learned from in a second of training them: evaluation,
        saving and logging do not count. Raises UserError at the first that is not finite, or over a limit."""
        with self._phases("update"):  # this waits for the devices
            fetched = [(step, jax.device_get(dict(metrics)), tokens) for step, metrics, tokens in self._pending]
        self._pending = []
        total = None
        for step, step_metrics, _ in fetched:
            self._stop_unless_finite(step, {name: float(m.total) for name, m in step_metrics.items()})
            total = step_metrics if total is None else metric_sum(total, step_metrics)
        values = metric_values(total)
        for name, limit in self._limits.items():
            if values[name] > limit:
                raise UserError(
                    f"{self._stage}: {name} is {values[name]:.3g} by step {fetched[-1][0]}, over its limit of "
                    f"{limit}: see metric_limits in {self._path} for what it means"
                )
        self._advise(values, fetched)
        trained = self._phases.training()
        tokens = sum(tokens for *_, tokens in fetched)
        self._tokens += tokens
        values["tokens_per_second"] = tokens / (trained - self._trained)
        self._trained = trained
        self.write_row(fetched[-1][0], values)

    def _advise(self, values: Mapping[str, float], fetched: Sequence[tuple[int, Mapping[str, Any], int]]) -> None:
        """Warns once of each unusual metric of a line, and of the first batch that nothing is learned from."""
        for name, (amiss, lines, advice) in METRIC_WARNINGS.items():
            if name in values:
                self._amiss[name] = self._amiss[name] + 1 if amiss(values[name]) else 0
                if self._amiss[name] == lines and name not in self._advised:
                    self._advised.add(name)
                    warn(f"{self._stage}: {name} is {values[name]:.3g} by step {fetched[-1][0]}: {advice}")
        masked = [
            step
            for step, metrics, _ in fetched
            for name in LOSS_METRICS
            if name in metrics and not metrics[name].weight > 0
        ]
        if masked and "masked" not in self._advised:
            self._advised.add("masked")
            warn(
                f"{self._stage}: every weight of the batch of step {masked[0]} is 0, so nothing is learned from it: "
                "look at its rows (data.length, data.turns, the chat template, equal rewards), or take larger batches"
            )

    def seconds_by_phase(self) -> dict[str, float]:
        """Seconds spent on each phase until now, by all processes of the run."""
        return {name: spent + self._before[name] for name, spent in self._phases.seconds().items()}

    def write_row(self, step: int, values: Mapping[str, float]) -> None:
        """One line to metrics.jsonl, TensorBoard and the terminal. Raises UserError if a value is not finite."""
        self._stop_unless_finite(step, values)
        spent = self.seconds_by_phase()
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
                    f"{self._workdir.checkpoints_path}: lower optimizer.learning_rate and take a new --workdir"
                )


def phase_seconds(row: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each phase from a row of metrics.jsonl; "other" is the rest of all seconds."""
    known = {phase: row[f"seconds/{phase}"] if f"seconds/{phase}" in row else 0.0 for phase in PHASES}
    return {**known, OTHER_PHASE: row["seconds"] - sum(known.values())}

"""Counts and times of a server, as the text that Prometheus reads."""

import threading
from collections.abc import Mapping, Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # upper bounds of buckets
Labels = tuple[tuple[str, str], ...]


class Histogram:
    """How many values lie at or below each of `bounds`."""

    def __init__(self, bounds: Sequence[float] = SECONDS):
        self.bounds, self.counts = tuple(bounds), [0] * len(bounds)
        self.count, self.sum = 0, 0.0

    def add(self, value: float) -> None:
        self.count, self.sum = self.count + 1, self.sum + value
        for i, bound in enumerate(self.bounds):
            self.counts[i] += value <= bound


class ServerMetrics:
    """Counters and histograms by name and labels, for any number of threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counters: dict[str, dict[Labels, float]] = {}
        self._histograms: dict[str, dict[Labels, Histogram]] = {}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        key = tuple(sorted(labels.items()))
        with self._lock:
            series = self._counters.setdefault(name, {})
            series[key] = (series[key] if key in series else 0) + amount

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        key = tuple(sorted(labels.items()))
        with self._lock:
            self._histograms.setdefault(name, {}).setdefault(key, Histogram()).add(seconds)

    def text(self, gauges: Mapping[str, Mapping[Labels, float]]) -> str:
        """Everything, with values of now beside it."""
        with self._lock:
            lines = _series("counter", self._counters) + _series("gauge", gauges)
            for name, series in sorted(self._histograms.items()):
                lines.append(f"# TYPE lm_{name} histogram")
                for labels, one in sorted(series.items()):
                    bounds = [*(f"{bound:g}" for bound in one.bounds), "+Inf"]
                    for bound, count in zip(bounds, [*one.counts, one.count]):
                        lines.append(f"lm_{name}_bucket{_labels((*labels, ('le', bound)))} {count}")
                    lines.append(f"lm_{name}_sum{_labels(labels)} {one.sum:.6f}")
                    lines.append(f"lm_{name}_count{_labels(labels)} {one.count}")
        return "\n".join(lines) + "\n"


def _series(kind: str, all_series: Mapping[str, Mapping[Labels, float]]) -> list[str]:
    lines = []
    for name, series in sorted(all_series.items()):
        lines.append(f"# TYPE lm_{name} {kind}")
        lines += [f"lm_{name}{_labels(labels)} {value:g}" for labels, value in sorted(series.items())]
    return lines


def _labels(labels: Labels) -> str:
    escaped = [(name, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for name, value in labels]
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}" if labels else ""

"""Held-out metrics of each source and of each kind of source, from the sums of their batches."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from lm.core.metrics import Metrics, metric_sum
from lm.stages.context import HeldOutPart
from lm.stages.stage import Stage


def source_metrics(
    stage: Stage, dataset_info: Mapping[str, Any], parts: Sequence[tuple[HeldOutPart, Metrics]]
) -> dict[str, float]:
    """The metrics that the stage shows, as "loss/SOURCE" and "loss/kind KIND". Parts without a name are left out, and
    so are metrics without an observation."""
    metrics_by_name = {}
    named = [(part, metrics) for part, metrics in parts if part.source]
    for part, metrics in named:
        metrics_by_name |= _shown_metrics(stage, dataset_info, [(part, metrics)], part.source)
    for kind in dict.fromkeys(part.kind for part, _ in named if part.kind):
        metrics_by_name |= _shown_metrics(
            stage, dataset_info, [each for each in named if each[0].kind == kind], f"kind {kind}"
        )
    return metrics_by_name


def _shown_metrics(
    stage: Stage, dataset_info: Mapping[str, Any], parts: Sequence[tuple[HeldOutPart, Metrics]], name: str
) -> dict[str, float]:
    metrics = functools.reduce(metric_sum, (own for _, own in parts))
    counts = {key: sum(part.dataset_info[key] for part, _ in parts) for key in parts[0][0].dataset_info}
    summary = stage.summary(metrics, {**dataset_info, **counts})
    return {
        f"{metric}/{name}": summary[metric]
        for metric in stage.shown_metrics
        if metric in summary and (metric not in metrics or float(metrics[metric].weight) > 0)
    }

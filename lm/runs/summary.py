"""The summary of a finished stage: held-out scores before and after, and their cost."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import jax

from lm.runs.hardware import peak_memory

MetricsRow = Mapping[str, Any]  # of metrics.jsonl


def run_summary(
    rows: Sequence[MetricsRow],
    *,
    flops_per_token: float | None,
    seconds: Mapping[str, float],
    peak: float | None,
    result_step: int | None = None,
) -> dict[str, Any]:
    """Steps, tokens, seconds, model FLOPs, MFU, memory and held-out scores, from the rows of a run.

    flops_per_token: of learning from one token of a batch; None where it is not known. seconds: by phase, all the
    run's. peak: FLOP/s of the devices at best, if known. result_step: the step whose state is the result, and so its
    held-out scores; None: the last. Memory is of this process' devices, or its own: see
    lm.runs.hardware.peak_memory.
    """
    scored = [
        (row["step"], {k.removeprefix("held_out/"): v for k, v in row.items() if k.startswith("held_out/")})
        for row in rows
    ]
    scored = [(step, found) for step, found in scored if found]
    results = [found for step, found in scored if result_step in (None, step)]
    rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    memory, of = peak_memory()
    return {
        "steps": rows[-1]["step"],
        "tokens": rows[-1]["tokens"],
        "seconds": sum(seconds.values()),
        "seconds_by_phase": dict(seconds),
        "tokens_per_second": statistics.median(rates[1:] or rates),  # the first interval holds compilation
        "model_flops": None if flops_per_token is None else flops_per_token * rows[-1]["tokens"],
        "mfu": None if flops_per_token is None else model_flops_utilization(rows, flops_per_token, peak),
        "peak_memory_bytes": memory,
        "peak_memory_of": of,
        "before": scored[0][1],
        "held_out": results[-1],
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def model_flops_utilization(rows: Sequence[MetricsRow], flops_per_token: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation (Chowdhery et al. 2022, app. B, arXiv 2204.02311): model FLOP/s over `peak`.

    The seconds are those of data and update: where a stage samples its batches, neither the tokens' sampling nor its
    time counts; waiting for data does. The median of the intervals between two lines of means; before the first line
    lies compilation. None without a peak, or where there are fewer than two lines.
    """
    marks = [(row["tokens"], row["seconds/data"] + row["seconds/update"]) for row in rows if has_phase_seconds(row)]
    rates = [(after[0] - before[0]) / (after[1] - before[1]) for before, after in pairwise(marks)]
    return flops_per_token * statistics.median(rates) / peak if rates and peak else None


def has_phase_seconds(row: MetricsRow) -> bool:
    """Whether it is a line of means with its seconds by phase, which rows of older runs lack."""
    return {"tokens_per_second", "seconds/data", "seconds/update"} <= set(row)

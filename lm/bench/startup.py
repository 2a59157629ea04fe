"""Seconds from the command to the first step of training in metrics.jsonl: the tiny config of experiments/pretrain.py.

They include everything: Python, imports, data, compiling, the held-out score before the first step. A cold start has an
empty cache of compiled programs, a warm one the cache that the cold start left.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.core.errors import UserError
from lm.runs.workdir import METRICS_FILE, read_metrics

REPOSITORY_ROOT = Path(__file__).resolve().parents[2]
TARGET_SECONDS = {"cold": 8.0, "warm": 4.0}  # seconds
RESTART_VARIABLES = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "GLIBC_TUNABLES",
)  # that lm/__init__.py sets: it is part of a start
TIMEOUT_SECONDS = 600.0  # seconds after which a start has failed


def startup_seconds(*, turns: int, on_turn: Callable[[Mapping[str, float]], None]) -> dict[str, list[float]]:
    """Seconds of each cold and warm start, in turns. UserError if lm train does not come to a step."""
    times_by_kind: dict[str, list[float]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        root = Path(folder)
        fitted = train_command("tokenizer", root / "tokenizer")
        done = subprocess.run(
            fitted, cwd=REPOSITORY_ROOT, env=child_environment(root / "programs"), capture_output=True, text=True
        )
        check_exit(fitted, done.returncode, done.stderr)
        for turn in range(turns):
            for kind in times_by_kind:
                times_by_kind[kind].append(first_step_seconds(root, f"{turn}-{kind}", cache=root / f"programs-{turn}"))
            on_turn({kind: times[-1] for kind, times in times_by_kind.items()})
    return times_by_kind


def train_command(name: str, workdir: Path, *flags: str) -> list[str]:
    config = f"--config={REPOSITORY_ROOT / 'experiments' / name}.py:tiny"
    return [sys.executable, "-m", "lm.train.loop", config, f"--workdir={workdir}", *flags]


def child_environment(cache: Path) -> dict[str, str]:
    """Ours, without what our own restart added, and with that cache of compiled programs."""
    ours = {name: value for name, value in os.environ.items() if name not in RESTART_VARIABLES}
    return {**ours, "JAX_COMPILATION_CACHE_DIR": str(cache)}


def first_step_seconds(root: Path, name: str, *, cache: Path) -> float:
    """Seconds from starting lm train until a step of its own is logged; the run may then end."""
    workdir, log = root / name, root / f"{name}.txt"
    run = train_command("pretrain", workdir, f"--config.tokenizer={root / 'tokenizer'}", "--config.train.log_every=1")
    with log.open("w") as stream:
        start = time.perf_counter()
        child = subprocess.Popen(
            run, cwd=REPOSITORY_ROOT, env=child_environment(cache), stdout=subprocess.DEVNULL, stderr=stream
        )
        try:
            while not any(row["step"] >= 1 for row in read_metrics(workdir / METRICS_FILE)):
                if child.poll() is not None:
                    break
                if time.perf_counter() - start > TIMEOUT_SECONDS:
                    raise UserError(f"{' '.join(run)} took no step within {TIMEOUT_SECONDS:.0f} s: run it by hand")
                time.sleep(0.01)
            seconds = time.perf_counter() - start
            check_exit(run, child.wait(), log.read_text())
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    return seconds


def check_exit(run: Sequence[str], code: int, stderr: str) -> None:
    if code:
        last_line = stderr.strip().splitlines()[-1:] or ["without a word"]
        raise UserError(f"{' '.join(run)} failed: {last_line[0]}")


def result(times_by_kind: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Median, best and aim of each kind of start."""
    return {
        kind: {
            "median": statistics.median(times),
            "best": min(times),
            "aim": TARGET_SECONDS[kind],
            "turns": list(times),
        }
        for kind, times in times_by_kind.items()
    }

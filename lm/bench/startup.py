"""Seconds from the command to the first step of training in metrics.jsonl: the tiny config of experiments/pretrain.py.

All of it counts: Python, imports, data, compiling, the held-out score before the first step. Cold has an empty cache of
compiled programs, warm the one that the cold start left.
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

from lm.errors import UserError
from lm.workdir import METRICS, read_metrics

CODE = Path(__file__).resolve().parents[2]
AIMS = {"cold": 8.0, "warm": 4.0}  # seconds
RESTART = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "GLIBC_TUNABLES",
)  # that lm/__init__.py sets: it is part of a start
LATEST = 600.0  # seconds after which a start has failed


def starts(*, turns: int, after: Callable[[Mapping[str, float]], None]) -> dict[str, list[float]]:
    """Of each cold and warm start, in turns. UserError where lm.train does not come to a step."""
    found: dict[str, list[float]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        root = Path(folder)
        fitted = command("tokenizer", root / "tokenizer")
        done = subprocess.run(fitted, cwd=CODE, env=environment(root / "programs"), capture_output=True, text=True)
        stop_if_failed(fitted, done.returncode, done.stderr)
        for turn in range(turns):
            for kind in found:
                found[kind].append(first_step(root, f"{turn}-{kind}", cache=root / f"programs-{turn}"))
            after({kind: times[-1] for kind, times in found.items()})
    return found


def command(name: str, workdir: Path, *flags: str) -> list[str]:
    config = f"--config={CODE / 'experiments' / name}.py:tiny"
    return [sys.executable, "-m", "lm.train", config, f"--workdir={workdir}", *flags]


def environment(cache: Path) -> dict[str, str]:
    """Ours, without what our own restart added, and with that cache of compiled programs."""
    ours = {name: value for name, value in os.environ.items() if name not in RESTART}
    return {**ours, "JAX_COMPILATION_CACHE_DIR": str(cache)}


def first_step(root: Path, name: str, *, cache: Path) -> float:
    """Seconds from starting lm.train until a step of its own is logged; the run may then end."""
    workdir, said = root / name, root / f"{name}.txt"
    run = command("pretrain", workdir, f"--config.tokenizer={root / 'tokenizer'}", "--config.train.log_every=1")
    with said.open("w") as stream:
        start = time.perf_counter()
        child = subprocess.Popen(run, cwd=CODE, env=environment(cache), stdout=subprocess.DEVNULL, stderr=stream)
        try:
            while not any(row["step"] >= 1 for row in read_metrics(workdir / METRICS)):
                if child.poll() is not None:
                    break
                if time.perf_counter() - start > LATEST:
                    raise UserError(f"{' '.join(run)} took no step within {LATEST:.0f} s: run it by hand")
                time.sleep(0.01)
            found = time.perf_counter() - start
            stop_if_failed(run, child.wait(), said.read_text())
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    return found


def stop_if_failed(run: Sequence[str], code: int, stderr: str) -> None:
    if code:
        said = stderr.strip().splitlines()[-1:] or ["without a word"]
        raise UserError(f"{' '.join(run)} failed: {said[0]}")


def result(found: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Median, best and aim of each kind of start."""
    return {
        kind: {"median": statistics.median(times), "best": min(times), "aim": AIMS[kind], "turns": list(times)}
        for kind, times in found.items()
    }

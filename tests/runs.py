"""One tiny pipeline, run once a session on made text, and the means to run it again, kill it and compare what it left.

    python tests/runs.py MODULE MOMENT FLAGS...      a program in the same small world, killed at a MOMENT (or "never")

The small world: short made conversations in the place of the 7,168 real ones, and a mesh of one of the test's eight
devices, as on a laptop; the machine's peak is not measured. Everything else is the program itself.
"""

import fcntl
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from lm.core.config import load_config
from lm.data import sources
from lm.pipeline import runner
from lm.report import run
from lm.runs import checkpoint, console, metadata
from lm.runs.timing import PHASES
from lm.runs.workdir import read_metrics
from lm.stages.rl import policy_gradient
from lm.train import config, loop

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
TRAINED = ("pretrain", "sft", "reward", "ppo")
# In a row of metrics and in a summary: all that two equal runs may differ in.
CLOCK = {"seconds", "tokens_per_second", "seconds_by_phase", "mfu", "peak_memory_bytes"}
CLOCK |= {f"seconds/{phase}" for phase in PHASES}
WORDS = "object class type value name method list string number call form body text time test code line item".split()


def made_text(folder: Path) -> Path:
    """80 documents of 2 kB from the language reference that comes with Python."""
    from pydoc_data.topics import topics

    folder.mkdir(parents=True)
    for name, text in sorted(topics.items())[:80]:
        (folder / f"{name}.txt").write_text(text[:2000])
    return folder


def made_dialogues():
    """800 conversations of four turns, each turn of three to five words."""
    draw = random.Random(0)
    for i in range(800):
        yield (
            f"chitchat/{i}",
            [f"the {' '.join(draw.choices(WORDS, k=draw.randint(2, 4)))}{'?.'[t % 2]}" for t in range(4)],
        )


def one_device(*, data: int = -1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    """make_mesh as it is on a machine with one device."""
    return jax.make_mesh(
        (1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )


def enter_small_world(patch: Callable) -> None:
    patch(sources, "chitchat_dialogues", made_dialogues)
    patch(config, "make_mesh", one_device)
    patch(metadata, "peak_flops", lambda: (1e10, "made up, as measuring takes time"))


def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's folder: `run`, a finished pipeline; `text`, its corpus; `snapshots/STAGE/MOMENT`, left by kills.

    One for all workers of pytest-xdist: the first that needs it makes it, the others wait. Not to be written to.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "runs"
    with folder.with_name("runs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "run" / "report.html").exists():
            shutil.rmtree(folder, ignore_errors=True)
            make_base(folder)
    return folder


def make_base(folder: Path) -> None:
    text = made_text(folder / "text")
    with pytest.MonkeyPatch.context() as patch:
        enter_small_world(patch.setattr)
        take_snapshots(patch.setattr, folder / "snapshots")
        runner.run_pipeline(
            load_config(f"{EXPERIMENTS / 'small_talk.py'}:tiny", [f"root={folder / 'run'}", f"corpus={text}"])
        )


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The run folder of the finished pipeline. Not to be written to."""
    return base(tmp_path_factory) / "run"


@pytest.fixture
def small(monkeypatch) -> None:
    """The small world for a test's own runs in this process. They draw no page of their own."""
    enter_small_world(monkeypatch.setattr)
    monkeypatch.setattr(run, "write_run_page", lambda path: path)


def stage_config(run: Path, stage: str, *overrides: str):
    """The config of one stage of the finished pipeline."""
    quickstart = [f"root={run}", f"corpus={run.parent / 'text'}", *(f"{stage}.{override}" for override in overrides)]
    return load_config(f"{EXPERIMENTS / 'small_talk.py'}:tiny", quickstart)[stage]


def settings(run: Path, stage: str) -> list[str]:
    """The flags that make the config of a stage beside small_talk.py what it is in the finished pipeline."""
    return {
        "pretrain": [f"--config.tokenizer={run}/tokenizer", f"--config.data.corpus={run.parent}/text"],
        "sft": [f"--config.init_from={run}/pretrain"],
        "reward": [f"--config.init_from={run}/sft", f"--config.data.rankings={run}/rank/rankings.jsonl"],
        "ppo": [f"--config.init_from={run}/sft", f"--config.data.reward_model={run}/reward"],
    }[stage]


def take_snapshots(patch: Callable, folder: Path) -> None:
    """Copies a stage's workdir before its batches at 1/4 and 3/4 of the way, just before its last save is complete, and
    as its last evaluation begins.

    Files that the saving thread moves away meanwhile are missing in the copy, as they may be after a kill.
    """
    fetched, run, finalize, held_out = (
        loop.device_batch,
        loop.run_training_loop,
        checkpoint.SealedPyTreeHandler.finalize,
        loop.held_out_metrics,
    )
    now = {}

    def snapshot(moment: str) -> None:
        try:
            shutil.copytree(now["workdir"], folder / now["stage"] / moment)
        except shutil.Error:
            pass

    def noted(config, workdir, **options):
        now.update(stage=config.stage.name, workdir=workdir.path, steps=config.train.steps)
        return run(config, workdir, **options)

    def before_a_batch(r, state, i):
        if i * 4 in (now["steps"], now["steps"] * 3):
            snapshot(f"batch {i}")
        return fetched(r, state, i)

    def before_an_evaluation(r, evaluate, state):
        if int(state.step):
            snapshot("evaluation")
        return held_out(r, evaluate, state)

    def while_saving(item, directory):
        saving = Path(directory).parent.name.split(".")[0], Path(directory).name.split(".")[0]
        if saving == (str(now["steps"]), "params"):
            snapshot("saving")
        finalize(item, directory)

    patch(loop, "run_training_loop", noted)
    patch(loop, "device_batch", before_a_batch)
    patch(loop, "held_out_metrics", before_an_evaluation)
    patch(checkpoint.SealedPyTreeHandler, "finalize", while_saving)


def started(module: str, *arguments: str, moment: str = "never") -> subprocess.Popen:
    """A program in the small world, in a process of its own."""
    command = [sys.executable, __file__, module, moment, *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def without_clock(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def saved(workdir: Path) -> dict[str, bytes]:
    """Every number of the newest checkpoint of a run, as bytes."""
    parts = {
        name: checkpoint.restore_params(workdir / "checkpoints", name)[0] for name in ("params", "opt_state", "counts")
    }
    leaves = jax.tree_util.tree_leaves_with_path(parts)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def assert_same_run(one: Path, other: Path) -> None:
    """Bitwise the same parameters and optimizer, and the same metrics and summary but for the clock."""
    assert without_clock(read_metrics(one)) == without_clock(read_metrics(other))
    assert without_clock([json.loads((one / "summary.json").read_text())]) == without_clock(
        [json.loads((other / "summary.json").read_text())]
    )
    assert sorted(step.name for step in (one / "checkpoints").iterdir()) == sorted(
        step.name for step in (other / "checkpoints").iterdir()
    )
    assert saved(one) == saved(other)


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_before_batch(number: int) -> None:
    fetched = loop.device_batch
    loop.device_batch = lambda r, state, i: die() if i == number else fetched(r, state, i)


def die_in_evaluation(number: int) -> None:
    """With the first held-out batch of the evaluation of that number, counted from 0: that before the first step."""
    held_out, begun = loop.held_out_metrics, []

    def dying(r, evaluate, state):
        begun.append(state)
        return held_out(r, (lambda *_: die()) if len(begun) > number else evaluate, state)

    loop.held_out_metrics = dying


def die_while_saving(number: int) -> None:
    """In the saving thread, when an item of the checkpoint `number` is written but not sealed."""
    finalize = checkpoint.SealedPyTreeHandler.finalize

    def half_way(item, directory):
        if Path(directory).parent.name.startswith(f"{number}."):
            die()
        finalize(item, directory)

    checkpoint.SealedPyTreeHandler.finalize = half_way


def die_in_update(number: int) -> None:
    """On the devices, at the minibatch of that number, counted over the epochs of PPO's updates."""
    gradient, seen = policy_gradient.decoder_gradient, []

    def tick(step):
        seen.append(step)
        if len(seen) == number:
            die()

    def ticking(*args, **options):
        inner = gradient(*args, **options)

        def update(state, batch):
            jax.debug.callback(tick, state.step)
            return inner.update(state, batch)

        return inner._replace(update=update)

    policy_gradient.decoder_gradient = ticking


MOMENTS = {
    "batch": die_before_batch,
    "evaluation": die_in_evaluation,
    "saving": die_while_saving,
    "update": die_in_update,
}


if __name__ == "__main__":
    module, moment, *sys.argv[1:] = sys.argv[1:]
    enter_small_world(setattr)
    if moment != "never":
        name, number = moment.split(":")
        MOMENTS[name](int(number))
    console.run_program(importlib.import_module(module).program)

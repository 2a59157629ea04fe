"""Times two sides of a comparison in turns, so that other load on the machine affects both."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lm.bench.sizes import thread_count
from lm.core.errors import UserError

PEERS_DIR = Path(__file__).parents[2] / "tests" / "peers"
PEER_REMEDY = "give --peer=PYTHON, an interpreter with tests/peers.txt"

PhaseSeconds = Mapping[str, float]  # seconds of each phase of one step
TimedSteps = Callable[[int], Sequence[PhaseSeconds]]  # so many steps that count, after one that does not


class Peer(NamedTuple):
    """A script of tests/peers, which says on its last line, as JSON, `seconds` (rows), `threads` and `versions`."""

    python: str
    script: str
    options: Mapping[str, Any]

    def run_steps(self, count: int) -> dict[str, Any]:
        """The script's output after `steps` steps. UserError if it cannot run."""
        options = {**self.options, "threads": thread_count(), "steps": count}
        script = PEERS_DIR / self.script
        try:
            done = subprocess.run(
                [self.python, str(script), *(f"--{k}={v}" for k, v in options.items())], capture_output=True, text=True
            )
        except OSError as error:
            raise UserError(f"cannot run {self.python}: {error.strerror}; {PEER_REMEDY}") from error
        if done.returncode:
            last_line = done.stderr.strip().splitlines()[-1:] or ["without a word"]
            raise UserError(f"{self.python} {script} failed: {last_line[0]}; {PEER_REMEDY}")
        return json.loads(done.stdout.strip().splitlines()[-1])


def peer_interpreter(peer: str) -> str:
    """The Python that --peer names; "torch" is this one, if it has PyTorch."""
    if peer != "torch":
        return peer
    if find_spec("torch") is None:
        raise UserError(f"--peer=torch: this Python has no torch; {PEER_REMEDY}")
    return sys.executable


class Timings(NamedTuple):
    """Rows of seconds of both sides, turn by turn; `peer` is empty where there was none."""

    ours: list[Sequence[PhaseSeconds]]
    peer: list[Sequence[PhaseSeconds]]
    peer_info: Mapping[str, Any]  # what the peer says of itself


def interleaved_timings(
    ours: TimedSteps, peer: Peer | None, *, turns: int, steps: int, on_turn: Callable[[PhaseSeconds], None]
) -> Timings:
    """Each side takes `steps` steps, `turns` times. `on_turn` gets the seconds of our last step after each turn."""
    our_steps, peer_steps, about = [], [], {}
    for _ in range(turns):
        our_steps.append(list(ours(steps)))
        if peer:
            reply = peer.run_steps(steps)
            peer_steps.append(reply["seconds"])
            about = {name: reply[name] for name in ("threads", "versions")}
        on_turn(our_steps[-1][-1])
    return Timings(our_steps, peer_steps, about)


def timing_summary(timed: Timings, phase: str, *, units: int = 1) -> dict[str, Any]:
    """Seconds of each phase, median and best of all steps; `units` (tokens) a second of the one that counts; and how
    many times as fast as the peer we are, by medians, by bests, and from turn to turn."""
    sides = {"ours": timed.ours, **({"peer": timed.peer} if timed.peer else {})}
    summary: dict[str, Any] = {
        "per_second": {side: units_per_second(turns, phase, units) for side, turns in sides.items()},
        **{side: phase_seconds(turns) for side, turns in sides.items()},
        "turns": {side: [[row[phase] for row in turn] for turn in turns] for side, turns in sides.items()},
        "threads": {"ours": thread_count()},
    }
    if timed.peer:
        speed = summary["per_second"]
        summary["threads"]["peer"] = timed.peer_info["threads"]
        summary["peer_versions"] = timed.peer_info["versions"]
        summary["ratio"] = {name: speed["ours"][name] / speed["peer"][name] for name in ("median", "best")}
        summary["ratio"]["each_turn"] = [
            units_per_second([theirs], phase)["median"] ** -1 * units_per_second([ours], phase)["median"]
            for ours, theirs in zip(timed.ours, timed.peer)
        ]
    return summary


def phase_seconds(turns: Sequence[Sequence[PhaseSeconds]]) -> dict[str, dict[str, float]]:
    rows = [row for turn in turns for row in turn]
    return {
        "median": {name: statistics.median(row[name] for row in rows) for name in rows[0]},
        "best": {name: min(row[name] for row in rows) for name in rows[0]},
    }


def units_per_second(turns: Sequence[Sequence[PhaseSeconds]], phase: str, units: int = 1) -> dict[str, float]:
    return {name: units / seconds[phase] for name, seconds in phase_seconds(turns).items()}

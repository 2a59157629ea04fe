"""Where a run's numbers come from: record.json, one entry for every start of the process, and the code it ran.

Each entry holds time (UTC), command, revision of the code (null where git does not know it), whether tracked files
differed from it and the file that holds the difference, versions, host, devices, seed, and the peak that MFU is over.
"""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from lm.console import warn
from lm.errors import UserError
from lm.hardware import peak_flops
from lm.workdir import RECORD, read_starts, write_text

CODE = Path(__file__).resolve().parent.parent  # the folder that holds `lm`
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
UNKNOWN = {"flops_per_second": None, "source": "the record could not be read"}
LONGEST = 2**18  # bytes of a difference that are kept


def note(path: Path, *, seed: int) -> dict[str, Any]:
    """Appends this start to the record of the run in `path`, and returns it.

    Uncommitted changes to tracked files go to code-N.diff beside it, N being the number of the start. A record that
    cannot be read or written is a warning: no run fails for it.
    """
    start = {**this_start(), "seed": seed, "peak": UNKNOWN}
    try:
        starts = read_starts(path)
        code, changes = revision(CODE)
        if changes:
            code["diff"] = f"code-{len(starts)}.diff"
            write_text(path / code["diff"], shortened(changes))
        start |= {**code, "peak": peak(starts)}
        write_text(path / RECORD, json.dumps([*starts, start], indent=2) + "\n")
    except UserError as error:
        warn(f"where this run comes from is not recorded: {error}")
    return start


def this_start() -> dict[str, Any]:
    """Time, command, versions and machine."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        **machine(),
    }


def machine() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
    }


def peak(starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`flops_per_second` that the devices reach at best, and its `source`; measured once for a run on a machine."""
    here = machine()
    for start in reversed(starts):
        if here.items() <= start.items():
            return start["peak"]
    return dict(zip(("flops_per_second", "source"), peak_flops()))


def revision(folder: Path) -> tuple[dict[str, Any], str]:
    """The git revision of the code in `folder` and whether it was changed since, both null if git does not track it;
    and the changes of tracked files as `git apply` takes them."""
    if git(folder, "ls-files", "--error-unmatch", "lm/__init__.py") is None:
        return {"revision": None, "dirty": None, "diff": None}, ""
    head, changes = git(folder, "rev-parse", "HEAD"), git(folder, "diff", "HEAD", "--no-ext-diff", "--no-color")
    if head is None or changes is None:
        return {"revision": None, "dirty": None, "diff": None}, ""
    return {"revision": head.strip(), "dirty": bool(changes), "diff": None}, changes


def git(folder: Path, *command: str) -> str | None:
    """What git says; None where there is no git, no checkout, no commit, or no answer within 10 seconds."""
    try:
        done = subprocess.run(["git", "-C", folder, *command], capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")


def shortened(changes: str) -> str:
    """The first LONGEST bytes of a difference, up to a line's end, and a line that says what is left out."""
    whole = changes.encode()
    if len(whole) <= LONGEST:
        return changes
    kept = whole[: whole.rindex(b"\n", 0, LONGEST) + 1] if b"\n" in whole[:LONGEST] else b""
    return kept.decode(errors="replace") + f"[{len(whole) - len(kept):,} of {len(whole):,} bytes left out here]\n"

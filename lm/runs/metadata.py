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

from lm.core.errors import UserError
from lm.runs.console import warn
from lm.runs.hardware import peak_flops
from lm.runs.workdir import METADATA_FILE, read_run_starts, write_text

CODE_ROOT = Path(__file__).resolve().parents[2]  # the folder that holds `lm`
RECORDED_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
UNKNOWN_PEAK = {"flops_per_second": None, "source": "the record could not be read"}
MAX_DIFF_BYTES = 2**18  # bytes of a difference that are kept


def record_start(path: Path, *, seed: int, own_files: Sequence[Path] = ()) -> dict[str, Any]:
    """Appends this start to the record of the run in `path`, and returns it.

    Uncommitted changes to tracked files go to code-N.diff beside it, N being the number of the start, and so does the
    whole of `own_files` (custom rewards, stages and models) that git does not track with the code. A record that
    cannot be read or written is a warning: no run fails for it.
    """
    start = {**start_metadata(), "seed": seed, "peak": UNKNOWN_PEAK}
    try:
        starts = read_run_starts(path)
        code, changes = code_revision(CODE_ROOT)
        changes += "".join(new_file_diff(file) for file in own_files if not is_tracked(file))
        if changes:
            code["diff"] = f"code-{len(starts)}.diff"
            write_text(path / code["diff"], truncated_diff(changes))
        start |= {**code, "peak": run_peak_flops(starts)}
        write_text(path / METADATA_FILE, json.dumps([*starts, start], indent=2) + "\n")
    except UserError as error:
        warn(f"where this run comes from is not recorded: {error}")
    return start


def start_metadata() -> dict[str, Any]:
    """Time, command, versions and machine."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in RECORDED_PACKAGES},
        },
        **machine_metadata(),
    }


def machine_metadata() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
    }


def run_peak_flops(starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`flops_per_second` that the devices reach at best, and its `source`; measured once for a run on a machine."""
    here = machine_metadata()
    for start in reversed(starts):
        if here.items() <= start.items():
            return start["peak"]
    return dict(zip(("flops_per_second", "source"), peak_flops()))


def code_revision(folder: Path) -> tuple[dict[str, Any], str]:
    """The git revision of the code in `folder` and whether it was changed since, both null if git does not track it;
    and the changes of tracked files as `git apply` takes them."""
    if git_output(folder, "ls-files", "--error-unmatch", "lm/__init__.py") is None:
        return {"revision": None, "dirty": None, "diff": None}, ""
    head, changes = (
        git_output(folder, "rev-parse", "HEAD"),
        git_output(folder, "diff", "HEAD", "--no-ext-diff", "--no-color"),
    )
    if head is None or changes is None:
        return {"revision": None, "dirty": None, "diff": None}, ""
    return {"revision": head.strip(), "dirty": bool(changes), "diff": None}, changes


def is_tracked(file: Path) -> bool:
    """Whether git tracks the file with the code, so that the revision and its difference hold it."""
    return git_output(CODE_ROOT, "ls-files", "--error-unmatch", str(file.resolve())) is not None


def new_file_diff(file: Path) -> str:
    """The file as a difference that makes it, under its own name in the folder where that is applied."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    head = f"diff --git a/{file.name} b/{file.name}\nnew file mode 100644\n--- /dev/null\n+++ b/{file.name}\n"
    return head + f"@@ -0,0 +1,{len(lines)} @@\n" + "".join(f"+{line}\n" for line in lines) if lines else ""


def git_output(folder: Path, *command: str) -> str | None:
    """What git says; None where there is no git, no checkout, no commit, or no answer within 10 seconds."""
    try:
        done = subprocess.run(["git", "-C", folder, *command], capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")


def truncated_diff(changes: str) -> str:
    """The first MAX_DIFF_BYTES bytes of a difference, up to a line's end, and a line that says what is left out."""
    encoded = changes.encode()
    if len(encoded) <= MAX_DIFF_BYTES:
        return changes
    kept = encoded[: encoded.rindex(b"\n", 0, MAX_DIFF_BYTES) + 1] if b"\n" in encoded[:MAX_DIFF_BYTES] else b""
    return kept.decode(errors="replace") + f"[{len(encoded) - len(kept):,} of {len(encoded):,} bytes left out here]\n"

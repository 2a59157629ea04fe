"""Everything that turns random matrices into an assistant; `python -m lm` lists the commands.

Rooms from low to high: core, losses, model, tokenizer, optim, data, runs, generate, rewards, weights, stages, report,
train, evaluate, compare, feedback, serve, sweep, bench, pipeline, studies. A file imports from its own room and lower
ones.
"""

import os as _os
import platform as _platform
import sys as _sys
from pathlib import Path as _Path


def restart_with_fast_environment() -> None:
    """Replaces this process by itself with huge pages for malloc and a cache for compiled programs, unless it has them.

    Both are read before the first line of Python runs; at this place nothing has been imported that would be twice.
    XLA's CPU backend allocates and frees its temporary memory at every step; with 2 MB pages that no longer costs a
    page fault per 4 kB (1.6 times the steps a second at width 128). The compilation cache is JAX's own, in the user's
    cache folder, and also keeps what compiles in less than JAX's limit of a second, of which a small run has ten; an
    environment that names another folder or limit is left as it is.
    """
    wanted = {
        "JAX_COMPILATION_CACHE_DIR": str(_Path.home() / ".cache" / "lm" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if _platform.libc_ver()[0] == "glibc":
        wanted["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    missing = {name: value for name, value in wanted.items() if name not in _os.environ}
    if missing:
        _os.environ.update(missing)
        _os.execv(_sys.executable, [_sys.executable, *_sys.orig_argv[1:]])


if _sys.orig_argv[1:2] == ["-m"] and _sys.orig_argv[2].startswith("lm."):  # a program of a room, started by itself
    restart_with_fast_environment()

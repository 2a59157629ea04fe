"""What the tests of sweeps run in the place of lm train: a trial that costs nothing and does what its config says.

loss after step t of the config's `train.steps`: (log10(rate) + 2)^2 + 0.01 * seed + 1 / t

HOLD=NAME:STEP in the environment: the trial of that folder waits after that step until it is killed.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from lm.core.config import flags_and_config, to_dict
from lm.core.errors import UserError

FLAGS = {"workdir": dict(required=True)}


def program(argv: list[str]) -> None:
    flags, config = flags_and_config(argv, __doc__, FLAGS)
    workdir = Path(flags.workdir)
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    with (workdir / "metrics.jsonl").open("a+") as metrics:
        metrics.seek(0)
        for step in range(len(metrics.readlines()) + 1, config.train.steps + 1):
            loss = (math.log10(config.rate) + 2) ** 2 + 0.01 * config.seed + 1 / step
            print(json.dumps({"step": step, "loss": loss}), file=metrics, flush=True)
            time.sleep(config.pause)
            if os.environ.get("HOLD") == f"{workdir.name}:{step}":
                time.sleep(600)
            if step == 2:
                FATES[config.fate](workdir)
        if config.fate != "silent":
            print(json.dumps({"step": step, "held_out/loss": loss}), file=metrics, flush=True)


def torn(workdir: Path) -> None:
    raise UserError("data.rate is torn: mend it")


def crash(workdir: Path) -> None:
    print("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 TB", file=sys.stderr)
    sys.exit(1)


def killed(workdir: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def once(workdir: Path) -> None:
    """Fails, but not when it is tried again."""
    if not (workdir / "failed").exists():
        (workdir / "failed").touch()
        raise UserError("the disk is full")


FATES = {
    "well": lambda workdir: None,
    "silent": lambda workdir: None,
    "torn": torn,
    "memory": crash,
    "killed": killed,
    "once": once,
}

if __name__ == "__main__":
    try:
        program(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")

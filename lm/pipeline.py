"""The whole way, from real text to an assistant: every stage in its own workdir under one run folder.

    python -m lm.pipeline --config=experiments/quickstart.py --workdir=runs/quickstart

The config holds one subtree a stage, in order: what `lm.train` (tokenizer, pretrain, sft, reward, ppo), `lm.verdicts`
or `lm.evaluate` would be given. Kill it at any moment and give the same command again: finished stages are passed over,
the interrupted one continues, and the result is bitwise the same.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from lm import evaluate, report, taste, train, verdicts
from lm.config import arguments, require
from lm.console import main, say
from lm.errors import UserError
from lm.stages import JUDGES
from lm.subtrees import subtrees
from lm.workdir import PIPELINE, TEMPORARY, read_json, write_text

FLAGS = {"workdir": dict(default=None, metavar="DIR", help="the run folder; default: the config's `root`")}
PROGRAMS: Mapping[str, Callable] = {"rank": verdicts.run, "evaluate": evaluate.run}  # every other stage is lm.train's


def run(config: ConfigDict) -> Path:
    """Runs the stages in order and writes report.html; returns the run folder."""
    root, start = Path(config.root), time.monotonic()
    record = taken_up(root, list(config.stages))
    for name in config.stages:
        say(f"\n{name}: {root / name}")
        began = time.monotonic()
        PROGRAMS.get(name, train.run)(config[name], root / name)
        record["seconds"][name] = record["seconds"].get(name, 0) + time.monotonic() - began
        write_text(root / PIPELINE, json.dumps(record, indent=2) + "\n")
        if "stage" in config[name] and config[name].stage.name in JUDGES:
            taste.show(taste.measured(root / name))
    page = report.write(root)
    say(
        f"\neverything took {sum(record['seconds'].values()):.0f} s ({time.monotonic() - start:.0f} s of them now)\n"
        f"report: {page}\nchat: python -m lm.chat --workdir={root}"
    )
    return root


def taken_up(root: Path, stages: list[str]) -> dict:
    """The record of the run in this folder: its stages and the seconds each took."""
    if (root / PIPELINE).exists():
        record = read_json(root / PIPELINE)
        if record["stages"] != stages:
            raise UserError(
                f"{root} has stages {', '.join(record['stages'])}, the config {', '.join(stages)}: "
                "give another --workdir, or remove this one"
            )
        return record
    try:
        root.mkdir(parents=True, exist_ok=True)
        foreign = {entry.name for entry in root.iterdir()} - {PIPELINE + TEMPORARY}
    except OSError as error:
        raise UserError(f"cannot make the folder {root}: {error.strerror}; give another --workdir") from error
    if foreign:
        raise UserError(
            f"{root} is not a pipeline's folder: it holds {min(foreign)} but no {PIPELINE}; give another --workdir"
        )
    record = {"stages": stages, "seconds": {}}
    write_text(root / PIPELINE, json.dumps(record, indent=2) + "\n")
    return record


def program(argv: list[str]) -> None:
    flags, config = arguments(argv, __doc__, FLAGS, subtrees)
    if "stages" not in config:
        raise UserError("the config has no `stages`: is it a config of lm.pipeline? (lm.train runs a single stage)")
    require(config, config.stages, "lm.pipeline")
    if flags.workdir:
        config.root = str(Path(flags.workdir))  # "runs/a/" and "runs/a" are one folder, so one config
    run(config)


if __name__ == "__main__":
    main(program)

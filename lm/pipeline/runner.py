"""Runs all stages in order, from text to an assistant, each in its own workdir under one run folder.

    python -m lm pipeline --config=experiments/quickstart.py --workdir=runs/quickstart
    python -m lm pipeline --config=experiments/quickstart.py --workdir=runs/longer --config.pretrain.train.steps=2000

The config has one subtree for each stage, in order: what `lm train` (tokenizer, pretrain, sft, reward, ppo),
`lm auto-rank` or `lm evaluate` would be given. To continue after a kill, give the same command again: finished stages
are skipped, the interrupted one continues, and the result is bitwise the same.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from lm.core.config import flags_and_config, require_entries
from lm.core.errors import UserError
from lm.evaluate import models
from lm.feedback import auto_rank
from lm.report import pipeline, reward_model
from lm.runs.console import run_program, say
from lm.runs.workdir import PIPELINE_FILE, TEMPORARY_SUFFIX, read_json, write_text
from lm.stages import REWARD_MODEL_STAGES
from lm.sweep.config_functions import config_functions
from lm.train import loop

FLAGS = {"workdir": dict(default=None, metavar="DIR", help="the run folder; default: the config's `root`")}
STAGE_PROGRAMS: Mapping[str, Callable] = {
    "rank": auto_rank.run_auto_rank,
    "evaluate": models.run_evaluation,
}  # every other stage is lm train's


def run_pipeline(config: ConfigDict) -> Path:
    """Runs the stages in order and writes report.html; returns the run folder."""
    root, start = Path(config.root), time.monotonic()
    record = pipeline_record(root, list(config.stages))
    for name in config.stages:
        say(f"\n{name}: {root / name}")
        began = time.monotonic()
        STAGE_PROGRAMS.get(name, loop.train_stage)(config[name], root / name)
        record["seconds"][name] = record["seconds"].get(name, 0) + time.monotonic() - began
        write_text(root / PIPELINE_FILE, json.dumps(record, indent=2) + "\n")
        if "stage" in config[name] and config[name].stage.name in REWARD_MODEL_STAGES:
            reward_model.print_measurements(reward_model.measure_reward_model(root / name))
    page = pipeline.write_report(root)
    say(
        f"\neverything took {sum(record['seconds'].values()):.0f} s ({time.monotonic() - start:.0f} s of them now)\n"
        f"report: {page}\nchat: python -m lm chat --workdir={root}"
    )
    return root


def pipeline_record(root: Path, stages: list[str]) -> dict:
    """The record of the run in this folder: its stages and the seconds each took."""
    if (root / PIPELINE_FILE).exists():
        record = read_json(root / PIPELINE_FILE)
        if record["stages"] != stages:
            raise UserError(
                f"{root} has stages {', '.join(record['stages'])}, the config {', '.join(stages)}: "
                "give another --workdir, or remove this one"
            )
        return record
    try:
        root.mkdir(parents=True, exist_ok=True)
        foreign = {entry.name for entry in root.iterdir()} - {PIPELINE_FILE + TEMPORARY_SUFFIX}
    except OSError as error:
        raise UserError(f"cannot make the folder {root}: {error.strerror}; give another --workdir") from error
    if foreign:
        raise UserError(
            f"{root} is not a pipeline's folder: it holds {min(foreign)} but no {PIPELINE_FILE}; give another --workdir"
        )
    record = {"stages": stages, "seconds": {}}
    write_text(root / PIPELINE_FILE, json.dumps(record, indent=2) + "\n")
    return record


def program(argv: list[str]) -> None:
    flags, config = flags_and_config(argv, __doc__, FLAGS, config_functions)
    if "stages" not in config:
        raise UserError("the config has no `stages`: is it a config of lm pipeline? (lm train runs a single stage)")
    require_entries(config, config.stages, "lm pipeline")
    if flags.workdir:
        config.root = str(Path(flags.workdir))  # "runs/a/" and "runs/a" are one folder, so one config
    run_pipeline(config)


if __name__ == "__main__":
    run_program(program)

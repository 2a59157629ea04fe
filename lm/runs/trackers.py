"""Where metrics go beside TensorBoard, when asked: Weights & Biases, MLflow. A resumed run continues there too.

Their own environment variables say where they send to: WANDB_PROJECT, WANDB_MODE=offline, MLFLOW_TRACKING_URI,
MLFLOW_EXPERIMENT_NAME. The id that each gave the run is kept in the workdir. For a tracking server the package
mlflow-skinny is enough.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from lm.core.config import flatten
from lm.core.errors import UserError
from lm.runs.workdir import TRACKERS_FILE, read_json, write_text


class Tracker(NamedTuple):
    name: str
    id: str  # of the run, there
    write: Callable[[int, Mapping[str, float]], None]  # (step, values)
    close: Callable[[], None]


def wandb_tracker(package, path: Path, config: Mapping[str, Any], id: str | None) -> Tracker:
    """Rows are drawn over their own "step": what a resumed run writes again replaces the earlier points."""
    settings = package.Settings(console="off", silent=True)
    run = package.init(dir=path, name=path.name, config=config, id=id, resume="allow", settings=settings)
    run.define_metric("*", step_metric="step")
    return Tracker("wandb", run.id, lambda step, values: run.log({"step": step, **values}), run.finish)


def mlflow_tracker(package, path: Path, config: Mapping[str, Any], id: str | None) -> Tracker:
    """The parameters are those of the first start, as MLflow does not let them change."""
    run = package.start_run(run_id=id, run_name=None if id else path.name)
    if id is None:
        package.log_params(flatten(config))
    return Tracker(
        "mlflow",
        run.info.run_id,
        lambda step, values: package.log_metrics(values, step=step, run_id=run.info.run_id),
        package.end_run,
    )


TRACKERS = {"wandb": wandb_tracker, "mlflow": mlflow_tracker}


def tracker_packages(text: str) -> dict[str, Any]:
    """The packages behind --log=NAME,NAME, imported. UserError for an unknown name, and for one not installed."""
    packages = {}
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in TRACKERS:
            raise UserError(f"--log={text}: {name!r} is no tracker; choose among {', '.join(TRACKERS)}")
        try:
            packages[name] = import_module(name)
        except ImportError:
            raise UserError(f"--log={name} needs a package that is not here: pip install {name}") from None
    return packages


def open_trackers(packages: Mapping[str, Any], path: Path, config: Mapping[str, Any]) -> Sequence[Tracker]:
    """One tracker for each package, taking up the run that `path` had there. UserError if one cannot be reached."""
    known = read_json(path / TRACKERS_FILE) if (path / TRACKERS_FILE).exists() else {}
    trackers = []
    for name, package in packages.items():
        try:
            trackers.append(TRACKERS[name](package, path, config, known[name] if name in known else None))
        except Exception as error:
            for tracker in trackers:
                tracker.close()
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"--log={name} cannot begin: {reason}; mend that, or leave {name} out of --log") from error
    if trackers:
        write_text(path / TRACKERS_FILE, json.dumps(known | {each.name: each.id for each in trackers}) + "\n")
    return trackers

"""What a checkpoint holds of a run's state, and how a run continues from it."""

from pathlib import Path
from typing import Any

from lm.core.errors import UserError
from lm.core.types import TrainState
from lm.optim.ema import averaged_params, with_averaged_params
from lm.runs.checkpoint import Checkpoints
from lm.train.setup import TrainingSetup


def checkpoint_tree(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds: everything but the frozen networks, which every start builds again.

    "params" is for programs that load the run: averaged weights, if there are any. Then "live" are those in training.
    """
    average = averaged_params(state.opt_state)
    return {
        "params": average or state.params,
        "live": state.params if average else {},
        "opt_state": with_averaged_params(state.opt_state, {}),
        "counts": {"step": state.step, "key": state.key},
        "memory": state.memory,
    }


def restored_state(checkpoints: Checkpoints, r: TrainingSetup) -> tuple[int, TrainState]:
    """(batches done, state) of the newest whole checkpoint, or (0, the starting state)."""
    return state_from_checkpoint(checkpoints.restore(checkpoint_tree(r.initial_state)), r, checkpoints.directory)


def state_from_checkpoint(
    checkpoint: tuple[int, dict[str, Any], dict[str, Any]] | None, r: TrainingSetup, directory: Path
) -> tuple[int, TrainState]:
    """(batches done, state) of a checkpoint as lm.runs.checkpoint reads it; (0, the starting state) of None."""
    if checkpoint is None:
        return 0, r.initial_state
    done, tree, meta = checkpoint
    if meta["fingerprint"] != r.checkpoint_metadata["fingerprint"]:
        raise UserError(
            f"{directory} was trained with tokenizer and template {meta['fingerprint'][:8]}, but "
            f"this run has {r.checkpoint_metadata['fingerprint'][:8]}: give another --workdir, or remove this one"
        )
    opt_state = with_averaged_params(tree["opt_state"], tree["params"])
    params = tree["live"] or tree["params"]
    return done, r.initial_state.replace(params=params, opt_state=opt_state, memory=tree["memory"], **tree["counts"])

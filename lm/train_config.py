"""What a config of lm.train is: its entries, the function that each subtree calls, how long a run is."""

import dataclasses
from collections.abc import Mapping

from ml_collections import ConfigDict

from lm import optim
from lm.config import to_dict
from lm.errors import UserError, at_least
from lm.model import Config
from lm.options import Called, setting
from lm.sharding import make_mesh
from lm.stages import STAGES
from lm.stages.next_token import next_token
from lm.stages.policy import learner
from lm.vocabulary import fit_tokenizer

ENTRIES = ("seed", "tokenizer", "init_from", "model", "optimizer", "stage", "data", "mesh", "train")
EQUAL = ("temperature", "axes")  # options that stage and data may both have: one distribution, one set of scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a run is and how often it does what; counted in batches."""

    steps: int
    log_every: int = 10
    evaluate_every: int = 0  # held-out score; 0: at the start and the end only
    save_every: int = 100
    keep: int = 2  # newest checkpoints that stay
    samples: int = 16  # rows of a sampled batch that rollouts.jsonl shows, at the start and at every save

    def __post_init__(self):
        at_least(1, "train", steps=self.steps, log_every=self.log_every, save_every=self.save_every, keep=self.keep)
        at_least(0, "train", evaluate_every=self.evaluate_every, samples=self.samples)

    def scores(self, done: int) -> bool:
        """Whether the state after `done` batches is scored on the held-out side."""
        between = self.evaluate_every and done % self.evaluate_every == 0
        return bool(not done or between or done >= self.steps)


def subtrees(config: ConfigDict) -> dict[str, Called]:
    """The function that each subtree of a config calls: the loop, overrides and --help go by it."""
    if config.stage.name == "tokenizer":
        return {"data": Called(fit_tokenizer)}
    if config.stage.name not in STAGES:
        return {}
    stage = STAGES[config.stage.name]
    optimizer = setting(Called(optim.make), config.optimizer if "optimizer" in config else {}, "name")
    optimizers = [optimizer] if optimizer in optim.OPTIMIZERS else list(optim.OPTIMIZERS)
    inherited = "init_from" in config and config.init_from
    unset = "what is not set is as init_from has it" if inherited else "vocab_size, if not set, is the tokenizer's"
    functions = {
        "model": Called(Config, note=unset),
        "optimizer": Called(
            optim.make, optim.signature(*optimizers), tuple(optim.OPTIMIZERS[name] for name in optimizers)
        ),
        "stage": Called(stage.make, also=(learner, next_token)),
        "data": Called(stage.batches),
        "mesh": Called(make_mesh),
        "train": Called(Schedule),
    }
    return {subtree: called for subtree, called in functions.items() if subtree in config}


def stop_unless_equal(config: ConfigDict, functions: Mapping[str, Called]) -> None:
    """UserError where one option of stage and data must be the same in both and is not."""
    for name in EQUAL:
        if all(name in functions[subtree].options for subtree in ("stage", "data")):
            stage, data = (setting(functions[each], to_dict(config[each]), name) for each in ("stage", "data"))
            if stage != data:
                raise UserError(
                    f"stage.{name} is {stage}, but data.{name} is {data}: what the stage learns from must be what its "
                    "batches bring; set both to the same"
                )

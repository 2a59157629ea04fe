"""The config of lm train: its entries, the function that each subtree calls, and the schedule of a run."""

import dataclasses
from collections.abc import Mapping

from ml_collections import ConfigDict

from lm.core.config import to_dict
from lm.core.errors import UserError, check_at_least
from lm.core.options import ConfigFunction, option_value
from lm.core.sharding import make_mesh
from lm.model import ModelConfig
from lm.model.imported import model_maker
from lm.optim import optimizers
from lm.stages import is_stage_name, named_stage
from lm.stages.pretraining.next_token import next_token_loss
from lm.stages.rl.policy_gradient import policy_gradient_update
from lm.train.tokenizer_stage import fit_tokenizer

CONFIG_KEYS = ("seed", "tokenizer", "init_from", "model", "optimizer", "stage", "data", "mesh", "train")
EQUAL_OPTIONS = (
    "temperature",
    "axes",
)  # options that stage and data may both have: one distribution, one set of scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSchedule:
    """How long a run is and how often it logs, saves and scores, counted in batches."""

    steps: int
    log_every: int = 10
    evaluate_every: int = 0  # batches between held-out scores; 0: only at the start and the end
    save_every: int = 100
    keep: int = 2  # newest checkpoints that stay
    logged_rollouts: int = 16  # rows of a sampled batch that rollouts.jsonl shows, at the start and at every save
    # RL: a held-out rating, such as score/rule: where it falls while the reward rises, the run stops, and its result is
    # the policy with the best rating (lm.train.over_optimization); "": no such gauge
    watched_rating: str = ""
    watched_errors: float = 2.0  # standard errors by which it must have fallen

    def __post_init__(self):
        check_at_least(
            1, "train", steps=self.steps, log_every=self.log_every, save_every=self.save_every, keep=self.keep
        )
        check_at_least(
            0,
            "train",
            evaluate_every=self.evaluate_every,
            logged_rollouts=self.logged_rollouts,
            watched_errors=self.watched_errors,
        )
        if self.watched_rating and not self.evaluate_every:
            raise UserError(
                "train.watched_rating needs ratings between start and end: set train.evaluate_every, e.g. to "
                f"{max(1, self.steps // 10)}"
            )

    def scores(self, done: int) -> bool:
        """Whether the state after `done` batches is scored on the held-out side."""
        between = self.evaluate_every and done % self.evaluate_every == 0
        return bool(not done or between or done >= self.steps)

    def saves(self, done: int) -> bool:
        """Whether the state after `done` batches is saved; each that is rated, where the best of them is wanted."""
        return done % self.save_every == 0 or done >= self.steps or bool(self.watched_rating and self.scores(done))


def train_functions(config: ConfigDict) -> dict[str, ConfigFunction]:
    """The function that each subtree of a config calls: the loop, overrides and --help go by it."""
    if config.stage.name == "tokenizer":
        return {"data": ConfigFunction(fit_tokenizer)}
    if not is_stage_name(config.stage.name):
        return {}
    stage = named_stage(config.stage.name)
    optimizer = option_value(
        ConfigFunction(optimizers.make_optimizer), config.optimizer if "optimizer" in config else {}, "name"
    )
    names = [optimizer] if optimizer in optimizers.OPTIMIZERS else list(optimizers.OPTIMIZERS)
    inherited = "init_from" in config and config.init_from
    unset = "what is not set is as init_from has it" if inherited else "vocab_size, if not set, is the tokenizer's"
    own_model = config.model.name if "model" in config and "name" in config.model else ""
    functions = {
        "model": ConfigFunction(model_maker(own_model) if own_model else ModelConfig, note=unset, is_named=True),
        "optimizer": ConfigFunction(
            optimizers.make_optimizer,
            optimizers.optimizer_signature(*names),
            tuple(optimizers.OPTIMIZERS[name] for name in names),
        ),
        "stage": ConfigFunction(stage.make, also=(policy_gradient_update, next_token_loss)),
        "data": ConfigFunction(stage.batches),
        "mesh": ConfigFunction(make_mesh),
        "train": ConfigFunction(TrainingSchedule),
    }
    return {subtree: called for subtree, called in functions.items() if subtree in config}


def check_equal_options(config: ConfigDict, functions: Mapping[str, ConfigFunction]) -> None:
    """UserError where one option of stage and data must be the same in both and is not."""
    for name in EQUAL_OPTIONS:
        if all(name in functions[subtree].options for subtree in ("stage", "data")):
            stage, data = (option_value(functions[each], to_dict(config[each]), name) for each in ("stage", "data"))
            if stage != data:
                raise UserError(
                    f"stage.{name} is {stage}, but data.{name} is {data}: what the stage learns from must be what its "
                    "batches bring; set both to the same"
                )

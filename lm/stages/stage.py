"""What a method is, for the loop and for everything else that treats all methods alike."""

import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

from lm.optim.update import Update
from lm.stages.context import Batches


class Stage(NamedTuple):
    """One way of training: how it learns, from what, and what a run of it shows and must keep to."""

    module: str  # the file that is the whole of it: __name__
    make: Callable[..., Update]  # (model, optimizer, *, hyperparameters)
    batches: Callable[..., Batches]  # (context, *, data options)
    summary: Callable[..., Mapping[str, float]]  # (held-out metrics, dataset_info) -> numbers by name
    shown_metrics: tuple[str, ...] = ("loss",)  # in the live line
    metric_limits: Mapping[str, float] = {}  # the loop stops above them
    start_metrics: Mapping[str, tuple[float, float]] = {}  # held out, before the first step: (value, tolerance)
    trains_reward_model: bool = False  # it scores answers and writes none
    has_teacher: bool = False  # its option `teacher` is a workdir, whose network the loop puts into `frozen`
    samples_rollouts: bool = False  # it learns from answers that the policy samples, and a reward

    @property
    def name(self) -> str:
        return self.module.rpartition(".")[2]

    @property
    def title(self) -> str:
        """The first line of the file's docstring."""
        return (sys.modules[self.module].__doc__ or self.name).partition("\n")[0]

    @property
    def path(self) -> str:
        """The file, for messages that point to it: "lm/stages/rl/ppo.py"."""
        return self.module.replace(".", "/") + ".py"


def stages_where(stages: Mapping[str, Stage], field: str) -> tuple[str, ...]:
    """The names of the stages for which a yes-or-no field is true."""
    return tuple(name for name, stage in stages.items() if getattr(stage, field))

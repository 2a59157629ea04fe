"""Every way of training, by name: the whole of a method is one file in one of the families below.

`pretraining`, `reward_model`, `preference`, `rl`, `distillation`; `context` is what a program gives a stage,
`stage.Stage`
what a stage is. A new method is a file here that ends in a `Stage`, and a line in STAGES.
"""

from lm.core.errors import UserError
from lm.core.imports import import_object, is_import_path
from lm.stages.distillation.distill import DISTILL
from lm.stages.distillation.gkd import GKD
from lm.stages.preference.dpo import DPO
from lm.stages.preference.ipo import IPO
from lm.stages.preference.kto import KTO
from lm.stages.preference.orpo import ORPO
from lm.stages.preference.simpo import SIMPO
from lm.stages.pretraining.pretrain import PRETRAIN
from lm.stages.pretraining.sft import SFT
from lm.stages.reward_model.listwise import LISTWISE
from lm.stages.reward_model.reward import REWARD
from lm.stages.rl.best_of_n import BEST_OF_N
from lm.stages.rl.cispo import CISPO
from lm.stages.rl.dapo import DAPO
from lm.stages.rl.dr_grpo import DR_GRPO
from lm.stages.rl.grpo import GRPO
from lm.stages.rl.gspo import GSPO
from lm.stages.rl.online_dpo import ONLINE_DPO
from lm.stages.rl.ppo import PPO
from lm.stages.rl.reinforce_pp import REINFORCE_PP
from lm.stages.rl.rloo import RLOO
from lm.stages.stage import Stage, stages_where

STAGES: dict[str, Stage] = {
    "pretrain": PRETRAIN,
    "sft": SFT,
    "reward": REWARD,
    "listwise": LISTWISE,
    "dpo": DPO,
    "ipo": IPO,
    "kto": KTO,
    "orpo": ORPO,
    "simpo": SIMPO,
    "ppo": PPO,
    "grpo": GRPO,
    "dr_grpo": DR_GRPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "rloo": RLOO,
    "reinforce_pp": REINFORCE_PP,
    "best_of_n": BEST_OF_N,
    "online_dpo": ONLINE_DPO,
    "distill": DISTILL,
    "gkd": GKD,
}
REWARD_MODEL_STAGES = stages_where(STAGES, "trains_reward_model")
TEACHER_STAGES = stages_where(STAGES, "has_teacher")
ROLLOUT_STAGES = stages_where(STAGES, "samples_rollouts")


def is_stage_name(name: str) -> bool:
    """Whether it names a stage, or may: a built-in one, or a custom one, "my_method.py:STAGE"."""
    return name in STAGES or is_import_path(name)


def named_stage(name: str, option: str = "stage.name") -> Stage:
    """The built-in stage of this name, or the `Stage` that "file.py:STAGE" names. UserError, which begins with
    `option`, for anything else.

    A custom stage trains policies: later stages and programs know a reward model by the name of its stage.
    """
    if name in STAGES:
        return STAGES[name]
    if not is_import_path(name):
        raise UserError(f"{option} is {name!r}; choose one of tokenizer, {', '.join(STAGES)}, or yours, file.py:STAGE")
    stage = import_object(name, option)
    if not isinstance(stage, Stage):
        raise UserError(f"{option} {name!r} is of type {type(stage).__name__}, no lm.stages.Stage: name the Stage")
    if stage.trains_reward_model:
        raise UserError(
            f"{option} {name!r} says trains_reward_model, but a reward model is known by a built-in stage's name "
            f"({', '.join(REWARD_MODEL_STAGES)}): add yours to STAGES in lm/stages/__init__.py"
        )
    return stage

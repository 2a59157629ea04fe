"""Every way of training, by name. A stage exports make, batches, summary, SHOWN, LIMITS and START."""

from lm.stages import (
    best_of_n,
    cispo,
    dapo,
    distill,
    dpo,
    dr_grpo,
    gkd,
    grpo,
    gspo,
    ipo,
    kto,
    listwise,
    online_dpo,
    orpo,
    ppo,
    pretrain,
    reinforce_pp,
    reward,
    rloo,
    sft,
    simpo,
)

STAGES = {
    "pretrain": pretrain,
    "sft": sft,
    "distill": distill,
    "gkd": gkd,
    "reward": reward,
    "listwise": listwise,
    "ppo": ppo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "best_of_n": best_of_n,
    "dpo": dpo,
    "ipo": ipo,
    "kto": kto,
    "orpo": orpo,
    "simpo": simpo,
    "online_dpo": online_dpo,
}
JUDGES = ("reward", "listwise")  # those that leave a reward model: it scores answers and writes none
TAUGHT = ("distill", "gkd")  # those whose option `teacher` is a workdir: lm.train puts its network into `frozen`
# Those that learn from answers which the policy samples itself, and a reward.
SAMPLERS = ("ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "best_of_n", "online_dpo")

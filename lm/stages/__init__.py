"""Every way of training, by name. A stage exports make, batches, summary, SHOWN and LIMITS."""

from lm.stages import listwise, ppo, pretrain, reward, sft

STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "listwise": listwise, "ppo": ppo}
JUDGES = ("reward", "listwise")  # those that leave a reward model: it scores answers and writes none

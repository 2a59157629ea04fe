"""Every way of training, by name. A stage exports make, batches and summary; LIMITS where the loop must watch a metric."""

from lm.stages import ppo, pretrain, reward, sft

STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo}

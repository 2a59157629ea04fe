"""Every way of training, by name. A stage exports make, batches, summary, SHOWN and LIMITS."""

from lm.stages import ppo, pretrain, reward, sft

STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo}

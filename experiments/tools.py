"""A policy learns to use a tool: it asks a calculator, reads the reply, and says the number; GRPO over two exchanges.

What the calculator says is context, never trained; the verifier looks at the last answer only.
Paper: Shao et al. 2024, arXiv 2402.03300; masking the tool's tokens: Jin et al. 2025 (Search-R1), arXiv 2503.09516.
Command: python -m lm train --config=experiments/tools.py --workdir=runs/tools/grpo
Needs: runs/tools/sft, from python -m lm train --config=experiments/sft.py --workdir=runs/tools/sft
--config.data.sources=arithmetic --config.data.length=64 --config.train.steps=65 --config.optimizer.total_steps=65
--config.optimizer.learning_rate=1e-3 --config.init_from=runs/small_talk/pretrain
Expect: held-out sums that are right from 0.26 to 0.34 at a KL of 4.0 nats, in 8 minutes on busy cores of an AMD EPYC.
Change first: optimizer.learning_rate, train.steps, data.exchanges.
"""

from ml_collections import ConfigDict

from lm.core.config import sibling_config


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    config = sibling_config(__file__, "grpo").get_config(arg).unlock()
    tiny = arg == "tiny"
    config.init_from = "runs/tools/sft"
    config.stage.beta = 0.04
    config.data.sources = "arithmetic"
    config.data.environment = "calculator"
    config.data.rewards = ConfigDict({"arithmetic": 1.0})
    config.data.rater = ""
    config.data.turns = 1
    config.data.prompt_length = 24
    config.data.max_new = 8 if tiny else 16
    config.data.reply_length = 12
    config.data.truncation_penalty = 0.0
    config.train.steps = 4 if tiny else 56
    config.optimizer.learning_rate = 5e-4
    return config.lock()

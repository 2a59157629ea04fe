"""GRPO on prompts and a reward of one's own: six digits are given, and the answer is to be the last of them.

The start knows how to name one of the digits, any of them; nothing tells the policy which is wanted but the reward.
Paper: Shao et al. 2024, arXiv 2402.03300.
Command: python -m lm train --config=experiments/own_reward.py --workdir=runs/own_reward/grpo
Needs: runs/own_reward/prompts.jsonl, from python experiments/examples/make_rows.py runs/own_reward; and
runs/own_reward/start, from python -m lm train --config=experiments/own_reward.py:start --workdir=runs/own_reward/start,
which needs runs/small_talk/tokenizer (experiments/tokenizer.py).
Expect: held-out reward, the share of right answers, from 0.16 to over 0.9 (own_data.md).
Change first: data.rewards (see experiments/examples/my_rewards.py), data.sources, optimizer.learning_rate.
"""

from ml_collections import ConfigDict

from lm.core.config import sibling_config

FOLDER = "runs/own_reward"


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"; "start" or "start_tiny" for the SFT that it starts from."""
    stage, _, size = arg.partition("_") if arg.startswith("start") else ("", "", arg)
    return start_config(size) if stage else policy_config(size)


def start_config(size: str) -> ConfigDict:
    """SFT from nothing on conversations whose answer is any one of the digits."""
    config, tiny = sibling_config(__file__, "sft").get_config(size).unlock(), size == "tiny"
    config.init_from = ""
    config.tokenizer = "runs/small_talk/tokenizer"
    config.model = ConfigDict({"layers": 2 if tiny else 4, "width": 32 if tiny else 128, "heads": 4, "kv_heads": 4})
    config.model.update({"head_size": 8 if tiny else 32, "hidden": 64 if tiny else 384, "context": 64})
    config.data.sources = f"{FOLDER}/talk.jsonl"
    config.data.length = 64
    config.train.steps = 8 if tiny else 300
    return config.lock()


def policy_config(size: str) -> ConfigDict:
    """GRPO on prompts with answers."""
    config, tiny = sibling_config(__file__, "grpo").get_config(size).unlock(), size == "tiny"
    config.init_from = f"{FOLDER}/start"
    config.stage = ConfigDict({"name": "grpo", "beta": 0.0, "temperature": 1.0})
    config.data = ConfigDict(
        {
            "sources": f"{FOLDER}/prompts.jsonl",
            "rewards": "experiments/examples/my_rewards.py:accuracy=1.0",
            "reward_timeout": 10.0,  # seconds
            "prompt_length": 24,
            "max_new": 4,
            "rollouts": 16 if tiny else 256,
            "group": 8,
            "temperature": config.stage.get_oneway_ref("temperature"),
            "truncation_penalty": 0.0,  # the reward alone counts
            "held_out": 0.1,
            "held_out_rollouts": 16 if tiny else 1024,
        }
    )
    config.train.steps = 4 if tiny else 80
    config.optimizer.learning_rate = 6e-4
    config.optimizer.schedule_name = "cosine"  # at a constant rate one seed of three fell back to 0.7
    config.optimizer.total_steps = config.train.get_oneway_ref("steps")
    return config.lock()

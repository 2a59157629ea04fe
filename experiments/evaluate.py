"""The raw, the fine-tuned and the PPO model on the same unseen text and prompts, with intervals and win rates.

Command: python -m lm evaluate --config=experiments/evaluate.py --workdir=runs/small_talk/evaluate
Needs: runs/small_talk/pretrain, sft and ppo.
Expect: rater's score 3.0 raw, 4.5 SFT, 5.6 PPO on 119 prompts, in 38 s on 2 cores of an AMD EPYC (Zen 4).
Change first: models (any workdirs, by the name to show), evaluate.prompts, evaluate.temperature.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    assert arg in ("", "tiny"), "choose nothing or tiny"
    tiny = arg == "tiny"
    config = ConfigDict()
    config.seed = 0
    config.models = ConfigDict(
        {"raw": "runs/small_talk/pretrain", "sft": "runs/small_talk/sft", "ppo": "runs/small_talk/ppo"}
    )
    config.evaluate = ConfigDict(
        {
            "order": ("raw", "sft", "ppo"),  # each is compared with the one before it
            "corpus": "stdlib,chitchat",
            "sources": "chitchat",
            "turns": 3,
            "prompts": 32 if tiny else 192,
            "prompt_length": 32 if tiny else 96,
            "max_new": 16 if tiny else 48,
            "temperature": 0.7,
            "rater": "rule",
            "held_out": 0.05,
            "held_out_bytes": 20_000 if tiny else 200_000,
            "length": 64 if tiny else 256,
            "rows_at_once": 32 if tiny else 64,
        }
    )
    return config.lock()

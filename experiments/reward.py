"""A Bradley-Terry reward model from ranked pairs of answers, starting as the SFT model.

Paper: Stiennon et al. 2020, arXiv 2009.01325; Ouyang et al. 2022, eq. 1, arXiv 2203.02155.
Command: python -m lm train --config=experiments/reward.py --workdir=runs/small_talk/reward
Needs: runs/small_talk/sft and runs/small_talk/rank/rankings.jsonl (any file of that format).
Expect: accuracy 0.87 +- 0.03 on held-out pairs, in 44 s on 2 cores of an AMD EPYC (Zen 4).
Change first: train.steps (too many overfit: watch held_out/accuracy), optimizer.learning_rate.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    assert arg in ("", "tiny"), "choose nothing or tiny"
    tiny = arg == "tiny"
    config = ConfigDict()
    config.seed = 0
    config.tokenizer = ""
    config.init_from = "runs/small_talk/sft"
    config.model = ConfigDict({})
    config.data = ConfigDict(
        {
            "rankings": "runs/small_talk/rank/rankings.jsonl",
            "length": 64 if tiny else 104,
            "prompts_per_batch": 8 if tiny else 32,
            "axes": {"overall": 1.0},  # and its share of the total score; further axes need verdicts that score them
            "held_out": 0.15,
            "limit": 0,  # verdicts to learn from; 0: all
        }
    )
    config.train = ConfigDict(
        {"steps": 8 if tiny else 80, "log_every": 4 if tiny else 10, "save_every": 4 if tiny else 50}
    )
    config.optimizer = ConfigDict(
        {
            "learning_rate": 5e-4,
            "total_steps": config.train.get_oneway_ref("steps"),
            "warmup_steps": 2 if tiny else 10,
            "schedule_name": "cosine",
            "weight_decay": 0.1,
        }
    )
    config.stage = ConfigDict({"name": "reward", "margin": 0.0, "flip_probability": 0.0, "centring_coefficient": 0.01})
    config.stage.axes = config.data.axes  # must be equal: one dict, so that to set an entry of either sets both
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    return config.lock()

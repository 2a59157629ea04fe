"""On-policy distillation: a small student writes, and at each word learns what the PPO policy would have said there.

Paper: Agarwal et al. 2023, arXiv 2306.13649.
Command: python -m lm train --config=experiments/gkd.py --workdir=runs/small_talk/gkd
Needs: runs/small_talk/distill, the student, and runs/small_talk/ppo, the teacher, which is five times its size.
Expect: divergence on its own words from 0.88 to 0.22 nats a token, agreement from 0.31 to 0.83, in 215 s on 2 shared
cores of an AMD EPYC (Zen 4). It sees no reward, yet the rater's score of its answers goes from 4.50 to 5.56 (+-0.07;
PPO itself: 5.59). People's conversations alone (data.on_policy_fraction=0.0) give 0.24 and 5.66: so small a student
gains nothing but a closer fit from writing itself.
Change first: data.on_policy_fraction, stage.beta (0 forward KL ... 1 reverse KL), stage.teacher,
optimizer.learning_rate.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    assert arg in ("", "tiny"), "choose nothing or tiny"
    tiny = arg == "tiny"
    config = ConfigDict()
    config.seed = 0
    config.tokenizer = ""
    config.init_from = "runs/small_talk/distill"
    config.model = ConfigDict({})
    config.stage = ConfigDict({"name": "gkd", "teacher": "runs/small_talk/ppo", "beta": 1.0, "temperature": 1.0})
    config.data = ConfigDict(
        {
            "sources": "chitchat",
            "turns": 3,
            "prompt_length": 32 if tiny else 64,
            "max_new": 8 if tiny else 32,
            "rollouts": 8 if tiny else 64,
            "on_policy_fraction": 1.0,  # the share of batches that the student writes; the rest are people's
            "temperature": config.stage.get_oneway_ref("temperature"),  # must be equal: one distribution
            "length": 64 if tiny else 256,
            "batch_size": 8 if tiny else 16,
            "held_out": 0.05,
            "held_out_rollouts": 8 if tiny else 64,
        }
    )
    config.train = ConfigDict(
        {"steps": 4 if tiny else 100, "log_every": 2 if tiny else 10, "save_every": 2 if tiny else 50}
    )
    config.optimizer = ConfigDict(
        {
            "learning_rate": 1e-3,
            "total_steps": config.train.get_oneway_ref("steps"),
            "warmup_steps": 1 if tiny else 10,
            "schedule_name": "cosine",
            "weight_decay": 0.0,
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    return config.lock()

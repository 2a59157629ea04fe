"""Distillation: a student a fifth of the SFT model's size learns, from nothing, to say what that model would say.

Paper: Hinton et al. 2015, arXiv 1503.02531; Agarwal et al. 2023, arXiv 2306.13649 (the divergences).
Command: python -m lm train --config=experiments/distill.py --workdir=runs/small_talk/distill
Needs: runs/small_talk/sft, the teacher.
Expect: held-out divergence from 3.62 to 0.38 nats, reply loss from 8.00 to 4.65, in 150 s on 2 busy cores of an AMD
EPYC (Zen 4). On the same batches the same student comes to 5.03 by stage sft, 4.95 by beta 0.5, 5.44 by beta 1. If it
was pretrained first (as ratings.md says), to 4.37 here, 4.43 by sft, 4.83 and 4.91 by the other betas.
Change first: stage.beta (0 forward KL ... 1 reverse KL), train.steps, model (any sizes), stage.teacher.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    assert arg in ("", "tiny"), "choose nothing or tiny"
    tiny = arg == "tiny"
    config = ConfigDict()
    config.seed = 0
    config.tokenizer = "runs/small_talk/tokenizer"  # the teacher's
    config.init_from = ""
    config.model = ConfigDict(
        {
            "layers": 2,
            "width": 16 if tiny else 64,
            "heads": 2,
            "kv_heads": 1,
            "head_size": 8 if tiny else 32,
            "hidden": 32 if tiny else 192,
            "context": 64 if tiny else 256,
        }
    )
    config.data = ConfigDict(
        {
            "sources": "chitchat" if tiny else "chitchat,docstrings",
            "turns": 4,
            "length": 64 if tiny else 256,
            "batch_size": 8 if tiny else 16,
            "held_out": 0.05,
        }
    )
    config.train = ConfigDict(
        {"steps": 8 if tiny else 200, "log_every": 4 if tiny else 10, "save_every": 4 if tiny else 50}
    )
    config.optimizer = ConfigDict(
        {
            "learning_rate": 3e-3,
            "total_steps": config.train.get_oneway_ref("steps"),
            "warmup_steps": 2 if tiny else 20,
            "schedule_name": "cosine",
        }
    )
    config.stage = ConfigDict({"name": "distill", "teacher": "runs/small_talk/sft", "beta": 0.0, "temperature": 1.0})
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    return config.lock()

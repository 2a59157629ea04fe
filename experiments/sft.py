"""Supervised fine-tuning on human conversations and questions about the standard library.

Paper: Ouyang et al. 2022, sec. 3.5, arXiv 2203.02155.
Command: python -m lm train --config=experiments/sft.py --workdir=runs/small_talk/sft
Needs: runs/small_talk/pretrain. Loss on the assistant's replies and their end token only.
Expect: held-out loss from 5.13 to 4.19 nats a reply token, in 86 s on 2 cores of an AMD EPYC (Zen 4).
Change first: train.steps, optimizer.learning_rate, data.sources.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    assert arg in ("", "tiny"), "choose nothing or tiny"
    tiny = arg == "tiny"
    config = ConfigDict()
    config.seed = 0
    config.tokenizer = ""  # the one init_from was trained with
    config.init_from = "runs/small_talk/pretrain"
    config.marker_embedding = ""  # "\n": the chat's markers start as the end of a line, not as random numbers
    config.model = ConfigDict({})  # sizes come with init_from
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
        {"steps": 8 if tiny else 170, "log_every": 4 if tiny else 10, "save_every": 4 if tiny else 50}
    )
    config.optimizer = ConfigDict(
        {
            "learning_rate": 1e-3,
            "total_steps": config.train.get_oneway_ref("steps"),
            "warmup_steps": 2 if tiny else 10,
            "schedule_name": "cosine",
            "weight_decay": 0.0,
        }
    )
    config.stage = ConfigDict({"name": "sft", "z_loss": 1e-4})
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    return config.lock()

"""Pretraining by next-token prediction on the standard library and human conversations, for a laptop CPU.

Paper: Radford et al. 2019 (GPT-2); the block of Touvron et al. 2023, arXiv 2302.13971; z-loss of arXiv 2204.02311.
Command: python -m lm train --config=experiments/pretrain.py --workdir=runs/small_talk/pretrain
Needs: runs/small_talk/tokenizer (experiments/tokenizer.py).
Expect: held-out bits per byte from 3.86 to 2.02 (xz -9: 2.55) in 162 s on 2 cores of an AMD EPYC (Zen 4).
Change first: optimizer.learning_rate and name, train.steps (optimizer.total_steps follows), model.width.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    assert arg in ("", "tiny"), "choose nothing or tiny"
    tiny = arg == "tiny"
    config = ConfigDict()
    config.seed = 0
    config.tokenizer = "runs/small_talk/tokenizer"
    config.init_from = ""
    config.model = ConfigDict(
        {
            "layers": 2 if tiny else 4,
            "width": 32 if tiny else 128,
            "heads": 2 if tiny else 4,
            "kv_heads": 1 if tiny else 2,
            "head_size": 16 if tiny else 32,
            "hidden": 64 if tiny else 384,
            "context": 64 if tiny else 256,
            "dtype": "auto",  # float32 on a CPU, else bfloat16
            "attention": "auto",  # cudnn, splash or xla, as the platform has it
        }
    )
    config.data = ConfigDict(
        {
            "corpus": "chitchat" if tiny else "stdlib,chitchat",
            "length": 64 if tiny else 256,
            "batch_size": 8 if tiny else 16,
            "ramp": (),
            "held_out": 0.05,
            "held_out_bytes": 20_000 if tiny else 200_000,
        }
    )
    config.train = ConfigDict(
        {"steps": 8 if tiny else 400, "log_every": 4 if tiny else 10, "save_every": 4 if tiny else 50}
    )
    config.optimizer = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 3e-3,
            "total_steps": config.train.get_oneway_ref("steps"),
            "warmup_steps": 2 if tiny else 30,
            "schedule_name": "cosine",
            "final_fraction": 0.1,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "ema_decay": 0.0,
        }
    )
    config.stage = ConfigDict({"name": "pretrain", "z_loss": 1e-4, "microbatches": 1})
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    return config.lock()

"""Supervised fine-tuning of a real model by low-rank adapters: SmolLM2-135M-Instruct learns how people chat.

Method: the base is frozen, in 8 bits; A and B of each attention matrix are trained (460,800 numbers). B starts at zero.
Paper: Hu et al. 2021 (LoRA), arXiv 2106.09685; Dettmers et al. 2023 (QLoRA), arXiv 2305.14314; Allal et al. 2025
(SmolLM2), arXiv 2502.02737.
Command: python -m lm train --config=experiments/lora.py --workdir=runs/lora
Needs: runs/smollm2 (python -m lm convert --source=smollm2-135m --workdir=runs/smollm2).
Expect: held-out loss from 4.71 to 3.95 nats a reply token, 23,893 tokens, 23 minutes on 2 cores that others kept busy.
Change first: init_from (any policy's workdir), model.lora_rank and lora_targets, optimizer.learning_rate.
"""

from ml_collections import ConfigDict

from lm.core.config import sibling_config


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    config = sibling_config(__file__, "sft").get_config(arg).unlock()
    tiny = arg == "tiny"
    config.model = ConfigDict(
        {"lora_rank": 4, "lora_alpha": 8.0, "lora_targets": "query,key,value,attention_out", "lora_base_dtype": "int8"}
    )
    if not tiny:
        config.init_from = "runs/smollm2"
        config.data.sources = "chitchat"
        config.data.length = 128
        config.data.batch_size = 4
        config.data.held_out = 0.005
        config.train.steps = 60
        config.train.save_every = 20
    config.optimizer.learning_rate = 3e-3 if tiny else 2e-3
    return config.lock()

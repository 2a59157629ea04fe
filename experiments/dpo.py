"""DPO: the policy learns from the ranked pairs themselves; no reward model, no sampling.

Paper: Rafailov et al. 2023, arXiv 2305.18290. stage.label_smoothing makes it cDPO,
stage.refresh_reference_every TR-DPO (arXiv 2404.09656).
Command: python -m lm train --config=experiments/dpo.py --workdir=runs/small_talk/dpo
Needs: runs/small_talk/sft and runs/small_talk/rank/rankings.jsonl (any file of that format).
Expect: accuracy of the implicit reward 0.81 +- 0.03 on held-out pairs, in 125 s of processor time on an AMD EPYC; the
rule's score +1.16 [0.98, 1.34] over SFT, win rate 0.85 [0.80, 0.90], on 119 unseen prompts: `python -m lm evaluate
--config=experiments/evaluate.py --workdir=DIR --config.models.ppo=runs/small_talk/dpo`. Both answers of a pair become
less likely (held-out chosen log-prob from -81 to -90), the rejected one more so; replies shrink from 17 to 11 tokens.
Change first: stage.beta (the price of a nat of KL), optimizer.learning_rate, train.steps.
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
            "held_out": 0.15,  # the prompts that stage reward holds out, too
            "limit": 0,  # verdicts to learn from; 0: all
        }
    )
    config.train = ConfigDict(
        {"steps": 8 if tiny else 80, "log_every": 4 if tiny else 10, "save_every": 4 if tiny else 50}
    )
    config.optimizer = ConfigDict(
        {
            "learning_rate": 2e-4,
            "total_steps": config.train.get_oneway_ref("steps"),
            "warmup_steps": 2 if tiny else 10,
            "schedule_name": "cosine",
            "weight_decay": 0.0,
        }
    )
    config.stage = ConfigDict({"name": "dpo", "beta": 0.1, "label_smoothing": 0.0, "refresh_reference_every": 0})
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    return config.lock()

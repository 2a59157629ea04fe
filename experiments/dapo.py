"""DAPO: clip-higher, dynamic sampling, token mean, a price on answers near the limit; no KL.

Paper: Yu et al. 2025, arXiv 2503.14476.
Command: python -m lm train --config=experiments/dapo.py --workdir=runs/dapo
Needs: runs/small_talk/sft and runs/small_talk/reward.
Expect: held-out score/rule from 4.2 to 5.9 at a KL of 16.9 nats an answer, in 45 s on 2 cores of an AMD EPYC (Zen 4).
Change first: stage.clip_high, data.resample_rounds, data.overlong_buffer.
"""

from ml_collections import ConfigDict

from lm.core.config import sibling_config


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    config = sibling_config(__file__, "grpo").get_config(arg).unlock()
    shared = (
        "entropy_bonus",
        "importance_ratio_cap",
        "refresh_reference_every",
        "epochs",
        "minibatch_count",
        "temperature",
    )
    config.stage = ConfigDict(
        {"name": "dapo", "clip_low": 0.2, "clip_high": 0.28, **{name: config.stage.get_ref(name) for name in shared}}
    )
    config.data.resample_rounds = 2
    config.data.overlong_buffer = 2 if arg == "tiny" else 8
    return config.lock()

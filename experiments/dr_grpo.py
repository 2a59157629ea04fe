"""Dr. GRPO: GRPO without the group's deviation and the answer's own length, so that only a constant scales it.

Paper: Liu et al. 2025, arXiv 2503.20783.
Command: python -m lm train --config=experiments/dr_grpo.py --workdir=runs/dr_grpo
Needs: runs/small_talk/sft and runs/small_talk/reward.
Expect: held-out score/rule from 4.2 to 5.5 at a KL of 7.9 nats an answer, in 42 s on 2 cores of an AMD EPYC (Zen 4).
Change first: data.group, optimizer.learning_rate.
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
        {
            "name": "dr_grpo",
            "clip": 0.2,
            "max_response_length": config.data.get_oneway_ref("max_new"),
            **{name: config.stage.get_ref(name) for name in shared},
        }
    )
    return config.lock()

"""Dr. GRPO: GRPO without the group's deviation and the answer's own length, so that only a constant scales it.

Paper: Liu et al. 2025, arXiv 2503.20783.
Command: python -m lm.train --config=experiments/dr_grpo.py --workdir=runs/dr_grpo
Needs: runs/quickstart/sft and runs/quickstart/reward.
Expect: not measured at this size yet; tests/test_policy.py sees it learn, lm.certify says what it estimates.
Change first: data.group, optimizer.learning_rate.
"""

from ml_collections import ConfigDict

from lm.config import beside


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    config = beside(__file__, "grpo").get_config(arg).unlock()
    shared = ("entropy_bonus", "correction", "refresh", "epochs", "minibatch_count", "temperature")
    config.stage = ConfigDict(
        {
            "name": "dr_grpo",
            "clip": 0.2,
            "length": config.data.get_ref("max_new"),
            **{name: config.stage.get_ref(name) for name in shared},
        }
    )
    return config.lock()

"""GSPO: the ratio and the clip of whole answers.

Paper: Zheng et al. 2025, arXiv 2507.18071.
Command: python -m lm.train --config=experiments/gspo.py --workdir=runs/gspo
Needs: runs/quickstart/sft and runs/quickstart/reward.
Expect: not measured at this size yet; tests/test_policy.py sees it learn, lm.certify says what it estimates.
Change first: stage.low, stage.high, optimizer.learning_rate.
"""

from ml_collections import ConfigDict

from lm.config import beside


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    config = beside(__file__, "grpo").get_config(arg).unlock()
    shared = ("entropy_bonus", "correction", "refresh", "epochs", "minibatch_count", "temperature")
    config.stage = ConfigDict(
        {
            "name": "gspo",
            "beta": 0.04,
            "low": 3e-4,
            "high": 4e-4,
            **{name: config.stage.get_ref(name) for name in shared},
        }
    )
    return config.lock()

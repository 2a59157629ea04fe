"""CISPO: REINFORCE whose importance weights are cut, never its gradients.

Paper: MiniMax 2025, arXiv 2506.13585.
Command: python -m lm.train --config=experiments/cispo.py --workdir=runs/cispo
Needs: runs/quickstart/sft and runs/quickstart/reward.
Expect: not measured at this size yet; tests/test_policy.py sees it learn, lm.certify says what it estimates.
Change first: stage.high, optimizer.learning_rate.
"""

from ml_collections import ConfigDict

from lm.config import beside


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    config = beside(__file__, "grpo").get_config(arg).unlock()
    shared = ("entropy_bonus", "correction", "refresh", "epochs", "minibatch_count", "temperature")
    config.stage = ConfigDict({"name": "cispo", "high": 4.0, **{name: config.stage.get_ref(name) for name in shared}})
    return config.lock()

"""Online DPO: the policy writes its own pairs, the reward model says which answer is better.

Paper: Guo et al. 2024, arXiv 2402.04792.
Command: python -m lm.train --config=experiments/online_dpo.py --workdir=runs/online_dpo
Needs: runs/quickstart/sft and runs/quickstart/reward.
Expect: not measured at this size yet; tests/test_policy.py sees it learn, lm.certify says what it estimates.
Change first: stage.beta, data.group, optimizer.learning_rate.
"""

from ml_collections import ConfigDict

from lm.config import beside


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    config = beside(__file__, "grpo").get_config(arg).unlock()
    shared = ("refresh", "epochs", "minibatch_count", "temperature")
    config.stage = ConfigDict(
        {"name": "online_dpo", "beta": 0.1, "smoothing": 0.0, **{name: config.stage.get_ref(name) for name in shared}}
    )
    config.data.group = 2
    return config.lock()

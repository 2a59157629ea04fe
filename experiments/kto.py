"""KTO: each answer is good or bad by itself, so that verdicts need no pairs.

Paper: Ethayarajh et al. 2024, arXiv 2402.01306.
Command: python -m lm train --config=experiments/kto.py --workdir=runs/small_talk/kto
Needs: what experiments/dpo.py needs, whose other options are its own.
Expect: accuracy 0.76 +- 0.03 on held-out pairs, in 152 s of processor time on an AMD EPYC; the rule's score +1.01
[0.82, 1.20] over SFT, win rate 0.82 [0.77, 0.87], measured as experiments/dpo.py says.
Change first: stage.beta, stage.desirable_weight and undesirable_weight, optimizer.learning_rate.
"""

from ml_collections import ConfigDict

from lm.core.config import sibling_config


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    config = sibling_config(__file__, "dpo").get_config(arg).unlock()
    config.stage = ConfigDict(
        {"name": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, "refresh_reference_every": 0}
    )
    return config.lock()

"""ORPO: fine-tuning on the better answers and keeping the worse ones unlikely, in one stage without a reference.

Paper: Hong et al. 2024, arXiv 2403.07691.
Command: python -m lm train --config=experiments/orpo.py --workdir=runs/small_talk/orpo
Needs: what experiments/dpo.py needs, whose other options are its own.
Expect: accuracy 0.71 +- 0.03 on held-out pairs (0.53 before), in 99 s of processor time on an AMD EPYC; the rule's
score +0.84 [0.66, 1.02] over SFT, win rate 0.77 [0.72, 0.83], measured as experiments/dpo.py says. It moves least: the
held-out reply loss goes from 4.20 to 4.28 nats, where the others' ends between 4.56 and 5.03.
Change first: stage.odds_coefficient, optimizer.learning_rate, init_from.
"""

from ml_collections import ConfigDict

from lm.core.config import sibling_config


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    config = sibling_config(__file__, "dpo").get_config(arg).unlock()
    config.stage = ConfigDict({"name": "orpo", "odds_coefficient": 1.0})
    return config.lock()

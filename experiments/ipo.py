"""IPO: DPO with a squared loss, which asks of every pair the same finite lead.

Paper: Azar et al. 2023, arXiv 2310.12036.
Command: python -m lm train --config=experiments/ipo.py --workdir=runs/small_talk/ipo
Needs: what experiments/dpo.py needs, whose other options are its own.
Expect: accuracy 0.85 +- 0.03 on held-out pairs, in 131 s of processor time on an AMD EPYC; the rule's score +1.18
[0.98, 1.37] over SFT, win rate 0.84 [0.79, 0.89], measured as experiments/dpo.py says.
Change first: stage.beta (the lead asked for is 1 / (2 beta) nats a token), optimizer.learning_rate, train.steps.
"""

from ml_collections import ConfigDict

from lm.core.config import sibling_config


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    config = sibling_config(__file__, "dpo").get_config(arg).unlock()
    config.stage = ConfigDict({"name": "ipo", "beta": 0.5, "refresh_reference_every": 0})
    return config.lock()

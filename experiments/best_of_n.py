"""Best-of-n fine-tuning: of eight answers to a prompt the best one is learned, as if it were a human's.

Paper: Touvron et al. 2023, sec. 3.2.3, arXiv 2307.09288; Dong et al. 2023, arXiv 2304.06767.
Command: python -m lm train --config=experiments/best_of_n.py --workdir=runs/best_of_n
Needs: runs/small_talk/sft and runs/small_talk/reward.
Expect: held-out score/rule from 4.2 to 5.6 at a KL of 19.2 nats an answer, in 32 s on 2 cores of an AMD EPYC (Zen 4).
Change first: data.group, optimizer.learning_rate.
"""

from ml_collections import ConfigDict

from lm.core.config import sibling_config


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    config = sibling_config(__file__, "grpo").get_config(arg).unlock()
    shared = ("entropy_bonus", "refresh_reference_every", "epochs", "minibatch_count", "temperature")
    config.stage = ConfigDict({"name": "best_of_n", **{name: config.stage.get_ref(name) for name in shared}})
    return config.lock()

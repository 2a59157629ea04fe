"""GRPO on the SFT model: eight answers a prompt, each judged against the others; no value network.

Paper: Shao et al. 2024, arXiv 2402.03300.
Command: python -m lm train --config=experiments/grpo.py --workdir=runs/grpo
Needs: runs/small_talk/sft and runs/small_talk/reward.
Expect: held-out score/rule from 4.2 to 5.9 at a KL of 10.1 nats an answer, in 46 s on 2 cores of an AMD EPYC (Zen 4).
Change first: stage.beta, data.group, optimizer.learning_rate.
"""

from ml_collections import ConfigDict

from lm.core.config import sibling_config


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    config = sibling_config(__file__, "ppo").get_config(arg).unlock()
    config.stage = ConfigDict(
        {
            "name": "grpo",
            "beta": 0.04,  # price of k3 to the reference, in the loss
            "clip": 0.2,
            "entropy_bonus": 0.0,
            "importance_ratio_cap": 0.0,  # above 0: the cap of p_trainer / p_sampler that weighs each token
            "refresh_reference_every": 0,  # batches after which the reference becomes the policy; 0: never
            "epochs": 1,
            "minibatch_count": 2 if arg == "tiny" else 4,
            "temperature": config.stage.get_ref("temperature"),  # of PPO: data.temperature follows it
        }
    )
    config.data.group = 8
    steps = config.train.get_ref("steps") * config.stage.get_ref("epochs")
    config.optimizer.total_steps = steps * config.stage.get_ref("minibatch_count")
    return config.lock()

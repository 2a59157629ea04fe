"""Over-optimisation: gold score and proxy score while best-of-n and PPO climb proxies of few and of many verdicts.

Method: a gold rater in the place of people (here the published rule) ranks answers of the SFT model; reward models
learn from 50, 500 and 5,000 of its verdicts; best-of-n and PPO, with no price on the KL, climb each, and ensembles.
Paper: Gao, Schulman and Hilton 2022, arXiv 2210.10760; ensembles: Coste et al. 2023, arXiv 2310.02743.
Command: python -m lm overoptimization --config=experiments/overoptimization.py --workdir=runs/overoptimisation
Needs: runs/small_talk/sft.
Expect: 16 minutes on 2 cores of an AMD EPYC (Zen 4). PPO's gold score rises by up to 1.9 of its deviations at a
distance of 3 and then falls (by 0.2 to 1.4; in one of six climbs inside the noise), while every proxy still rises;
best-of-n up to 128 does not turn. The ensemble of three helps PPO at 5,000 verdicts only.
Change first: sizes, pessimism, ppo.train.steps, ppo.optimizer.learning_rate.
"""

from ml_collections import ConfigDict

from lm.core.config import sibling_config


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    assert arg in ("", "tiny"), "choose nothing or tiny"
    tiny = arg == "tiny"
    config = ConfigDict(
        {
            "seed": 0,
            "init_from": "runs/small_talk/sft",
            "sizes": (8, 16) if tiny else (50, 500, 5000),  # verdicts a proxy learns from
            "reward_steps": (2, 2) if tiny else (16, 48, 156),  # batches of 32: 10, 3 and 1 passes
            "members": 2 if tiny else 3,  # proxies from the same verdicts, in another order: an ensemble
            "pessimism": 1.0,  # deviations of its members that an ensemble's mean loses
        }
    )
    config.prompts = ConfigDict(
        {
            "sources": "chitchat",
            "turns": 1,  # short prompts: a pool of thousands of answers is scored by every proxy
            "conversations": 16 if tiny else 128,
            "prompts_per_conversation": 1,
            "prompt_length": 32,
            "held_out": 0.05,
        }
    )
    config.evaluate = ConfigDict(
        {
            "rater": "rule",
            "samples": 8 if tiny else 128,
            "draws": 1 if tiny else 2,
            "max_new": 8 if tiny else 24,
            "temperature": 1.0,
            "rows_at_once": 16 if tiny else 128,
        }
    )
    shared = ("turns", "prompt_length", "held_out")

    config.verdicts = sibling_config(__file__, "rank").get_config(arg).unlock()
    config.verdicts.init_from = config.get_oneway_ref("init_from")
    config.verdicts.rank.update({name: config.prompts.get_oneway_ref(name) for name in shared})
    config.verdicts.rank.prompts_per_conversation = 1 if tiny else 6
    config.verdicts.rank.prompts = 96 if tiny else 10_000
    config.verdicts.rank.max_new = config.evaluate.get_oneway_ref("max_new")

    config.reward = sibling_config(__file__, "reward").get_config(arg).unlock()
    config.reward.init_from = config.get_oneway_ref("init_from")
    config.reward.data.length = 64  # a prompt of 32 and an answer of 24, with what closes them
    config.reward.optimizer.warmup_steps = 1 if tiny else 5

    config.ppo = sibling_config(__file__, "ppo").get_config(arg).unlock()
    config.ppo.init_from = config.get_oneway_ref("init_from")
    config.ppo.data.update({name: config.prompts.get_oneway_ref(name) for name in shared})
    config.ppo.data.max_new = config.evaluate.get_oneway_ref("max_new")
    config.ppo.data.truncation_penalty = 0.0  # the proxy alone is climbed
    config.ppo.data.held_out_rollouts = 16 if tiny else 64  # the lab asks prompts of its own
    config.ppo.stage.beta = 0.0
    config.ppo.optimizer.learning_rate = 1e-4
    config.ppo.train.steps = 4 if tiny else 60
    config.ppo.train.save_every = 2 if tiny else 4
    config.ppo.train.keep = config.ppo.train.get_ref("steps") // config.ppo.train.get_ref("save_every")  # all of them
    return config.lock()

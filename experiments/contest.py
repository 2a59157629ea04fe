"""The contest: PPO, GRPO, RLOO, DPO and best-of-n from one SFT model, one reward model, one budget, three seeds.

Method: every method gets 1,536 answers, scored by the same reward model, and learns from each twice. PPO, GRPO, RLOO
and best-of-n sample them as they go; DPO gets 768 pairs of answers of the SFT model, ranked by that reward model.
Paper: those of experiments/ppo.py, grpo.py, rloo.py, dpo.py, best_of_n.py, whose settings are taken but for those here.
Command: python -m lm contest --config=experiments/contest.py --workdir=runs/contest
Needs: runs/small_talk/sft and runs/small_talk/reward.
Expect: over SFT by the rule GRPO +1.66 [1.53, 1.79], best-of-n +1.51 [1.32, 1.69], RLOO +1.44 [1.31, 1.58], PPO +1.41
[1.09, 1.73], DPO +0.91 [0.81, 1.01], on 367 prompts; 36 minutes on two busy cores of an AMD EPYC.
Tuned: four settings of learning rate and beta each, by the rule's score of seed 100 on the conversations of variant
`tuning`, on which the contest does not judge; PPO's and GRPO's own settings were the best of theirs.
Change first: methods, seeds, rollouts.
"""

from ml_collections import ConfigDict

from lm.core.config import sibling_config

METHODS = ("ppo", "grpo", "rloo", "dpo", "best_of_n")  # who takes part
OTHERS = ("dr_grpo", "gspo", "cispo", "reinforce_pp", "ipo", "kto", "simpo", "orpo")  # --config.methods="('ppo','kto')"
PASSES = 2  # over every answer


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "", "tiny", or "tuning": another seed, judged on conversations that the contest does not judge on.

    What is tuned does not learn from those either, but the SFT and the reward model did."""
    assert arg in ("", "tiny", "tuning"), "choose nothing or tiny, or tuning"
    tiny, tuning = arg == "tiny", arg == "tuning"
    config = ConfigDict(
        {
            "init_from": "runs/small_talk/sft",
            "reward_model": "runs/small_talk/reward",
            "rollouts": 64 if tiny else 1536,  # answers that each method learns from
            "seeds": (0, 1) if tiny else (100,) if tuning else (0, 1, 2),
            "methods": METHODS,
        }
    )
    rollouts = config.get_ref("rollouts")
    config.prompts = ConfigDict(
        {
            "sources": "chitchat",
            "turns": 3,
            "conversations": 16 if tiny else 0,
            "prompts_per_conversation": 1 if tiny else 3,
            "prompt_length": 32 if tiny else 64,
            "held_out": 0.1 if tuning else 0.05,
            "held_out_from": 0.05 if tuning else 0.0,
        }
    )
    config.evaluate = ConfigDict(
        {"rater": "rule", "max_new": 8 if tiny else 32, "temperature": 1.0, "rows_at_once": 16 if tiny else 128}
    )

    for name in (*METHODS, *OTHERS):
        config[name] = method = sibling_config(__file__, name).get_config("tiny" if tiny else "").unlock()
        method.init_from = config.get_oneway_ref("init_from")
        method.data.held_out = config.prompts.get_oneway_ref("held_out")
        steps = method.train.get_ref("steps")
        if "rollouts" in method.data:
            method.data.reward_model = config.get_oneway_ref("reward_model")
            method.data.held_out_rollouts = 16 if tiny else 64
            method.stage.epochs = PASSES
            steps.set(rollouts // method.data.get_ref("rollouts"))
        else:
            steps.set(rollouts // 2 * PASSES // method.data.get_ref("prompts_per_batch"))

    # Where one of four settings of learning rate and beta did better than what the method's own config has.
    config.rloo.stage.beta = 0.05
    config.dpo.stage.beta = 0.3
    config.best_of_n.optimizer.learning_rate = 6e-5

    config.verdicts = sibling_config(__file__, "rank").get_config("tiny" if tiny else "").unlock()
    config.verdicts.init_from = config.get_oneway_ref("init_from")
    rank = config.verdicts.rank
    rank.rater = config.get_oneway_ref("reward_model")
    rank.responses = 2
    rank.prompts = rollouts // 2
    rank.truncation_penalty = config.ppo.data.get_oneway_ref("truncation_penalty")
    rank.held_out = config.prompts.get_oneway_ref("held_out")
    rank.held_out_prompts = 16 if tiny else 64
    return config.lock()

"""A conversation partner without knowledge, ranked by a published rule: the chain whose stages lie beside this file.

Method: tokenizer, pretraining, SFT, ranking, reward model, PPO, evaluation, report, each by the config of its name.
Command: python -m lm pipeline --config=experiments/small_talk.py
The rater that ranks is a published rule (lm.rewards.rule.RULE), so that what PPO learns can be checked by reading.
Expect: 412 s on 2 cores of an AMD EPYC (Zen 4); small_talk.md has the table.
Change first: --config.corpus=PATH (your own text for tokenizer and pretraining), --workdir.
"""

from ml_collections import ConfigDict

from lm.core.config import sibling_config

STAGES = ("tokenizer", "pretrain", "sft", "rank", "reward", "ppo", "evaluate")


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny", which runs every stage for a few steps."""
    assert arg in ("", "tiny"), "choose nothing or tiny"
    config = ConfigDict({"root": "runs/small_talk", "corpus": "stdlib,chitchat", "stages": STAGES})
    root = config.get_ref("root")
    for name in STAGES:
        config[name] = sibling_config(__file__, name).get_config(arg).unlock()

    config.tokenizer.data.corpus = config.get_oneway_ref("corpus")
    config.pretrain.data.corpus = config.get_oneway_ref("corpus")
    config.evaluate.evaluate.corpus = config.get_oneway_ref("corpus")
    config.pretrain.tokenizer = root + "/tokenizer"
    config.sft.init_from = root + "/pretrain"
    config.rank.init_from = root + "/sft"
    config.reward.init_from = root + "/sft"
    config.reward.data.rankings = root + "/rank/rankings.jsonl"
    config.ppo.init_from = root + "/sft"
    config.ppo.data.reward_model = root + "/reward"
    config.evaluate.models = ConfigDict({"raw": root + "/pretrain", "sft": root + "/sft", "ppo": root + "/ppo"})
    return config.lock()

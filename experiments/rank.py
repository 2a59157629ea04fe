"""Rankings of a model's own answers by a rater; here the published rule of lm.rewards.rule, in a human's place.

Paper: Stiennon et al. 2020, sec. 3.3, arXiv 2009.01325 (comparisons of the policy's own samples).
Command: python -m lm auto-rank --config=experiments/rank.py --workdir=runs/small_talk/rank
Needs: runs/small_talk/sft. Writes rankings.jsonl, the file that stage reward reads and human raters will write.
Expect: 1,635 pairs decided and 965 tied, in 26 s on 2 cores of an AMD EPYC (Zen 4).
Change first: rank.prompts, rank.responses (answers ranked per prompt).
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    assert arg in ("", "tiny"), "choose nothing or tiny"
    tiny = arg == "tiny"
    config = ConfigDict()
    config.seed = 0
    config.init_from = "runs/small_talk/sft"
    config.rank = ConfigDict(
        {
            "sources": "chitchat",
            "turns": 3,
            "prompts_per_conversation": 1 if tiny else 2,
            "prompts": 128 if tiny else 2600,
            "prompt_length": 32 if tiny else 64,
            "responses": 2,
            "max_new": 8 if tiny else 32,
            "temperature": 1.0,
            "rater": "rule",
            "held_out": 0.05,
            "prompts_at_once": 32 if tiny else 128,
        }
    )
    return config.lock()

"""A reward model of real people's taste: 3,705 conversations rated for wit, interest and mood by those who had them.

Paper: Plackett-Luce over groups of one opener, as Song et al. 2023, eq. 4, arXiv 2306.17492; data: Myers et al. 2020.
Command: python -m lm train --config=experiments/ratings.py --workdir=runs/ratings
Needs: runs/small_talk/pretrain, which has read most of these conversations but none of their ratings.
Expect: held-out accuracy 0.655 [0.622, 0.689] on 1,358 pairs of raters it never saw; had the longer conversation always
won, 0.665: it has mostly learned length. 3 minutes on 2 cores of an AMD EPYC (Zen 4). A weight of 0 in data.axes
trains a head but leaves it out of the total; 20 % of the groups of raters hold 35 % of the rankings.
Change first: data.limit (rankings to learn from), data.axes, data.length (most conversations are longer than a row).
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    assert arg in ("", "tiny"), "choose nothing or tiny"
    tiny = arg == "tiny"
    config = ConfigDict()
    config.seed = 0
    config.tokenizer = ""
    config.init_from = "runs/small_talk/pretrain"
    config.model = ConfigDict({})
    config.data = ConfigDict(
        {
            "rankings": "chitchat",
            "axes": {"overall": 1.0, "witty": 0.0, "interesting": 0.0, "upbeat": 0.0},
            "length": 64 if tiny else 256,
            "prompts_per_batch": 4 if tiny else 8,
            "held_out": 0.2,  # of the buckets of raters
            "limit": 64 if tiny else 0,
        }
    )
    config.train = ConfigDict(
        {
            "steps": 8 if tiny else 150,
            "log_every": 4 if tiny else 10,
            "save_every": 4 if tiny else 50,
            "evaluate_every": 0 if tiny else 50,
        }
    )
    config.optimizer = ConfigDict(
        {
            "learning_rate": 5e-4,
            "total_steps": config.train.get_oneway_ref("steps"),
            "warmup_steps": 2 if tiny else 10,
            "schedule_name": "cosine",
            "weight_decay": 0.1,
        }
    )
    config.stage = ConfigDict({"name": "listwise", "centring_coefficient": 0.01})
    config.stage.axes = config.data.axes  # must be equal: one dict, so that to set an entry of either sets both
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    return config.lock()

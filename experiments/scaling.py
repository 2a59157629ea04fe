"""A ladder of runs over two decades of compute, its scaling laws, and a larger run predicted by them.

Method: pretraining at five budgets and five widths each, two layers, short rows, small vocabulary, muP so that one
learning rate serves every width (experiments/mup_sweep.py); a run's steps follow from its budget and its width.
Paper: Hoffmann et al. 2022, arXiv 2203.15556; Besiroglu et al. 2024, arXiv 2404.10102; Yang et al. 2022, 2203.03466.
Command: python -m lm scaling --config=experiments/scaling.py --workdir=runs/scaling --jobs=2
Expect: 25 runs in 47 minutes, the larger one in 9, on 2 cores of an AMD EPYC that others kept busy too; best size as
C^0.56; predicted loss 2.26 [2.16, 2.41], then measured 2.24. `python -m lm train` with it trains one run.
Change first: ladder.min_flops, max_flops and target_flops (FLOPs); data.corpus; ladder.sizes_per_budget.
"""

from ml_collections import ConfigDict

from lm.core.config import sibling_config


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    tiny = arg == "tiny"
    config = sibling_config(__file__, "pretrain").get_config(arg).unlock()
    config.tokenizer = "runs/scaling/tokenizer"  # lm scaling puts its own in this place
    config.data.corpus = "stdlib"
    config.data.length = config.model.context = 32 if tiny else 64
    config.model.layers = 1 if tiny else 2
    config.model.head_size = 8
    width = config.model.get_ref("width")
    width.set(8 if tiny else 32)
    config.model.heads = width // 8
    config.model.kv_heads = config.model.get_oneway_ref("heads")
    config.model.hidden = width * 3
    config.model.base_width = 16 if tiny else 32
    config.optimizer.base_width = config.model.get_oneway_ref("base_width")  # must be equal
    config.optimizer.learning_rate = 1.5e-2
    config.train.steps = 8 if tiny else 400
    config.optimizer.warmup_steps = config.train.get_ref("steps") // 10
    config.train.log_every = 4 if tiny else 50
    config.train.save_every = 4 if tiny else 400
    config.vocabulary = ConfigDict(
        {
            "corpus": config.data.get_oneway_ref("corpus"),
            "held_out": config.data.get_oneway_ref("held_out"),
            "vocab_size": 512,
            "max_bytes": 2_000_000,
        }
    )
    config.ladder = ConfigDict(
        {
            "min_flops": 1e9 if tiny else 4e10,
            "max_flops": 4e9 if tiny else 4e12,
            "budgets": 2 if tiny else 5,
            "sizes_per_budget": 4 if tiny else 5,
            "target_flops": 8e9 if tiny else 1.2e13,
            "tokens_per_parameter": (0.1, 8.0) if tiny else (1.5, 200.0),
            "bootstrap_draws": 50 if tiny else 1000,
        }
    )
    return config.lock()

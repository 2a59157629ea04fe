"""A ladder of models on drills: does a skill come at once as they grow, or only by a metric that is all or nothing?

Method: pretraining on the built-in corpus of copying, sums, brackets and made-up facts, 7 sizes, tokens in proportion.
Paper: Schaeffer et al. 2023, "Are Emergent Abilities of Large Language Models a Mirage?", arXiv 2304.15004.
Command: python -m lm.sweep --config=experiments/emergence.py --workdir=runs/emergence
Needs: runs/drills/tokenizer (python -m lm.train --config=experiments/tokenizer.py --workdir=runs/drills/tokenizer
--config.data.corpus=drills --config.data.vocab_size=512).
Expect: see `python -m lm.emergence runs/emergence` afterwards.
Change first: LADDER, data.corpus (drills,stdlib).
"""

from ml_collections import ConfigDict

from lm.config import beside
from lm.sweeps.space import axis, zipped

# (layers, width, learning rate, steps of 64 rows of 128 tokens): each step of the ladder is about 3 times the FLOPs
LADDER = (
    (1, 16, 1e-2, 100),
    (1, 32, 1e-2, 150),
    (2, 32, 1e-2, 250),
    (2, 48, 1e-2, 400),
    (2, 80, 6e-3, 700),
    (3, 112, 4e-3, 900),
    (4, 144, 3e-3, 1200),
)


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    config = beside(__file__, "pretrain").get_config(arg).unlock()
    tiny = arg == "tiny"
    config.data.corpus = "drills"
    config.tokenizer = "runs/drills/tokenizer"
    if not tiny:
        config.model.layers = 2
        config.model.context = config.data.length = 128
        config.data.batch_size = 64
        config.data.held_out_bytes = 100_000
        config.train.save_every = 500
        config.train.log_every = 20
        config.optimizer.warmup_steps = 20
    width = config.model.get_ref("width")
    config.model.head_size = 16
    config.model.heads = width // 16
    config.model.kv_heads = width // 16
    config.model.hidden = width * 3
    return config.lock()


def sweep(arg: str = "") -> list[dict]:
    """The ladder."""
    ladder = ((1, 16, 1e-2, 2), (1, 16, 1e-2, 4), (1, 32, 1e-2, 8)) if arg == "tiny" else LADDER
    layers, widths, rates, steps = zip(*ladder)
    return zipped(
        axis("model.layers", *layers),
        axis("model.width", *widths),
        axis("optimizer.learning_rate", *rates),
        axis("train.steps", *steps),
    )

"""Learning rate by width, three seeds each: where the best rate lies, and whether it moves with the width.

Method: pretraining as in experiments/pretrain.py, two layers, short rows, 120 steps.
Paper: Yang et al. 2022 (Tensor Programs V), fig. 1, arXiv 2203.03466.
Command: python -m lm sweep --config=experiments/width_sweep.py --workdir=runs/width_sweep --seeds=3
Needs: runs/small_talk/tokenizer (experiments/tokenizer.py).
Expect: bits per byte 2.585 at width 128 and 0.01, 2.643 at 64 and 0.01, 2.696 at 32 and 0.03; 36 runs of about 30 s
on 2 cores of an AMD EPYC (Zen 4).
Change first: the axes of sweep(), train.steps.
"""

from ml_collections import ConfigDict

from lm.core.config import sibling_config
from lm.sweep.space import axis, product


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    config = sibling_config(__file__, "pretrain").get_config(arg).unlock()
    if arg != "tiny":
        config.model.layers = 2
        config.model.context = config.data.length = 128
        config.train.steps = 120
        config.train.save_every = 120
        config.optimizer.warmup_steps = 12
    width = config.model.get_ref("width")
    config.model.head_size = 16
    config.model.heads = width // 16
    config.model.kv_heads = width // 16
    config.model.hidden = width * 3
    return config.lock()


def sweep(arg: str = "") -> list[dict]:
    """The settings that `lm sweep` tries."""
    rates = (3e-3, 1e-2) if arg == "tiny" else (1e-3, 3e-3, 1e-2, 3e-2)
    widths = (16, 32) if arg == "tiny" else (32, 64, 128)
    return product(axis("model.width", *widths), axis("optimizer.learning_rate", *rates))

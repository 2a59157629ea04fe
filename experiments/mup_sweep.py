"""Learning rate by width, without muP (base width 0) and with it: whether the best rate stays where it is.

Method: a run of experiments/scaling.py, 150 steps; width, learning rate and muP's base width vary.
Paper: Yang et al. 2022 (Tensor Programs V), fig. 1, arXiv 2203.03466.
Command: python -m lm sweep --config=experiments/mup_sweep.py --workdir=runs/mup_sweep
Needs: runs/scaling/tokenizer, which lm scaling makes first.
Expect: the best rate, by a parabola through the lowest three, is 0.016, 0.020, 0.023 at widths 16, 64, 128 with muP,
and 0.033, 0.010, 0.007 without; 24 runs in 12 minutes on 2 cores of an AMD EPYC that others kept busy too.
Change first: the axes of sweep(), train.steps.
"""

from ml_collections import ConfigDict

from lm.core.config import sibling_config
from lm.sweep.space import axis, product


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    config = sibling_config(__file__, "scaling").get_config(arg).unlock()
    del config.ladder, config.vocabulary
    config.train.steps = 8 if arg == "tiny" else 150
    return config.lock()


def sweep(arg: str = "") -> list[dict]:
    """The settings that `lm sweep` tries."""
    rates = (3e-3, 1e-2) if arg == "tiny" else (3e-3, 1e-2, 3e-2, 1e-1)
    widths = (8, 16) if arg == "tiny" else (16, 64, 128)
    bases = (16, 0) if arg == "tiny" else (32, 0)
    return product(
        axis("model.base_width", *bases), axis("model.width", *widths), axis("optimizer.learning_rate", *rates)
    )

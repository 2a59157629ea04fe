"""A ladder of models on drills: does a skill come at once as they grow, or only by a metric that is all or nothing?

Method: pretraining of two layers of seven widths on the built-in corpus of copying, sums, brackets and made-up facts,
20 tokens for each parameter; Muon at one rate. AdamW was tried once, not to its end, and never compared fairly.
Paper: Schaeffer et al. 2023, "Are Emergent Abilities of Large Language Models a Mirage?", arXiv 2304.15004.
Command: python -m lm sweep --config=experiments/emergence.py --workdir=runs/emergence
Needs: runs/drills/tokenizer (python -m lm train --config=experiments/tokenizer.py --workdir=runs/drills/tokenizer
--config.data.corpus=drills --config.data.vocab_size=512).
Expect: 7 runs from 3e10 to 6e12 FLOPs, held-out bits per byte from 2.08 to 1.09, in 21 minutes on 2 busy cores.
`python -m lm emergence runs/emergence` scores them: facts come first, then brackets, sums, copying.
Change first: WIDTHS, TOKENS; data.corpus to drills,stdlib.
"""

from ml_collections import ConfigDict

from lm.core.config import sibling_config
from lm.sweep.space import axis, zip_axes

WIDTHS = (16, 24, 32, 40, 48, 64, 80)
TOKENS = 20  # for each parameter (Hoffmann et al. 2022, arXiv 2203.15556)
VOCABULARY, ROWS, LENGTH = 512, 16, 128


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    config = sibling_config(__file__, "pretrain").get_config(arg).unlock()
    config.tokenizer = "runs/drills/tokenizer"
    config.data.corpus = "drills"
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    if arg != "tiny":
        config.data.length = LENGTH
        config.data.batch_size = ROWS
        config.data.held_out_bytes = 100_000
        config.train.save_every = 500
        config.optimizer.warmup_steps = 20
    config.model.context = LENGTH  # so much do the longest questions need
    width = config.model.get_ref("width")
    config.model.layers = 2
    config.model.heads = config.model.kv_heads = 4
    config.model.head_size = width // 4
    config.model.hidden = width * 3
    return config.lock()


def sweep(arg: str = "") -> list[dict]:
    """The ladder."""
    if arg == "tiny":
        return zip_axes(axis("model.width", 16, 16, 16), axis("train.steps", 3, 5, 8))
    parameters = [VOCABULARY * width + 2 * (4 + 9) * width**2 for width in WIDTHS]  # attention and SwiGLU, two layers
    steps = [round(TOKENS * count / (ROWS * LENGTH)) for count in parameters]
    return zip_axes(axis("model.width", *WIDTHS), axis("train.steps", *steps))

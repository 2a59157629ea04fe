"""A mixture of experts beside its dense twin: as many parameters work on a token, in the mixture of four times as many.

Method: pretraining as in experiments/pretrain.py, two layers, 1024 tokens a step; each token takes 2 of 8 experts.
Paper: Fedus et al. 2021 (Switch), arXiv 2101.03961; router z-loss of Zoph et al. 2022, arXiv 2202.08906; no token is
dropped, Gale et al. 2022, arXiv 2211.15841.
Command: python -m lm sweep --config=experiments/moe.py --workdir=runs/moe
Needs: runs/small_talk/tokenizer (experiments/tokenizer.py).
Expect: so early, no gain: held-out bits per byte 2.919 with 1,542,912 parameters, 2.867 dense with 656,128 (one seed,
102,400 tokens, of which an expert sees a quarter). The mixture's training balance rises to 1.35 and ends at 1.12. Its
steps take twice as long (91 s and 46 s, on 2 cores beside other work): on a CPU, XLA computes every expert for every
token.
Change first: model.experts and model.experts_per_token (model.hidden with them), stage.balance_loss, train.steps.
"""

from ml_collections import ConfigDict

from lm.core.config import sibling_config
from lm.sweep.space import axis, zip_axes

TAKEN = 2  # experts a token


def get_config(arg: str = "") -> ConfigDict:
    """The mixture. `arg`: "" or "tiny"."""
    config = sibling_config(__file__, "pretrain").get_config(arg).unlock()
    if arg != "tiny":
        config.model.layers = 2
        config.model.context = config.data.length = 128
        config.data.batch_size = 8
        config.data.held_out_bytes = 50_000
        config.train.steps = 100
        config.train.save_every = 100
        config.optimizer.warmup_steps = 10
    config.model.experts = 4 if arg == "tiny" else 8
    config.model.experts_per_token = TAKEN
    config.model.hidden = config.model.hidden // TAKEN  # of one expert
    config.stage.balance_loss = 0.01
    config.stage.router_z_loss = 0.001
    return config.lock()


def sweep(arg: str = "") -> list[dict]:
    """The mixture, and the dense model whose one MLP is as wide as a token's experts together."""
    model = get_config(arg).model
    return zip_axes(
        axis("model.experts", model.experts, 0),
        axis("model.hidden", model.hidden, model.hidden * TAKEN),
        axis("stage.balance_loss", 0.01, 0.0),
        axis("stage.router_z_loss", 0.001, 0.0),
    )

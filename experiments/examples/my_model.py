"""A model of one's own in a run: a gated convolution in Flax, and the config that trains it on text.

    python -m lm train --config=experiments/examples/my_model.py --workdir=runs/my_model
    python -m lm chat --workdir=runs/my_model

Needs: runs/small_talk/tokenizer (experiments/tokenizer.py). Any config takes such a model, as model.name; what else
stands in `model` are the options of `make`. The run is loaded again from the same file, in the same place.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen
from ml_collections import ConfigDict

from lm.core.config import sibling_config
from lm.model import Model
from lm.model.flax_adapter import model_from_linen


class GatedConvolution(linen.Module):
    """Each position gathers the last `reach` embeddings of its own text, and a gate decides what passes."""

    vocab_size: int
    width: int
    reach: int

    @linen.compact
    def __call__(self, inputs, positions, segments):
        x = linen.Embed(self.vocab_size, self.width, name="embedding")(inputs)
        seen = []
        for back in range(self.reach):
            before = jnp.pad(x, ((0, 0), (back, 0), (0, 0)))[:, : x.shape[1]]
            same = jnp.pad(segments, ((0, 0), (back, 0)))[:, : x.shape[1]] == segments
            seen.append(jnp.where(same[..., None], before, 0))
        window = jnp.concatenate(seen, axis=-1)
        h = linen.Dense(2 * self.width)(window) * jax.nn.sigmoid(linen.Dense(2 * self.width)(window))
        return linen.Dense(self.vocab_size)(linen.LayerNorm(name="norm")(x + linen.Dense(self.width)(h)))


def make(*, vocab_size: int, width: int = 64, reach: int = 8, context: int = 256) -> Model:
    """`vocab_size` is the tokenizer's, where the config says nothing of it."""
    return model_from_linen(GatedConvolution(vocab_size, width, reach), context=context)


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" or "tiny"."""
    config = sibling_config(str(Path(__file__).parent), "pretrain").get_config(arg).unlock()
    config.model = ConfigDict({"name": "experiments/examples/my_model.py:make", "width": 16 if arg == "tiny" else 128})
    return config.lock()

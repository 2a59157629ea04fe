"""What the subtrees of any config call: of one program's, and of configs that hold those of several, as a pipeline's.

Each program that is given a config says of its own; here they are found by what a config holds.
"""

from ml_collections import ConfigDict

from lm import evaluate, train, verdicts
from lm.options import Called


def subtrees(config: ConfigDict) -> dict[str, Called]:
    """The functions by dotted path, such as "sft.optimizer" in a pipeline's config."""
    if "stage" in config and "name" in config.stage:
        return train.subtrees(config)
    if "init_from" in config and "rank" in config:
        return verdicts.subtrees(config)
    if "models" in config:
        return evaluate.subtrees(config)
    parts = {name: subtrees(part) for name, part in config.items() if isinstance(part, ConfigDict)}
    return {f"{name}.{path}": called for name, found in parts.items() for path, called in found.items()}

"""The functions that the subtrees of any config call: a config of one program, or of several, such as a pipeline.

Each program lists its own functions; this file chooses by the entries of the config.
"""

from ml_collections import ConfigDict

from lm.core.options import ConfigFunction
from lm.evaluate import models
from lm.feedback import auto_rank
from lm.train import loop


def config_functions(config: ConfigDict) -> dict[str, ConfigFunction]:
    """The functions by dotted path, such as "sft.optimizer" in a pipeline's config."""
    if "stage" in config and "name" in config.stage:
        return loop.train_functions(config)
    if "init_from" in config and "rank" in config:
        return auto_rank.auto_rank_functions(config)
    if "models" in config:
        return models.evaluation_functions(config)
    parts = {name: config_functions(part) for name, part in config.items() if isinstance(part, ConfigDict)}
    return {f"{name}.{path}": called for name, functions in parts.items() for path, called in functions.items()}

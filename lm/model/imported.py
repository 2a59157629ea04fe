"""A custom model in a run: `model.name="my_model.py:make"`, a function of options that returns a `Model`.

`make(*, vocab_size, ...)` takes what config.model holds beside the name; `vocab_size`, if it has that option, is the
tokenizer's. lm.model.flax_adapter makes a Model of a Flax module. A checkpoint keeps the name and the options, not the
code: a program that loads the run needs the file at the same path, and gets the model that it makes then.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lm.core.config import call_with_options
from lm.core.errors import UserError
from lm.core.imports import import_function, is_import_path
from lm.core.types import Params
from lm.model import Model

OPTION = "model.name"


def model_maker(name: str) -> Callable[..., Model]:
    """The function that `name` names. UserError for a name that is no import path, or nothing to call."""
    if not is_import_path(name):
        raise UserError(f"{OPTION} is {name!r}: leave it out for lm's own decoder, or write file.py:function")
    return import_function(name, OPTION)


def imported_model(entries: Mapping[str, Any]) -> Model:
    """The Model of {"name": "file.py:make", **its options}. UserError for options that do not fit and other results."""
    make = model_maker(entries["name"])
    model = call_with_options(make, {key: value for key, value in entries.items() if key != "name"}, name="model")
    if not isinstance(model, Model):
        raise UserError(f"{OPTION} {entries['name']!r} gave a {type(model).__name__}, not an lm.model.Model")
    return model


def takes_vocab_size(name: str) -> bool:
    return "vocab_size" in inspect.signature(model_maker(name)).parameters


def check_same_params(model: Model, lm: Params, name: str, path: Any) -> None:
    """UserError unless the model that `name` makes now has the parameters `lm` of the run in `path`."""
    shapes = [
        {jax.tree_util.keystr(key): tuple(leaf.shape) for key, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (jax.eval_shape(model.init, jax.random.key(0)), lm)
    ]
    for key in sorted(set(shapes[0]) | set(shapes[1])):
        made, kept = (each[key] if key in each else "nothing" for each in shapes)
        if made != kept:
            raise UserError(
                f"{path} holds {kept} for the parameter {key}, but {name} makes {made} now: restore the file that the "
                "run was trained with, and leave model's sizes out"
            )

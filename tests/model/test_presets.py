"""Models by name: each has the parameters that its docstring states, and those of a token where it has experts."""

import inspect
import math
import re

import jax
import pytest
from ml_collections import ConfigDict

from lm import model
from lm.model import presets
from lm.model.params import param_count, param_specs
from lm.weights import config_map

NAMES = [name for name, _ in inspect.getmembers(presets, inspect.isfunction) if not name.startswith("_")]
# What transformers calls those whose own name it does not use.
KINDS = {"llama2": "llama", "llama3": "llama", "smollm2": "llama", "gemma3": "gemma3_text"}
EACH = pytest.mark.parametrize("name", NAMES)


def config_of(name) -> model.ModelConfig:
    return model.ModelConfig(**ConfigDict(getattr(presets, name)()).to_dict())


def stated(name, pattern) -> str | None:
    found = re.search(pattern, getattr(presets, name).__doc__)
    return found and found[1]


@EACH
def test_it_has_the_parameters_that_it_states(name):
    """Exactly; and within 5 % of the name that its authors gave it."""
    c, exactly = config_of(name), int(stated(name, r"^([\d,]+) parameters").replace(",", ""))
    assert param_count(param_specs(c)) == exactly
    shapes = jax.eval_shape(model.make_model(c.for_backend("cpu")).init, jax.random.key(0))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == exactly
    if name != "olmo2_1b":
        number, unit = re.fullmatch(r"([\d.]+)([BM])", stated(name, r'"(.*?)"')).groups()
        assert abs(exactly / {"B": 1e9, "M": 1e6}[unit] / float(number) - 1) < 0.05


def test_the_parameters_of_a_token():
    """All but those of the experts that it does not take: 12.9B of Mixtral, 3.3B of Qwen 3."""
    for name in ("mixtral_8x7b", "qwen3_30b_a3b"):
        c = config_of(name)
        experts = sum(math.prod(spec.shape) for spec in param_specs(c)["layers"].values() if len(spec.shape) == 4)
        active = param_count(param_specs(c)) - experts + experts * c.experts_per_token // c.experts
        assert abs(active / 1e9 - float(stated(name, r"([\d.]+)B of them"))) < 0.06, name


@EACH
def test_transformers_can_say_it(name):
    """A model trained in this shape can be exported, to the architecture that it is named after."""
    c, named = config_of(name), name.partition("_")[0]
    kind = KINDS.get(named, named)
    if c.experts and kind == "qwen3":
        kind = "qwen3_moe"
    hf = config_map.config_json(c, kind)
    assert hf["model_type"] == kind and config_map.model_config_from_json(hf) == c


def test_they_are_all_here():
    assert len(NAMES) == 28

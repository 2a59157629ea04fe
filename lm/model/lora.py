"""Low-rank adapters on a frozen base: W + (alpha / rank) A B (Hu et al. 2021, arXiv 2106.09685).

A run learns the adapters, {"layers": {"query_a", "query_b", ...}}; the base is in state.frozen["base"], in float32,
bfloat16, or int8 with a scale a column (as QLoRA's frozen base, Dettmers et al. 2023, arXiv 2305.14314, in 8 bits).
`adapters_over_base` joins both, by reference, into the one tree that the forward pass reads. B starts at zero, so that
the first output is the base model's.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lm.core.errors import UserError
from lm.core.types import Params
from lm.model.config import ModelConfig
from lm.model.params import ParamSpec, param_specs
from lm.model.quantization import QUANTIZED_MATRICES

FROZEN_BASE = "base"  # of state.frozen


def config_without_lora(c: ModelConfig) -> ModelConfig:
    """The same model without adapters: every LoRA option at its default."""
    defaults = {f.name: f.default for f in dataclasses.fields(c) if f.name.startswith("lora_")}
    return dataclasses.replace(c, **defaults)


def lora_specs(c: ModelConfig) -> dict:
    """Specs of the trainable adapters: A is drawn like a matrix of as many rows, B is zero."""
    layers = param_specs(config_without_lora(c))["layers"]
    specs = {}
    for name in lora_target_names(c):
        stack, rows, columns = layers[name].shape
        _, row_axis, column_axis = layers[name].axes
        specs[f"{name}_a"] = ParamSpec((stack, rows, c.lora_rank), (None, row_axis, None), 1 / math.sqrt(rows))
        specs[f"{name}_b"] = ParamSpec((stack, c.lora_rank, columns), (None, None, column_axis), 0.0)
    return {"layers": specs}


def lora_target_names(c: ModelConfig) -> list[str]:
    """The matrices that have adapters. UserError for one that the model does not have."""
    names = [name.strip() for name in c.lora_targets.split(",")]
    available = [
        name
        for name, spec in param_specs(config_without_lora(c))["layers"].items()
        if name in QUANTIZED_MATRICES and len(spec.shape) == 3
    ]
    for name in names:
        if name not in available:
            raise UserError(f"model.lora_targets names {name!r}; this model has {', '.join(sorted(available))}")
    return names


def adapters_over_base(lm: Params, frozen: Mapping[str, Any]) -> Params:
    """Adapters and the base under them as one decoder; `lm` itself where there is no base, or it needs none."""
    if FROZEN_BASE not in frozen or "embedding" in lm:
        return lm
    base = frozen[FROZEN_BASE]
    return {**base, **lm, "layers": {**base["layers"], **lm["layers"]}}


def join_adapters(params: Params, frozen: Mapping[str, Any]) -> tuple[Params, Mapping[str, Any]]:
    """Both with decoders as their forward pass reads them: adapters laid on the frozen base, if there is one."""
    if FROZEN_BASE not in frozen:
        return params, frozen
    params = {**params, "lm": adapters_over_base(params["lm"], frozen)} if "lm" in params else params
    return params, {**frozen, **({"ref": adapters_over_base(frozen["ref"], frozen)} if "ref" in frozen else {})}


def merged_params(c: ModelConfig, base: Mapping[str, Any], lm: Mapping[str, Any]) -> Params:
    """The decoder without adapters that computes the same, float32, numpy."""
    layers = {
        name: np.asarray(leaf, np.float32) for name, leaf in base["layers"].items() if not name.endswith("_scale")
    }
    for name in base["layers"]:
        if name.endswith("_scale"):
            layers[name.removesuffix("_scale")] *= np.asarray(base["layers"][name], np.float32)
    for name in lora_target_names(c):
        a, b = (np.asarray(lm["layers"][f"{name}_{side}"], np.float32) for side in "ab")
        layers[name] = layers[name] + lora_scale(c) * (a @ b)
    rest = {name: np.asarray(leaf, np.float32) for name, leaf in base.items() if name != "layers"}
    return {**rest, "layers": layers}


def lora_scale(c: ModelConfig) -> float:
    return c.lora_alpha / c.lora_rank

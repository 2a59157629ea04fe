"""The rotary positions of a config.json.

Newer files say {"rope_parameters": {..., "rope_theta"}}, Gemma 3 one for each kind of layer; older ones "rope_theta"
and, where a context is stretched, "rope_scaling". We read both, which must agree, and write the older, which every
version reads.
"""

from collections.abc import Mapping
from typing import Any

from lm.core.errors import UserError
from lm.model.config import ModelConfig

Json = Mapping[str, Any]
ROPE_FACTOR_KEYS = {"rope_factor": "factor"}
ROPE_ORIGINAL_KEYS = {**ROPE_FACTOR_KEYS, "rope_original": "original_max_position_embeddings"}
ROPE_SCALING_KEYS = {
    "linear": ROPE_FACTOR_KEYS,
    "llama3": {**ROPE_ORIGINAL_KEYS, "rope_low": "low_freq_factor", "rope_high": "high_freq_factor"},
    "yarn": {
        **ROPE_ORIGINAL_KEYS,
        "rope_low": "beta_slow",
        "rope_high": "beta_fast",
        "rope_attention": "attention_factor",
    },
}


def single_value(places: Mapping[str, Any]) -> Any:
    """The one value that config.json gives at these places, None where at none. UserError for two."""
    values = {place: value for place, value in places.items() if value is not None}
    for place, value in values.items():
        first = next(iter(values))
        if value != values[first]:
            raise UserError(
                f"config.json has {first} = {values[first]!r}, but {place} = {value!r}: keep the one that the weights "
                "were made with"
            )
    return next(iter(values.values()), None)


def read_rope(hf: Json, *, base: float, local: float) -> dict[str, Any]:
    """The rotary options of our ModelConfig; base and local where config.json has none.

    Raises KeyError for a key that is not there, UserError for a scaling that we cannot compute.
    """
    new, old = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    inner = new.get("sliding_attention") or {}
    new = {} if new.keys() <= {"sliding_attention"} else new.get("full_attention", new) or {}
    rope = {
        key: single_value({f"rope_parameters.{key}": new.get(key), f"rope_scaling.{key}": old.get(key)})
        for key in new | old
    }
    kind = single_value({"rope_type": rope.get("rope_type"), "type": rope.get("type")}) or "default"
    if kind not in ("default", *ROPE_SCALING_KEYS):
        raise UserError(
            f"config.json scales its rotary positions by {kind!r}: we compute {', '.join(ROPE_SCALING_KEYS)}, or none"
        )
    if (inner.get("rope_type") or "default") != "default":
        raise UserError(f"config.json scales the rotary positions of its windows by {inner['rope_type']!r}: we do not")
    if any((part.get("partial_rotary_factor") or 1.0) != 1.0 for part in (rope, inner)):
        raise UserError("config.json has a partial_rotary_factor: we turn the whole of each head")
    theta = {"rope_parameters.rope_theta": rope.get("rope_theta"), "rope_theta": hf.get("rope_theta")}
    within = {
        "sliding_attention.rope_theta": inner.get("rope_theta"),
        "rope_local_base_freq": hf.get("rope_local_base_freq"),
    }
    bases = {"rope_base": float(single_value(theta) or base), "rope_local_base": float(single_value(within) or local)}
    if kind == "default":
        return bases
    before = "original_max_position_embeddings"
    own = {ours: rope[theirs] for ours, theirs in ROPE_SCALING_KEYS[kind].items() if rope.get(theirs) is not None}
    for ours, theirs in ROPE_SCALING_KEYS[kind].items():
        if ours not in (*own, "rope_original") and (kind != "yarn" or ours == "rope_factor"):
            raise KeyError(theirs)
    if "rope_original" in ROPE_SCALING_KEYS[kind]:
        own["rope_original"] = single_value({f"the rope's {before}": rope.get(before), before: hf.get(before)})
        own["rope_original"] = own["rope_original"] or hf["max_position_embeddings"]
    if kind == "yarn":
        if rope.get("truncate") is False or rope.get("mscale"):
            raise UserError("config.json has yarn with truncate = false or an mscale: we round, and have none")
        own = {"rope_low": 1.0, "rope_high": 32.0, **own}
    return {**bases, "rope_scaling": kind, **own}


def write_rope(c: ModelConfig) -> dict[str, Any]:
    """The keys of config.json."""
    rope: dict[str, Any] = {"rope_theta": c.rope_base}
    if c.rope_local_base:
        rope["rope_local_base_freq"] = c.rope_local_base
    if c.rope_scaling != "none":
        own = {
            theirs: getattr(c, ours) for ours, theirs in ROPE_SCALING_KEYS[c.rope_scaling].items() if getattr(c, ours)
        }
        rope["rope_scaling"] = {"rope_type": c.rope_scaling, **own}
    return rope

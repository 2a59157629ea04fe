"""One spec per parameter gives initial values, logical axes and counts. Layers are stacked on a leading axis."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.core.types import Array, Params
from lm.model.config import ModelConfig

# The projections that have a bias, by Config.bias.
QKV = ("query", "key", "value")
BIASED_PROJECTIONS = {
    "none": (),
    "qkv": QKV,
    "attention": (*QKV, "attention_out"),
    "all": (*QKV, "attention_out", "gate", "up", "down"),
}


class ParamSpec(NamedTuple):
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical names, one per dimension; lm.core.sharding maps them to the mesh
    std: float | None  # normal with this deviation, truncated at two deviations; None: ones; 0: zeros


def param_specs(c: ModelConfig) -> dict:
    """The decoder's parameters. Output projections start smaller by sqrt(2 layers) (Radford et al. 2019, sec. 2.3).

    With `base_width`, muP (Yang et al. 2022, table 8, arXiv 2203.03466): embedding and head start with the deviation
    that they have at that width, the logits are multiplied by base_width / width (lm.model.decoder.logits), and Adam's
    steps on the blocks' matrices too (optimizer.base_width). Those matrices start by their fan-in anyway. Attention
    needs no change, as heads of one size grow in number: sqrt(head size) is the same at every width.
    """
    outer = (c.base_width or c.width) ** -0.5
    norm = 0.0 if c.norm_unit_offset else None
    tree = {
        "embedding": ParamSpec((c.vocab_size, c.width), ("vocab", "width"), outer / c.embedding_scale),
        "layers": layer_specs(c),
        "final_norm": ParamSpec((c.width,), (None,), norm),
    }
    if c.norm == "layer":
        tree["final_norm_bias"] = tree["final_norm"]._replace(std=0.0)
    if c.positions == "learned":
        tree["position_embedding"] = ParamSpec((c.context, c.width), (None, "width"), outer)
    if not c.tie_embeddings:
        tree["head"] = ParamSpec((c.width, c.vocab_size), ("width", "vocab"), outer)
    return tree


def layer_specs(c: ModelConfig) -> dict:
    """Specs of the layers' parameters, stacked."""
    queries, keys = c.heads * c.head_size, c.kv_heads * c.head_size
    out = 1 / math.sqrt(2 * c.layers)

    def stacked_spec(shape, axes, std):
        return ParamSpec((c.layers, *shape), (None, *axes), std)

    def matrix(rows, columns, axes, scale=1.0):
        return stacked_spec((rows, columns), axes, scale / math.sqrt(rows))

    def norm(size):
        return stacked_spec((size,), (None,), 0.0 if c.norm_unit_offset else None)

    experts, expert = ((c.experts,), ("experts",)) if c.experts else ((), ())

    def mlp(rows, columns, axes, scale=1.0):
        return stacked_spec((*experts, rows, columns), (*expert, *axes), scale / math.sqrt(rows))

    layers = {
        "query": matrix(c.width, queries, ("width", "heads")),
        "key": matrix(c.width, keys, ("width", "kv_heads")),
        "value": matrix(c.width, keys, ("width", "kv_heads")),
        "attention_out": matrix(queries, c.width, ("heads", "width"), out),
        "up": mlp(c.width, c.hidden, ("width", "hidden")),
        "down": mlp(c.hidden, c.width, ("hidden", "width"), out),
    }
    if c.gated:
        layers["gate"] = mlp(c.width, c.hidden, ("width", "hidden"))
    if c.experts:
        layers["router"] = matrix(c.width, c.experts, ("width", None))
    for name in [
        name for name in layers if name in BIASED_PROJECTIONS[c.bias]
    ]:  # in their order: that of a set is the process's
        layers[f"{name}_bias"] = stacked_spec(layers[name].shape[-1:], layers[name].axes[-1:], 0.0)
    if c.qk_norm:
        norm_over_heads = c.qk_norm_over == "all"
        layers["query_norm"] = norm(queries if norm_over_heads else c.head_size)
        layers["key_norm"] = norm(keys if norm_over_heads else c.head_size)
    for place, suffix in (("output", "_norm"), ("input", "_post_norm")):
        if c.norm_at != place:
            layers |= {f"{part}{suffix}": norm(c.width) for part in ("attention", "mlp")}
    if c.norm == "layer":
        layers |= {f"{name}_bias": spec._replace(std=0.0) for name, spec in layers.items() if name.endswith("_norm")}
    return layers


def value_head_specs(c: ModelConfig) -> dict:
    """A scalar head that starts at zero: V(s) = 0 and every answer scores 0 before training."""
    return {"score": ParamSpec((c.width,), (None,), 0.0), "offset": ParamSpec((), (), 0.0)}


def _is_spec(x) -> bool:
    return isinstance(x, ParamSpec)


def initial_params(tree: dict, key: Array) -> Params:
    """float32 parameters; each draws from its own key, folded from its place in the tree."""
    flat, treedef = jax.tree.flatten(tree, is_leaf=_is_spec)
    return jax.tree.unflatten(treedef, [_initial_leaf(spec, jax.random.fold_in(key, i)) for i, spec in enumerate(flat)])


def _initial_leaf(spec: ParamSpec, key: Array) -> Array:
    if spec.std is None:
        return jnp.ones(spec.shape, jnp.float32)
    if spec.std == 0:
        return jnp.zeros(spec.shape, jnp.float32)
    return spec.std * jax.random.truncated_normal(key, -2.0, 2.0, spec.shape, jnp.float32)


def logical_axes(tree: dict) -> dict:
    """Logical axes in the tree's structure."""
    return jax.tree.map(lambda spec: spec.axes, tree, is_leaf=_is_spec)


def param_count(tree: dict) -> int:
    """Number of parameters."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(tree, is_leaf=_is_spec))


def matmul_param_count(c: ModelConfig) -> int:
    """Parameters that take part in a matrix product per token: not norms, biases, looked-up embeddings, idle experts.

    The N of 6N FLOPs a token (Chowdhery et al. 2022, app. B, arXiv 2204.02311); a tied embedding counts once, as head.
    """
    layers = param_specs(c)["layers"].values()
    blocks = sum(math.prod(s.shape) for s in layers if len(s.shape) == 3)
    experts = sum(math.prod(s.shape) for s in layers if len(s.shape) == 4) * c.experts_per_token // max(c.experts, 1)
    return blocks + experts + c.vocab_size * c.width


def flops_per_token(c: ModelConfig, length: int) -> float:
    """Training FLOPs a token, forward and backward: 6N plus causal attention; a frozen base has no weight gradient: 4N.

    Attention: two products of 2 * heads * head_size per visible key, (length + 1) / 2 keys on average, times three for
    the backward pass; a window sees fewer. Rematerialisation is work, not progress, and is left out.
    """
    global_keys = (length + 1) / 2
    visible = min(c.window, length)
    windowed = visible - visible * (visible - 1) / (2 * length)  # the first queries of a row see less than a window
    keys = sum(windowed if local else global_keys for local in c.local_layers)
    return (4 if c.lora_rank else 6) * matmul_param_count(c) + 12 * c.heads * c.head_size * keys

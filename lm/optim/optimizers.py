"""Optimizers and schedules by name and keyword. Moments are float32; norms and embeddings are not decayed."""

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.core.errors import UserError, check_at_least
from lm.core.types import Params
from lm.optim.ema import weight_average

SCHEDULES = ("constant", "linear", "cosine", "wsd", "inverse_sqrt")
NOT_DECAYED_NAMES = ("embedding", "norm", "bias", "score", "offset")


def learning_rate_schedule(
    *, name: str, learning_rate: float, total_steps: int, warmup_steps: int, final_fraction: float
) -> optax.Schedule:
    """Learning rate by optimizer step: linear warm-up from 0, then constant, or down to final_fraction of the peak.

    "linear" and "cosine" fall over all remaining steps; "wsd" stays, then falls linearly over the last fifth, two steps
    at least (warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395). "inverse_sqrt" has no end to fall to: after w
    steps of warm-up it is the peak times sqrt(w / step) (Vaswani et al. 2017, eq. 3, arXiv 1706.03762).
    """
    if name not in SCHEDULES:
        raise UserError(f"optimizer.schedule_name is {name!r}; choose one of {', '.join(SCHEDULES)}")
    check_at_least(0, "optimizer", warmup_steps=warmup_steps)
    if warmup_steps >= total_steps:
        raise UserError(f"optimizer.warmup_steps {warmup_steps} is not below optimizer.total_steps {total_steps}")
    rest, end = total_steps - warmup_steps, learning_rate * final_fraction
    fall = min(max(rest // 5, 2), rest)  # the first of them is still at the peak
    after = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "linear": lambda: optax.linear_schedule(learning_rate, end, rest),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, rest, final_fraction),
        "wsd": lambda: optax.linear_schedule(learning_rate, end, fall, transition_begin=rest - fall),
        "inverse_sqrt": lambda: lambda i: learning_rate * jnp.sqrt(max(warmup_steps, 1) / (warmup_steps + i + 1)),
    }[name]()
    # Step 0 already moves: the warm-up counts from 1.
    warm = optax.linear_schedule(learning_rate / max(warmup_steps, 1), learning_rate, max(warmup_steps - 1, 1))
    return optax.join_schedules([warm, after], [warmup_steps])


def weight_decay_mask(params: Params):
    """True on the matrices that weight decay shrinks: neither norms nor biases nor embeddings nor the scalar head."""

    def has_weight_decay(path, _):
        return not any(part in str(key.key) for key in path for part in NOT_DECAYED_NAMES)

    return jax.tree_util.tree_map_with_path(has_weight_decay, params)


# An optimizer is the direction of its step; clipping, weight decay and the learning rate are the same for all.


def adamw(*, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam's step (Kingma & Ba 2015, arXiv 1412.6980), the decay apart (Loshchilov & Hutter 2019, arXiv 1711.05101)."""
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


def lion(*, b1: float = 0.9, b2: float = 0.99) -> optax.GradientTransformation:
    """The sign of an interpolated momentum (Chen et al. 2023, algorithm 2, arXiv 2302.06675).

    Every entry moves by the whole learning rate: theirs is 3 to 10 times smaller than AdamW's, their decay as much
    larger.
    """
    return optax.scale_by_lion(b1=b1, b2=b2)


def adafactor(
    *, decay_rate: float = 0.8, clipping: float = 1.0, min_dim_size_to_factor: int = 128
) -> optax.GradientTransformation:
    """Second moments by rows and columns, steps relative to a weight's size (Shazeer & Stern 2018, arXiv 1804.04235).

    decay_rate: the second moment's decay at step t is 1 - t^-decay_rate. clipping: of the step's root mean square.
    A weight's size and its step's are taken over all of its stacked layers; matrices with a side shorter than
    `min_dim_size_to_factor` keep whole moments.
    """
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor),
        optax.clip_by_block_rms(clipping),
        optax.scale_by_param_block_rms(),
    )


def muon(
    *, beta: float = 0.95, iterations: int = 5, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Momentum made orthogonal by Newton-Schulz `iterations` (Jordan et al. 2024), each layer's matrices on their own.

    beta: of that momentum. The rest (embedding, head, norms, scores) takes Adam's step with b1, b2 and eps. A matrix
    [in, out] is scaled by 0.2 sqrt(max(in, out)), so that one learning rate and decay serve both
    (Liu et al. 2025, eq. 4, arXiv 2502.16982).
    """

    def matrices(updates):  # layers, and whatever else is stacked before the last two axes, are batched
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), updates)

    def scale_update(update, _):
        return 0.2 * math.sqrt(max(update.shape[-2:])) * update

    orthogonal = optax.contrib.scale_by_muon(ns_steps=iterations, beta=beta, weight_dimension_numbers=matrices)
    steps = {
        "muon": optax.chain(orthogonal, optax.stateless_with_tree_map(scale_update)),
        "adamw": adamw(b1=b1, b2=b2, eps=eps),
    }
    return optax.partition(steps, muon_labels)


def muon_labels(params: Params):
    """ "muon" on the matrices of the blocks, [L, ..., in, out]; "adamw" on everything else."""

    def label(path, leaf):
        inside = any(str(key.key) == "layers" for key in path)
        return "muon" if inside and leaf.ndim >= 3 else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


def scale_by_width(base_width: int) -> optax.GradientTransformation:
    """Steps on the blocks' matrices times base_width / width: the learning rate of muP (see
    lm.model.params.param_specs).

    The width is the embedding's. For steps whose size is not the gradient's, as Adam's and Lion's (Yang et al. 2022,
    table 8, arXiv 2203.03466).
    """

    def update(updates, state, params):
        leaves = jax.tree_util.tree_leaves_with_path(params)
        scale = base_width / next(leaf.shape[-1] for path, leaf in leaves if str(path[-1].key) == "embedding")
        labels = muon_labels(updates)
        return jax.tree.map(lambda u, label: scale * u if label == "muon" else u, updates, labels), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


OPTIMIZERS = {"adamw": adamw, "lion": lion, "adafactor": adafactor, "muon": muon}


def make_optimizer(
    *,
    name: str = "adamw",
    learning_rate: float,
    total_steps: int,
    schedule_name: str = "cosine",
    warmup_steps: int = 0,
    final_fraction: float = 0.1,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    ema_decay: float = 0.0,
    base_width: int = 0,
    **options: Any,
) -> optax.GradientTransformation:
    """The optimizer of that name in OPTIMIZERS, with its own options, after clipping the global gradient norm.

    The learning rate, which may be traced, lives in the optimizer's state, where `update.gradient` finds it to report.
    weight_decay: times the learning rate, of the matrices. clip_norm: 0 does not clip. ema_decay: of the averaged
    weights, 0 for none. base_width: of muP, the same as model.base_width, 0 for none. UserError for a name or option
    that there is not. optax 0.2.8 has no Shampoo and no SOAP.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"optimizer.name is {name!r}; choose one of {', '.join(OPTIMIZERS)}")
    known = inspect.signature(OPTIMIZERS[name]).parameters
    for option in options:
        if option not in known:
            raise UserError(f"optimizer.{option} is not an option of {name}, which has {', '.join(known)}")
    if not 0 <= ema_decay < 1:
        raise UserError(f"optimizer.ema_decay is {ema_decay}; it must be from 0 (no average) to below 1")
    if base_width < 0 or base_width and name not in ("adamw", "lion"):
        raise UserError(f"optimizer.base_width is {base_width} for {name}; it must be 0, or a width for adamw or lion")
    rate = learning_rate_schedule(
        name=schedule_name,
        learning_rate=learning_rate,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        final_fraction=final_fraction,
    )

    def descent(learning_rate):
        direction = OPTIMIZERS[name](**options)
        if base_width:  # before the decay, whose strength no width changes
            direction = optax.chain(direction, scale_by_width(base_width))
        decay = optax.add_decayed_weights(weight_decay, weight_decay_mask)
        return optax.chain(direction, decay, optax.scale_by_learning_rate(learning_rate))

    clip = optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity()
    steps = [clip, optax.inject_hyperparams(descent)(learning_rate=rate)]
    return optax.chain(*steps, weight_average(ema_decay)) if ema_decay else optax.chain(*steps)


SHARED_OPTIONS = [p for p in inspect.signature(make_optimizer).parameters.values() if p.kind is p.KEYWORD_ONLY]


def optimizer_signature(*names: str) -> inspect.Signature:
    """Of `make` with the options of these optimizers instead of **options, so that a misspelt one is known."""
    own = {option: p for name in names for option, p in inspect.signature(OPTIMIZERS[name]).parameters.items()}
    return inspect.Signature([*SHARED_OPTIONS, *own.values()], return_annotation=optax.GradientTransformation)


make_optimizer.__signature__ = optimizer_signature(*OPTIMIZERS)

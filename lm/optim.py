"""Optimizer and schedule by name and keyword. Moments are float32; norms and embeddings are not decayed."""

import jax
import optax

from lm.errors import UserError
from lm.types import Params

SCHEDULES = ("constant", "linear", "cosine", "wsd")
NOT_DECAYED = ("embedding", "norm", "score", "offset")


def schedule(
    *, name: str, learning_rate: float, total_steps: int, warmup_steps: int, final_fraction: float
) -> optax.Schedule:
    """Learning rate by optimizer step: linear warm-up from 0, then constant, or down to final_fraction of the peak.

    "linear" and "cosine" fall over all remaining steps; "wsd" stays, then falls linearly over the last fifth
    (warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395).
    """
    if name not in SCHEDULES:
        raise UserError(f"optimizer.schedule is {name!r}; choose one of {', '.join(SCHEDULES)}")
    if warmup_steps >= total_steps:
        raise UserError(f"optimizer.warmup_steps {warmup_steps} is not below optimizer.total_steps {total_steps}")
    rest, end = total_steps - warmup_steps, learning_rate * final_fraction
    after = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "linear": lambda: optax.linear_schedule(learning_rate, end, rest),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, rest, final_fraction),
        "wsd": lambda: optax.linear_schedule(learning_rate, end, max(rest // 5, 1), transition_begin=rest - rest // 5),
    }[name]()
    # Step 0 already moves: the warm-up counts from 1.
    warm = optax.linear_schedule(learning_rate / max(warmup_steps, 1), learning_rate, max(warmup_steps - 1, 1))
    return optax.join_schedules([warm, after], [warmup_steps])


def decay_mask(params: Params):
    """True on the matrices that weight decay shrinks: neither norms nor embeddings nor the scalar head."""

    def decayed(path, _):
        return not any(part in str(key.key) for key in path for part in NOT_DECAYED)

    return jax.tree_util.tree_map_with_path(decayed, params)


def make(
    *,
    learning_rate: float,
    total_steps: int,
    schedule_name: str = "cosine",
    warmup_steps: int = 0,
    final_fraction: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) after clipping the global gradient norm; 0 does not clip.

    The learning rate lives in the optimizer's state, where `update.gradient` finds it to report it.
    """
    rate = schedule(
        name=schedule_name,
        learning_rate=learning_rate,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        final_fraction=final_fraction,
    )

    def adamw(learning_rate):
        return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask)

    clip = optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity()
    return optax.chain(clip, optax.inject_hyperparams(adamw)(learning_rate=rate))

"""A certificate: an update, all its possible batches with their probabilities, and the gradient that it claims to
take."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from lm.core.types import Array, Params, Tokens
from lm.optim.update import Update
from lm.studies.gradients.objectives import PolicyLoss, exact_gradient
from lm.studies.gradients.tiny_world import TinyWorld

GRADIENT_RECORDER = optax.trace(decay=0.0)  # an optimizer whose state, after an update, is the gradient itself
# Relative. float32 rounds at 6e-8, and batches pull in all directions: what is left of them is some ten times smaller
# than each. The sum over batches is in float64, so float32 is enough.
UNBIASED_TOLERANCE = 1e-5
MIN_BIAS = 1e-3
BATCHES_AT_ONCE = 1680  # batches computed together: all rankings of four, half of the pairs


class BatchDistribution(NamedTuple):
    """All possible batches."""

    indices: Any  # leaves i32[M,...]
    probabilities: np.ndarray  # f64[M], of sum 1
    make_batch: Callable[[Any], Any]  # the indices of one batch -> the batch of the stage
    answers_per_batch: int  # answers in a batch


class Certificate(NamedTuple):
    """The claim that over `batches` the mean gradient of `update` is `scale` times `exact_gradient`, or is biased."""

    name: str
    objective: str  # in words: whose gradient `exact_gradient` is
    exact_gradient: Params | None  # None: zero
    update: Update  # with the optimizer GRADIENT_RECORDER
    batches: BatchDistribution
    params: Params
    frozen: Params
    scale: float = 1.0
    is_biased: bool = False
    param_group: str = "lm"  # of the parameters


class CertificateResult(NamedTuple):
    """The result of a certificate. Norms are over all parameters of its part."""

    name: str
    objective: str
    biased: bool  # what it claims
    holds: bool
    exact: float  # |G|, G being `scale` times the exact gradient
    ours: float  # |E g|
    size: float  # sqrt E |g|^2
    off: float  # |E g - G| / |G|; |E g| / size where G is zero
    scale: float | None  # the best factor on the objective's gradient
    residue: float | None  # |E g - best| / |E g|: the error that no factor removes, the sine of the angle
    cosine: float | None
    variance: float  # E |g - E g|^2, times the answers in a batch
    noise: float | None  # variance / |E g|^2: in a batch of so many answers the noise is as large as the gradient


def certificate_of(
    world: TinyWorld,
    name: str,
    objective: str,
    loss: PolicyLoss | None,
    update: Update,
    batches: BatchDistribution,
    **claimed,
) -> Certificate:
    """The certificate of an update of the world's policy. `loss` is the objective's; None if the expected gradient is
    zero.

    claimed: scale, is_biased, param_group; `temperature` of the policy; `heads`, further parameters.
    """
    truth = None if loss is None else exact_gradient(world, loss, temperature=claimed.pop("temperature", 1.0))
    params = {"lm": world.nets.policy, **claimed.pop("heads", {})}
    frozen = {"ref": world.nets.reference, "teacher": world.nets.teacher}
    return Certificate(name, objective, truth, update, batches, params, frozen, **claimed)


def certificate_result(c: Certificate) -> CertificateResult:
    """The gradient of every batch, their mean, and its distance from the claim."""
    gradients, chances = batch_gradients(c), c.batches.probabilities
    mean = chances @ gradients
    square = chances @ np.sum(np.square(gradients), axis=1)
    ours, size = np.linalg.norm(mean), np.sqrt(square)
    variance = c.batches.answers_per_batch * max(square - ours**2, 0.0)
    if c.exact_gradient is None:
        norm, off, scale, residue, cosine, noise = 0.0, ours / size, None, None, None, None
        error = off
    else:
        truth = np.asarray(ravel_pytree(c.exact_gradient)[0], np.float64)
        norm = np.linalg.norm(truth) * abs(c.scale)
        off = np.linalg.norm(mean - c.scale * truth) / norm
        scale = mean @ truth / (truth @ truth)
        residue = np.linalg.norm(mean - scale * truth) / ours
        cosine = mean @ truth / (ours * np.linalg.norm(truth))
        noise = variance / ours**2
        error = residue if c.is_biased else off
    holds = error > MIN_BIAS if c.is_biased else error < UNBIASED_TOLERANCE
    numbers = (norm, ours, size, off, scale, residue, cosine, variance, noise)
    return CertificateResult(
        c.name, c.objective, c.is_biased, bool(holds), *(None if x is None else float(x) for x in numbers)
    )


def batch_gradients(c: Certificate) -> np.ndarray:
    """f64[M,parameters]: the gradient that the update takes on each batch.

    Not compiled as a whole: every primitive is compiled once and then serves all certificates, where one certificate's
    own program takes longer to compile than all of them take to run. Hence one shape of rows for all worlds, pieces of
    one size, and model functions that are compiled by themselves.
    """
    state = c.update.init(jax.random.key(0), c.params, c.frozen)

    def one(indices):
        after, _ = c.update.update(state, c.batches.make_batch(indices))
        return ravel_pytree(after.opt_state.trace[c.param_group])[0]

    count = len(c.batches.probabilities)
    gradients = []
    for start in range(0, count, BATCHES_AT_ONCE):
        piece = np.minimum(np.arange(start, start + BATCHES_AT_ONCE), count - 1)
        gradients.append(np.asarray(jax.vmap(one)(jax.tree.map(lambda x: jnp.asarray(x[piece]), c.batches.indices))))
    return np.concatenate(gradients)[:count].astype(np.float64)


def rows_by_index(tokens: Tokens, rows: Array) -> Tokens:
    """Enumerated rows by their numbers i32[...]: leaves [...,T]."""
    return jax.tree.map(lambda x: x[rows], tokens)

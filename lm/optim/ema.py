"""A moving average of the weights, kept in the optimizer's state: what evaluation and later stages read."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.core.types import Array, Params


class WeightAverageState(NamedTuple):
    """A mean of the weights after each step so far, the older ones counting less."""

    count: Array  # i32[]  steps in it
    average: Params  # a copy of the starting weights before the first


def weight_average(decay: float) -> optax.GradientTransformation:
    """Remembers sum_t decay^(n-t) w_t / sum_t decay^(n-t) of the weights w_1 ... w_n; the updates pass unchanged.

    The starting weights, random in pretraining, count for nothing after the first step. Last in a chain.
    Polyak & Juditsky 1992; exponential, with the correction of Kingma & Ba 2015, sec. 3 and 7.2, arXiv 1412.6980.
    """

    def init(params):
        return WeightAverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates, state, params):
        count = state.count + 1
        share = (1 - decay) / -jnp.expm1(count * math.log(decay))  # (1 - decay) / (1 - decay^count)
        after = optax.apply_updates(params, updates)
        return updates, WeightAverageState(
            count, jax.tree.map(lambda old, new: old + share * (new - old), state.average, after)
        )

    return optax.GradientTransformation(init, update)


def averaged_params(opt_state: optax.OptState) -> Params:
    """The averaged weights that the optimizer remembers; {} if it has none."""
    averages = [x.average for x in jax.tree.leaves(opt_state, is_leaf=_is_average) if _is_average(x)]
    return averages[0] if averages else {}


def with_averaged_params(opt_state: optax.OptState, params: Params) -> optax.OptState:
    """The same memory with `params` for its averaged weights, where it has any."""
    return jax.tree.map(lambda x: x._replace(average=params) if _is_average(x) else x, opt_state, is_leaf=_is_average)


def _is_average(x) -> bool:
    return isinstance(x, WeightAverageState)

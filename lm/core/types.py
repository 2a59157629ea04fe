"""The pytrees that travel through every stage. B rows, T positions; every field names its dtype and shape."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import jax
import optax
from flax import struct

Array = jax.Array
Params = Mapping[str, Any]


class Replaceable:
    """Tells type checkers what flax.struct.dataclass adds."""

    if TYPE_CHECKING:

        def replace(self, **changes: Any) -> Self: ...


@struct.dataclass
class TrainState(Replaceable):
    """Everything an update may change, and what it may read."""

    step: Array  # i32[]  optimizer updates so far; schedules and keys count by it
    params: Params  # trainable: {"lm": ...} or {"lm": ..., "value": ...}
    opt_state: optax.OptState  # moments and counts: all optimizer memory lives here
    key: Array  # typed PRNG key, never advanced: fold_in(key, step)
    frozen: Mapping[str, Params]  # {"ref": ...}: read by losses, never differentiated, not saved again
    memory: Mapping[str, Any] = struct.field(default_factory=dict)  # what a method itself remembers, saved: a KL
    # coefficient that adapts {"beta": f32[]}, a reference that is renewed {"ref": ...}


@struct.dataclass
class Tokens(Replaceable):
    """Rows of tokens for next-token prediction.

    `targets` is `inputs` shifted left by one, so the weight at t says how much predicting targets[t] counts. Rows may
    hold several packed segments: positions restart in each, attention needs equal segment ids, and 0 marks padding.
    """

    inputs: Array  # i32[B,T]
    targets: Array  # i32[B,T]
    weights: Array  # f32[B,T]  belongs to the target
    positions: Array  # i32[B,T]  restart per segment
    segments: Array  # i32[B,T]  1, 2, ... per row; 0 is padding


@struct.dataclass
class RankedAnswers(Replaceable):
    """Answers to each of P prompts, up to K of them, and a rater's ranks on each of A axes.

    Grouped, so that a cut by prompts (microbatches, devices) never parts the answers that a rank compares.
    """

    tokens: Tokens  # leaves [P,K,T]; weights are 1 on an answer's own tokens where a policy learns from it
    ranks: Array  # i32[P,K,A]  1 is best, equal is a tie; 0: no such answer, or not judged on this axis
    mismatched_tokens: Tokens | None = None  # leaves [P,T]: the prompt with an answer to another one (KTO's baseline)
    baseline: Array | None = None  # f32[P]  once annotated


@struct.dataclass
class Rollouts(Replaceable):
    """Sampled answers with what is known of them. Fields that are None have not been annotated yet.

    The answers to one prompt are adjacent: B = prompts * group.
    """

    tokens: Tokens  # weights are 1 on sampled tokens only
    rewards: Array  # f32[B]  what the whole answer is worth, the sum of `token_rewards` included
    row_metrics: Mapping[str, Array]  # f32[B] each: parts of the reward and other raters' scores, logged by these names
    stopped: Array  # bool[B]  ended by themselves, not by the limit
    sampler_logprobs: Array  # f32[B,T]  what the sampler said while it drew
    token_rewards: Array | None = None  # f32[B,T]  what of `rewards` belongs to a token; the rest is its last token's
    old_logprobs: Array | None = None  # f32[B,T]  the trainer's, of the same policy
    ref_logprobs: Array | None = None  # f32[B,T]  of the frozen reference
    old_values: Array | None = None  # f32[B,T]  V(s_t) at the position that predicts token t
    advantages: Array | None = None  # f32[B,T]
    returns: Array | None = None  # f32[B,T]
    text_tokens: Tokens | None = None  # [B,T']: rows of pretraining text to be learned from along the way (PPO-ptx)
    group: int = struct.field(pytree_node=False, default=1)  # answers to each prompt


@struct.dataclass
class Completions(Replaceable):
    """What a sampler drew. A row counts its stop token; everything after it is 0."""

    tokens: Array  # i32[B,N]
    logprobs: Array  # f32[B,N]  of the distribution that was sampled
    lengths: Array  # i32[B]  sampled tokens, stop token included
    stopped: Array  # bool[B]  ended by a stop token, not by the limit

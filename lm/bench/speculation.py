"""The gain of a draft: tokens a second with it and without it, and the share of its proposals that is accepted.

Both sides are ours and answer the same held-out prompts, in turns within a step, `batch` prompts at once.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.bench.generation import GenerationShape
from lm.bench.turns import TimedSteps, Timings, phase_seconds
from lm.core.errors import UserError
from lm.core.statistics import mean_estimate
from lm.core.types import Array, Completions
from lm.data import conversations
from lm.data.loading import load_conversations
from lm.data.prompts import Prompts, prompts_at, prompts_within_length
from lm.data.sources import split_held_out
from lm.generate.sampler import SamplingParams, sample
from lm.generate.speculative import AcceptanceCounts, speculative_sample
from lm.runs.workdir import TrainedModel, check_same_tokenizer

TEMPERATURES = (0.0, 0.7, 1.0)
HELD_OUT_FRACTION = 0.05  # of the conversations, as in the quickstart, whose models have not learned from them


class SpeculationSamplers(NamedTuple):
    """(key) -> what is drawn for the prompts, compiled at the first call."""

    without_draft: Callable[[Array], Completions]
    with_draft: Callable[[Array], tuple[Completions, AcceptanceCounts]]


def speculation_samplers(
    target: TrainedModel,
    draft: TrainedModel,
    prompts: Prompts,
    shape: GenerationShape,
    *,
    draft_tokens: int,
    temperature: float,
) -> SpeculationSamplers:
    """Answers of at most shape.new tokens, that end where they end. UserError for a draft of another tokenizer."""
    check_same_tokenizer(target, draft)
    lm, draft_lm = (jax.device_put(trained.params["lm"]) for trained in (target, draft))
    sampling = SamplingParams(shape.new, temperature, stop=target.tokenizer.stop_ids)
    plain = jax.jit(functools.partial(sample, target.model, sampling=sampling))
    drafted = jax.jit(
        functools.partial(speculative_sample, target.model, draft.model, sampling=sampling, draft_tokens=draft_tokens)
    )
    given = prompts.ids, prompts.lengths
    return SpeculationSamplers(functools.partial(plain, lm, *given), functools.partial(drafted, lm, draft_lm, *given))


def held_out_prompts(target: TrainedModel, shape: GenerationShape) -> Prompts:
    """The first shape.batch held-out prompts of at most shape.prompt tokens. UserError where there are not so many."""
    _, unseen = split_held_out(load_conversations("chitchat"), HELD_OUT_FRACTION)
    fit, _ = prompts_within_length(target.tokenizer, conversations.prompt_contexts(unseen), shape.prompt)
    if len(fit.ids) < shape.batch:
        raise UserError(
            f"{len(fit.ids)} held-out prompts have at most {shape.prompt} tokens, not {shape.batch}: "
            "lower --batches or raise --prompt_tokens"
        )
    return prompts_at(fit, np.arange(shape.batch))


def timed_steps(both: SpeculationSamplers) -> TimedSteps:
    """Steps: seconds of each side, and of one of its tokens, as answers end at lengths of their own."""

    def run(count: int):
        times = []
        for i in range(count + 1):
            key, start = jax.random.key(i), time.perf_counter()
            plain = jax.block_until_ready(both.without_draft(key))
            between = time.perf_counter()
            drafted, _ = jax.block_until_ready(both.with_draft(key))
            seconds = {"plain": between - start, "drafted": time.perf_counter() - between}
            tokens = {"plain": plain, "drafted": drafted}
            each = {f"{name}_token": seconds[name] / int(out.lengths.sum()) for name, out in tokens.items()}
            times.append(seconds | each)
        return times[1:]

    return run


def result(
    name: str, shape: GenerationShape, draft_tokens: int, temperature: float, both: SpeculationSamplers, timed: Timings
) -> dict[str, Any]:
    """Tokens a second of both; over prompts, the share of proposals accepted and the tokens a pass of the target, each
    with its interval. A prompt whose answer had no room for a proposal counts in neither."""
    completions, counts = jax.device_get(both.with_draft(jax.random.key(0)))
    some = counts.proposed > 0
    seconds = phase_seconds(timed.ours)["median"]
    by_turn = [phase_seconds([turn])["median"] for turn in timed.ours]
    return {
        "size": name,
        "temperature": temperature,
        "draft_tokens": draft_tokens,
        **shape._asdict(),
        "per_second": {side: 1 / seconds[f"{side}_token"] for side in ("plain", "drafted")},
        "ratio": seconds["plain_token"] / seconds["drafted_token"],
        "each_turn": [turn["plain_token"] / turn["drafted_token"] for turn in by_turn],
        "accepted": mean_estimate(counts.accepted[some] / counts.proposed[some])._asdict(),
        "tokens_a_pass": mean_estimate(completions.lengths[some] / counts.rounds[some])._asdict(),
    }

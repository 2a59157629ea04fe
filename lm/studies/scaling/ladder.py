"""The runs of a ladder: at each budget several widths, each trained for as long as the budget allows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm.core.config import call_with_options
from lm.core.errors import UserError, check_at_least
from lm.model import ModelConfig
from lm.model.params import flops_per_token, param_count, param_specs
from lm.sweep.space import ConfigSource

MIN_STEPS = 10  # of a run: with fewer, its size does not matter


class LadderPlan(NamedTuple):
    """`config.ladder`, checked. Budgets are FLOPs of training, all matrix products and attention counted."""

    budgets: Sequence[float]
    sizes_per_budget: int
    target_flops: float
    tokens_per_parameter: tuple[float, float]
    bootstrap_draws: int


class PlannedRun(NamedTuple):
    """One run: a width, and the steps that its budget allows at that width."""

    budget: float
    width: int
    parameters: int
    embedding: int  # of them, in the table of tokens
    flops_per_token: float
    steps: int
    tokens: int

    @property
    def overrides(self) -> dict[str, str]:
        return {"model.width": str(self.width), "train.steps": str(self.steps)}


def ladder_plan(
    *,
    min_flops: float,
    max_flops: float,
    target_flops: float,
    budgets: int = 5,
    sizes_per_budget: int = 5,
    tokens_per_parameter: tuple[float, float] = (1.5, 200.0),
    bootstrap_draws: int = 1000,
) -> LadderPlan:
    """Budgets from `min_flops` to `max_flops`, equally spaced in their logarithm; a run of `target_flops` comes last,
    after its loss is predicted.

    sizes_per_budget: runs of a budget, from the fewest to the most tokens_per_parameter. bootstrap_draws: resamplings.
    """
    check_at_least(2, "ladder", budgets=budgets)
    check_at_least(4, "ladder", sizes_per_budget=sizes_per_budget)
    check_at_least(20, "ladder", bootstrap_draws=bootstrap_draws)
    if not 0 < min_flops < max_flops < target_flops:
        raise UserError(
            f"ladder.min_flops {min_flops:g}, max_flops {max_flops:g}, target_flops {target_flops:g}: "
            "each must be above the one before"
        )
    low, high = tokens_per_parameter
    if not 0 < low < high:
        raise UserError(f"ladder.tokens_per_parameter is {low:g}, {high:g}: give two numbers, the smaller first")
    return LadderPlan(
        tuple(map(float, np.geomspace(min_flops, max_flops, budgets))),
        sizes_per_budget,
        target_flops,
        (low, high),
        bootstrap_draws,
    )


def planned_runs(plan: LadderPlan, source: ConfigSource) -> list[PlannedRun]:
    """The runs of the ladder, budget by budget, the narrowest first. UserError for a budget that pays too little."""
    return [rung for budget in plan.budgets for rung in runs_at_budget(plan, source, budget)]


def runs_at_budget(plan: LadderPlan, source: ConfigSource, budget: float) -> list[PlannedRun]:
    """`plan.sizes` widths, each the nearest to equal steps in log(tokens per parameter) that is not yet taken."""
    low, high = plan.tokens_per_parameter
    planned = []
    for width in candidate_widths(source):
        planned.append(planned_run(source, budget, width))
        if planned[-1].tokens < low * planned[-1].parameters / 4 or planned[-1].steps < MIN_STEPS:
            break
    usable = [one for one in planned if one.steps >= MIN_STEPS]
    if len(usable) < plan.sizes_per_budget:
        raise UserError(
            f"a budget of {budget:.3g} FLOPs pays {MIN_STEPS} steps or more of {len(usable)} widths, and a ladder "
            f"needs {plan.sizes_per_budget}: raise ladder.min_flops, or make data.batch_size, "
            "data.length or model.head_size smaller"
        )
    ladder = []
    for target in np.geomspace(high, low, plan.sizes_per_budget):
        ladder.append(min(usable, key=lambda one: abs(np.log(one.tokens / one.parameters / target))))
        usable.remove(ladder[-1])
    return sorted(ladder, key=lambda one: one.width)


def candidate_widths(source: ConfigSource):
    """Multiples of the head's size, as heads of one size grow in number."""
    step = source.config({}).model.head_size
    return (step * i for i in range(1, 100_000 // step))


def planned_run(source: ConfigSource, budget: float, width: int) -> PlannedRun:
    """The run that `budget` FLOPs allow at a width."""
    config = source.config({"model.width": str(width)})
    shape = call_with_options(
        ModelConfig, {**config.model.to_dict(), "vocab_size": config.vocabulary.vocab_size}, name="model"
    )
    each = flops_per_token(shape, config.data.length)
    batch = config.data.batch_size * config.data.length
    steps = round(budget / each / batch)
    return PlannedRun(
        budget, width, param_count(param_specs(shape)), shape.vocab_size * width, each, steps, steps * batch
    )


def nearest_run(source: ConfigSource, budget: float, parameters: float) -> PlannedRun:
    """The run at `budget` whose size is nearest to `parameters`."""
    best = None
    for width in candidate_widths(source):
        one = planned_run(source, budget, width)
        if best and abs(np.log(one.parameters / parameters)) > abs(np.log(best.parameters / parameters)):
            break
        best = one
    if best.steps < MIN_STEPS:
        raise UserError(f"ladder.target_flops {budget:.3g} pays {best.steps} steps of width {best.width}: raise it")
    return best

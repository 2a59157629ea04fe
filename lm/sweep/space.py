"""What a sweep tries: lists of overrides, from a config's sweep(), from --grid, or drawn by a sampler from --space.

An override is text, as on the command line: {"optimizer.learning_rate": "3e-4"}. A config's `sweep()` builds its list
of them with `axis`, `product`, `zip_axes` and +:

    def sweep(arg: str = ""):
        return product(axis("model.width", 32, 64), axis("optimizer.learning_rate", 1e-3, 3e-3))
"""

import functools
import itertools
import json
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import optuna
from ml_collections import ConfigDict
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lm.core.config import config_module, load_config, to_dict
from lm.core.errors import UserError
from lm.core.options import ConfigFunctions
from lm.sweep.config_functions import config_functions

Overrides = Mapping[str, Any]  # dotted key -> value, or its text
SEED_KEY = "seed"


class ConfigSource(NamedTuple):
    """The config that a sweep varies: a file with its argument, and what the command line changes in every trial."""

    name: str  # FILE[:ARG]
    overrides: tuple[str, ...] = ()
    functions: ConfigFunctions = config_functions  # whose options may be varied though the file does not list them

    def config(self, overrides: Overrides) -> ConfigDict:
        changes = [*self.overrides, *(f"{key}={text}" for key, text in overrides.items())]
        return load_config(self.name, changes, self.functions)


class Trial(NamedTuple):
    """One setting to try, with its seeds."""

    number: int
    overrides: dict[str, str] | None  # None: a sampler chooses them
    seeds: tuple[int, ...]  # a run each


def axis(key: str, *values: Any) -> list[dict[str, Any]]:
    """One override for each value."""
    return [{key: value} for value in values]


def product(*sweeps: Sequence[Overrides]) -> list[dict[str, Any]]:
    """Every choice of one entry from each sweep, merged; the last sweep varies fastest."""
    return [_merged_overrides(entries) for entries in itertools.product(*sweeps)]


def zip_axes(*sweeps: Sequence[Overrides]) -> list[dict[str, Any]]:
    """The first entries merged, the second, and so on; all sweeps must be of one length."""
    return [_merged_overrides(entries) for entries in zip(*sweeps, strict=True)]


def _merged_overrides(entries: Sequence[Overrides]) -> dict[str, Any]:
    return {key: value for one in entries for key, value in one.items()}


def config_sweep_points(source: ConfigSource) -> list[dict[str, str]]:
    """What the `sweep(arg)` beside get_config returns, as texts."""
    path, _, arg = source.name.partition(":")
    module = config_module(path)
    if "sweep" not in vars(module):
        raise UserError(f"{path} has no sweep(): give --grid KEY=V1,V2 or --search=tpe --space KEY=LOW:HIGH")
    return [{key: str(value) for key, value in overrides.items()} for overrides in module.sweep(arg)]


def grid_points(texts: Sequence[str]) -> list[dict[str, str]]:
    """ "KEY=V1,V2,..." each -> every combination."""
    axes = [
        axis(key, *_split_outside_brackets(values, ","))
        for key, values in (_split_entry(text, "--grid") for text in texts)
    ]
    return product(*axes)


def search_space(texts: Sequence[str], source: ConfigSource) -> dict[str, BaseDistribution]:
    """The distribution of each key that a sampler draws from: "KEY=LOW:HIGH", "KEY=log:LOW:HIGH" or "KEY=V1,V2,...".

    A range is of integers if the config's value is an integer. Raises UserError for a key or value that the config
    refuses.
    """
    space = {}
    for key, text in (_split_entry(text, "--space") for text in texts):
        bounds = _split_outside_brackets(text.removeprefix("log:"), ":")
        if len(bounds) == 2:
            low, high = (typed_overrides(source, {key: bound})[key] for bound in bounds)
            log = text.startswith("log:")
            if isinstance(low, bool) or not isinstance(low, (int, float)):
                raise UserError(f"--space {key}={text}: config.{key} is no number; list its values: {key}=V1,V2")
            if not low < high or log and low <= 0:
                above = "0 < LOW < HIGH" if log else "LOW < HIGH"
                raise UserError(f"--space {key}={text}: give {above}")
            is_integer = isinstance(low, int)
            space[key] = IntDistribution(low, high, log=log) if is_integer else FloatDistribution(low, high, log=log)
        elif len(bounds) == 1 and not text.startswith("log:"):
            choices = _split_outside_brackets(text, ",")
            for choice in choices:
                typed_overrides(source, {key: choice})
            space[key] = CategoricalDistribution(choices)
        else:
            raise UserError(f"--space {key}={text}: write {key}=LOW:HIGH, {key}=log:LOW:HIGH or {key}=V1,V2")
    return space


def sampled_overrides(trial: optuna.Trial, space: Mapping[str, BaseDistribution]) -> dict[str, str]:
    """The overrides that the study's sampler chooses for a trial."""
    texts = {}
    for key, distribution in space.items():
        if isinstance(distribution, CategoricalDistribution):
            texts[key] = trial.suggest_categorical(key, distribution.choices)
        else:
            suggest = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
            texts[key] = repr(suggest(key, distribution.low, distribution.high, log=distribution.log))
    return texts


def distribution_value(distribution: BaseDistribution, text: str) -> Any:
    """The value with this `text`."""
    if isinstance(distribution, CategoricalDistribution):
        return text
    return int(text) if isinstance(distribution, IntDistribution) else float(text)


def extended_trials(old: Sequence[Trial], trials: Sequence[Trial]) -> tuple[list[Trial], int]:
    """The old trials, then the new ones among `trials` with the next numbers; and how many old ones are not in
    `trials`. Trials with the same overrides and seeds are the same."""
    unmatched = Counter(map(_trial_content, old))
    new = []
    for trial in trials:
        if unmatched[_trial_content(trial)]:
            unmatched[_trial_content(trial)] -= 1
        else:
            new.append(trial)
    numbered = [trial._replace(number=len(old) + i) for i, trial in enumerate(new)]
    return [*old, *numbered], unmatched.total()


def _trial_content(trial: Trial) -> str:
    return json.dumps([trial.overrides, list(trial.seeds)], sort_keys=True)


def typed_overrides(source: ConfigSource, overrides: Mapping[str, str]) -> dict[str, Any]:
    """The values of `overrides` as the config holds them. Raises UserError for what `lm.core.config` refuses."""
    config = to_dict(source.config(overrides))
    return {key: functools.reduce(operator.getitem, key.split("."), config) for key in overrides}


def trials_of_points(points: Sequence[Mapping[str, str]], seeds: Sequence[int]) -> list[Trial]:
    """A trial for every point and seed."""
    return [Trial(i, dict(point), (seed,)) for i, (point, seed) in enumerate(itertools.product(points, seeds))]


def search_trials(count: int, seeds: Sequence[int]) -> list[Trial]:
    """Trials whose overrides a sampler will choose, each run with every seed."""
    return [Trial(i, None, tuple(seeds)) for i in range(count)]


def _split_entry(text: str, flag: str) -> tuple[str, str]:
    key, equals, values = text.partition("=")
    key = key.removeprefix("config.")
    if not equals or not key or not values.strip(","):
        raise UserError(f"{flag} {text}: write KEY=V1,V2, such as optimizer.learning_rate=1e-3,3e-3")
    if key == SEED_KEY:
        raise UserError(f"{flag} {text}: seeds are given by --seeds=N")
    return key, values


def _split_outside_brackets(text: str, separator: str) -> list[str]:
    """Cut at separators outside brackets: "(1,2),(3,4)" has two parts at ","."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == separator and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]

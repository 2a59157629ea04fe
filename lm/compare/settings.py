"""Groups runs into settings. Runs whose configs differ only in the seed are one setting, named by its differences from
others."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm.compare.read import Run, value_text

NO_VALUE = "–"  # where a config has no such key
STAGE_KEY = "stage.name"
CODE_KEY = "code"  # the key of the code, which is part of a setting if several versions ran the same config
NAME_DIGITS = (3, 6, 17)  # of a float in a name: as few as distinguish the settings; 17 distinguish all
MAX_NAME_KEYS = 4  # keys in a name, unless more are needed to distinguish the settings


class Setting(NamedTuple):
    name: str
    config: Mapping[str, Any]  # dotted key to value, without the seed
    runs: Sequence[Run]  # by seed, each seed once


class SettingGroups(NamedTuple):
    settings: Sequence[Setting]
    parameters: Sequence[
        str
    ]  # keys that distinguish the settings, without those that follow from keys that a sweep set
    differing_keys: Sequence[str]  # every key in which settings differ
    notes: Sequence[str]  # notes on how runs became settings


def settings_of_runs(runs: Sequence[Run], *, ignore: Iterable[str] = ()) -> SettingGroups:
    """Groups the runs. `ignore`: further dotted keys, or their beginnings, in which runs of one setting may differ.

    A path that differs is taken relative to the folder that holds the run's own, so that runs/a/sft and runs/b/sft with
    init_from runs/a/pretrain and runs/b/pretrain are one setting. The code is part of a setting only if several
    versions of it ran the same config and seed. Of runs that are still equal, the first counts.
    """
    configs = [comparable_config(run, runs, ("seed", *ignore)) for run in runs]
    notes = []
    if by_code := any(len({run.code.label for run in same}) > 1 for same in repeated_runs(runs, configs)):
        configs = [{**config, CODE_KEY: run.code.label} for config, run in zip(configs, runs)]
    dropped = set()
    for first, *others in repeated_runs(runs, configs):
        dropped |= {run.path for run in others}
        notes += [f"{run.path} repeats {first.path}, setting and seed, and is left out." for run in others]
    groups: dict[str, tuple[Mapping[str, Any], list[Run]]] = {}
    for config, run in zip(configs, runs):
        if run.path not in dropped:
            groups.setdefault(config_identity(config), (config, []))[1].append(run)
    settings = list(groups.values())
    differing = differing_keys([config for config, _ in settings])
    causes = [key for run in runs for key in run.overrides] + [CODE_KEY] * by_code
    parameters = distinguishing_keys([config for config, _ in settings], differing, list(dict.fromkeys(causes)))
    keys = name_keys([config for config, _ in settings], parameters)
    names = setting_names([config for config, _ in settings], keys, settings[0][1][0].stage)
    grouped = [
        Setting(name, config, sorted(members, key=lambda run: run.seed))
        for name, (config, members) in zip(names, settings)
    ]
    if aside := keys_differing_within(grouped):
        notes.append(f"Runs of one setting differ in {', '.join(aside)}, which the comparison sets aside.")
    if len(keys) < len(parameters):
        notes.append(f"The settings differ in {len(parameters)} keys, of which their names show {len(keys)}.")
    return SettingGroups(grouped, parameters, differing, notes)


def comparable_config(run: Run, runs: Sequence[Run], ignore: Sequence[str]) -> dict[str, Any]:
    """The config of a run by which it is grouped."""
    kept = {key: value for key, value in run.config.items() if not any(f"{key}.".startswith(f"{i}.") for i in ignore)}
    differ = {key for key in kept if any(key in r.config and r.config[key] != kept[key] for r in runs)}
    return {
        key: normalized_value(relative_path(value, run.path) if key in differ else value) for key, value in kept.items()
    }


def normalized_value(value: Any) -> Any:
    """1.0 as 1, which is the same setting."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def relative_path(value: Any, path: Path) -> Any:
    """A path below the folder that holds a run's own as "../REST"; any other value unchanged."""
    home = path.resolve().parent
    if isinstance(value, str) and "/" in value and Path(value).resolve().is_relative_to(home):
        return f"../{Path(value).resolve().relative_to(home)}"
    return value


def config_identity(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def repeated_runs(runs: Sequence[Run], configs: Sequence[Mapping[str, Any]]) -> list[list[Run]]:
    """Runs that have both setting and seed in common, where there are several."""
    same: dict[tuple[str, int], list[Run]] = {}
    for run, config in zip(runs, configs):
        same.setdefault((config_identity(config), run.seed), []).append(run)
    return [members for members in same.values() if len(members) > 1]


def differing_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that are not the same in all."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({value_json(config, key) for config in configs}) > 1]


def value_json(config: Mapping[str, Any], key: str) -> str:
    """The value as text, which can be hashed; NO_VALUE if there is none."""
    return json.dumps(config[key], sort_keys=True) if key in config else NO_VALUE


def distinguishing_keys(
    configs: Sequence[Mapping[str, Any]], differing: Sequence[str], causes: Sequence[str]
) -> list[str]:
    """The causes that differ, then the keys whose values do not follow from them; a stage's name first."""
    causes = [key for key in causes if key in differing]
    values = [tuple(value_json(config, key) for key in causes) for config in configs]

    def follows(key):
        pairs = {(cause, value_json(config, key)) for cause, config in zip(values, configs)}
        return len(pairs) == len(set(values))

    distinguishing = [*causes, *(key for key in differing if key not in causes and not (causes and follows(key)))]
    return sorted(distinguishing, key=lambda key: key != STAGE_KEY)


def name_keys(configs: Sequence[Mapping[str, Any]], parameters: Sequence[str]) -> list[str]:
    """The parameters in names: all of them; if they are more than MAX_NAME_KEYS, as few as distinguish the settings;
    the stage alone if that is enough."""
    if len(parameters) <= MAX_NAME_KEYS:
        return list(parameters)
    alone = parameters[0] == STAGE_KEY and are_distinct(configs, parameters[:1])
    keys = list(parameters[:1]) if alone else common_keys(configs, parameters)[:MAX_NAME_KEYS]
    while not are_distinct(configs, keys):
        keys.append(next(key for key in parameters if key not in keys))
    return keys


def are_distinct(configs: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> bool:
    """Whether no two configs have the same values of these keys."""
    return len({tuple(value_json(config, key) for key in keys) for config in configs}) == len(configs)


def setting_names(configs: Sequence[Mapping[str, Any]], keys: Sequence[str], stage: str) -> list[str]:
    """ "learning_rate=0.001, width=64" for each, all different; a single setting is called by its stage."""
    if not keys:
        return [stage for _ in configs]
    short = short_keys(keys)
    for digits in NAME_DIGITS:
        names = [
            ", ".join(f"{short[key]}={config_value_text(config, key, digits)}" for key in keys) for config in configs
        ]
        if len(set(names)) == len(names):
            break
    return names


def common_keys(configs: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """Those that every config has, or all if there are none."""
    return [key for key in keys if all(key in config for config in configs)] or list(keys)


def config_value_text(config: Mapping[str, Any], key: str, digits: int = 6) -> str:
    return value_text(config[key], digits) if key in config else NO_VALUE


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each key by its last part, or whole if another key has the same last part."""
    last = ["stage" if key == STAGE_KEY else key.rpartition(".")[2] for key in keys]
    return {key: part if last.count(part) == 1 else key for key, part in zip(keys, last)}


def keys_differing_within(grouped: Sequence[Setting]) -> list[str]:
    """The keys in which runs of one setting differ, apart from the seed."""
    keys = [key for setting in grouped for key in differing_keys([run.config for run in setting.runs])]
    return [key for key in dict.fromkeys(keys) if key != "seed"]

"""Configs: a Python file whose get_config(arg) returns a ConfigDict, changed by --config.KEY=VALUE, checked by name.

ml_collections' own flags could read these files too, but they print a page of traceback for a misspelt key, so the
few lines that parse an override are here.
"""

import argparse
import difflib
import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from ml_collections import ConfigDict

from lm.core.errors import UserError
from lm.core.options import (
    ConfigFunction,
    ConfigFunctions,
    is_record,
    option_type,
    options_help,
    parsed_value,
    record_options,
    value_type,
)


def no_functions(config: ConfigDict) -> Mapping[str, ConfigFunction]:
    """No functions, for a config whose program is not known: only the entries that it lists can be overridden."""
    return {}


def load_config(
    path_and_arg: str, overrides: Sequence[str] = (), functions: ConfigFunctions = no_functions
) -> ConfigDict:
    """The locked config of "FILE.py:ARG" with `overrides` such as "optimizer.learning_rate=3e-4" applied.

    An override keeps the type of what it replaces; an int is accepted for a float, and "None" for text or None. What
    follows an overridden field (`get_oneway_ref` in the file) changes with it, unless it is overridden itself; the
    order does not matter. `functions`: what the subtrees call; their options may be set though the file does not list
    them. Raises UserError for a file, argument, key or value that is not valid.
    """
    path, _, arg = path_and_arg.partition(":")
    module = config_module(path)
    try:
        config = module.get_config(arg)
    except Exception as error:
        _refuse_dotted_key(error, path)
        if not arg:
            raise  # an error of the file itself: its author needs the traceback
        raise UserError(f"{path} has no variant {arg!r}: {error or type(error).__name__}") from error
    # What names a function comes first: it decides which other options there are.
    for override in sorted(overrides, key=lambda each: not each.partition("=")[0].endswith(".name")):
        _apply_override(config, override, path, functions)
    return config.lock()


def config_module(path: str):
    """The Python file of a config, which is no package. UserError where there is none, or no get_config in it."""
    if not Path(path).is_file():
        raise UserError(f"there is no config file {path}: give --config=experiments/NAME.py")
    spec = importlib.util.spec_from_file_location(f"config_{Path(path).stem}", path)
    if spec is None:
        raise UserError(f"{path} is not a Python file: give --config=experiments/NAME.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if "get_config" not in vars(module):
        raise UserError(f"{path} has no get_config(arg) that returns a ConfigDict")
    return module


def sibling_config(file: str, name: str):
    """The config module `name` in the folder of `file`, which is no package: for configs that build on another."""
    spec = importlib.util.spec_from_file_location(name, Path(file).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def to_dict(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """`config` with every reference resolved, as JSON holds it: tuples become lists."""
    return json.loads(json.dumps(_plain_dict(config)))


def require_entries(config: ConfigDict, entries: Iterable[str], program: str) -> None:
    """UserError if the config lacks one of the entries that this program reads: it may be another program's."""
    missing = [entry for entry in entries if entry not in config]
    if missing:
        raise UserError(f"the config has no `{missing[0]}`: is it a config of {program}?")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}; an empty dict is kept as a value."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


# The keys of configs that had another name: (subtree, old): new. Runs made under the old name are read as before.
RENAMED_KEYS: Mapping[tuple[str, str], str] = {
    ("model", "cache"): "cache_dtype",
    ("model", "lora_base"): "lora_base_dtype",
    ("model", "tied"): "tie_embeddings",
    ("stage", "balance"): "balance_loss",
    ("stage", "centring"): "centring_coefficient",
    ("stage", "correction"): "importance_ratio_cap",
    ("stage", "flipped"): "flip_probability",
    ("stage", "high"): "clip_high",
    ("stage", "length"): "max_response_length",
    ("stage", "low"): "clip_low",
    ("stage", "refresh"): "refresh_reference_every",
    ("stage", "router_z"): "router_z_loss",
    ("stage", "smoothing"): "label_smoothing",
    ("stage", "whitened"): "whiten_advantages",
    ("data", "cut_penalty"): "truncation_penalty",
    ("data", "on_policy"): "on_policy_fraction",
    ("data", "resample"): "resample_rounds",
    ("rewards", "form"): "punctuation",
    ("rank", "cut_penalty"): "truncation_penalty",
    ("train", "samples"): "logged_rollouts",
    ("prompts", "after"): "held_out_from",
    ("ladder", "lowest"): "min_flops",
    ("ladder", "highest"): "max_flops",
    ("ladder", "larger"): "target_flops",
    ("ladder", "sizes"): "sizes_per_budget",
    ("ladder", "draws"): "bootstrap_draws",
}


def with_current_names(config: Mapping[str, Any], subtree: str = "") -> dict[str, Any]:
    """The config of an older run with the names that its keys have now. `subtree`: which one `config` is."""
    return {
        RENAMED_KEYS.get((subtree, key), key): with_current_names(value, key) if isinstance(value, Mapping) else value
        for key, value in config.items()
    }


# Keys that configs did not have before, and what a run without them did.
ADDED_KEYS: Mapping[str, Any] = {"marker_embedding": ""}


def with_added_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The config `old` of a run with those keys of `new` that it could not have."""
    return {**{key: value for key, value in ADDED_KEYS.items() if key in new}, **old}


def _new_name(path: str, names: Iterable[str]) -> str:
    """ "; it is called X now" for a key that was renamed to one of `names`, or nothing."""
    group, _, key = path.rpartition(".")
    new = RENAMED_KEYS.get((group.rpartition(".")[2], key), "")
    return f"; it is called {group}.{new} now" if new in names else ""


def call_with_options(
    function: Callable, options: ConfigDict | Mapping[str, Any], *args: Any, name: str, **extra: Any
) -> Any:
    """function(*args, **extra, **options), once every option is known to be a parameter and none is missing.

    name: where `options` stands in the config; it opens the error: "optimizer.lr is not an option of ...".
    """
    options = _plain_dict(options)
    label = ConfigFunction(function).name
    parameters = list(inspect.signature(function).parameters.values())[len(args) :]
    records = {p.name: (p.default, record_options(p)) for p in parameters if is_record(p)}
    names = [
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.name not in {*extra, *records}
    ]
    names += [field for _, fields in records.values() for field in fields]
    for option in options:
        if option not in names:
            way_out = _new_name(f"{name}.{option}", names) or did_you_mean(option, names)
            raise UserError(f"{name}.{option} is not an option of {label}{way_out}")
    for parameter in parameters:
        if parameter.name in names and parameter.default is parameter.empty and parameter.name not in options:
            raise UserError(f"{name}.{parameter.name} is missing: {label} has no default for it")
    for record, (default, fields) in records.items():
        extra[record] = default._replace(**{field: options.pop(field) for field in fields if field in options})
    return function(*args, **extra, **options)


def flags_and_config(
    argv: Sequence[str],
    description: str,
    flags: Mapping[str, Mapping[str, Any]],
    functions: ConfigFunctions = no_functions,
) -> tuple[argparse.Namespace, ConfigDict]:
    """The program's own flags, and the config named by --config=FILE[:ARG] with every --config.KEY=VALUE applied.

    flags: name to the keywords of argparse's add_argument, such as {"workdir": dict(required=True, help="...")}.
    functions: what the config's subtrees call (see `load_config`); with --help they are listed, option by option.
    """
    changes = "the config; --config.KEY=VALUE changes an entry; with --help: lists all there are"
    config_flag = dict(required=True, metavar="FILE[:ARG]", help=changes)
    overrides, rest = split_overrides(argv)
    namespace = parsed_flags(rest, description, {"config": config_flag, **flags}, epilog=config_help(argv, functions))
    return namespace, load_config(namespace.config, overrides, functions)


def config_help(argv: Sequence[str], functions: ConfigFunctions) -> str:
    """What --help adds for the config that the command line names: all its entries, with every override applied.

    Nothing without --help or a config."""
    overrides, rest = split_overrides(argv)
    if not {"-h", "--help"} & set(rest):
        return ""
    finder = _FlagParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default="")
    name = finder.parse_known_args(rest)[0].config
    if not name:
        return ""
    config = load_config(name, overrides, functions)
    return f"entries of {name}, set by --config.KEY=VALUE:\n{options_help(_plain_dict(config), functions(config))}"


def parsed_flags(
    argv: Sequence[str],
    description: str,
    flags: Mapping[str, Mapping[str, Any]],
    positional: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    *,
    epilog: str = "",
) -> argparse.Namespace:
    """The flags of a program without a config. Raises UserError where argparse would exit, naming the near flag.

    description: the program's docstring. --help shows its first two paragraphs, a sentence and the examples, then the
    flags, then the rest. positional: what is given without a flag, in any place among the flags, by name like these.
    epilog: ends --help.
    """
    sentence_and_examples, details = _split_paragraphs(description.strip(), 2)
    parser = _FlagParser(
        usage=argparse.SUPPRESS,
        description=sentence_and_examples,
        epilog="\n\n".join(filter(None, (details, epilog))),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, keywords in flags.items():
        parser.add_argument(f"--{name}", **keywords)
    for name, keywords in positional.items():
        parser.add_argument(name, **keywords)
    for argument in argv:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag.removeprefix("--") not in [*flags, "help", ""]:
            near = did_you_mean(flag, [f"--{name}" for name in flags])
            raise UserError(f"{flag} is not a flag of this program{near}")
    return parser.parse_intermixed_args(argv)


def _split_paragraphs(text: str, count: int) -> tuple[str, str]:
    """The first paragraphs, `count` of them, and the others."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(paragraphs[:count]), "\n\n".join(paragraphs[count:])


class _FlagParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits argv into the KEY=VALUE of every --config.KEY=VALUE or --config.KEY VALUE, and all the rest."""
    overrides, rest = [], []
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        if "=" not in argument:
            if not remaining or remaining[0].startswith("--"):
                raise UserError(f"{argument} has no value: write {argument}=VALUE")
            argument = f"{argument}={remaining.pop(0)}"
        overrides.append(argument.removeprefix("--config."))
    return overrides, rest


def _apply_override(config: ConfigDict, override: str, path: str, functions: ConfigFunctions) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"config.{key} has no value: write --config.{key}=VALUE")
    keys, called = flatten(_plain_dict(config)), functions(config)
    parent, _, leaf = key.rpartition(".")
    options = called[parent].options if parent in called else {}
    listed = key in keys and not isinstance(keys[key], Mapping)
    if listed:
        kind, old = value_type(_node(config, parent).get_type(leaf), keys[key]), keys[key]
        types = option_type(options[leaf]).types if leaf in options else ()
        if {str, tuple} <= set(types) or isinstance(old, str) and dict in types:
            kind = option_type(options[leaf])  # text, or a list or mapping in its place
    elif leaf in options:
        kind, old = option_type(options[leaf]), options[leaf].default
    else:
        _refuse_key(key, keys, called, path)
    try:
        value = parsed_value(text, kind)
    except (ValueError, SyntaxError):
        if not listed and any(known.startswith(f"{key}.") for known in keys):
            _refuse_key(key, keys, called, path)
        example = "" if old is inspect.Parameter.empty else f", as in config.{key}={old}"
        raise UserError(f"config.{key}={text}: expected {kind}{example}") from None
    node = _node(config, parent)
    with node.unlocked():
        try:
            if isinstance(value, dict) and leaf in node and isinstance(node[leaf], ConfigDict):
                _refill(node[leaf], value)
            elif leaf in node and _container(value) != _container(
                node[leaf]
            ):  # text, or a mapping or list in its place
                with node.ignore_type():
                    node[leaf] = value
            else:
                node[leaf] = value
        except ValueError as error:
            _refuse_dotted_key(error, f"config.{override}")
            raise


def _container(value: Any) -> type | None:
    """dict or tuple, of the entries of a config that hold others; None of any other."""
    return dict if isinstance(value, Mapping | ConfigDict) else tuple if isinstance(value, tuple) else None


def _refuse_dotted_key(error: Exception, where: str) -> None:
    """UserError for a key with a dot in it, such as the file of a reward, where `error` is ml_collections' own."""
    match = re.search(r"but the key (\S+) contains one", str(error)) if isinstance(error, ValueError) else None
    if match:
        raise UserError(
            f"{where}: the key {match[1]!r} holds a dot, which a ConfigDict does not take; write a mapping of rewards "
            f"as text, 'NAME=WEIGHT,...', such as '{match[1]}=1.0'"
        ) from error


def _refill(mapping: ConfigDict, entries: Mapping[str, Any]) -> None:
    """Replaces all entries in place: another subtree may hold the same mapping."""
    with mapping.unlocked():
        for name in [name for name in mapping if name not in entries]:
            del mapping[name]
        mapping.update(entries)


def _node(config: ConfigDict, path: str) -> ConfigDict:
    node: Any = config
    for part in path.split(".") if path else ():
        node = node[part]
    return node


def _refuse_key(key: str, keys: Mapping[str, Any], called: Mapping[str, ConfigFunction], path: str) -> NoReturn:
    """UserError for a key that is a group, or that neither the file nor a function of a subtree knows."""
    inside = [f"config.{known}" for known in keys if known.startswith(f"{key}.")]
    if inside or key in keys:
        known = [f"config.{key}.{option}" for option in called[key].options] if key in called else []
        raise UserError(f"config.{key} is a group: set its entries" + f", such as {(inside or known or [''])[0]}")
    group, _, leaf = key.rpartition(".")
    parent, _, option = group.rpartition(".")
    if parent in called and option in called[parent].options:
        known = [name for name in keys if name.startswith(f"{group}.")]
        near = _new_name(f"config.{key}", [name.rpartition(".")[2] for name in known])
        near = near or did_you_mean(key, known, prefix="config.")
        raise UserError(
            f"config.{key} is not in {path}{near or f'; give config.{group} as a whole, such as {{{leaf!r}: 1.0}}'}"
        )
    names = [*keys, *(f"{subtree}.{option}" for subtree, each in called.items() for option in each.options)]
    options = called[group].options if group in called else ()
    near = _new_name(f"config.{key}", options) or did_you_mean(key, names, prefix="config.")
    nor = f", and no option of {called[group].name}; --help lists all there are" if group in called else ""
    raise UserError(f"config.{key} is not in {path}{near or nor}")


def _plain_dict(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    return config.to_dict() if isinstance(config, ConfigDict) else dict(config)


def did_you_mean(name: str, names: Iterable[str], *, prefix: str = "") -> str:
    """ "; did you mean X?" with the nearest of `names`, or nothing where none is near."""
    closeness, near = max(((_path_similarity(name, other), other) for other in names), default=((0.0, 0.0), ""))
    return f"; did you mean {prefix}{near}?" if closeness[0] >= 0.6 else ""


def _path_similarity(a: str, b: str) -> tuple[float, float]:
    """How alike the dotted names a and b are: their least alike parts, 0 to 1, and then the sum over their parts."""
    parts = [_similarity(*pair) for pair in zip(reversed(a.split(".")), reversed(b.split(".")))]
    return min(parts), sum(parts)


def _similarity(a: str, b: str) -> float:
    """difflib's ratio, but at least 0.8 for an abbreviation: initials (lr, learning_rate) or a beginning (temp)."""
    abbreviation = a == "".join(word[:1] for word in b.split("_")) or (len(a) > 2 and b.startswith(a))
    return max(0.8 * abbreviation, difflib.SequenceMatcher(None, a, b).ratio())

"""The options of the functions that a config's subtrees call: their types, defaults and one line of what they are.

A subtree of a config is the keyword arguments of one function, so whatever keyword that function has may be set,
whether the config file lists it or not. The types come from the function's signature, the lines from its source: the
comment beside a parameter or a dataclass's field, else what the docstring says of `name`, or after "name:".
"""

import ast
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple, NoReturn

from ml_collections import ConfigDict

TYPE_DESCRIPTIONS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    tuple: "a tuple such as 1,2",
    list: "a list such as [1,2]",
    dict: "a mapping such as {'overall':1.0}",
    NoneType: "None",
}
HELP_WIDTH = 160  # of a line of --help, whose last column is what an option is


class ConfigFunction(NamedTuple):
    """The function that a subtree of a config calls."""

    function: Callable[..., Any]
    listed: inspect.Signature | None = None  # what --help lists, where one option decides which others there are
    also: tuple[Callable, ...] = ()  # functions that take some of the options on, and say what they are
    note: str = ""  # what a reader of --help must know of all of them
    is_named: bool = False  # whether the subtree may hold a `name` too, which says what the function is

    @property
    def name(self) -> str:
        """The name one would import it by, also of a module that runs as a program."""
        module = self.function.__module__
        spec = sys.modules[module].__spec__ if module == "__main__" else None
        return f"{spec.name if spec else module}.{self.function.__qualname__}"

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The keywords that a config may hold, by name."""
        return {**self._choice, **keyword_parameters(inspect.signature(self.function))}

    @property
    def shown_options(self) -> dict[str, inspect.Parameter]:
        """Those that --help lists."""
        return {**self._choice, **keyword_parameters(self.listed or inspect.signature(self.function))}

    @property
    def _choice(self) -> dict[str, inspect.Parameter]:
        name = inspect.Parameter("name", inspect.Parameter.KEYWORD_ONLY, default="", annotation=str)
        return {"name": name} if self.is_named else {}


class OptionType(NamedTuple):
    """What values an entry of a config takes."""

    types: tuple[type, ...]
    item: type | None = None  # of a tuple's or list's items, or of a mapping's values; None: anything

    def __str__(self) -> str:
        kinds = [kind for kind in self.types if kind is not NoneType] or self.types
        return " or ".join(
            TYPE_DESCRIPTIONS[kind] if kind in TYPE_DESCRIPTIONS else f"a {kind.__name__}" for kind in kinds
        )


# The function of each subtree of a config, by dotted path, such as "optimizer" or "sft.optimizer".
ConfigFunctions = Callable[[ConfigDict], Mapping[str, ConfigFunction]]


def keyword_parameters(signature: inspect.Signature) -> dict[str, inspect.Parameter]:
    """The keywords that a config may set, by name. A record among them gives its fields instead (`record_options`)."""
    options = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            options |= record_options(parameter) if is_record(parameter) else {name: parameter}
    return options


def is_record(parameter: inspect.Parameter) -> bool:
    """Whether it takes a NamedTuple by keyword and has one as its default."""
    kind = parameter.annotation
    named_tuple = isinstance(kind, type) and issubclass(kind, tuple) and "_fields" in vars(kind)
    return named_tuple and parameter.kind is parameter.KEYWORD_ONLY and isinstance(parameter.default, kind)


def record_options(parameter: inspect.Parameter) -> dict[str, inspect.Parameter]:
    """The fields of a record as keywords with the defaults that the function gives it.

    So settings that several functions share are one object in code, and single entries of a config's subtree. Fields
    that the class lists in `set_by_code` are no options.
    """
    record, values = parameter.annotation, parameter.default._asdict()
    hidden = record.set_by_code if "set_by_code" in vars(record) else ()
    types_by_name = inspect.get_annotations(record)
    return {
        name: inspect.Parameter(name, parameter.KEYWORD_ONLY, default=value, annotation=types_by_name[name])
        for name, value in values.items()
        if name not in hidden
    }


def option_type(parameter: inspect.Parameter) -> OptionType:
    """What the annotation says, else the default; text for a class that no config can hold, such as a network."""
    annotation, default = parameter.annotation, parameter.default
    if annotation is parameter.empty:
        annotation = str if default in (parameter.empty, None) else type(default)
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds, items = [], []
    members = typing.get_args(annotation) if union else (annotation,)
    if float in members or int in members:  # a number, or an array of such, which no config can hold
        members = [each for each in members if typing.get_origin(each) or each in TYPE_DESCRIPTIONS]
    for each in members:
        origin, args = typing.get_origin(each) or each, typing.get_args(each)
        if origin in (bool, int, float, str, NoneType, list):
            kinds.append(origin)
        elif origin in (dict, Mapping):
            kinds.append(dict)
        elif origin in (tuple, Sequence):
            kinds.append(tuple)
        else:
            kinds.append(str)
        if kinds[-1] in (tuple, list, dict):
            inner = (typing.get_origin(arg) or arg for arg in (args[1:] if kinds[-1] is dict else args))
            items += [dict if each is Mapping else each for each in inner]
    items = set(items) - {...}
    return OptionType(tuple(dict.fromkeys(kinds)), items.pop() if len(items) == 1 else None)


def value_type(kind: type, value: Any) -> OptionType:
    """What may replace a value of a config: its type, and for a tuple or list that of its items."""
    items = {type(item) for item in value or ()} if kind in (tuple, list) else set()
    nothing = (NoneType,) if value is None or kind is str else ()
    return OptionType(tuple(dict.fromkeys((kind, *nothing))), items.pop() if len(items) == 1 else None)


def parsed_value(text: str, kind: OptionType) -> Any:
    """`text` as one of the types of `kind`, text last; ValueError or SyntaxError if it is none of them."""
    if text == "None" and NoneType in kind.types:
        return None
    if kind.types == (NoneType,):  # the config says nothing of the type
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
    for each in sorted(set(kind.types) - {NoneType}, key=lambda each: (each is str, each is float)):
        try:
            return _converted_value(text, each, kind.item)
        except (ValueError, SyntaxError):
            continue
    return _refuse(text)


def _converted_value(text: str, kind: type, item: type | None) -> Any:
    if kind is str:
        return text
    if kind is bool:
        return bool(("false", "true").index(text.lower()))
    if kind in (int, float):
        return kind(text)
    value = ast.literal_eval(text)
    if kind is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: each if item is None else _checked_item(each, item) for key, each in value.items()}
    if kind not in (tuple, list) or not isinstance(value, (tuple, list)):
        _refuse(text)
    return kind(each if item is None else _checked_item(each, item) for each in value)


def _checked_item(item: Any, kind: type) -> Any:
    if type(item) is kind:
        return item
    return float(item) if kind is float and type(item) is int else _refuse(item)


def _refuse(value: Any) -> NoReturn:
    raise ValueError(value)


def option_value(
    called: ConfigFunction, given: ConfigDict | Mapping[str, Any], name: str, otherwise: Any = None
) -> Any:
    """The value of an option: as `given`, else the function's own default; `otherwise` if it has no such option."""
    if name in given:
        return given[name]
    options = called.options
    return options[name].default if name in options else otherwise


def option_docs(called: ConfigFunction) -> dict[str, str]:
    """What an option is, in one line, by its name, where the source says so."""
    names, docs = list(called.options), {}
    parameters = inspect.signature(called.function).parameters.values()
    records = [parameter.annotation for parameter in parameters if is_record(parameter)]
    for function in (called.function, *called.also, *records):
        try:
            source = inspect.getsource(function)
        except (OSError, TypeError):
            source = ""
        beside = dict(re.findall(r"^\s+(\w+): [^#\n]*?  # (.+)$", source, re.MULTILINE))
        documented = {**_documented_options(inspect.getdoc(function) or "", names), **beside}
        docs |= {name: text for name, text in documented.items() if name in names and name not in docs}
    return docs


def _documented_options(text: str, names: Sequence[str]) -> dict[str, str]:
    """Of each name the sentence that says "name: ...", or else holds `name`; only its own clause where it opens one."""
    sentences = {}
    for sentence in re.split(r"(?<=[^.]\.)(?<!e\.g\.)\s+", " ".join(text.split())):
        for name in names:
            if name not in sentences and (opening := re.search(rf"(?:^|[.:;] |, (?=`))`?{name}`?: (.+)$", sentence)):
                sentences[name] = opening[1]
            elif f"`{name}`" in sentence and name not in sentences:
                clause = re.search(rf"(?:^|[,:;] |and )(`{name}`.*?)(?:, (?:and )?`|; |$)", sentence)
                sentences[name] = clause[1] if clause else sentence
    docs = {name: text.rstrip(".") for name, text in sentences.items()}
    return {name: text for name, text in docs.items() if not re.fullmatch(r"`\w+`|as in [\w.]+", text)}


def options_help(config: Mapping[str, Any], functions: Mapping[str, ConfigFunction]) -> str:
    """Every entry that a plain config may hold, by subtree, with its value here, its default and what it is."""
    rows = {"": [("", "here", "default", "")]}
    unlisted = _unlisted_options(config, functions)
    if unlisted:
        rows["other entries"] = [(key, repr(value), "", "") for key, value in unlisted.items()]
    for path, called in functions.items():
        subtree = config
        for part in path.split("."):
            subtree = subtree[part]
        docs = option_docs(called)
        title = f"{path}: {called.name}" + f" ({called.note})" * bool(called.note)
        rows[title] = [(f"{path}.{key}", repr(subtree[key]), "", "") for key in subtree if key not in called.options]
        for name, parameter in called.shown_options.items():
            needed = parameter.default is parameter.empty
            default = "none" if needed else _value_text(parameter.default)
            value = _value_text(subtree[name]) if name in subtree else "not set" if needed else default
            rows[title].append((f"{path}.{name}", value, default, docs[name] if name in docs else ""))
    widths = [max(len(row[i]) for group in rows.values() for row in group) for i in range(3)]
    widths = [min(width, most) for width, most in zip(widths, (60, 40, 24))]
    lines = []
    for title, group in rows.items():
        lines += [f"\n{title}"] if title else []
        for row in group:
            line = "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths))
            room = max(HELP_WIDTH - len(line) - 2, 40)
            lines.append(f"{line}  {textwrap.shorten(row[3], room, placeholder=' ...')}".rstrip())
    return "\n".join(lines)


def _value_text(value: Any) -> str:
    return repr(dict(value)) if isinstance(value, Mapping) else repr(value)


def _unlisted_options(
    config: Mapping[str, Any], functions: Mapping[str, ConfigFunction], prefix: str = ""
) -> dict[str, Any]:
    """The entries, by dotted key, that stand in no subtree which calls a function."""
    unlisted = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if path in functions:
            continue
        unlisted |= (
            _unlisted_options(value, functions, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
        )
    return unlisted

"""User code by name: "file.py:name" or "package.module:name", for rewards, stages, models and environments."""

import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lm.core.config import did_you_mean
from lm.core.errors import UserError


def is_import_path(name: str) -> bool:
    """Whether a name means user code, not a built-in thing."""
    return ":" in name


def import_object(path: str, option: str) -> Any:
    """What "file.py:name" or "package.module:name" names; a relative file is looked for in the working directory.

    A module is imported once in a process, a file under its own name (or that and a hash, where another module has the
    name already); files beside it can be imported from its top level. option: where the path stands in the config, for
    the UserError if the file or the name is not there, or if the import raises.
    """
    module_path, _, name = path.rpartition(":")
    if not module_path or not name:
        raise UserError(f"{option} is {path!r}: write file.py:name or package.module:name")
    named = f"{option} {path!r}"
    module = _file_module(Path(module_path), named) if module_path.endswith(".py") else _package_module(path, named)
    if name not in vars(module):
        public = [each for each in vars(module) if not each.startswith("_")]
        own = [each for each in public if getattr(vars(module)[each], "__module__", "") == module.__name__]
        near = did_you_mean(name, public) or (f"; it has {', '.join(own)}" if own else "")
        raise UserError(f"{named}: {module_path} has no {name}{near}")
    return vars(module)[name]


def import_function(path: str, option: str) -> Callable[..., Any]:
    """As `import_object`; UserError for what cannot be called."""
    function = import_object(path, option)
    if not callable(function):
        raise UserError(f"{option} {path!r} is of type {type(function).__name__}, no function: name one")
    return function


def own_code_files(config: Any) -> list[Path]:
    """The files of "file.py:name" in a plain config, as keys or within text, that are there; each once, in order."""
    if isinstance(config, Mapping):
        files = [file for pair in config.items() for each in pair for file in own_code_files(each)]
    elif isinstance(config, list | tuple):
        files = [file for each in config for file in own_code_files(each)]
    else:
        files = [Path(each) for each in re.findall(r"([^\s,=]+\.py):\w", config)] if isinstance(config, str) else []
    return list(dict.fromkeys(file for file in files if file.is_file()))


def error_origin(error: BaseException, file: str = "") -> str:
    """ "ValueError: no such thing (my_rewards.py, line 12)": the error in one line, with where it was raised.

    file: the last line of this file is meant, where the traceback has one; else the last line of all.
    """
    text = " ".join(str(error).split())
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({Path(error.filename).name}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if file and Path(frame.filename) == Path(file)] or frames
    return f"{what} ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else what


def _file_module(file: Path, named: str) -> ModuleType:
    if not file.is_file():
        raise UserError(f"{named}: there is no file {file} in {Path.cwd()}; give its path from the working directory")
    file = file.resolve()
    loaded = [each for each in list(sys.modules.values()) if getattr(each, "__file__", None) == str(file)]
    if loaded:
        return loaded[0]
    name = (
        file.stem if _is_free(file.stem, file) else f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    )
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{named} does not import: {error_origin(error, str(file))}") from error
    finally:
        sys.path.remove(str(file.parent))
    return module


def _package_module(path: str, named: str) -> ModuleType:
    name = path.rpartition(":")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            way_out = "install it, or give a file, file.py:name"
            raise UserError(f"{named}: there is no module {error.name}; {way_out}") from error
        raise UserError(f"{named} does not import: {error_origin(error)}") from error
    except Exception as error:
        raise UserError(f"{named} does not import: {error_origin(error)}") from error


def _is_free(name: str, file: Path) -> bool:
    """Whether no module but that of the file has the name, imported or not."""
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    return name not in sys.modules and (spec is None or spec.origin == str(file))

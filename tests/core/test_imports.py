"""Code of one's own by name: files and modules, each imported once, and one line for whatever is wrong with them."""

import json
import sys

import pytest

from lm.core.errors import UserError
from lm.core.imports import import_function, import_object


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a few files; what they leave among the modules goes again."""
    before = set(sys.modules)
    (tmp_path / "mine.py").write_text(
        "import beside_mine\nCOUNT = [beside_mine.START]\n\ndef accuracy():\n    return COUNT\n\ndef _hidden(): ...\n"
    )
    (tmp_path / "beside_mine.py").write_text("START = 7\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.py").write_text("def accuracy():\n    return 'other'\n")
    (tmp_path / "json.py").write_text("def accuracy():\n    return 'my json'\n")
    (tmp_path / "raises.py").write_text("import json\n\n\ndef f():\n    return 1 / 0\n\n\nf()\n")
    (tmp_path / "unknown.py").write_text("import no_such_package_here\n")
    (tmp_path / "broken.py").write_text("def f(:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_file_is_imported_once_under_its_own_name(folder):
    accuracy = import_object("mine.py:accuracy", "data.rewards")
    assert accuracy() == [7] and accuracy.__module__ == "mine" and str(folder) not in sys.path
    accuracy().append(8)
    again = import_object(str(folder / "other" / ".." / "mine.py") + ":accuracy", "data.rewards")
    assert again is accuracy and again() == [7, 8]


def test_files_of_one_name_do_not_stand_for_each_other(folder):
    found = [import_object(f"{path}:accuracy", "it")() for path in ("mine.py", "other/mine.py", "json.py")]
    assert found == [[7], "other", "my json"] and json.dumps(1) == "1"


def test_a_module_of_a_package():
    assert import_object("json.decoder:JSONDecoder", "it") is json.decoder.JSONDecoder


@pytest.mark.parametrize(
    "path, message",
    [
        ("mine", "data.rewards is 'mine': write file.py:name or package.module:name"),
        ("mine.py:", "data.rewards is 'mine.py:': write file.py:name"),
        ("nothing.py:f", "data.rewards 'nothing.py:f': there is no file nothing.py in /.*; give its path"),
        ("mine.py:acuracy", "data.rewards 'mine.py:acuracy': mine.py has no acuracy; did you mean accuracy?"),
        ("mine.py:reward_of_all", "'mine.py:reward_of_all': mine.py has no reward_of_all; it has accuracy$"),
        ("mine.py:COUNT", "data.rewards 'mine.py:COUNT' is of type list, no function: name one"),
        ("raises.py:f", r"'raises.py:f' does not import: ZeroDivisionError: division by zero \(raises.py, line 5\)"),
        ("unknown.py:f", r"import: ModuleNotFoundError: No module named 'no_such_package_here' \(unknown.py, line 1"),
        ("broken.py:f", r"'broken.py:f' does not import: SyntaxError: invalid syntax \(broken.py, line 1\)"),
        ("no_such_package.rewards:f", "there is no module no_such_package; install it, or give a file, file.py:name"),
        ("json.no_such_module:f", "there is no module json.no_such_module; install it"),
        ("json:no_such_name", "'json:no_such_name': json has no no_such_name"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(folder, path, message):
    with pytest.raises(UserError, match=message) as caught:
        import_function(path, "data.rewards")
    assert "\n" not in str(caught.value)


def test_a_file_that_failed_may_be_mended(folder):
    with pytest.raises(UserError, match="does not import"):
        import_object("raises.py:f", "it")
    (folder / "raises.py").write_text("def f():\n    return 'mended'\n")
    assert import_object("raises.py:f", "it")() == "mended"

"""The package and its documents: one list of requirements, and pages that name only what exists."""

import ast
import fnmatch
import functools
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lm.__main__ import BY_NAME
from lm.core.config import load_config, no_functions, parsed_flags
from lm.stages import STAGES
from lm.studies.gradients import __main__ as certify
from lm.train.config import train_functions

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "experiments").glob("*.md")), ROOT / "notebooks/README.md"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EACH = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
COLUMNS = 100
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")
CODE = re.compile(r"```.*?\n(.*?)```|`([^`\n]+)`", re.DOTALL)
COMMAND = re.compile(r"(?:python -m lm|(?<![\w./-])lm) ([a-z][a-z-]*)")
FILE = re.compile(r"(?<![\w./-])(?:lm|tests|experiments|notebooks)/[\w./-]*")
PLACEHOLDER = re.compile(r"=[A-Z]+$")


def versions(requirements) -> dict[str, str]:
    """Name (with its extras) to bounds: "jax[cuda12]" to ">=0.10.2"."""
    parsed = [Requirement(text) for text in requirements]
    return {canonicalize_name(r.name) + "".join(f"[{e}]" for e in sorted(r.extras)): str(r.specifier) for r in parsed}


def requirements_file(path: Path) -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return versions(line for line in lines if line)


@functools.cache
def code(page: Path) -> tuple[str, ...]:
    """The code of a page, blocks and spans; continued lines are one."""
    if page.suffix == ".ipynb":
        cells = nbformat.read(page, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    else:
        text = page.read_text()
    return tuple((block or span).replace("\\\n", " ") for block, span in CODE.findall(text))


def command_lines(page: Path) -> list[list[str]]:
    """Every command of lm on a page, as words from its name on."""
    lines = [line.rpartition("&& ")[2] for block in code(page) for line in block.splitlines()]
    return [shlex.split(line.partition(" lm ")[2]) for line in lines if line.startswith(("python -m lm ", "lm "))]


def test_requirements_and_project_agree():
    project, file = PROJECT["project"], requirements_file(ROOT / "requirements.txt")
    needed, extras = versions(project["dependencies"]), project["optional-dependencies"]
    assert needed.items() <= file.items(), "requirements.txt has every run-time dependency with the same bound"
    optional = versions(text for group in extras.values() for text in group)
    for name in file.keys() - needed.keys():
        assert optional.get(name) == file[name], f"{name} is in requirements.txt only: add it to an extra of pyproject"
    assert {"cuda", "tpu", "notebooks", "browser", "wandb", "mlflow", "dev"} <= extras.keys()
    for name in ("cuda", "tpu"):  # jax and its plugin at one version
        assert set(versions(extras[name]).values()) == {needed["jax"]}


def test_everything_in_lm_is_packaged():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    files = [path for path in (ROOT / "lm").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert (ROOT / "lm/py.typed") in files and any(path.suffix == ".jinja" for path in files)
    for path in files:
        assert any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns), f"no wheel would hold {path}"
    for path in (ROOT / "lm").rglob("*.py"):
        assert (path.parent / "__init__.py").exists(), f"{path.parent} is no package: no wheel would hold it"


def test_the_console_script_exists():
    module, _, function = PROJECT["project"]["scripts"]["lm"].partition(":")
    tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_readme_tree_names_the_rooms():
    tree = re.search(r"```\nlm/\n(.*?)```", README.read_text(), re.DOTALL)[1]
    named = [line.split()[0].rstrip("/") for line in tree.splitlines()]
    rooms = {path.parent.name for path in (ROOT / "lm").glob("*/__init__.py")}
    assert len(named) == len(set(named)) and set(named) == rooms


def test_readme_is_short_and_holds_the_two_commands():
    lines = README.read_text().splitlines()
    assert len(lines) <= 160
    assert not [line for line in lines if len(line) > COLUMNS]
    install = "pip install -r requirements.txt && python -m "
    assert [line for line in lines if line.startswith(f"{install}lm pipeline --config=experiments/quickstart.py")]
    assert [line for line in lines if line.startswith(f"{install}pytest")], ".ci/run looks for this line"


@EACH
def test_prose_and_commands_are_narrow(page):
    wide = [line for line in page.read_text().splitlines() if len(line) > COLUMNS and not line.startswith("|")]
    assert not wide


@EACH
def test_links_and_paths_exist(page):
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    paths = {path for block in code(page) for path in FILE.findall(block) if "NAME" not in path}
    assert not [link for link in links if not (page.parent / link).exists()]
    assert not sorted(path for path in paths if not (ROOT / path).exists())


@pytest.fixture(scope="module")
def listed() -> set[str]:
    """What `python -m lm` lists: the first word of each line."""
    told = subprocess.run([sys.executable, "-m", "lm"], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    return set(re.findall(r"^ *(?:lm )?([a-z][a-z-]*)\b", told.stdout, re.MULTILINE))


def test_the_command_line_lists_what_the_pages_use(listed):
    used = {name: page.name for page in [*PAGES, *NOTEBOOKS] for block in code(page) for name in COMMAND.findall(block)}
    assert len(used) > 10
    assert not used.keys() - listed, f"{used}: `python -m lm` lists {sorted(listed)}"


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes as POSIX has them")
def test_a_closed_output_ends_a_command_quietly():
    """`lm | head`: no traceback, and the status of a program that SIGPIPE ended; argparse drops a help nobody reads."""
    for argument, status in (("--help", 141), ("certify --help", 0)):
        command = f"{shlex.quote(sys.executable)} -u -m lm {argument} | true; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (status, "")


@pytest.mark.parametrize("name", BY_NAME)
def test_help_opens_with_a_sentence_and_two_examples(name):
    """--help shows the docstring: its sentence and examples, then the options, then the rest."""
    path = ROOT / (BY_NAME[name].module.replace(".", "/") + ".py")
    sentence, examples, *_ = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")
    assert re.fullmatch(r"[A-Z][^\n]*\.", sentence)
    lines = examples.splitlines()
    assert len(lines) == 2 and all(line.startswith(f"    python -m lm {name}") for line in lines)


def test_help_of_a_program_shows_options_before_details(capsys):
    with pytest.raises(SystemExit):
        parsed_flags(["--help"], certify.__doc__ or "", certify.FLAGS)
    text = capsys.readouterr().out
    assert text.startswith("Checks exactly that")
    assert 0 < text.index("    python -m lm certify\n") < text.index("--policy {") < text.index("The world is small")


def test_flags_in_the_pages_exist():
    source = "\n".join(path.read_text() for path in (ROOT / "lm").rglob("*.py"))
    words = {word for page in PAGES for line in command_lines(page) for word in line if word.startswith("--")}
    flags = {word[2:].partition("=")[0] for word in words}
    flags = {flag for flag in flags if not flag.startswith("config.")}
    assert len(flags) > 20
    assert not [flag for flag in flags if f'"{flag}"' not in source and f'"--{flag}"' not in source]


@EACH
def test_configs_take_the_overrides_of_the_pages(page):
    for words in command_lines(page):
        config = next((word for word in words if word.startswith("--config=")), "")
        if config and "NAME" not in config:
            overrides = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
            path = str(ROOT / config.removeprefix("--config="))
            overrides = [override for override in overrides if not PLACEHOLDER.search(override)]
            load_config(path, overrides, train_functions if "train" in words else no_functions)


def test_experiments_page_lists_every_config_page_and_stage():
    text = (ROOT / "experiments/README.md").read_text()
    links = set(LINK.findall(text))
    files = {path.name for path in (ROOT / "experiments").iterdir() if path.suffix in (".py", ".md")} - {"README.md"}
    assert not files - links
    table = text.partition("stages\n")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(STAGES)
    assert f"The {len(STAGES)} stages" in text

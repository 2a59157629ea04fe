"""The order of the rooms: a file of lm/ imports only from its own room and from rooms above it in this list."""

import ast
from pathlib import Path

LM = Path(__file__).parent.parent / "lm"
ROOMS = """
    core losses model tokenizer optim data runs generate rewards weights stages report train evaluate compare feedback
    serve sweep bench pipeline studies
""".split()  # as in README.md
SHARED = {"stage", "context", "pretraining.next_token", "pretraining.conversation_batches"}  # what all families may use
FAMILIES_SHARE = {  # the files of a family that another one may use
    "reward_model.ranking_batches",
    "preference.preference_batches",
    "rl.rollouts",
    "rl.policy_gradient",
    "rl.multi_turn",
    "distillation.teacher_divergence",
}


def imports_of(file: Path, lm: Path):
    """Every module of lm that a file imports, at any depth of its code, as parts: ("model", "config")."""
    package = file.relative_to(lm.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [base + [alias.name] for alias in node.names]
        yield from (tuple(name[1:]) for name in names if name[0] == "lm" and len(name) > 1)


def upward_imports(lm: Path) -> list[str]:
    """Every import from a room below, or from none of the list."""
    found = []
    for file in sorted(lm.rglob("*.py")):
        room, *rest = file.relative_to(lm).with_suffix("").parts
        if not rest:
            continue  # lm/__init__.py and lm/__main__.py, which have a test of their own
        place = file.relative_to(lm)
        if room not in ROOMS:
            found.append(f"lm/{place} stands in no room of the list")
            continue
        for other, *parts in imports_of(file, lm):
            if other not in ROOMS:
                found.append(f"lm/{place} imports lm.{other}, which is no room")
            elif ROOMS.index(other) > ROOMS.index(room):
                found.append(f"lm/{place} imports {'.'.join([other, *parts])}, a room below its own")
    return found


def stages_that_import_stages(lm: Path) -> list[str]:
    """Every import of one method by another: they share files of their families, and nothing else."""
    found = []
    shared = SHARED | FAMILIES_SHARE
    for file in sorted((lm / "stages").glob("*/*.py")):
        place = ".".join(file.relative_to(lm / "stages").with_suffix("").parts)
        for other, *parts in imports_of(file, lm):
            module = ".".join(parts[:2])
            if other == "stages" and parts and module not in shared and parts[0] not in shared and place not in shared:
                found.append(f"lm/stages/{place.replace('.', '/')}.py imports lm.stages.{'.'.join(parts)}")
    return found


def test_every_file_imports_from_its_own_room_and_from_rooms_above():
    upward = upward_imports(LM)
    assert not upward, "\n".join(["", *upward])


def test_no_method_imports_another():
    between = stages_that_import_stages(LM)
    assert not between, "\n".join(["", *between])


def test_the_list_is_the_folders_of_lm():
    assert sorted(ROOMS) == sorted(path.parent.name for path in LM.glob("*/__init__.py"))


def test_every_room_opens_with_a_docstring():
    doors = [path for path in sorted(LM.rglob("__init__.py")) if not ast.get_docstring(ast.parse(path.read_text()))]
    folders = {path.parent for path in LM.rglob("*.py")}
    assert not doors and all((folder / "__init__.py").exists() for folder in folders)


def test_the_walk_sees_every_form_of_import(tmp_path):
    file = tmp_path / "lm" / "stages" / "rl" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import lm.train\nfrom lm import serve\nfrom . import ppo\nfrom ... import model\nimport jax\n"
        "from ...data.packing import padded_rows\ndef f():\n    from lm.stages.pretraining.sft import make\n"
        "from os import path"
    )
    assert set(imports_of(file, tmp_path / "lm")) == {
        ("train",),
        ("serve",),
        ("stages", "rl", "ppo"),
        ("model",),
        ("data", "packing", "padded_rows"),
        ("stages", "pretraining", "sft", "make"),
    }
    assert upward_imports(tmp_path / "lm") == [
        "lm/stages/rl/x.py imports train, a room below its own",
        "lm/stages/rl/x.py imports serve, a room below its own",
    ]
    assert stages_that_import_stages(tmp_path / "lm") == [
        "lm/stages/rl/x.py imports lm.stages.rl.ppo",
        "lm/stages/rl/x.py imports lm.stages.pretraining.sft.make",
    ]

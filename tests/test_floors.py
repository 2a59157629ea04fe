"""The house of design.md: a file inside lm/ imports from strictly lower floors only, or from its own room."""

import ast
from pathlib import Path

import pytest

LM = Path(__file__).parent.parent / "lm"
# Rewards score rows that the data room lays out, so data stands half a floor below.
FLOORS = {
    -1: "errors calculator textfiles",
    0: "types metrics losses returns distribution sharding intervals together",
    0.5: "agreement laws skills",
    1: "model optim tokenizer checkpoint hardware",
    1.5: "data weights",
    2: "update sample rewards environments",
    3: "stages answers beam speculative",
    4: "config console workdir pages phases streams",
    4.5: "host vocabulary log record trackers trace inherited summary runpage",
    5: "convert train verdicts evaluate taste ranking unseen certify bench comparison quantised",
    5.5: "report lab compare vectorised jumps",
    6: "pipeline chat contest overoptimisation sweeps emergence",
    6.5: "ladder",
    7: "rank judge sweep",
    7.5: "scaling",
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms.split()}
NO_STAGE = {
    "__init__",
    "context",
    "next_token",
    "ranked",
    "policy",
    "rollouts",
    "answering",
    "preference",
    "distillation",
    "conversations",
}  # files of lm/stages that are not stages
FILES = sorted(LM.rglob("*.py"))


def imported(file: Path):
    """Every module of lm that a file imports, at any depth of its code, as parts: ("model", "config")."""
    package = file.relative_to(LM.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [base + [alias.name] for alias in node.names]
        yield from (tuple(name[1:]) for name in names if name[0] == "lm" and len(name) > 1)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(LM)))
def test_floor(file):
    room, *rest = file.relative_to(LM).with_suffix("").parts
    if room == "__init__":
        assert not list(imported(file)), "lm/__init__.py stands below every floor and imports nothing of lm"
        return
    assert room in FLOOR, f"lm/{room} has no floor: give it one in FLOORS, and in design.md"
    for other, *parts in imported(file):
        assert other in FLOOR, f"{file.name} imports lm.{other}, which has no floor: give it one in FLOORS"
        if other != room:
            assert FLOOR[other] < FLOOR[room], f"{room} (floor {FLOOR[room]}) imports {other} (floor {FLOOR[other]})"
        elif room == "stages" and rest[0] not in NO_STAGE:
            assert parts and parts[0] in NO_STAGE, f"stage {rest[0]} imports {'.'.join(parts)}: a stage never does"


def test_the_walk_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "LM", tmp_path / "lm")
    file = tmp_path / "lm" / "stages" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import lm.train\nfrom lm import chat\nfrom . import ppo\nfrom .. import model\nimport jax\n"
        "from ..data.rows import pad\ndef f():\n    from lm.stages.sft import make\nfrom os import path"
    )
    assert set(imported(file)) == {
        ("train",),
        ("chat",),
        ("stages", "ppo"),
        ("model",),
        ("data", "rows", "pad"),
        ("stages", "sft", "make"),
    }

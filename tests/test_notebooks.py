"""Every notebook runs from top to bottom in time, and says again what it says in the repository.

    python tests/test_notebooks.py      runs them all and keeps their new outputs

Cells tagged "reproduced" must print the same words and nearly the same numbers; other machines round differently, and
what is sampled may then go another way, so that of the other cells only what the text concludes is held.
"""

import ast
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SETUP = ROOT / "notebooks" / "setup_cell.py"
LIMIT = 240  # seconds: two minutes are promised, of two cores that do nothing else
LARGEST = 300_000  # bytes of a notebook with its outputs
TOLERANCE = 0.02  # of a number in a reproduced cell
# What the text of a notebook concludes, as Python after its last cell.
CONCLUSIONS = {
    "01_from_text_to_chat": """
losses = {stage: [row["held_out/loss"] for row in workdir.read_metrics(root / stage) if "held_out/loss" in row]
          for stage in ("pretrain", "sft")}
assert losses["pretrain"][-1] < losses["pretrain"][0] - 1 and losses["sft"][-1] < losses["pretrain"][-1], losses
assert losses["sft"][0] > losses["pretrain"][-1], losses
facts, unknown = ([float(cell.split()[0]) for cell in row[2:]] for row in table_rows)
assert facts[0] < 0.3 < 0.6 < facts[1] and unknown[0] < 0.1 < 0.9 < unknown[1], table_rows
assert "Lima" in "".join(chat_with("sft", max_new=24).answer("What city is the capital of Peru?"))
""",
    "02_one_training_step": """
assert p_after[mat] > p[mat] and (p_after[places[1:]] < p[places[1:]]).all()
assert abs(jnp.log(p_after[mat] / p[mat]) / (rate * norm**2) - 1) < 0.3
assert of_corpus[-1] > start + 1, "a large step forgets"
for animal, habit in HABITS.items():
    assert np.allclose(probabilities(state.params["lm"], question[animal])[places], habit, atol=0.03), animal
assert entropy / 7 < losses[-1] < 1.05 * entropy / 7
""",
    "03_tokens_masks_packing": """
assert all(a < b for a, b in zip(ratios, ratios[1:])), ratios
assert (packed.segments > 0).mean() > 1.5 * (padded.segments > 0).mean()
assert packed.weights.sum() == padded.weights.sum() and (seen == allowed).all()
assert np.abs(alone - together).max() < 1e-4 and np.mean(wrong > 1e-4) > 0.3
""",
    "04_sft": """
pretraining, tuning = changes.values()
assert all(tuning[name] < pretraining[name] for name in tuning), changes
assert found["untrained"]["text"] - found["before SFT"]["text"] > 0.7, found
assert found["after SFT"]["text"] < found["before SFT"]["text"] + 0.05, found
assert found["after SFT"]["replies"] < found["before SFT"]["replies"] - 0.4, found
assert probability["after SFT"][ends].mean() > 5 * probability["after SFT"][goes_on].mean(), "it knows where"
assert probability["before SFT"][ends].mean() < 1e-3
assert shares["before SFT"].high < 0.1 and shares["after SFT"].low > 0.4, shares
""",
    "05_rank_reward_ppo": """
assert found["accuracy"]["low"] > 0.5, found["accuracy"]
assert gain.low > 0.5 and wins.low > 0.6, (gain, wins)
before, after = ({name: numbers[i] for name, *numbers in means} for i in range(2))
assert all(after[name] > before[name] + 0.3 for name in ("ends properly", "asks something back")), means
assert max(before["on topic"], after["on topic"]) < 0.1, means
""",
    "06_dpo_grpo_ppo": """
base = rule_reward(questions.prompts.examples, last["start"][2].texts)
gains = {name: paired_difference(rule_reward(questions.prompts.examples, last[name][2].texts), base) for name in ways}
assert all(gain.low > 0 for gain in gains.values()) and gains["grpo"].value > gains["dpo"].value, gains
kl = {name: last[name][1].value for name in ways}
assert kl["dpo"] < 2 and kl["ppo"] > 2 * kl["grpo"], kl
asks = {name: dict(zip(CRITERIA, shares))["asks something back"] for name, shares in share.items()}
assert all(asks[name] > asks["start"] + 0.1 for name in ways), asks
""",
    "07_sweeps_scaling": """
assert swept[0].mean() > swept[1:].mean(axis=1).max() + 0.3, swept
assert best["learning_rate"] > 2e-3 and best["loss"] < np.median([each["loss"] for each in tried]) - 0.05, tried
assert all(np.all(np.diff(path) < 0.1) for _, path in small.values()), small
assert abs(loss - predicted.value) < 0.35 and loss < min(path[-1] for _, path in small.values()), (loss, predicted)
""",
    "08_generation": """
assert (difference < 1e-4).all() and without[-1] > 2 * with_cache[-1], (without, with_cache)
assert np.sum(found["top-k 5"] > 0) == 5 and np.sum(found["temperature 0"] > 0) == 1
assert found["temperature 0.5"].max() > found["temperature 1"].max() > found["temperature 2"].max()
assert list(variety.values()) == sorted(variety.values()), variety
""",
    "09_your_own": """
assert all(losses[-20:].mean() < np.log(V) - 1 for _, losses in found.values()), "all three learn"
sure, middle, unsure = (values[price] for price in prices)
assert sure["entropy"] < middle["entropy"] - 0.2 and middle["entropy"] < unsure["entropy"] - 0.2, values
assert sure["loss"] < unsure["loss"], values
assert again.own_model["name"] == "my_model:make" and again.stage == "my_method:STAGE"
""",
}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
COLOUR = re.compile(r"\x1b\[[\d;]*m")
TIMED = re.compile(r"\b\d+:\d\d\b|\bseconds\b")  # in a line that depends on the machine's speed
QUICK = ("03_tokens_masks_packing",)  # of the default run, the quickest; the others are slow
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def executed(path: Path, conclusions: str = "") -> NotebookNode:
    """The notebook as it comes out of a new kernel in a temporary folder, on one CPU device as on a laptop."""
    notebook = nbformat.read(path, as_version=4)
    if conclusions:
        notebook.cells.append(nbformat.v4.new_code_cell(conclusions))
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        environment["TMPDIR"] = folder
        there = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, timeout=LIMIT, kernel_name="python3", resources=there, record_timing=False)
        return client.execute(env=environment)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def reproduced(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in code(notebook) if "reproduced" in cell.metadata.get("tags", ())]


def parsed(cell: NotebookNode) -> ast.Module:
    """The Python of a cell; the notebook's own commands count as nothing."""
    return ast.parse(re.sub(r"^(\s*)[!%].*", r"\1pass", cell.source, flags=re.MULTILINE))


def printed(cell: NotebookNode) -> tuple[str, list[float]]:
    """What a cell prints and shows: the words, with # for a number and without the clock, and the numbers."""
    texts = [output.text if "text" in output else output.data["text/plain"] for output in cell.outputs]
    lines = [line for text in texts for line in text.splitlines() if not TIMED.search(line)]
    plain = COLOUR.sub("", "\n".join(lines))
    text = re.sub(r"[\s─]+", " ", plain)  # columns are as wide as their numbers are long
    return NUMBER.sub("#", text), [float(number) for number in NUMBER.findall(text)]


def defined() -> set[str]:
    """The names of all functions and classes of lm."""
    trees = [ast.parse(file.read_text()) for file in (ROOT / "lm").rglob("*.py")]
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_the_comparison_sees_words_and_numbers_but_no_clock():
    def told(text):
        return printed(NotebookNode(outputs=[NotebookNode(output_type="stream", text=text)]))

    assert told("sft step 10/100  loss 5.7  0:12\nloss  4.94\n ──── \nseconds 9\n") == ("loss # ", [4.94])
    assert told("loss 4.94") != told("gain 4.94") and told("a -1e-3")[1] == [-0.001]


def test_there_are_notebooks_and_conclusions_of_these_only():
    assert {path.stem for path in NOTEBOOKS} >= CONCLUSIONS.keys() and NOTEBOOKS


@EACH
def test_form(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    install, imports, *_ = code(notebook)
    assert 10 <= len(notebook.cells) <= 25
    assert notebook.cells[0].source.startswith("# ")
    assert install.source == SETUP.read_text().rstrip("\n"), "the same cell in every notebook: notebooks/setup_cell.py"
    assert not install.outputs
    assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in parsed(imports).body)
    anew = {
        node.name
        for cell in code(notebook)
        for node in ast.walk(parsed(cell))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert not anew & defined(), "call lm's own"


def set_up(monkeypatch, folder: Path, *, colab=True, repository="https://host/lm", packages=(), gpu=False):
    """What the setup cell runs and puts on the path, in a folder, with these packages (name, version) installed."""
    ran, clone = [], folder / "lm-clone"

    def run(command, **_):
        ran.append(command)
        if command[0] == "git" and "absent" in command[-2]:
            return subprocess.CompletedProcess(command, 128)
        if command[0] == "git":
            clone.mkdir()
        return subprocess.CompletedProcess(command, 0)

    installed = [SimpleNamespace(metadata={"Name": name}, version=version) for name, version in packages]
    monkeypatch.chdir(folder)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("importlib.metadata.distributions", lambda: installed)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi" if gpu else None)
    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("sys.path", [])
    if colab:
        monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    exec(SETUP.read_text().replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}"), {})
    return ran, sys.path


CUDA = [("jax-cuda12-plugin", "0.7.2")]


@pytest.mark.parametrize(
    "packages, gpu, wanted",
    [
        ([("jax", "0.10.2"), ("jaxlib", "0.10.2"), *CUDA], True, ["jax==0.10.2", "jaxlib==0.10.2"]),
        ([("jax", "0.12.0.1"), ("jaxlib", "0.12.0")], False, ["jax==0.12.0.1", "jaxlib==0.12.0"]),
        ([("jax", "0.7.2"), ("jaxlib", "0.7.2"), *CUDA], True, ["jax[cuda12]>=0.10.2"]),
        ([("jax", "0.7.2"), ("jax-cuda13-plugin", "0.7.2")], True, ["jax[cuda13]>=0.10.2"]),
        ([], True, ["jax[cuda12]>=0.10.2"]),
        ([("jax", "0.7.2"), ("libtpu", "0.0.21")], False, ["jax[tpu]>=0.10.2"]),
        ([("jax", "0.10.1")], False, ["jax>=0.10.2"]),
    ],
)
def test_setup_on_colab_never_parts_jax_from_its_plugin(tmp_path, monkeypatch, packages, gpu, wanted):
    (git, pip), path = set_up(monkeypatch, tmp_path, packages=packages, gpu=gpu)
    clone = str(tmp_path / "lm-clone")
    assert git[:2] == ["git", "clone"] and git[-2:] == ["https://host/lm", clone]
    assert pip[1:] == ["-m", "pip", "install", "--quiet", "-r", f"{clone}/requirements.txt", *wanted]
    assert path == [clone]


def test_setup_says_what_is_missing_in_one_line(tmp_path, monkeypatch):
    for options, fault in (
        ({"repository": ""}, "Write your clone's address into REPOSITORY"),
        ({"repository": "https://host/absent"}, "git cannot clone REPOSITORY = 'https://host/absent'"),
        ({"colab": False}, "There is no lm here"),
    ):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match=fault) as stopped:
            set_up(patch, tmp_path, **options)
        assert "\n" not in stopped.value.code


def test_setup_in_a_clone_only_finds_it(monkeypatch):
    assert set_up(monkeypatch, ROOT / "notebooks", colab=False) == ([], [str(ROOT)])


@EACH
def test_is_kept_with_its_outputs(path):
    cells = code(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom"
    assert reproduced(nbformat.read(path, as_version=4))
    assert any("image/png" in output.get("data", ()) for cell in cells for output in cell.outputs), "a figure teaches"
    assert path.stat().st_size < LARGEST


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem not in QUICK)) for path in NOTEBOOKS],
)
def test_runs_in_time_and_says_the_same(path):
    start = time.monotonic()
    now = executed(path, CONCLUSIONS.get(path.stem, ""))
    assert time.monotonic() - start < LIMIT
    for cell, kept in zip(reproduced(now), reproduced(nbformat.read(path, as_version=4)), strict=True):
        (words, numbers), (kept_words, kept_numbers) = printed(cell), printed(kept)
        assert words == kept_words
        assert numbers == pytest.approx(kept_numbers, rel=TOLERANCE)


if __name__ == "__main__":
    for path in NOTEBOOKS:
        nbformat.write(executed(path), path)

"""The examples of code of one's own: each is short, and runs as its docstring says, here with few steps."""

import importlib.util
import json
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import EXPERIMENTS, ROOT, finished, small

from lm.core.config import load_config
from lm.core.imports import import_object
from lm.rewards import named_rater, weighted_reward
from lm.runs.workdir import load_trained_model, read_json, read_metrics
from lm.serve.chat import Chat
from lm.stages import named_stage
from lm.train import loop
from lm.train.config import train_functions

__all__ = ["finished", "small"]
EXAMPLES = EXPERIMENTS / "examples"
REWARDS = "experiments/examples/my_rewards.py"


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def example_commands(file: Path) -> list[list[str]]:
    """The words of each command in a file's docstring, from `python` on."""
    text = import_docstring(file).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip().startswith("python ")]


def import_docstring(file: Path) -> str:
    spec = importlib.util.spec_from_file_location(f"docstring_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.__doc__ or ""


@pytest.mark.parametrize(
    "file", [*sorted(EXAMPLES.glob("my_*.py")), EXAMPLES / "make_rows.py"], ids=lambda file: file.stem
)
def test_an_example_is_short_and_says_how_it_runs(file):
    assert len(file.read_text().splitlines()) < 60
    commands = example_commands(file)
    assert commands
    for words in commands:
        if words[1:4] == ["-m", "lm", "train"]:
            flags = dict(word.removeprefix("--").split("=", 1) for word in words[4:])
            overrides = [f"{k.removeprefix('config.')}={v}" for k, v in flags.items() if k.startswith("config.")]
            load_config(flags["config"], overrides, train_functions)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    import_object(f"{EXAMPLES / 'make_rows.py'}:write_rows", "it")(folder)
    return folder


def test_rows_say_which_digit_is_wanted(rows):
    talk, prompts = ([json.loads(line) for line in (rows / f"{name}.jsonl").open()] for name in ("talk", "prompts"))
    assert (len(talk), len(prompts)) == (6000, 3000)
    assert len({row["prompt"] for row in talk + prompts}) == 9000
    assert all(row["prompt"].split()[-1] == row["answer"] for row in prompts)
    told = np.mean([row["prompt"].split()[-1] == row["completion"] for row in talk])
    assert abs(told - 1 / 6) < 0.02 and all(row["completion"] in row["prompt"] for row in talk)


def test_the_rewards_in_every_form():
    examples = [{"messages": [{"role": "user", "content": "Name one of 3 4"}], "answer": "4"}] * 3
    texts, tokens = ["4", "it is 4", "3"], [["4", "<|end|>"], ["it", " is", " 4", "<|end|>"], ["3"]]
    assert named_rater(f"{REWARDS}:accuracy", "it")(examples, texts).tolist() == [1, 0, 0]
    assert named_rater(f"{REWARDS}:mentions_answer", "it")(examples, texts).tolist() == [0.5, 0.5, 0]
    assert named_rater(f"{REWARDS}:patient_accuracy", "it")(examples, texts).tolist() == [1, 0, 0]
    brevity = import_object(f"{REWARDS}:brevity", "it")
    found = weighted_reward({f"{REWARDS}:brevity": (2.0, brevity)})(examples, texts, tokens)
    assert [each.tolist() for each in found.token_rewards] == [[0, -2], [0, -2, -2, -2], [0]]


def tiny_config(name: str, *overrides: str):
    return load_config(f"{EXPERIMENTS / name}", overrides, train_functions)


def test_own_rewards_from_a_file_of_prompts(finished, small, rows, tmp_path):
    """The start and GRPO of own_reward.py, with all four rewards, one of them per token."""
    talk, prompts = (f"data.sources={rows / name}.jsonl" for name in ("talk", "prompts"))
    tokenizer = f"tokenizer={finished / 'tokenizer'}"
    loop.train_stage(tiny_config("own_reward.py:start_tiny", talk, tokenizer), tmp_path / "start")
    names = ("accuracy", "mentions_answer", "patient_accuracy", "brevity")
    rewards = ",".join(f"{REWARDS}:{name}=1.0" for name in names)
    overrides = prompts, f"init_from={tmp_path / 'start'}", f"data.rewards={rewards}", "data.prompt_length=48"
    summary = loop.train_stage(tiny_config("own_reward.py:tiny", *overrides), tmp_path / "grpo")
    assert summary["about"]["prompts"] + summary["about"]["held_out_prompts"] == 3000
    logged = [row for row in read_metrics(tmp_path / "grpo") if "reward/accuracy" in row]
    for row in logged:
        np.testing.assert_allclose(row["reward"], sum(row[f"reward/{name}"] for name in names), atol=1e-5)
        np.testing.assert_allclose(row["reward/brevity"], 1 - row["response_length"], rtol=1e-5)


def test_my_model_trains_is_loaded_again_and_tuned(finished, small, tmp_path):
    tokenizer, text = f"tokenizer={finished / 'tokenizer'}", f"data.corpus={finished.parent / 'text'}"
    config = tiny_config("examples/my_model.py:tiny", tokenizer, text)
    loop.train_stage(config, tmp_path / "pretrain")
    trained = load_trained_model(tmp_path / "pretrain", backend="cpu")
    assert trained.own_model["width"] == 16 and "embedding" in trained.params["lm"]
    size = sum(leaf.size for leaf in jax.tree.leaves(trained.params["lm"]))
    summary = read_json(tmp_path / "pretrain" / "summary.json")
    assert summary["parameters"] == size and summary["model_flops"] is None and summary["mfu"] is None
    overrides = f"init_from={tmp_path / 'pretrain'}", "data.sources=chitchat", "train.steps=4"
    loop.train_stage(tiny_config("sft.py:tiny", *overrides), tmp_path / "sft")
    tuned = load_trained_model(tmp_path / "sft", backend="cpu")
    assert tuned.own_model == trained.own_model and tuned.stage == "sft"
    chat = Chat(tuned, print, max_new=4)
    assert f"{size:,} parameters" in str(chat) and isinstance("".join(chat.answer("the object?")), str)


def test_my_method_trains_and_is_not_the_loss_alone(finished, small, tmp_path):
    """With a price the same steps leave the model less certain than without."""
    common = f"tokenizer={finished / 'tokenizer'}", f"data.corpus={finished.parent / 'text'}"
    name = "stage.name=experiments/examples/my_method.py:STAGE"
    found = {}
    for price in (0.0, 5.0):
        config = tiny_config("pretrain.py:tiny", *common, name, f"stage.price={price}")
        found[price] = loop.train_stage(config, tmp_path / str(price))["held_out"]
    assert found[5.0]["entropy"] > found[0.0]["entropy"] + 0.05 and "bits_per_byte" in found[5.0]
    stage = named_stage("experiments/examples/my_method.py:STAGE")
    assert stage.title.startswith("A method of one's own") and stage.path.endswith("my_method.py")
    assert load_trained_model(tmp_path / "5.0", backend="cpu").stage == "experiments/examples/my_method.py:STAGE"

"""Runs that were started when lm/ was one folder of 70 modules, kept as two small workdirs: they resume.

Each stopped after 2 batches of 4 (Python 3.12, JAX 0.12, one device); the loss below is that of the same code going on
without a stop. Their config.json has the keys of then, and their checkpoints name a class of then.
"""

import zipfile
from pathlib import Path

import pytest
from runs import ROOT, one_device

from lm.core.config import load_config
from lm.runs.workdir import read_metrics
from lm.sweep.config_functions import config_functions
from lm.train import config as train_config, loop

FOLDER = "tests/fixtures/before_rooms"
OVERRIDES = {
    "pretrain": [
        f"tokenizer={FOLDER}/tokenizer",
        f"data.corpus={FOLDER}/text",
        "data.held_out_bytes=2000",
        "data.length=32",
        "model.width=16",
        "model.layers=1",
        "model.head_size=8",
        "model.hidden=16",
        "optimizer.warmup_steps=1",
        "optimizer.total_steps=4",
    ],
    "ppo": [
        f"init_from={FOLDER}/pretrain",
        "data.reward_model=",
        "data.sources=arithmetic",
        "data.rewards.model=0.0",
        "data.rewards.length=1.0",
        "data.rater=",
        "data.prompt_length=24",
        "data.max_new=6",
        "data.rollouts=8",
        "data.held_out_rollouts=8",
        "optimizer.total_steps=16",
    ],
}


@pytest.fixture
def before(tmp_path, monkeypatch) -> Path:
    with zipfile.ZipFile(ROOT / "tests" / "fixtures" / "before_rooms.zip") as packed:
        packed.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_config, "make_mesh", one_device)
    return tmp_path / FOLDER


def resumed(stage: str, workdir: Path) -> dict[str, float]:
    """The last row of the run's metrics, once it has gone on from 2 batches to 4."""
    common = ["train.steps=4", "train.log_every=1", "train.save_every=2"]
    path = f"{ROOT / 'experiments' / stage}.py:tiny"
    loop.train_stage(load_config(path, [*OVERRIDES[stage], *common], config_functions), workdir)
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows if "tokens_per_second" in row] == [1, 2, 3, 4]
    return rows[-1]


def test_pretraining_goes_on_where_it_stopped(before, capsys):
    last = resumed("pretrain", before / "killed")
    assert "continues from step 2" in capsys.readouterr().out
    assert last["held_out/loss"] == pytest.approx(5.359086036682129, rel=1e-5)
    assert last["tokens"] == 1002


def test_ppo_goes_on_where_it_stopped_but_for_prompts_that_are_held_out_now(before, capsys):
    """Sums are held out by what they ask since then, so later batches differ; the state and its shapes fit."""
    last = resumed("ppo", before / "ppo")
    assert "continues from step 2" in capsys.readouterr().out
    assert last["held_out/ratio"] == pytest.approx(1, abs=1e-5) and abs(last["held_out/kl"]) < 0.3
    assert last["held_out/beta"] == pytest.approx(0.1)

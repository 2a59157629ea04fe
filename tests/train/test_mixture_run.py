"""Runs on several sources: what is reported of each, that it is what each has alone, that a stop changes nothing."""

import json
import math

import numpy as np
import pytest
from runs import EXPERIMENTS, assert_same_run, finished, small

from lm.core.config import load_config
from lm.core.errors import UserError
from lm.runs.workdir import read_metrics
from lm.train import loop
from lm.train.config import train_functions

__all__ = ["finished", "small"]


def pretrain(finished, corpus, *overrides):
    """The tiny config on this corpus; chitchat is the made conversations of tests/runs.py."""
    given = [f"tokenizer={finished / 'tokenizer'}", f"data.corpus={corpus}", "data.held_out=0.2"]
    given += ["optimizer.warmup_steps=0", *overrides]
    return load_config(f"{EXPERIMENTS / 'pretrain.py'}:tiny", given, train_functions)


@pytest.fixture
def corpus(finished):
    """Text, whose weight falls from 1 to 0 in 8 steps, beside talk."""
    text = {"source": str(finished.parent / "text"), "weight": ((0, 1.0), (8, 0.0)), "kind": "documentation"}
    return text, {"source": "chitchat", "weight": 0.5, "kind": "forum"}


def test_the_loss_of_each_source_is_what_it_is_alone(finished, small, corpus, tmp_path):
    loop.train_stage(pretrain(finished, corpus, "train.steps=2"), tmp_path / "both")
    both = read_metrics(tmp_path / "both")[0]
    for name, source in (("text", corpus[0]["source"]), ("chitchat", "chitchat")):
        loop.train_stage(pretrain(finished, source, "train.steps=1"), tmp_path / name)
        alone = read_metrics(tmp_path / name)[0]  # before the first step: the same parameters
        for metric in ("loss", "bits_per_byte"):
            assert both[f"held_out/{metric}/{name}"] == pytest.approx(alone[f"held_out/{metric}"], rel=1e-5)
        assert not [key for key in alone if key.count("/") > 1]
    kinds = {"documentation": "text", "forum": "chitchat"}
    for kind, name in kinds.items():
        assert both[f"held_out/bits_per_byte/kind {kind}"] == both[f"held_out/bits_per_byte/{name}"]
    info = json.loads((tmp_path / "both" / "summary.json").read_text())["about"]
    each = [json.loads((tmp_path / name / "summary.json").read_text())["about"] for name in kinds.values()]
    for count in ("documents", "tokens", "rows", "held_out_documents", "held_out_bytes"):
        assert info[count] == sum(part[count] for part in each)
    bits = sum(both[f"held_out/bits_per_byte/{n}"] * part["held_out_bytes"] for n, part in zip(kinds.values(), each))
    assert both["held_out/bits_per_byte"] == pytest.approx(bits / info["held_out_bytes"], rel=1e-5)
    nats = both["held_out/bits_per_byte"] * info["held_out_bytes"] * math.log(2)
    assert nats > 0 and "held_out/z_loss/text" not in both


def test_a_run_that_was_stopped_ends_as_one_that_was_not(finished, small, corpus, tmp_path):
    config = pretrain(finished, corpus, "train.steps=8", "train.save_every=3")
    loop.train_stage(config, tmp_path / "straight")
    fetched = loop.device_batch

    def stopping(r, state, i):
        if i == 5:
            raise KeyboardInterrupt
        return fetched(r, state, i)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "device_batch", stopping)
        loop.train_stage(config, tmp_path / "stopped")
    loop.train_stage(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_sources_that_are_used_up_stop_the_run_at_their_step(finished, small, tmp_path):
    corpus = [{"source": str(finished.parent / "text"), "epochs": 0.025}]
    with pytest.raises(UserError, match="the sources are used up at step 3"):
        loop.train_stage(pretrain(finished, corpus, "train.steps=8", "train.save_every=1"), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


def test_conversations_and_prompts_are_mixed_too(finished, small, tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": f"it is {i}"}]}
            for i in range(60)]  # fmt: skip
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"source": "chitchat", "weight": 1}, {"source": str(path), "weight": 3, "kind": "education"}]
    given = [f"init_from={finished / 'pretrain'}", f"data.sources={sources}", "data.held_out=0.2", "train.steps=2"]
    given += ["optimizer.warmup_steps=0"]
    loop.train_stage(load_config(f"{EXPERIMENTS / 'sft.py'}:tiny", given, train_functions), tmp_path / "sft")
    found = read_metrics(tmp_path / "sft")[0]
    parts = ("chitchat", "own", "kind forum", "kind education")
    assert np.isfinite([found[f"held_out/loss/{name}"] for name in parts]).all()

    given = [f"init_from={finished / 'sft'}", f"data.sources={sources}", "data.held_out=0.2", "train.steps=2"]
    given += [
        "optimizer.warmup_steps=0",
        "data.rewards.model=0.0",
        "data.rewards.repetition=1.0",
        "data.rollouts=16",
        "data.held_out_rollouts=16",
    ]
    config = load_config(f"{EXPERIMENTS / 'grpo.py'}:tiny", given, train_functions)
    about = loop.train_stage(config, tmp_path / "grpo")["about"]
    assert about["prompts"] + about["held_out_prompts"] + about["skipped"] + about["held_out_skipped"] > 60

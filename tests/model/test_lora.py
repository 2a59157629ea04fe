"""Low-rank adapters: what they start as, what is learned, what a workdir of them is to others."""

import dataclasses
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import EXPERIMENTS, finished, settings, small

from lm import model
from lm.core.errors import UserError
from lm.model import lora
from lm.model.params import param_count
from lm.model.quantization import quantized_params
from lm.optim import optimizers
from lm.optim.combinators import inference_state
from lm.runs import console
from lm.runs.workdir import load_trained_model, read_metrics
from lm.stages.pretraining import pretrain
from lm.stages.rl import grpo
from lm.train import loop

__all__ = ["finished", "small"]


@pytest.fixture(scope="module")
def adapted(tiny_model):
    """The tiny model with adapters of rank 2 on two of its matrices."""
    config = dataclasses.replace(tiny_model.config, lora_rank=2, lora_alpha=4.0, lora_targets="query,down")
    return model.make_model(config)


def update(adapted, tiny_lm, rows, base="float32", steps=3):
    """State and metrics after some pretraining steps on one batch."""
    tokens = rows(np.arange(48).reshape(4, 12) % 29 + 1, [12, 9, 12, 7])
    step = pretrain.make(adapted, optimizers.make_optimizer(learning_rate=1e-2, total_steps=10))
    key = jax.random.key(0)
    state = step.init(key, {"lm": adapted.init(key)}, {lora.FROZEN_BASE: quantized_params(base, tiny_lm)})
    run, found = jax.jit(step.update), []
    for _ in range(steps):
        state, metrics = run(state, tokens)
        found.append(float(metrics["loss"].value()))
    return state, found, tokens


def test_only_adapters_are_learnt_and_the_first_output_is_the_bases(adapted, tiny_model, tiny_lm, rows):
    state, losses, tokens = update(adapted, tiny_lm, rows)
    before = tiny_model.token_logprobs(tiny_lm, tokens)
    mean = float(-jnp.sum(before * tokens.weights) / jnp.sum(tokens.weights))
    assert losses[0] == pytest.approx(mean, rel=1e-5) and losses[2] < losses[0] - 0.05
    assert set(state.params["lm"]["layers"]) == {"query_a", "query_b", "down_a", "down_b"}
    # Rank 2 of two layers: query 16 x 32, down 24 x 16: 2 x 2 x (16 + 32 + 24 + 16) = 352
    assert sum(x.size for x in jax.tree.leaves(state.params)) == param_count(lora.lora_specs(adapted.config)) == 352
    jax.tree.map(np.testing.assert_array_equal, state.frozen[lora.FROZEN_BASE], tiny_lm)
    moments = [x for x in jax.tree.leaves(state.opt_state) if getattr(x, "ndim", 0) >= 2]
    assert sum(x.size for x in moments) == 2 * 352


def test_merged_is_the_same_model(adapted, tiny_model, tiny_lm, rows):
    state, _, tokens = update(adapted, tiny_lm, rows)
    merged = lora.merged_params(adapted.config, tiny_lm, state.params["lm"])
    apart = adapted.token_logprobs(inference_state(state).params["lm"], tokens)
    np.testing.assert_allclose(tiny_model.token_logprobs(merged, tokens), apart, atol=2e-5)
    assert jax.tree.structure(merged) == jax.tree.structure(dict(tiny_lm))
    # By hand, one entry: W + alpha / rank times row of A times column of B.
    a, b = (np.asarray(state.params["lm"]["layers"][f"down_{side}"])[1] for side in "ab")
    expected = np.asarray(tiny_lm["layers"]["down"])[1, 3, 5] + 2.0 * (a[3, 0] * b[0, 5] + a[3, 1] * b[1, 5])
    assert merged["layers"]["down"][1, 3, 5] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("base, gap", [("bfloat16", 0.1), ("int8", 0.1)])
def test_a_smaller_base_is_close_and_learns(adapted, tiny_model, tiny_lm, rows, base, gap):
    state, losses, tokens = update(adapted, tiny_lm, rows, base=base)
    assert losses[2] < losses[0] - 0.05
    kept = state.frozen[lora.FROZEN_BASE]["layers"]
    assert kept["gate"].dtype == {"bfloat16": jnp.bfloat16, "int8": jnp.int8}[base]
    apart = adapted.token_logprobs(inference_state(state).params["lm"], tokens)
    merged = lora.merged_params(
        dataclasses.replace(adapted.config, lora_base_dtype=base), kept_base(state), state.params["lm"]
    )
    np.testing.assert_allclose(tiny_model.token_logprobs(merged, tokens), apart, atol=2e-4)
    plain = lora.merged_params(adapted.config, tiny_lm, state.params["lm"])
    assert 0 < np.abs(tiny_model.token_logprobs(plain, tokens) - apart)[tokens.weights > 0].max() < gap


def kept_base(state):
    return jax.tree.map(np.asarray, state.frozen[lora.FROZEN_BASE])


def test_a_reference_is_adapters_only(adapted, tiny_lm):
    """KL to the start is 0 before the first step, and the reference costs no second decoder."""
    step = grpo.make(adapted, optimizers.make_optimizer(learning_rate=1e-2, total_steps=10))
    key = jax.random.key(0)
    state = step.init(key, {"lm": adapted.init(key)}, {lora.FROZEN_BASE: tiny_lm})
    assert set(state.frozen["ref"]) == {"layers"}
    there = inference_state(state)
    jax.tree.map(np.testing.assert_array_equal, there.frozen["ref"], there.params["lm"])
    assert "embedding" in there.frozen["ref"]


def run(capsys, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["", *map(str, flags)])
    code = 0
    try:
        console.run_program(loop.program)
    except SystemExit as exit:
        code = exit.code
    return code, capsys.readouterr()


def test_a_workdir_of_adapters_is_a_whole_model_to_others(finished, tmp_path, capsys, monkeypatch, small):
    """SFT with adapters, which resumes; then plain SFT from there, as from any run."""
    flags = [f"--config={EXPERIMENTS / 'lora.py'}:tiny", f"--workdir={tmp_path / 'sft'}", *settings(finished, "sft")]
    flags += [
        "--config.model.lora_rank=4",
        "--config.model.lora_targets=query,up",
        "--config.model.lora_base_dtype=int8",
    ]
    code, said = run(capsys, monkeypatch, *flags, "--config.train.steps=4")
    assert code == 0, said.err
    code, said = run(capsys, monkeypatch, *flags, "--config.train.steps=8")
    assert code == 0 and "continues from step 4" in said.out
    trained = load_trained_model(tmp_path / "sft", backend="cpu")
    assert trained.model_config == load_trained_model(finished / "pretrain", backend="cpu").model_config
    assert trained.params["lm"]["layers"]["query"].dtype == np.float32
    rows = [row for row in read_metrics(tmp_path / "sft") if "held_out/loss" in row]
    assert [row["step"] for row in rows][0] == 0 and rows[-1]["step"] == 8
    flags = [f"--config={EXPERIMENTS / 'sft.py'}:tiny", f"--workdir={tmp_path / 'on'}", *settings(finished, "sft")]
    code, said = run(capsys, monkeypatch, *flags, f"--config.init_from={tmp_path / 'sft'}", "--config.train.steps=4")
    assert code == 0, said.err
    first = read_metrics(tmp_path / "on")[0]["held_out/loss"]
    assert first == pytest.approx(rows[-1]["held_out/loss"], abs=1e-4)  # the merged model is the adapted one


def test_it_goes_on_upon_its_own_base(finished, tmp_path, capsys, monkeypatch, small):
    """Stopped and resumed, after the run that it came from has changed, it ends bitwise where it ends in one go."""
    source = shutil.copytree(finished / "pretrain", tmp_path / "source")
    flags = [f"--config={EXPERIMENTS / 'lora.py'}:tiny", f"--config.init_from={source}"]
    flags += ["--config.optimizer.schedule_name=constant"]  # which does not depend on the length of the run
    for name, steps in (("through", 8), ("stopped", 4)):
        code, said = run(capsys, monkeypatch, *flags, f"--workdir={tmp_path / name}", f"--config.train.steps={steps}")
        assert code == 0, said.err
    shutil.rmtree(source)
    shutil.copytree(finished / "sft", source)
    code, said = run(capsys, monkeypatch, *flags, f"--workdir={tmp_path / 'stopped'}", "--config.train.steps=8")
    assert code == 0 and "continues from step 4" in said.out
    ends = [load_trained_model(tmp_path / name, backend="cpu").params for name in ("through", "stopped")]
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_refused(tiny_model, finished, tmp_path, capsys, monkeypatch, small):
    bad = dataclasses.replace(tiny_model.config, lora_rank=2, lora_targets="query,embedding")
    with pytest.raises(UserError, match="lora_targets names 'embedding'; this model has attention_out, down, gate"):
        model.make_model(bad)
    flags = [f"--config={EXPERIMENTS / 'lora.py'}:tiny", f"--workdir={tmp_path / 'p'}"]
    code, said = run(capsys, monkeypatch, *flags, "--config.init_from=", f"--config.tokenizer={finished / 'tokenizer'}")
    assert code == 2 and "model.lora_rank needs a model to adapt: set config.init_from" in said.err
    assert not (tmp_path / "p" / "base").exists()

"""What a run takes from another one, and where the two do not go together."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from runs import EXPERIMENTS, finished, small, stage_config

from lm.core.config import load_config
from lm.core.errors import UserError
from lm.rewards.load import check_same_axes
from lm.runs.workdir import load_trained_model, read_json, read_metrics
from lm.train import loop
from lm.train.warm_start import inherited_params, load_policy, with_marker_embeddings

__all__ = ["finished", "small"]


def of(finished, stage: str):
    return load_trained_model(finished / stage, backend="cpu")


def with_axes(config, axes: dict[str, float]):
    config = config.unlock()
    config.data.axes, config.stage.axes = dict(axes), dict(axes)
    return config


def test_a_head_is_taken_where_both_mean_the_same_by_it(finished):
    """PPO's values go on as PPO's values, a reward model's axes as the same axes; a policy's value is no reward."""
    ppo, reward = stage_config(finished, "ppo"), stage_config(finished, "reward")
    assert inherited_params(None, ppo) == {}
    assert set(inherited_params(of(finished, "sft"), ppo)) == {"lm"}
    assert set(inherited_params(of(finished, "ppo"), ppo)) == {"lm", "value"}
    assert set(inherited_params(of(finished, "ppo"), reward)) == {"lm"}
    taken = inherited_params(of(finished, "reward"), reward)
    assert taken["value"]["score"].shape == (of(finished, "reward").model_config.width, 1)


def test_a_reward_model_from_a_ppo_policy_learns(finished, small, tmp_path):
    """Its head is new: with PPO's, whose shape is another, all answers of a batch had the score of the first."""
    loop.train_stage(stage_config(finished, "reward", f"init_from={finished}/ppo"), tmp_path / "run")
    before, *_, after = read_metrics(tmp_path / "run")
    assert before["held_out/loss"] == pytest.approx(np.log(2)) and before["held_out/margin"] == 0
    assert after["held_out/margin"] != 0
    head = of(tmp_path, "run").params["value"]
    assert jax.tree.map(np.shape, head) == {"score": (of(finished, "ppo").model_config.width, 1), "offset": (1,)}


def test_axes_must_be_those_of_the_start(finished):
    start, config = of(finished, "reward"), stage_config(finished, "reward")
    with pytest.raises(
        UserError, match="has learned the axes overall, data.axes are overall, clear: name the same, or"
    ):
        inherited_params(start, with_axes(config, {"overall": 1.0, "clear": 0.5}))
    assert inherited_params(start, with_axes(config, {"overall": 0.5}))  # what an axis counts may change
    two = config.unlock()
    two.data.axes, two.stage.axes = {"overall": 1.0, "clear": 0.5}, {"overall": 1.0}
    with pytest.raises(UserError, match="stage.axes are .*, but data.axes, which the batches bring, .*: give both the"):
        inherited_params(None, two)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_no_policy_starts_as_a_reward_model(finished, stage):
    with pytest.raises(UserError, match="init_from .*/reward is a reward model, which scores answers and writes none"):
        inherited_params(of(finished, "reward"), stage_config(finished, stage))


def test_whoever_answers_is_a_policy(finished):
    assert load_policy(finished / "ppo", backend="cpu").stage == "ppo"
    with pytest.raises(UserError, match="models.a .*/reward is a reward model, which scores answers and writes none"):
        load_policy(finished / "reward", backend="cpu", name="models.a ")


def test_judges_of_one_question(finished, tmp_path):
    """Defaults count too: a config that names no axes has learned the overall ranking."""
    other = shutil.copytree(finished / "reward", tmp_path / "other")
    config = read_json(other / "config.json")
    del config["data"]["axes"]
    (other / "config.json").write_text(json.dumps(config))
    check_same_axes([of(finished, "reward"), load_trained_model(other, backend="cpu")])
    config["data"]["axes"] = {"clear": 1.0, "overall": 1.0}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="reward counts the axes overall 1, but .*other counts overall 1, clear 1: an"):
        check_same_axes([of(finished, "reward"), load_trained_model(other, backend="cpu")])


@pytest.mark.parametrize("config, made", [("pretrain", "tokenizer"), ("sft", "pretrain"), ("reward", "sft")])
def test_a_config_by_itself_says_the_command_that_makes_what_it_needs(config, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(EXPERIMENTS)
    command = f"python -m lm train --config=experiments/{made}.py --workdir=runs/small_talk/{made}` makes it"
    with pytest.raises(UserError, match=re.escape(command)):
        loop.train_stage(load_config(f"experiments/{config}.py:tiny"), tmp_path / "run")


@pytest.mark.parametrize("has_head", [False, True])
def test_markers_start_as_the_token_that_stands_where_they_will(finished, has_head):
    trained = of(finished, "pretrain")
    lm, tokenizer = trained.params["lm"], trained.tokenizer
    lm = (
        {**lm, "head": np.arange(lm["embedding"].size, dtype=np.float32).reshape(lm["embedding"].T.shape)}
        if has_head
        else lm
    )
    line_end, markers = tokenizer.encode("\n")[-1], list(tokenizer.marker_ids)
    started = with_marker_embeddings(lm, tokenizer, "\n")
    others = np.setdiff1d(np.arange(tokenizer.vocab_size), markers)
    assert sorted(tokenizer.pieces(markers)) == ["<|assistant|>", "<|end|>", "<|system|>", "<|tool|>", "<|user|>"]
    for name, rows in (("embedding", lambda a: np.asarray(a)), *([("head", lambda a: np.asarray(a).T)] * has_head)):
        old, new = rows(lm[name]), rows(started[name])
        assert np.array_equal(new[markers], np.tile(old[line_end], (len(markers), 1)))
        assert np.array_equal(new[others], old[others])
    assert started["layers"] is lm["layers"]


def test_markers_that_cannot_start_so_are_refused(finished):
    trained = of(finished, "pretrain")
    with pytest.raises(UserError, match="holds no token"):
        with_marker_embeddings(trained.params["lm"], trained.tokenizer, "")
    with pytest.raises(UserError, match="not lm's own"):
        with_marker_embeddings({"layers": {}}, trained.tokenizer, "\n")
    with pytest.raises(UserError, match="set init_from"):
        config = stage_config(finished, "pretrain").unlock()
        config.marker_embedding = "\n"
        inherited_params(None, config)

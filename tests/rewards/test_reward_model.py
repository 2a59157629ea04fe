"""Reward models as rewards: a weighted sum of axes, centred and scaled; ensembles and their doubt."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import finished

from lm.core.errors import UserError
from lm.rewards.load import load_reward_model, reward_from_workdir, reward_from_workdirs
from lm.rewards.reward_model import (
    conversation_with_answer,
    reward_ensemble,
    reward_row_length,
    reward_rows,
    reward_scores,
)
from lm.runs.workdir import read_json
from lm.tokenizer import encode_chat, encode_prompt, load_tokenizer

__all__ = ["finished"]

PROMPT = [{"role": "user", "content": "the object code method?"}]
ASKED = {"messages": PROMPT}


def test_an_ensemble_is_its_mean_less_its_doubt():
    members = [lambda examples, texts, shift=shift: np.array([1.0, 2.0]) + shift for shift in ([0, 0], [2, 0])]
    np.testing.assert_allclose(reward_ensemble(members, pessimism=0.0)([], []), [2, 2])
    np.testing.assert_allclose(
        reward_ensemble(members, pessimism=0.5)([], []), [2 - 0.5 * 1, 2]
    )  # 1 and 3: deviation 1


def test_the_reward_of_a_workdir_is_the_score_at_its_end_token_centred(finished):
    """By another way: one row at a time, without padding to a batch, and the summary's moments."""
    trained, centred = load_reward_model(finished / "reward", backend="cpu", normalized=True, jit=jax.jit)
    _, raw = load_reward_model(finished / "reward", backend="cpu", normalized=False, jit=lambda function: function)
    texts = ["a list of names.", "no", "what is a class? a type of object, of course"]
    moments = read_json(finished / "reward" / "summary.json")["held_out"]
    by_hand = []
    for text in texts:
        tokens = reward_rows(trained.tokenizer, [conversation_with_answer(PROMPT, text)], 64)
        by_hand.append(float(reward_scores(trained.model, jax.tree.map(jnp.asarray, trained.params), tokens)[0, 0]))
        last = int((tokens.segments > 0).sum()) - 1
        assert tokens.inputs[0, last] == trained.tokenizer.end_of_message  # where it is read
    assert np.std(by_hand) > 1e-4
    np.testing.assert_allclose(raw([ASKED] * 3, texts), by_hand, atol=1e-5)
    expected = (np.array(by_hand) - moments["score_mean"]) / moments["score_deviation"]
    np.testing.assert_allclose(centred([ASKED] * 3, texts), expected, atol=1e-3)


def test_what_a_reward_model_cannot_read_whole_is_said_once(finished, capsys):
    """64 tokens a row. Up to that nothing is said, and beyond it nobody is left to think that it was judged whole."""
    said = []
    options = dict(backend="cpu", normalized=True, jit=jax.jit, warn=said.append)
    trained, reward = load_reward_model(finished / "reward", **options)
    length = lambda text: len(encode_chat(trained.tokenizer, conversation_with_answer(PROMPT, text)).ids)
    fits = next(text for n in range(1, 99) if length(text := "a list" + " of" * n) == 64)
    reward([ASKED] * 70, ["short"] * 69 + [fits])
    assert said == []
    longer = [fits + ending for ending in (" a name", " no", " the class of a list")]
    reward([ASKED] * 5, ["short", *longer, fits])
    longest = max(map(length, longer))
    assert len(said) == 1 and f"{finished}/reward reads rows of 64 tokens, but 3 of 5 conversations" in said[0]
    assert f"(up to {longest})" in said[0] and f"--config.data.length={longest}, or shorten the answers" in said[0]
    reward([ASKED], longer[:1])
    assert len(said) == 1


def test_a_judge_reads_every_row_that_a_sampler_can_write(finished):
    """By hand: a prompt of 24 tokens with the marker, and 40 sampled ones without an end token, which the template
    closes with one more."""
    tokenizer = load_tokenizer(finished / "reward" / "tokenizer.model")
    asked = encode_prompt(tokenizer, PROMPT)
    text = next(t for n in range(1, 99) if len(tokenizer.encode(t := "a list" + " of" * n)) == 40)
    assert (
        len(encode_chat(tokenizer, conversation_with_answer(PROMPT, text)).ids)
        == len(asked) + 40 + 1
        == reward_row_length(len(asked), 40)
    )


def test_a_judge_that_cannot_read_all_is_refused(finished):
    tokenizer = load_tokenizer(finished / "reward" / "tokenizer.model")
    reward_from_workdir(finished / "reward", tokenizer, 64)
    message = "reward was trained on rows of 64 tokens, but a prompt and its answer may have 65 here, which it would "
    for path in (f"{finished}/reward", f"{finished}/reward, {finished}/reward"):
        with pytest.raises(UserError, match=f"{message}read cut: lower .* by 1 in all, or train it with .*length=65"):
            reward_from_workdirs(path, tokenizer, 0.0, longest=65)


@pytest.mark.parametrize(
    "axes, said",
    [({"overall": 0.5}, "counts overall 0.5"), ({"overall": 1.0, "clear": 1.0}, "counts overall 1, clear 1")],
)
def test_an_ensemble_of_judges_that_answer_different_questions_is_refused(finished, tmp_path, axes, said):
    other = shutil.copytree(finished / "reward", tmp_path / "other")
    config = read_json(other / "config.json")
    config["data"]["axes"] = axes
    (other / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(finished / "reward" / "tokenizer.model")
    with pytest.raises(UserError, match=f"reward counts the axes overall 1, but {other} {said}: an ensemble needs"):
        reward_from_workdirs(f"{finished}/reward,{other}", tokenizer, 0.0, longest=64)


def test_an_answer_longer_than_a_row_keeps_its_end_token(finished):
    trained, _ = load_reward_model(finished / "reward", backend="cpu", normalized=True, jit=jax.jit)
    tokens = reward_rows(trained.tokenizer, [conversation_with_answer(PROMPT, "a list of names " * 50)], 16)
    assert (tokens.segments > 0).all() and tokens.inputs[0, -1] == trained.tokenizer.end_of_message
    assert tokens.inputs[0, 0] == trained.tokenizer.bos


def test_behind_a_prompt_longer_than_a_row_answers_are_still_seen(finished):
    """The answer is whole, and before it stands the end of the prompt: different answers have different rewards."""
    _, reward = load_reward_model(finished / "reward", backend="cpu", normalized=True, jit=jax.jit)
    long = {"messages": [{"role": "user", "content": "the object code method? " * 60}]}
    found = reward([long] * 3, ["a name.", "the type of a list", "no"])
    assert len({round(float(score), 4) for score in found}) == 3


@pytest.mark.parametrize("pessimism", [0.0, 1.0])
def test_an_ensemble_of_one_model_twice_is_that_model(finished, pessimism):
    _, one = load_reward_model(finished / "reward", backend="cpu", normalized=True, jit=jax.jit)
    two = reward_ensemble([one, one], pessimism=pessimism)
    np.testing.assert_allclose(two([ASKED], ["a name."]), one([ASKED], ["a name."]), rtol=1e-6)

"""Reward models as rewards: a weighted sum of axes, centred and scaled; ensembles and their doubt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import finished

from lm.rewards.model import answered, ensemble, rows, scores
from lm.workdir import load_reward, read_json

__all__ = ["finished"]

PROMPT = [{"role": "user", "content": "the object code method?"}]


def test_an_ensemble_is_its_mean_less_its_doubt():
    members = [lambda examples, texts, shift=shift: np.array([1.0, 2.0]) + shift for shift in ([0, 0], [2, 0])]
    np.testing.assert_allclose(ensemble(members, pessimism=0.0)([], []), [2, 2])
    np.testing.assert_allclose(ensemble(members, pessimism=0.5)([], []), [2 - 0.5 * 1, 2])  # 1 and 3: deviation 1


def test_the_reward_of_a_workdir_is_the_score_at_its_end_token_centred(finished):
    """By another way: one row at a time, without padding to a batch, and the summary's moments."""
    trained, centred = load_reward(finished / "reward", backend="cpu", centred=True, jit=jax.jit)
    _, raw = load_reward(finished / "reward", backend="cpu", centred=False, jit=lambda function: function)
    texts = ["a list of names.", "no", "what is a class? a type of object, of course"]
    moments = read_json(finished / "reward" / "summary.json")["held_out"]
    by_hand = []
    for text in texts:
        tokens = rows(trained.tokenizer, [answered(PROMPT, text)], 64)
        by_hand.append(float(scores(trained.model, jax.tree.map(jnp.asarray, trained.params), tokens)[0, 0]))
        last = int((tokens.segments > 0).sum()) - 1
        assert tokens.inputs[0, last] == trained.tokenizer.end  # where it is read
    assert np.std(by_hand) > 1e-4
    np.testing.assert_allclose(raw([PROMPT] * 3, texts), by_hand, atol=1e-5)
    expected = (np.array(by_hand) - moments["score_mean"]) / moments["score_deviation"]
    np.testing.assert_allclose(centred([PROMPT] * 3, texts), expected, atol=1e-3)


def test_an_answer_longer_than_a_row_keeps_its_end_token(finished):
    trained, _ = load_reward(finished / "reward", backend="cpu", centred=True, jit=jax.jit)
    tokens = rows(trained.tokenizer, [answered(PROMPT, "a list of names " * 50)], 16)
    assert (tokens.segments > 0).all() and tokens.inputs[0, -1] == trained.tokenizer.end
    assert tokens.inputs[0, 0] == trained.tokenizer.bos


def test_behind_a_prompt_longer_than_a_row_answers_are_still_seen(finished):
    """The answer is whole, and before it stands the end of the prompt: different answers have different rewards."""
    _, reward = load_reward(finished / "reward", backend="cpu", centred=True, jit=jax.jit)
    long = [{"role": "user", "content": "the object code method? " * 60}]
    found = reward([long] * 3, ["a name.", "the type of a list", "no"])
    assert len({round(float(score), 4) for score in found}) == 3


@pytest.mark.parametrize("pessimism", [0.0, 1.0])
def test_an_ensemble_of_one_model_twice_is_that_model(finished, pessimism):
    _, one = load_reward(finished / "reward", backend="cpu", centred=True, jit=jax.jit)
    two = ensemble([one, one], pessimism=pessimism)
    np.testing.assert_allclose(two([PROMPT], ["a name."]), one([PROMPT], ["a name."]), rtol=1e-6)

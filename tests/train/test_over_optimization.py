"""The gauge of over-optimization: when it speaks, and that a run then ends at its best checkpoint."""

import json

import pytest
from runs import finished, small, stage_config

from lm.core.errors import UserError
from lm.runs.workdir import load_trained_model, read_json, read_metrics
from lm.train import loop
from lm.train.over_optimization import best_rated_step, over_optimization

__all__ = ["finished", "small"]
OWN_REWARDS = """
import numpy as np

def letters(examples, texts):
    return np.array([text.count("e") / 4 for text in texts], np.float32)

def fewer_letters(examples, texts):
    return -letters(examples, texts)
"""


def rows(*points: tuple[float, float], se: float = 0.1) -> list[dict]:
    """Held-out rows of (reward, rating), five steps apart, with a line of means between them."""
    found = [
        {"step": 5 * i, "held_out/reward": reward, "held_out/score/a": rating, "held_out/score/a_se": se}
        for i, (reward, rating) in enumerate(points)
    ]
    return [row for each in found for row in (each, {"step": each["step"] + 3, "reward": 1.0})]


def test_a_fall_by_hand():
    """From 3.0 to 2.5 with errors of 0.1 each: the error of the fall is sqrt(2) / 10 = 0.141, so it is 3.5 of them."""
    found = over_optimization(rows((0, 2.0), (1, 3.0), (2, 2.5)), "score/a", errors=3.5)
    assert found is not None and (found.step, found.best_step) == (10, 5)
    assert (found.rating, found.reward) == ((3.0, 2.5), (1, 2))
    assert found.noise == pytest.approx(0.02**0.5)
    assert "The policy of step 5 is the result" in found.message and "rose from 1 to 2" in found.message
    assert over_optimization(rows((0, 2.0), (1, 3.0), (2, 2.5)), "score/a", errors=3.6) is None


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(0, 2.0)],
        [(0, 2.0), (1, 3.0), (2, 3.5)],  # both rise
        [(0, 2.0), (1, 3.0), (2, 2.9)],  # within the noise
        [(0, 2.0), (1, 3.0), (0.5, 1.0)],  # the reward falls as well: no over-optimization
        [(0, 2.0), (1, 1.0), (2, 2.5)],  # it has come back
    ],
)
def test_healthy_runs(points):
    assert over_optimization(rows(*points), "score/a", errors=2.0) is None


def test_the_first_of_equal_ratings_is_the_best():
    assert best_rated_step(rows((0, 1.0), (1, 2.0), (2, 2.0)), "score/a") == 5
    assert best_rated_step([{"step": 3, "loss": 1.0}], "score/a") is None


def rigged_config(finished, folder, rater: str, **schedule):
    """PPO that learns to say the letter e, rated by `rater` of OWN_REWARDS."""
    own = folder / "own.py"
    own.write_text(OWN_REWARDS)
    options = ["data.held_out_rollouts=32", "data.truncation_penalty=0.0", "stage.beta=0.0"]
    config = stage_config(finished, "ppo", f"data.rater={own}:{rater}", "optimizer.learning_rate=0.01", *options)
    config.train = {"steps": 30, "evaluate_every": 2, "keep": 1, "save_every": 100, **schedule}
    if "watched_rating" not in schedule:
        config.train["watched_rating"] = f"score/{rater}"
    with config.unlocked(), config.data.ignore_type():
        config.data.rewards = f"{own}:letters=1.0"
    return config


def test_a_rigged_reward_stops_the_run_at_its_best_checkpoint(finished, small, tmp_path, capsys):
    config = rigged_config(finished, tmp_path, "fewer_letters")
    summary = loop.train_stage(config, tmp_path / "ppo")
    found = summary["over_optimization"]
    scored = {r["step"]: r for r in read_metrics(tmp_path / "ppo") if "held_out/reward" in r}
    assert found["step"] == max(scored) < 30
    best = max(scored, key=lambda step: scored[step]["held_out/score/fewer_letters"])
    assert best == found["best_step"] and summary["held_out"]["reward"] == scored[best]["held_out/reward"]
    assert scored[found["step"]]["held_out/reward"] > summary["held_out"]["reward"]
    assert sorted(folder.name for folder in (tmp_path / "ppo" / "checkpoints").iterdir()) == [str(best)]
    assert load_trained_model(tmp_path / "ppo", backend="cpu").summary["over_optimization"]["message"]
    printed = capsys.readouterr()
    assert f"policy of step {best} is the result" in " ".join((printed.out + printed.err).split())
    again = loop.train_stage(config, tmp_path / "ppo")  # it has finished
    assert again == read_json(tmp_path / "ppo" / "summary.json") == json.loads(json.dumps(summary))


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["summary", "checkpoints"])
def test_a_kill_at_the_stop_changes_nothing(finished, small, tmp_path, lost):
    """Killed before the summary is written; or before the later checkpoints are removed, its rows complete."""
    config = rigged_config(finished, tmp_path, "fewer_letters")
    with pytest.MonkeyPatch.context() as patch:
        if lost == "checkpoints":
            patch.setattr(loop.Checkpoints, "remove_after", lambda self, step: None)
        first = loop.train_stage(config, tmp_path / "ppo")
    (tmp_path / "ppo" / "summary.json").unlink()
    again = loop.train_stage(config, tmp_path / "ppo")
    for key in ("steps", "tokens", "held_out", "over_optimization"):
        assert again[key] == json.loads(json.dumps(first[key])) or again[key] == first[key], key
    best = first["over_optimization"]["best_step"]
    assert [folder.name for folder in (tmp_path / "ppo" / "checkpoints").iterdir()] == [str(best)]


@pytest.mark.slow
def test_a_healthy_run_goes_on_to_its_end(finished, small, tmp_path):
    config = rigged_config(finished, tmp_path, "letters", steps=6)
    summary = loop.train_stage(config, tmp_path / "ppo")
    assert summary["steps"] == 6 and "over_optimization" not in summary
    assert load_trained_model(tmp_path / "ppo", backend="cpu").summary["held_out"]["score/letters_se"] >= 0


@pytest.mark.parametrize(
    "schedule, message",
    [
        ({"watched_rating": "score/rul"}, "train.watched_rating is 'score/rul', but ppo logs no such rating"),
        ({"evaluate_every": 0}, "train.watched_rating needs ratings between start and end: set train.evaluate_every"),
        ({"watched_errors": -1.0}, "train.watched_errors is -1.0; it must be at least 0"),
    ],
)
def test_bad_options(finished, small, tmp_path, schedule, message):
    with pytest.raises(UserError, match=message):
        loop.train_stage(rigged_config(finished, tmp_path, "letters", **schedule), tmp_path / "ppo")

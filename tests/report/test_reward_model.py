"""What a reward model is told to have learned: by hand on few pairs, and on the finished tiny one."""

import json
import math

import numpy as np
import pytest
from runs import finished

from lm.core.errors import UserError
from lm.data import preferences
from lm.report import reward_model
from lm.runs.workdir import read_json

__all__ = ["finished"]

RANKS = np.array([[1, 2, 3], [2, 1, 0]])
TOTAL = np.array([[2.0, 2.5, 0.0], [1.0, -1.0, 9.0]])


@pytest.fixture
def pairs():
    """Leads -0.5, 2 and 2.5 in the first verdict; -2 in the second, whose third answer is not there."""
    return reward_model.preference_pairs(RANKS, TOTAL)


def test_preferences(pairs):
    assert pairs == [(0, 0, 1, 1, -0.5), (0, 0, 2, 2, 2.0), (0, 1, 2, 1, 2.5), (1, 1, 0, 1, -2.0)]


def test_each_verdict_counts_once(pairs):
    found = reward_model.accuracy_by_ranking(pairs)  # (2/3 + 0) / 2, with the deviation of these two over root 2
    assert found.value == pytest.approx(1 / 3) and found.se == pytest.approx(1 / 3)
    assert (
        reward_model.accuracy_by_ranking([pairs[0]._replace(score_gap=0.0)] * 2).value == 0.5
    )  # no preference: half right


def test_margins_and_calibration(pairs):
    near, far = reward_model.accuracy_by_margin(pairs)
    assert (near["apart"], near["pairs"], far["apart"], far["pairs"]) == (1, 3, 2, 1)
    assert near["value"] == pytest.approx(1 / 3) and far["value"] == 1
    found = {one["from"]: (one["said"], one["value"], one["pairs"]) for one in reward_model.calibration_bins(pairs)}
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    assert found == {
        0.6: (pytest.approx(sigmoid(0.5)), 0.0, 1),
        0.8: (pytest.approx(sigmoid(2.0)), 0.5, 2),
        0.9: (pytest.approx(sigmoid(2.5)), 1.0, 1),
    }


def test_the_worst_come_first_and_one_of_a_verdict(pairs):
    verdicts = [
        preferences.Ranking(name, [{"role": "user", "content": name}], ["p", "q", "r"], [1, 1, 1], "x", "2026-01-01")
        for name in ("one", "two")
    ]
    found = reward_model.worst_pairs([*pairs, pairs[0]._replace(score_gap=-0.1)], verdicts, TOTAL)
    assert [(one["prompt"][0]["content"], one["better"], one["worse"]) for one in found] == [
        ("two", "q", "p"),
        ("one", "p", "q"),
    ]
    assert found[0]["scores"] == [-1.0, 1.0] and found[0]["sure"] == pytest.approx(1 / (1 + math.exp(-2)))


def test_it_agrees_with_the_loop_s_own_held_out_score(finished):
    """Two ways to the same numbers: the metrics of the last held-out pass, and the pairs one by one."""
    told, summary = (
        read_json(finished / "reward" / reward_model.NUMBERS_FILE),
        read_json(finished / "reward" / "summary.json"),
    )
    held_out = summary["held_out"]
    assert told["prompts"] == summary["about"]["held_out_prompts"]
    assert told["accuracy"]["value"] == pytest.approx(held_out["accuracy"], abs=1e-6)
    assert told["longer"]["value"] == pytest.approx(held_out["longer_preferred"], abs=1e-6)
    assert told["length_correlation"] == pytest.approx(held_out["length_correlation"], abs=1e-3)
    for one in told["calibration"]:
        assert one["said"] == pytest.approx(held_out[f"confidence/{one['from']}"], abs=1e-4)
    page = (finished / "reward" / reward_model.PAGE_FILE).read_text()
    assert page.count("<svg") == 3 and page.count("the rater&#39;s choice") + page.count("the rater's choice") == len(
        told["worst"]
    )


def test_an_answer_is_shown_as_text(tmp_path, finished, monkeypatch):
    told = read_json(finished / "reward" / reward_model.NUMBERS_FILE)
    told["worst"] = [{"prompt": [], "better": "<script>", "worse": "b", "scores": [0.0, 1.0], "sure": 0.7}]
    page = reward_model.rendered_page("report/reward_model.html.jinja", root="x", measured=told, figures=[])
    assert "&lt;script&gt;" in page and "<script>" not in page
    json.dumps(told)


def test_only_a_reward_model_has_a_taste(finished):
    with pytest.raises(UserError, match="sft is no reward model .it is sft.: train stage reward"):
        reward_model.measure_reward_model(finished / "sft")

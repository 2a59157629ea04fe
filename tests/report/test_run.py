"""The page of one stage: what it cost, how it learned, where it came from; unknown parts are left out."""

import json

import numpy as np
import pytest
from runs import finished

from lm.report import run
from lm.runs.workdir import read_json
from lm.stages import STAGES

__all__ = ["finished"]
ATTACK = "<script>alert(1)</script>"


@pytest.mark.parametrize("stage", ["tokenizer", "pretrain", "ppo"])
def test_training_leaves_the_page(finished, stage):
    page = (finished / stage / "report.html").read_text()
    (start,) = read_json(finished / stage / "record.json")
    assert all(version in page for version in start["versions"].values())
    assert "It has not finished" not in page and "What it cost" in page
    assert ("<svg" in page) == (stage != "tokenizer")
    assert ("What the policy said while it learned" in page) == (stage == "ppo")
    if stage != "tokenizer":
        assert STAGES[stage].title in page
        spent = read_json(finished / stage / "summary.json")["seconds_by_phase"]
        assert [name for name in spent if f"<b>{name}</b> {spent[name]:.1f} s" in page] == [
            n for n in spent if spent[n]
        ]


def folder(path, **files):
    path.mkdir()
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def test_what_is_not_known_is_left_out_with_a_word(tmp_path):
    """A run that has not finished, of an older version, of a stage of somebody's own."""
    page = run.write_run_page(folder(tmp_path / "run", config={"stage": {"name": "mine"}})).read_text()
    for words in (
        "It has not finished.",
        "shown once the run has finished",
        "scored",
        "took no steps",
        "no record.json",
    ):
        assert words in page, words


def test_costs():
    """8e12 FLOPs, MFU 0.25 of 4 TFLOP/s; a peak that nobody knows gives a dash and says so."""
    summary = {"model_flops": 8e12, "mfu": 0.25, "seconds": 61.25, "peak_memory_bytes": 2e9, "peak_memory_of": "device"}
    start = {"peak": {"flops_per_second": 4e12, "source": "a guess"}}
    assert run.run_costs(summary, [start, start]) == [
        ("Seconds", "61.2", "in 2 starts"),
        ("Model FLOPs", "8 T", "forward and backward over the tokens learned from, in every pass"),
        ("MFU, over data and update", "25\u00a0%", "of 4 TFLOP/s, a guess"),
        ("Peak memory", "2 GB", "of the fullest device"),
    ]
    unknown = {"peak": {"flops_per_second": None, "source": "no figure is known for abacus"}}
    told = ("MFU, over data and update", "–", "no figure is known for abacus")
    assert run.run_costs({"mfu": None}, [unknown]) == [told]


def test_spans_are_shares_of_all_seconds():
    spent = {"data": 1.0, "rollout": 0.0, "update": 2.0, "other": 1.0}
    found = [(name, seconds, share) for name, seconds, share, _ in run.phase_shares({"seconds_by_phase": spent})]
    assert found == [("data", 1.0, 0.25), ("update", 2.0, 0.5), ("other", 1.0, 0.25)]


def test_compared_has_no_before_for_what_was_not_scored_then():
    summary = {"before": {"loss": 4.0}, "held_out": {"loss": 2.0, "own_loss": 3.0}}
    assert run.held_out_changes(summary) == [("loss", 4.0, 2.0), ("own_loss", None, 3.0)]


def test_what_others_wrote_is_text(tmp_path):
    start = dict.fromkeys(("devices", "device", "backend", "cores", "seed"), 1)
    start |= {
        "time": "2026-01-01T00:00:00",
        "revision": None,
        "host": ATTACK,
        "command": ATTACK,
        "versions": {"x": "1"},
    }
    start["peak"] = {"flops_per_second": None, "source": ATTACK}
    path = folder(
        tmp_path / "run", config={"stage": {"name": ATTACK}}, record=[start], summary={"mfu": None, "seconds": 1.0}
    )
    page = run.write_run_page(path).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") == 6, "title, heading, host, command, peak, config"
    assert "no git revision" in page


def test_smoothed():
    """40 values: means over 2 on either side, over fewer at the ends. A lone 5 at the tenth spreads to 1 over five."""
    values = np.zeros(40)
    values[10] = 5
    assert run.moving_average(values)[8:13].tolist() == [1] * 5 and run.moving_average(values).sum() == pytest.approx(5)
    line = np.arange(40.0)
    np.testing.assert_allclose(run.moving_average(line), line)

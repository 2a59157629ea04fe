"""The benchmark: what it reads of its peer, what it prints, and what it says when the peer cannot run."""

import sys

import pytest

from lm import bench
from lm.errors import UserError


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """A peer that says what it is told to."""

    def saying(code: str) -> str:
        script = tmp_path / "peer.py"
        script.write_text(code)
        monkeypatch.setattr(bench, "PEER", script)
        return sys.executable

    return saying


def test_the_peer_s_phases_are_its_last_line(peer):
    python = peer("""print("loading"); print('{"seconds": {"step": 2.5, "generation": 1.0}, "versions": {}}')""")
    assert bench.peer_step(python, 3) == {"step": 2.5, "generation": 1.0}


def test_a_peer_that_cannot_run_is_one_line(peer, tmp_path):
    with pytest.raises(
        UserError, match="peer.py --steps=3 failed: ModuleNotFoundError: No module named 'trll'; give a"
    ):
        bench.peer_step(peer("import trll"), 3)
    with pytest.raises(
        UserError, match="cannot run .*nowhere: No such file or directory; give a Python with tests/pee"
    ):
        bench.peer_step(str(tmp_path / "nowhere"), 3)


def test_the_floor_counts_five_passes():
    """2 FLOPs a parameter and token: 32 rows of 128 tokens; generation, reference, forward, and twice backward."""
    assert bench.flops(bench.Shape()) == 2 * bench.matmul_count(bench.SIZE_S) * 32 * 128 * 5


def test_ratios_in_words(capsys):
    ours = {"generation": 0.5, "update": 1.0, "step": 1.5}
    bench.show({"ours": ours, "best": ours, "peer": {"step": 3.0}, "ceiling": 2e11, "floor": 0.75})
    said = capsys.readouterr().out
    assert "the products alone take 0.75 s, 0.50 of our step" in said and "TRL takes 2.00 times as long" in said

"""What a run cost: MFU worked by hand, memory, the devices' peaks."""

from types import SimpleNamespace

import jax
import pytest

from lm.runs import hardware, summary
from lm.runs.summary import model_flops_utilization, run_summary


def line(step, tokens, data, update, **more):
    return {"step": step, "tokens": tokens, "seconds/data": data, "seconds/update": update} | more


def test_utilisation():
    """Three lines, a score between. First 100 tokens in 1 + 9 s, compiling; then 100 in 0.5 + 1.5 s and 300 in
    1 + 2 s: rates 50 and 100 tokens a second, median 75; times 4 FLOPs over 1000 FLOP/s: 0.3."""
    means = {"tokens_per_second": 1.0}
    rows = [
        line(0, 0, 0.0, 0.0),
        line(1, 100, 1.0, 9.0, **means),
        line(2, 200, 1.5, 10.5, **means),
        line(2, 200, 1.5, 10.5),
        line(3, 500, 2.5, 12.5, **means),
    ]
    assert model_flops_utilization(rows, 4.0, 1000.0) == pytest.approx(0.3)
    assert model_flops_utilization(rows, 4.0, None) is None, "nobody knows the peak"
    assert model_flops_utilization(rows[:2], 4.0, 1000.0) is None, "nothing but compilation"
    old = {"step": 1, "tokens": 100, "seconds": 3.0, **means}
    assert model_flops_utilization([old, *rows], 4.0, 1000.0) == pytest.approx(0.3), (
        "rows from before there were phases"
    )


def test_summed_up():
    rows = [
        {"step": 0, "tokens": 0, "held_out/loss": 4.0},
        line(5, 100, 1.0, 1.0, tokens_per_second=10.0),
        line(10, 200, 2.0, 2.0, tokens_per_second=30.0),
        {"step": 10, "tokens": 200, "held_out/loss": 3.0},
    ]
    found = run_summary(rows, flops_per_token=6.0, seconds={"data": 2.0, "update": 5.0, "other": 1.0}, peak=6e3)
    assert found["seconds"] == 8 and found["tokens"] == 200 and found["model_flops"] == 1200
    assert found["tokens_per_second"] == 30, "the first interval holds compilation"
    assert found["mfu"] == pytest.approx(6 * 50 / 6e3)
    assert found["before"] == {"loss": 4.0} and found["held_out"] == {"loss": 3.0}
    assert found["peak_memory_of"] == "process" and 1e7 < found["peak_memory_bytes"] < 1e12


def devices(monkeypatch, *found):
    monkeypatch.setattr(jax, "devices", lambda: list(found))
    monkeypatch.setattr(jax, "local_devices", lambda: list(found))
    monkeypatch.setattr(jax, "device_count", lambda: len(found))


@pytest.mark.parametrize(
    "kind, flops",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
    ],
)
def test_peaks_of_accelerators_add_up(monkeypatch, kind, flops):
    device = SimpleNamespace(platform="gpu", device_kind=kind)
    devices(monkeypatch, device, device)
    assert hardware.peak_flops()[0] == 2 * flops


@pytest.mark.parametrize("kind", ["abacus", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"])
def test_nobody_knows_an_abacus_or_a_slice(monkeypatch, kind):
    devices(monkeypatch, SimpleNamespace(platform="gpu", device_kind=kind))
    assert hardware.peak_flops() == (None, f"no figure is known for {kind}")


def test_a_cpu_is_measured_once_however_many_devices_share_it(monkeypatch):
    measured = []
    monkeypatch.setattr(hardware, "matmul_ceiling", lambda: measured.append(1) or 5e9)
    assert hardware.peak_flops() == (5e9, "the fastest float32 matrix product measured on this machine")
    assert jax.device_count() == 8 and measured == [1]


def test_measuring_stops_in_time(monkeypatch):
    """A clock that gives every product 0.4 s: after 1 s no further one begins, of 8."""
    now = iter(0.4 * i for i in range(100))
    asked = []
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: asked.append(1) or next(now))
    assert hardware.matmul_ceiling(size=8) == pytest.approx(2 * 8**3 / 0.4)
    assert len(asked) < 8


def test_memory_is_the_fullest_device_s_where_it_counts(monkeypatch):
    full, empty = ({"peak_bytes_in_use": n} for n in (7, 3))
    devices(monkeypatch, *(SimpleNamespace(memory_stats=lambda told=told: told) for told in (empty, full, None)))
    assert hardware.peak_memory() == (7, "device")


def test_the_summary_asks_the_machine(monkeypatch):
    monkeypatch.setattr(summary, "peak_memory", lambda: (7, "device"))
    rows = [{"step": 0, "tokens": 0, "held_out/loss": 4.0}, line(1, 9, 1.0, 1.0, tokens_per_second=1.0)]
    found = run_summary(rows, flops_per_token=1.0, seconds={"other": 1.0}, peak=None)
    assert (found["peak_memory_bytes"], found["peak_memory_of"], found["mfu"]) == (7, "device", None)

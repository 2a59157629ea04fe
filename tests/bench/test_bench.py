"""The benchmark: its arithmetic, what it reads of its peers, what it prints and refuses. No speed is asserted."""

import asyncio
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scripted
from runs import finished, made_text, small

from lm.bench import (
    __main__ as bench,
    data,
    engine,
    generation,
    rollout,
    serving,
    speculation,
    startup,
    tables,
    training,
    turns,
)
from lm.bench.limits import DeviceLimits
from lm.bench.sizes import SIZES, parsed_counts, thread_count
from lm.core.config import parsed_flags
from lm.core.errors import UserError
from lm.data.conversations import Conversation
from lm.model.params import param_count, param_specs
from lm.runs import hardware
from lm.tokenizer import train_tokenizer
from lm.weights.config_map import config_json, model_config_from_json as read_back

__all__ = ["finished", "small"]
TINY = SIZES["tiny"]
TALKS = [Conversation(f"talk {i}", [{"role": "user", "content": f"what do you see {i}"}]) for i in range(3)]


@pytest.fixture
def limits(monkeypatch):
    """A machine of 1 GFLOP/s that reads 1 MB/s, so that no test measures it."""
    monkeypatch.setattr(DeviceLimits, "remeasure", lambda self: None)
    return DeviceLimits({"float32": 1e9, "bfloat16": 2e9}, 1e6)


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """(code, *names): scripts of these names that run that code take the place of the peers'."""

    def saying(code: str, *names: str) -> str:
        for name in names:
            (tmp_path / name).write_text(code)
        monkeypatch.setattr(turns, "PEERS_DIR", tmp_path)
        return sys.executable

    return saying


def said(**phases: float) -> str:
    """Code of a peer that took two steps, the second twice as long."""
    rows = [phases, {name: 2 * seconds for name, seconds in phases.items()}]
    return f"print('loading'); print({json.dumps(dict(seconds=rows, threads=3, versions=dict(torch='2')))!r})"


def test_a_peer_is_told_the_work_and_its_last_line_is_read(scripts):
    code = "import json, sys; print(0); print(json.dumps(sys.argv[1:]))"
    peer = turns.Peer(scripts(code, "peer.py"), "peer.py", {"rows": 2})
    assert peer.run_steps(3) == ["--rows=2", f"--threads={thread_count()}", "--steps=3"]


def test_a_peer_that_cannot_run_is_one_line(scripts, tmp_path):
    peer = turns.Peer(scripts("import trll", "peer.py"), "peer.py", {})
    with pytest.raises(UserError, match="peer.py failed: ModuleNotFoundError: No module named 'trll'; give --peer="):
        peer.run_steps(3)
    with pytest.raises(UserError, match="cannot run .*nowhere: No such file or directory; give --peer=PYTHON, an int"):
        turns.Peer(str(tmp_path / "nowhere"), "peer.py", {}).run_steps(3)


def test_torch_is_this_python_if_it_has_it(monkeypatch):
    monkeypatch.setattr(turns, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--peer=torch: this Python has no torch; give --peer=PYTHON"):
        turns.peer_interpreter("torch")
    monkeypatch.setattr(turns, "find_spec", lambda name: name)
    assert turns.peer_interpreter("torch") == sys.executable and turns.peer_interpreter("/a/python") == "/a/python"


def test_sides_take_turns_and_are_compared_by_medians_bests_and_turn_by_turn(scripts):
    """Ours 1, 2 | 3, 4: median 2.5, best 1. The peer's 4, 8 | 4, 8: median 6, best 4. By turn 6/1.5 and 6/3.5."""
    seconds, told = iter([1.0, 2.0, 3.0, 4.0]), []
    ours = lambda steps: [{"step": next(seconds)} for _ in range(steps)]
    peer = turns.Peer(scripts(said(step=4.0, cpu=7.0), "peer.py"), "peer.py", {})
    timed = turns.interleaved_timings(ours, peer, turns=2, steps=2, on_turn=told.append)
    found = turns.timing_summary(timed, "step", units=10)
    assert told == [{"step": 2.0}, {"step": 4.0}]
    assert found["per_second"]["ours"] == {"median": 4.0, "best": 10.0}
    assert found["per_second"]["peer"] == pytest.approx({"median": 10 / 6, "best": 2.5})
    assert (found["ratio"]["median"], found["ratio"]["best"]) == pytest.approx((2.4, 4.0))
    assert found["ratio"]["each_turn"] == pytest.approx([4.0, 12 / 7])
    assert found["threads"] == {"ours": thread_count(), "peer": 3} and found["peer"]["best"]["cpu"] == 7.0
    assert found["turns"]["ours"] == [[1.0, 2.0], [3.0, 4.0]]


def test_a_grpo_step_counts_five_passes():
    """2 FLOPs a parameter and token: 32 rows of 128 tokens; generation, reference, forward, and twice backward.

    Of size S a layer has 4 x 256^2 in attention and 3 x 256 x 704 in its MLP, the head 256 x 4096.
    """
    parameters = 4 * (4 * 256**2 + 3 * 256 * 704) + 256 * 4096
    assert rollout.step_flops(SIZES["S"].config, rollout.RolloutShape()) == 2 * parameters * 32 * 128 * 5


def test_bytes_that_a_decode_step_reads():
    """Tiny: 2 layers of 4 x 32^2 + 3 x 32 x 64 and a head of 32 x 256 make 28,672 parameters. Two rows after 3 tokens
    attend to 4, then to 5: 4.5 on average, each 2 layers x (key and value) x 32 numbers."""
    shape = generation.GenerationShape(batch=2, prompt=3, new=2)
    assert generation.bytes_per_step(TINY.config, shape, "float32") == 4 * (28_672 + 2 * 4.5 * 2 * 2 * 32)
    assert generation.bytes_per_step(TINY.config, shape, "bfloat16") == 2 * (28_672 + 2 * 4.5 * 2 * 2 * 32)


def test_a_window_is_all_that_is_read():
    """A window of 4 on every second layer: 4 both times there, 4 and then 5 on the other one."""
    config = TINY.config.__class__(**{**vars(TINY.config), "window": 4, "global_every": 2})
    shape = generation.GenerationShape(batch=1, prompt=3, new=2)
    assert generation.bytes_per_step(config, shape, "float32") == 4 * (28_672 + (4 + 4.5) * 2 * 32)


def test_flops_are_held_against_the_float32_ceiling(limits):
    """64 tokens in 1 s. 6 x 28,672 parameters and, over 16.5 keys, 12 x 32 numbers in each of 2 layers, a token."""
    timed = turns.Timings([[{"step": 1.0}]], [], {})
    found = training.result("tiny", TINY, "bfloat16", timed, limits)
    assert found["flops_per_second"] == pytest.approx(64 * (6 * 28_672 + 12 * 32 * 16.5 * 2))
    assert found["of_peak"] == pytest.approx(found["flops_per_second"] / 1e9)
    assert found["peak"]["source"] == "the float32 matmul ceiling" and "ratio" not in found


def test_decoding_is_held_against_the_bandwidth(limits):
    timed = turns.Timings([[{"prefill": 0.5, "decode": 2.0, "whole": 2.5}]], [], {})
    shape = generation.GenerationShape(batch=2, prompt=3, new=5)
    found = generation.result("tiny", TINY.config, shape, "float32", timed, limits)
    assert found["of_bandwidth"] == pytest.approx(found["bytes_per_step"] * 5 / 2.0 / 1e6)
    assert found["per_second"]["ours"]["median"] == 4 and found["decode_per_second"] == 5
    assert found["prefill_per_second"] == 12


def test_bandwidth_is_bytes_over_the_fastest(monkeypatch):
    """Three products, of 0.5, 0.25 and 0.75 s; after each the clock is asked whether there is time for another."""
    now = iter([0.0, 1.0, 1.5, 1.5, 2.0, 2.25, 2.25, 3.0, 3.75, 3.75])
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(now))
    assert hardware.memory_bandwidth(size=2**14, repeats=3, seconds=100.0) == 2**14 / 0.25


@pytest.mark.parametrize("name", SIZES)
def test_the_peer_s_model_is_ours(name):
    """The config.json that it is told reads back as our shape, or lm.weights would refuse it."""
    config = SIZES[name].config
    assert param_count(param_specs(read_back(config_json(config, "llama")))) == param_count(param_specs(config))


def test_a_whole_run(limits, scripts, tmp_path, capsys):
    """Training and generation at the tiny size for two steps, beside peers that say what they are told to."""
    python = scripts(said(step=4.0, whole=8.0), "train_step.py", "generate.py")
    file = tmp_path / "bench.jsonl"
    flags = f"training generation --sizes=tiny --dtypes=auto,bfloat16 --batches=2 --new_tokens=4 --turns=1 --steps=2 \
        --peer={python} --json={file}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "DeviceLimits", lambda: limits)
        bench.program(flags.split())
    (line,) = file.read_text().splitlines()
    found = json.loads(line)
    assert [row["dtype"] for row in found["training"]] == ["float32", "bfloat16"]
    for row in found["training"] + found["generation"]:
        assert len(row["turns"]["ours"][0]) == 2 and min(row["turns"]["ours"][0]) > 0
        assert row["ratio"]["median"] > 0 and row["peer_versions"] == {"torch": "2"}
    assert found["training"][0]["per_second"]["peer"] == {"median": 64 / 6, "best": 16.0}
    assert found["generation"][0]["per_second"]["peer"] == {"median": 8 / 12, "best": 1.0}
    assert found["limits"]["bandwidth"] == 1e6 and found["device"] == "cpu" and "jax" in found["versions"]
    printed = capsys.readouterr().out
    assert "tiny bfloat16 batch 2" in printed and "threads" in printed and "times as fast" in printed


def test_a_grpo_step_is_generation_and_update(limits, capsys):
    shape = rollout.RolloutShape(prompts=1, group=2, prompt=4, new=4)
    timed = turns.interleaved_timings(
        rollout.timed_steps(TINY.config, shape), None, turns=1, steps=1, on_turn=lambda row: None
    )
    ((row,),) = timed.ours
    assert row["step"] == pytest.approx(row["generation"] + row["update"]) and min(row.values()) > 0
    tables.print_rollout([rollout.result(TINY.config, shape, timed, limits)])
    assert "generation" in capsys.readouterr().out


def test_a_draft_that_is_the_model_itself_is_always_right(finished, limits, capsys, monkeypatch):
    """Greedy: all proposals are accepted. Warm: some, and no more. Both sides of a step are timed."""
    monkeypatch.setattr(bench, "DeviceLimits", lambda: limits)
    monkeypatch.setattr(speculation, "TEMPERATURES", (0.0, 1.0))
    monkeypatch.setattr(speculation, "load_conversations", lambda source: TALKS)
    monkeypatch.setattr(speculation, "split_held_out", lambda talks, fraction: ([], talks))
    flags = (
        f"--workdir={finished}/sft --batches=2 --prompt_tokens=40 --new_tokens=8 --turns=1 --steps=1 --draft_tokens=2"
    )
    found = {}
    for draft in ("sft", "pretrain"):
        given = parsed_flags(
            f"speculation {flags} --draft={finished}/{draft}".split(), "", bench.FLAGS, bench.POSITIONAL
        )
        found[draft] = bench.measurements(given)["speculation"]
        bench.print_measurements({"speculation": found[draft]})
    own, other = found["sft"][0], found["pretrain"][0]
    assert own["accepted"]["value"] == 1 and own["tokens_a_pass"]["value"] > other["tokens_a_pass"]["value"] >= 1
    assert 0 <= other["accepted"]["value"] < 1 and own["temperature"] == 0 and found["sft"][1]["temperature"] == 1
    for row in (own, other):
        assert min(row["per_second"].values()) > 0
        assert row["ratio"] == pytest.approx(row["per_second"]["drafted"] / row["per_second"]["plain"])
        assert row["each_turn"] == pytest.approx([row["ratio"]])
    assert "pretrain, 2 draft tokens" in capsys.readouterr().out


def test_the_engine_stands_beside_the_fixed_loop_and_a_prefix_cache_beside_none(limits, monkeypatch, capsys):
    """At the tiny size: 4 answers of 3 to 6 tokens in two batches, and 2 prompts of 40 with 2 answers of 3 each."""
    small = dict(REQUESTS=4, SHORTEST=3, GROUP_PROMPTS=2, GROUP=2, GROUP_PROMPT=40, GROUP_NEW=3)
    for name, value in small.items():
        monkeypatch.setattr(engine, name, value)
    monkeypatch.setattr(bench, "DeviceLimits", lambda: limits)
    flags = "engine --sizes=tiny --batches=2 --prompt_tokens=5 --new_tokens=6 --turns=2 --steps=1"
    found = bench.measurements(parsed_flags(flags.split(), "", bench.FLAGS, bench.POSITIONAL))["engine"]
    bench.print_measurements({"engine": found})
    (row,) = found
    assert (row["size"], row["batch"], row["tokens"]["groups"]) == ("tiny", 2, 2 * 2 * 3)
    assert 4 * 3 <= row["tokens"]["lengths"] <= 4 * 6
    for what, (ours, other) in engine.COMPARISONS.items():
        speeds = row[what]["per_second"]
        assert row[what]["ratio"] == pytest.approx(speeds[ours] / speeds[other]) and len(row[what]["each_turn"]) == 2
        assert min(speeds.values()) > 0
    assert "tiny float32 2" in capsys.readouterr().out


def test_the_loader_stands_beside_training_and_the_encoder_beside_its_library(
    limits, small, tmp_path, monkeypatch, capsys
):
    """At the tiny size, on made text: rows of 32 tokens, two in a batch, 20 batches a step."""
    text = made_text(tmp_path / "text")
    monkeypatch.setattr(bench, "DeviceLimits", lambda: limits)
    monkeypatch.setattr(data, "CORPUS", f"chitchat,{text}")
    monkeypatch.setattr(data, "SOURCES", "chitchat")
    monkeypatch.setattr(data, "MIXTURE", ({"source": "chitchat", "weight": 1}, {"source": str(text), "weight": 2}))
    given = parsed_flags("data --sizes=tiny --turns=2 --steps=2".split(), "", bench.FLAGS, bench.POSITIONAL)
    found = bench.measurements(given)["data"]
    bench.print_measurements({"data": found})
    (row,) = found
    assert row["ratio"] == {k: rate / row["trained_per_second"] for k, rate in row["loaded_per_second"].items()}
    assert set(row["ratio"]) == {"texts", "conversations", "mixture"} and min(row["ratio"].values()) > 0
    assert min(row["encoded_bytes_per_second"].values()) > 0
    printed = capsys.readouterr().out
    assert "times training" in printed and "of its speed, by the median of turns" in printed


def test_loaded_tokens_by_hand():
    """Whole rows count: 2 rows of 32 tokens in 20 batches are 1,280 tokens; the medians are 2 s and 4 s, and 8 s."""
    rows = [
        dict(texts=t, conversations=t, mixture=2 * t, training=8.0, encode=4.0, library=2.0) for t in (1.0, 2.0, 3.0)
    ]
    found = data.result("tiny", TINY, turns.Timings([rows], [], {}))
    assert found["loaded_per_second"] == {"texts": 640.0, "conversations": 640.0, "mixture": 320.0}
    assert found["trained_per_second"] == 8.0 and found["ratio"]["mixture"] == 40.0 and found["encode_ratio"] == 0.5


def test_a_start_ends_with_its_first_step(tmp_path, monkeypatch):
    """Its own rows count, not the score before it; what fails is told."""
    code = "import pathlib, sys, json; d = pathlib.Path(sys.argv[1]); d.mkdir(); (d / 'metrics.jsonl').write_text("
    rows = "".join(json.dumps({"step": i}) + "\\n" for i in (0, 1))
    monkeypatch.setattr(
        startup, "train_command", lambda name, path, *flags: [sys.executable, "-c", f"{code}'{rows}')", path]
    )
    assert 0 < startup.first_step_seconds(tmp_path, "a", cache=tmp_path) < 60
    monkeypatch.setattr(
        startup, "train_command", lambda name, path, *flags: [sys.executable, "-c", "raise OSError('no')"]
    )
    with pytest.raises(UserError, match="failed: OSError: no"):
        startup.first_step_seconds(tmp_path, "b", cache=tmp_path)


def test_a_start_has_none_of_what_our_own_restart_added(monkeypatch, tmp_path):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    monkeypatch.setenv("KEPT", "yes")
    found = startup.child_environment(tmp_path)
    assert "GLIBC_TUNABLES" not in found and found["KEPT"] == "yes"
    assert found["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("trainin", "lm bench does not time 'trainin'; choose from training, generation, rollout, startup"),
        ("--sizes=S,XL", "--sizes=S,XL: there is no 'XL'; choose from tiny, S, M"),
        ("--dtypes=float16", "--dtypes=float16: there is no 'float16'; choose from auto, float32, bfloat16"),
        ("--batches=1,0", "--batches=1,0: give numbers from 1 up"),
        ("speculation --workdir=w", "speculation needs two trained models: give --workdir=DIR and --draft=DIR"),
        ("serve", "serve needs a trained model: give --workdir=DIR"),
        ("--turns=0", "bench.turns is 0; it must be at least 1"),
        ("--json=nowhere/at/all", "--json=nowhere/at/all: there is no folder"),
        ("--turn=1", "--turn is not a flag of this program; did you mean --turns?"),
    ],
)
def test_what_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        bench.program(flags.split())


def test_peers_only_on_a_cpu(monkeypatch):
    monkeypatch.setattr(bench.jax, "default_backend", lambda: "gpu")
    flags = SimpleNamespace(what=[], steps=1, turns=1, new_tokens=1, prompt_tokens=1, slots=1, peer="python", json="")
    with pytest.raises(UserError, match="the peers run on a CPU, and this is a gpu: leave --peer out"):
        bench.check_flags(flags)


def test_counts_are_each_taken_once():
    assert parsed_counts("batches", "1, 32,1") == [1, 32]


def test_a_batch_is_whole_rows_of_next_tokens():
    batch = training.random_batch(TINY)
    assert batch.inputs.shape == batch.targets.shape == (2, 32) and (batch.weights == 1).all()
    np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])


@pytest.mark.peer
def test_pytorch_does_the_same_work():
    """Its first loss, of random weights on random tokens, is near that of an even guess: log 256."""
    trained = training.peer(sys.executable, TINY, "bfloat16").run_steps(1)
    assert trained["losses"][0] == pytest.approx(np.log(256), rel=0.05)
    generated = generation.peer(sys.executable, TINY.config, generation.GenerationShape(2, 4, 3), "float32").run_steps(
        1
    )
    for found in (trained, generated):
        assert len(found["seconds"]) == 1 and min(found["seconds"][0].values()) > 0
        assert found["threads"] == thread_count() and set(found["versions"]) == {"transformers", "torch"}


def test_a_load_of_two_clients(tmp_path, capsys):
    """On a server around a scripted engine: each prompt is answered once, and all are counted."""
    tokenizer = train_tokenizer(["Hello you there! I am fine. 1234567890\n" * 20], vocab_size=300)
    trained = scripted.loaded(scripted.tiny_workdir(tmp_path / "sft", tokenizer))
    said = tokenizer.encode("I am fine.")
    engine = scripted.ScriptedEngine(lambda request: said, tokenizer.end_of_message)
    prompts = serving.random_prompts(trained, 6, 5)
    with scripted.serving([scripted.scripted_model("tiny", trained, engine)], tmp_path / "people.db") as (url, _):
        host, port = url.removeprefix("http://").split(":")
        answers, seconds = asyncio.run(serving.measured_load((host, int(port)), prompts, 2, 30))
    assert sorted(request.ids for request in engine.requests) == sorted(prompts.tolist())
    assert [answer.tokens for answer in answers] == [len(said) + 1] * 6
    assert all(0 < answer.first < seconds and len(answer.gaps) == len(said) - 1 for answer in answers)
    row = serving.load_figures(answers, seconds)
    assert row["tokens_per_second"] == pytest.approx(6 * (len(said) + 1) / seconds)
    rows = [{"clients": 2, **row}]
    loop = {"tokens_per_second": row["tokens_per_second"] / 3, "requests_per_second": 1.0}
    tables.print_serving({"size": "tiny", "prompt": 5, "new": 30, "slots": 2, "rows": rows, "loop": loop})
    assert "2 clients: 3.00 times the loop over sample" in capsys.readouterr().out


def test_load_figures_by_hand():
    """Two answers of 3 and 1 tokens in 2 seconds."""
    answers = [serving.ServedAnswer(3, 0.1, [0.2, 0.4]), serving.ServedAnswer(1, 0.3, [])]
    row = serving.load_figures(answers, 2.0)
    assert (row["requests"], row["requests_per_second"], row["tokens_per_second"]) == (2, 1.0, 2.0)
    assert row["first"][50] == pytest.approx(0.2) and row["between"][50] == pytest.approx(0.3)

"""Chat: a streamed answer is the sampler's, the terminal is safe, and whatever is wrong is one line."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import chat, model
from lm.chat import Chat, newest, policy_folder, printable, settled, streamer
from lm.checkpoint import Checkpoints
from lm.errors import UserError
from lm.sample import sample
from lm.tokenizer import Tokenizer, prompt, train
from lm.workdir import Trained, load

ROOT = Path(__file__).parent.parent
TEXT = "The quick brown fox jumps over the lazy dog. How are you today? I am fine, thank you. Grüße! 日本 😀\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([TEXT * 20], vocab_size=320)


@pytest.fixture(scope="module")
def trained_workdir(tokenizer, tmp_path_factory):
    """make(stage) -> a workdir of that stage as lm.train leaves it, of a random model that has hardly a bias."""
    config = model.Config(vocab_size=tokenizer.vocab_size, layers=2, width=16, heads=2, kv_heads=1, head_size=8,
                          hidden=24, context=64)
    lm = jax.jit(model.make(config.on("cpu")).init)(jax.random.key(0))
    parent = tmp_path_factory.mktemp("runs")

    def make(stage: str) -> Path:
        path = parent / stage
        if not path.exists():
            meta = {"stage": stage, "fingerprint": tokenizer.fingerprint, "model": dataclasses.asdict(config)}
            with Checkpoints(path / "checkpoints") as checkpoints:
                checkpoints.save(1, {"params": {"lm": lm}}, meta)
            tokenizer.save(path / "tokenizer.model")
            (path / "config.json").write_text(json.dumps({"stage": {"name": stage}}))
        return path

    return make


@pytest.fixture(scope="module")
def sft(trained_workdir) -> Trained:
    return load(trained_workdir("sft"), backend="cpu")


def run(*flags: str, stdin: str = "") -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    return subprocess.run([sys.executable, "-m", "lm.chat", *flags], input=stdin, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 50])
@pytest.mark.parametrize("sampler", [dict(temperature=1.0, top_k=0, top_p=1.0), dict(temperature=0.8, top_k=20, top_p=0.9)])
def test_streamed_tokens_are_those_of_sample(sft, sampler, length):
    """Around the edges of a bucket (32), and to the last position of the context (64)."""
    ids = np.random.default_rng(length).integers(10, sft.tokenizer.vocab_size, length).astype(np.int32)
    key, max_new, stop = jax.random.key(length), 64 - length, sft.tokenizer.stops
    lm = sft.params["lm"]
    expected = jax.jit(lambda: sample(sft.model, lm, jnp.array(ids)[None], jnp.array([length]), key, max_new=max_new,
                                      stop=stop, **sampler))()
    streamed = list(streamer(sft.model, **sampler)(lm, ids, key, max_new=max_new, stop=stop))
    assert streamed == expected.tokens[0, : expected.lengths[0]].tolist()
    assert (streamed[-1] in stop) == bool(expected.stopped[0]) and (len(streamed) == max_new or streamed[-1] in stop)


def test_a_stream_ends_with_the_stop_token(sft):
    stream = streamer(sft.model, temperature=1.0, top_k=0, top_p=1.0)
    ids, key = np.array([2, 30, 31], np.int32), jax.random.key(0)
    free = list(stream(sft.params["lm"], ids, key, max_new=8, stop=()))
    assert len(free) == 8
    first = free.index(free[3])  # make the fourth token, wherever it comes first, the one that stops
    assert list(stream(sft.params["lm"], ids, key, max_new=8, stop=(free[3],))) == free[: first + 1]


def test_answers_follow_the_conversation(sft):
    """The second answer is sample's to the template of all that was said, drawn with fold_in(key(seed), 1)."""
    talk = Chat(sft, pytest.fail, seed=5, max_new=6, temperature=1.0)
    said = ["".join(talk.answer(text)) for text in ("How are you?", "Why?")]
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2
    assert [m["content"] for m in talk.messages] == ["How are you?", said[0], "Why?", said[1]]
    ids = prompt(sft.tokenizer, talk.messages[:3])
    drawn = sample(sft.model, sft.params["lm"], jnp.array(ids)[None], jnp.array([len(ids)]),
                   jax.random.fold_in(jax.random.key(5), 1), max_new=6, stop=sft.tokenizer.stops)
    assert said[1] == printable(sft.tokenizer.decode(drawn.tokens[0, : drawn.lengths[0]]))
    assert talk.ended == bool(drawn.stopped[0])


def test_many_turns_compile_once(sft):
    """Two buckets of prompts and one decode step, however long the answers are."""
    talk = Chat(sft, lambda text: None, temperature=1.0)
    with jax.log_compiles(False):
        list(talk.answer("How are you?")), list(talk.answer("The quick brown fox jumps over the lazy dog. " * 2))
        first, following = (f for f in vars_of(talk._stream) if hasattr(f, "_cache_size"))
        talk.reset()
        list(talk.answer("thank you")), list(talk.answer("fine"))
    assert {first._cache_size(), following._cache_size()} == {2, 1}


def vars_of(function):
    return [cell.cell_contents for cell in function.__closure__]


def test_characters_come_out_whole(tokenizer):
    """é is 2 bytes, 漢 3, 😀 4; none has a piece of its own in this vocabulary, so each is as many ids."""
    byte = {piece: i for i, piece in enumerate(tokenizer.pieces(range(tokenizer.vocab_size)))}
    ids = [byte[f"<0x{b:02X}>"] for b in "é漢😀".encode()]
    assert [settled(tokenizer, ids[:n]) for n in range(10)] == [""] + [""] + ["é"] * 3 + ["é漢"] * 4 + ["é漢😀"]
    broken = ids[:3] + ids[5:]  # 漢 loses two of its bytes: what follows settles it
    assert settled(tokenizer, broken[:3]) == "é" and settled(tokenizer, broken) == "é\ufffd😀"


def test_control_characters_never_reach_the_terminal():
    assert printable("a\x1b[2J\x07b\r\x9b1mc\x7f\u202f\n\td😀") == "a[2Jb1mc\u202f\n\td😀"


def test_an_escape_sequence_from_the_model_is_disarmed(sft, monkeypatch):
    ids = sft.tokenizer.encode("\x1b]0;owned\x07fine") + [sft.tokenizer.end]
    talk = Chat(sft, pytest.fail)
    monkeypatch.setattr(talk, "_stream", lambda *args, **options: iter(ids))
    assert "".join(talk.answer("hi")) == "]0;ownedfine" == talk.messages[-1]["content"]
    assert talk.ended


def test_newest_leaves_out_whole_exchanges(tokenizer):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate("abcde")]
    size = len(prompt(tokenizer, messages))  # bos, 5 x (role, letter, end), the assistant's marker: 1 + 15 + 1
    assert size == 17
    assert newest(tokenizer, messages, 17) == messages
    assert newest(tokenizer, messages, 16) == newest(tokenizer, messages, 11) == messages[2:]  # 17 - 6 = 11
    assert newest(tokenizer, messages, 1) == messages[4:]


def test_the_oldest_exchanges_go_and_it_is_said_once(sft):
    notes = []
    talk = Chat(sft, notes.append, max_new=8)
    for text in ("one", "two", "three", "four", "five", "six"):
        list(talk.answer(text))
    assert notes == ["the conversation has outgrown the context of 64 tokens: from now on its oldest exchanges are left out"]
    assert talk.messages[-2]["content"] == "six" and talk.messages[0]["role"] == "user"
    assert len(prompt(sft.tokenizer, talk.messages[:-1])) <= 64 - 8
    talk.reset()
    assert talk.messages == []


def test_an_answer_cut_short_is_kept(sft):
    talk = Chat(sft, pytest.fail, temperature=1.0)
    pieces = talk.answer("hi")
    said = next(pieces)
    pieces.close()  # what ctrl-C comes to
    assert talk.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": said}] and not talk.ended


def test_requests_that_cannot_be_served(sft):
    talk = Chat(sft, pytest.fail)
    list(talk.answer("hi"))
    before = list(talk.messages)
    size = len(prompt(sft.tokenizer, [{"role": "user", "content": "dog " * 40}]))
    with pytest.raises(UserError, match=f"the prompt has {size} tokens, but the model's context is 64: shorten it"):
        talk.answer("dog " * 40)
    with pytest.raises(UserError, match="the prompt is empty"):
        talk.answer(" \n")
    assert talk.messages == before, "a refused message leaves no trace"
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens and 60 more were asked for, but the model's context is 64"):
        Chat(sft, pytest.fail, max_new=60).answer("How are you today?")
    with pytest.raises(UserError, match="max_new_tokens is 64, but the context, prompt included, is 64: lower it"):
        Chat(sft, pytest.fail, max_new=64)
    with pytest.raises(UserError, match="max_new_tokens is 0; it must be at least 1"):
        Chat(sft, pytest.fail, max_new=0)
    with pytest.raises(UserError, match="temperature is -1"):
        Chat(sft, pytest.fail, temperature=-1)
    with pytest.raises(UserError, match="seed is -1; it must be from 0 to 4294967295"):
        Chat(sft, pytest.fail, seed=-1)


def test_the_last_policy_of_a_pipeline_speaks(trained_workdir, tmp_path):
    stages = ["tokenizer", "pretrain", "sft", "rank", "reward", "ppo", "evaluate"]
    assert policy_folder(trained_workdir("sft")) == trained_workdir("sft"), "a stage's own workdir"
    (tmp_path / "pipeline.json").write_text(json.dumps({"stages": stages}))
    with pytest.raises(UserError, match="holds no trained model yet"):
        policy_folder(tmp_path)
    for stage, expected in (("pretrain", "pretrain"), ("sft", "sft"), ("reward", "sft"), ("ppo", "ppo")):
        (tmp_path / stage).symlink_to(trained_workdir(stage))
        assert policy_folder(tmp_path) == tmp_path / expected
    (tmp_path / "ppo").unlink()
    (tmp_path / "ppo" / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    assert policy_folder(tmp_path) == tmp_path / "sft", "a save that a kill cut off is no checkpoint"


def test_one_answer_end_to_end(trained_workdir, sft):
    done = run(f"--workdir={trained_workdir('sft')}", "--prompt=How are you?", "--seed=3", "--max_new_tokens=8", "--temperature=1")
    ids = prompt(sft.tokenizer, [{"role": "user", "content": "How are you?"}])
    drawn = sample(sft.model, sft.params["lm"], jnp.array(ids)[None], jnp.array([len(ids)]),
                   jax.random.fold_in(jax.random.key(3), 0), max_new=8, stop=sft.tokenizer.stops)
    assert done.stdout == printable(sft.tokenizer.decode(drawn.tokens[0, : drawn.lengths[0]])) + "\n", done.stderr
    assert done.returncode == 0


def test_a_session_end_to_end(trained_workdir):
    """The same line after /reset is another answer; an error does not end the session; a raw model says what it is."""
    done = run(f"--workdir={trained_workdir('pretrain')}", "--max_new_tokens=4", stdin=f"hi\n\n{'dog ' * 60}\n/reset\nhi\n/exit\nno\n")
    assert done.returncode == 0, done.stderr
    assert "pretrain model of " in done.stderr and "context 64 tokens; temperature 0.7, top_k 0, top_p 1, seed 0" in done.stderr
    assert "only pretrained: it continues your text" in done.stderr
    assert "error: the prompt has" in done.stderr and "a new conversation" in done.stderr
    assert done.stdout.count("you> ") == 6, "five lines and /exit; what follows it is not read"


@pytest.mark.parametrize("flags, line", [
    (["--prompt=hi", "--workdir=/nowhere/at/all"], "error: there is no workdir /nowhere/at/all"),
    (["--prompt=hi", "--temprature=1", "--workdir=x"], "error: --temprature is not a flag of this program; did you mean --temperature?"),
])
def test_bad_input_is_one_line(flags, line):
    done = run(*flags)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1


@pytest.mark.parametrize("flag, line", [
    ("--prompt=", "the prompt is empty"),
    ("--top_p=0", "top_k is 0 and top_p 0.0"),
    ("--temperature=hot", "argument --temperature: invalid float value: 'hot'"),
])
def test_bad_flags_name_the_fault(trained_workdir, flag, line):
    with pytest.raises(UserError, match=line):
        chat.program([f"--workdir={trained_workdir('sft')}", "--prompt=hi", flag])


def test_what_is_no_policy_or_torn_is_refused(trained_workdir, tmp_path):
    with pytest.raises(UserError, match="is a reward model, which scores answers and writes none"):
        chat.program([f"--workdir={trained_workdir('reward')}", "--prompt=hi"])
    trained_workdir("torn")
    for file in (trained_workdir("torn") / "checkpoints" / "1" / "params").rglob("*"):
        if file.is_file() and file.name != "sha256.json":
            file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="none of them whole"):
        chat.program([f"--workdir={trained_workdir('torn')}", "--prompt=hi"])

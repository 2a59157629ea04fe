"""Chat: a streamed answer is the sampler's, the terminal is safe, and whatever is wrong is one line."""

import dataclasses
import functools
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import tiny_workdir

from lm import model
from lm.core.errors import UserError
from lm.data.prompts import padded_prompts
from lm.generate.answers import answer_from_ids, batch_answerer, text_before_stop, text_without_partial_stop
from lm.generate.sampler import SamplingParams, sample
from lm.generate.speculative import TargetDraft, speculative_sample
from lm.generate.streaming import speculative_token_streamer, token_streamer
from lm.runs.workdir import TrainedModel, load_trained_model
from lm.serve import chat
from lm.serve.chat import Chat, policy_folder, printable_text, recent_messages, run_chat, stable_text
from lm.tokenizer import Tokenizer, encode_prompt, train_tokenizer

ROOT = Path(__file__).parents[2]
TEXT = "The quick brown fox jumps over the lazy dog. How are you today? I am fine, thank you. Grüße! 日本 😀\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 20], vocab_size=320)


@pytest.fixture(scope="module")
def trained_workdir(tokenizer, tmp_path_factory):
    """make(stage) -> a workdir of that stage as lm train leaves it, of a random model that has hardly a bias."""
    parent = tmp_path_factory.mktemp("runs")

    def make(stage: str) -> Path:
        path = parent / stage
        return path if path.exists() else tiny_workdir(path, tokenizer, stage=stage, deviation=0.0)

    return make


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """A stdin that can be reconfigured, as a terminal's can and pytest's cannot."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))


@pytest.fixture(scope="module")
def sft(trained_workdir) -> TrainedModel:
    return load_trained_model(trained_workdir("sft"), backend="cpu")


def run(*flags: str, stdin: str = "") -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "lm.serve.chat", *flags]
    return subprocess.run(command, input=stdin, env=environment, capture_output=True, text=True)


def sampled(trained: TrainedModel, ids, key, *, stop=None, **options) -> list[int]:
    """Row 0 of what lm.generate.sampler.sample draws."""
    stop = trained.tokenizer.stop_ids if stop is None else stop
    sampling = SamplingParams(stop=stop, **options)
    draw = jax.jit(lambda lm, ids, lengths: sample(trained.model, lm, ids, lengths, key, sampling))
    drawn = draw(trained.params["lm"], jnp.array(ids)[None], jnp.array([len(ids)]))
    return drawn.tokens[0, : drawn.lengths[0]].tolist()


def scripted(trained: TrainedModel, text: str, note=pytest.fail, **options) -> Chat:
    """A chat whose model always says `text`."""
    talk = Chat(trained, note, **options)
    talk._stream = lambda *args, **kwargs: iter([*trained.tokenizer.encode(text), trained.tokenizer.end_of_message])
    return talk


def compiled(stream) -> tuple[int, int]:
    """How many programs a stream has for the prompt, and how many for what follows."""
    inside = dict(zip(stream.__code__.co_freevars, (cell.cell_contents for cell in stream.__closure__)))
    return inside["first"]._cache_size(), inside["next_token"]._cache_size()


@pytest.mark.parametrize(
    "lengths, sampler",
    [
        ([1, 33], dict(temperature=1.0, top_k=0, top_p=1.0)),
        ([32], dict(temperature=0.8, top_k=20, top_p=0.9)),
        ([9], dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.1, repetition_penalty=1.3)),
    ],
)
def test_streamed_tokens_are_those_of_sample(sft, lengths, sampler):
    """Around the edges of a bucket (32), and to the last position of the context (64). One decode step is compiled."""
    stream = token_streamer(sft.model, SamplingParams(64, **sampler))
    for length in lengths:
        ids = np.random.default_rng(length).integers(10, sft.tokenizer.vocab_size, length).astype(np.int32)
        key, max_new = jax.random.key(length), 64 - length
        streamed = list(stream(sft.params["lm"], ids, key, max_new=max_new, stop=()))
        assert len(streamed) == max_new
        assert streamed == sampled(sft, ids, key, max_new=max_new, stop=(), **sampler)
    assert compiled(stream) == (len({-(-length // 32) for length in lengths}), 1)


def test_a_stream_ends_with_the_stop_token(sft):
    stream = token_streamer(sft.model, SamplingParams(8))
    ids, key = np.array([2, 30, 31], np.int32), jax.random.key(0)
    free = list(stream(sft.params["lm"], ids, key, max_new=8, stop=()))
    ended = free[: free.index(free[3]) + 1]  # had the fourth token, wherever it comes first, been a stop token
    assert list(stream(sft.params["lm"], ids, key, max_new=8, stop=(0, free[3]))) == ended
    assert sampled(sft, ids, key, max_new=8, stop=(0, free[3])) == ended


def test_a_new_prompt_length_compiles_nothing(sft):
    """5 and 30 tokens share a bucket, in a stream and in many answers; 60 and 4 new ones just fit the context of
    64, in an array of any width, and 61 do not."""
    traced = []
    counting = lambda f: jax.jit(lambda *given: (traced.append(given), f(*given))[1])
    greedy = SamplingParams(4, temperature=0.0)
    ask = batch_answerer(sft.model, sft.params["lm"], sft.tokenizer, greedy, jit=counting, rows_at_once=2)
    stream = token_streamer(sft.model, greedy)
    draw = np.random.default_rng(0)
    for length, width in ((5, 5), (30, 31), (60, 90)):
        ids = draw.integers(10, sft.tokenizer.vocab_size, length).astype(np.int32)
        said = sampled(sft, ids, jax.random.key(0), max_new=4, temperature=0.0)
        assert list(stream(sft.params["lm"], ids, jax.random.key(0), max_new=4, stop=sft.tokenizer.stop_ids)) == said
        (answer,) = ask(padded_prompts([ids], [[]], width), jax.random.key(0))
        assert answer.text == sft.tokenizer.decode(said) and answer.length == len(said)
    assert len(traced) == 2 and compiled(stream) == (2, 1)
    with pytest.raises(UserError, match="the prompt has 61 tokens and 4 more were asked for, .* context is 64"):
        ask(padded_prompts([np.ones(61, np.int32)], [[]], 61), jax.random.key(0))


def test_a_stream_with_a_draft_is_speculates(sft):
    """Across a bucket's edge and to the end of the context, stops included; one program of rounds. The counts of
    the proposals add up to AcceptanceCounts."""
    draft, told = jax.tree.map(lambda x: 0.98 * x, sft.params["lm"]), []
    models, settings = TargetDraft(sft.model, sft.model), SamplingParams(64, temperature=0.8, top_k=20)
    tell = lambda *counts: told.append(counts)
    stream = speculative_token_streamer(models, draft, tell, settings, draft_tokens=3)
    for length, max_new, stop in ((30, 34, (7, 30)), (33, 31, ())):
        ids = np.random.default_rng(length).integers(10, sft.tokenizer.vocab_size, length).astype(np.int32)
        key = jax.random.key(length)
        run = jax.jit(
            functools.partial(
                speculative_sample, *models, sampling=settings._replace(max_new=max_new, stop=stop), draft_tokens=3
            )
        )
        drawn, counts = run(sft.params["lm"], draft, ids[None], np.array([length], np.int32), key)
        told.clear()
        streamed = list(stream(sft.params["lm"], ids, key, max_new=max_new, stop=stop))
        assert streamed == drawn.tokens[0, : drawn.lengths[0]].tolist() and streamed
        assert np.sum(told, axis=0).tolist() == [counts.proposed[0], counts.accepted[0]] and len(told) == counts.rounds
    assert compiled(stream) == (2, 1)


def test_a_chat_with_a_draft_tells_what_it_was_worth(sft, trained_workdir, capsys):
    """At temperature 0 its answer is the one without; the draft that is the model itself is always right."""
    flags = ["--prompt=How are you?", "--temperature=0", "--max_new_tokens=8"]
    chat.program([f"--workdir={trained_workdir('sft')}", *flags])
    plain = capsys.readouterr().out
    chat.program(
        [f"--workdir={trained_workdir('sft')}", f"--draft={trained_workdir('pretrain')}", "--draft_tokens=2", *flags]
    )
    found = capsys.readouterr()
    assert found.out == plain
    n, of = map(
        int, re.search(r"\((\d+) of (\d+) proposed tokens were accepted: 100% \(95% interval", found.err).groups()
    )
    assert n == of >= 2


def test_drafts_that_do_not_fit(sft):
    other = train_tokenizer([TEXT * 20], vocab_size=310)
    short = sft._replace(model=model.make_model(dataclasses.replace(sft.model.config, context=40)))
    with pytest.raises(
        UserError, match=f"trained with .* {other.fingerprint[:8]}, but .* {sft.tokenizer.fingerprint[:8]}"
    ):
        Chat(sft, pytest.fail, draft=sft._replace(tokenizer=other))
    with pytest.raises(UserError, match="repetition_penalty does not go with a draft"):
        Chat(sft, pytest.fail, draft=sft, repetition_penalty=1.1)
    with pytest.raises(UserError, match="draft_tokens is 0"):
        Chat(sft, pytest.fail, draft=sft, draft_tokens=0)
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens and 36 more .* the draft's context is 40"):
        Chat(sft, pytest.fail, draft=short, max_new=36).answer("How are you?")
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens, but the draft's context is 40: shorten it"):
        Chat(sft, pytest.fail, draft=short).answer("dog " * 40)
    assert "context 40 tokens" in str(Chat(sft, pytest.fail, draft=short))


def test_answers_follow_the_conversation(sft):
    """The second answer is sample's to the template of all that was said, drawn with fold_in(key(seed), 1)."""
    talk = Chat(sft, pytest.fail, seed=5, max_new=6, temperature=1.0)
    said = ["".join(talk.answer(text)) for text in ("How are you?", "Why?")]
    assert talk.messages == [
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": said[0]},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": said[1]},
    ]
    ids = sampled(
        sft, encode_prompt(sft.tokenizer, talk.messages[:3]), jax.random.fold_in(jax.random.key(5), 1), max_new=6
    )
    assert said[1] == printable_text(sft.tokenizer.decode(ids))
    assert talk.has_ended == (ids[-1] in sft.tokenizer.stop_ids)


def test_characters_come_out_whole(tokenizer):
    """é is 2 bytes, 漢 3, 😀 4; none has a piece of its own in this vocabulary, so each is as many ids."""
    byte = {piece: i for i, piece in enumerate(tokenizer.pieces(range(tokenizer.vocab_size)))}
    ids = [byte[f"<0x{b:02X}>"] for b in "é漢😀".encode()]
    assert [stable_text(tokenizer, ids[:n]) for n in range(10)] == [""] + [""] + ["é"] * 3 + ["é漢"] * 4 + ["é漢😀"]
    broken = ids[:3] + ids[5:]  # 漢 loses two of its bytes: what follows settles it
    assert stable_text(tokenizer, broken[:3]) == "é" and stable_text(tokenizer, broken) == "é\ufffd😀"


@pytest.mark.parametrize(
    "stop, said",
    [
        (["fox"], "The quick brown "),
        (["fox", "qu"], "The "),  # the first to come, not the first named
        (["ick brow", "i"], "The qu"),  # i is whole before the longer one is, wherever that begins
        (["lazy cat"], "The quick brown fox jumps over the lazy dog."),  # begun, never come: nothing is lost
        (["T"], ""),
        (["dog.", "z"], "The quick brown fox jumps over the la"),
    ],
)
def test_an_answer_ends_before_a_stop_string(sft, stop, said):
    """Nothing of it is ever shown, whatever the tokens it comes in; what is shown is kept."""
    talk = scripted(sft, "The quick brown fox jumps over the lazy dog.", stop=stop)
    so_far = ""
    for piece in talk.answer("hi"):
        so_far += piece
        assert said.startswith(so_far)
    assert so_far == said == talk.messages[-1]["content"] and talk.has_ended


def test_a_stop_string_that_never_comes_leaves_the_limit(sft):
    free, talk = (Chat(sft, pytest.fail, max_new=6, temperature=1.0, stop=stop) for stop in ((), ("@#@",)))
    assert "".join(free.answer("hi")) == "".join(talk.answer("hi")) and free.has_ended == talk.has_ended


def test_stop_strings_by_hand():
    assert text_before_stop("a b c", ["c", "b"]) == ("a ", True) and text_before_stop("abc", ["d"]) == ("abc", False)
    assert (
        text_before_stop("xyz", ["xyz", "y"]) == text_before_stop("xy", ["xyz", "y"]) == ("x", True)
    )  # more text changes nothing
    assert text_before_stop("anything", []) == ("anything", False)
    assert [text_without_partial_stop(text, ["STOP", "\n\n"]) for text in ("a", "aS", "aST", "aSTo", "a\n", "")] == [
        "a", "a", "a", "aSTo", "a", ""
    ]  # fmt: skip


def test_a_stop_string_cuts_an_answer_of_many(tokenizer):
    """As lm.generate.answers does it: the length counts the tokens until the string is whole."""
    ids = [*tokenizer.encode("The quick brown fox jumps"), tokenizer.end_of_message]
    for stops in ([], ["lazy"]):
        assert answer_from_ids(tokenizer, ids, True, stops) == (tokenizer.decode(ids), len(ids), True)
    text, length, stopped = answer_from_ids(tokenizer, ids, False, ["jumps", "ck b"])
    assert (text, stopped) == ("The qui", True)
    assert "ck b" in tokenizer.decode(ids[:length]) and "ck b" not in tokenizer.decode(ids[: length - 1])


def test_many_answers_with_a_stop_string(sft):
    """Each is the free one's beginning; an empty stop string is refused."""
    ids = [
        encode_prompt(sft.tokenizer, [{"role": "user", "content": text}]) for text in ("How are you?", "Why?", "fox")
    ]
    rows = padded_prompts(ids, [[], [], []], 24)
    ask = functools.partial(
        batch_answerer, sft.model, sft.params["lm"], sft.tokenizer, SamplingParams(8), jit=jax.jit, rows_at_once=3
    )
    free = ask()(rows, jax.random.key(0))
    stop = free[0].text[3:5]
    ended = ask(stop_strings=[stop])(rows, jax.random.key(0))
    assert [answer.text for answer in ended] == [answer.text.partition(stop)[0] for answer in free]
    assert len(stop) == 2 and ended[0].stopped and ended[0] != free[0] and ended[1:] == free[1:]
    with pytest.raises(UserError, match="a stop string is empty"):
        ask(stop_strings=["a", ""])


def test_control_characters_never_reach_the_terminal():
    assert printable_text("a\x1b[2J\x07b\r\x9b1mc\x7f\u202f\n\td😀") == "a[2Jb1mc\u202f\n\td😀"


def test_an_escape_sequence_from_the_model_is_disarmed(sft):
    talk = scripted(sft, "\x1b]0;owned\x07fine")
    assert "".join(talk.answer("hi")) == "]0;ownedfine" == talk.messages[-1]["content"]
    assert talk.has_ended


def test_newest_leaves_out_whole_exchanges(tokenizer):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate("abcde")]
    size = len(encode_prompt(tokenizer, messages))  # bos, 5 x (role, letter, end), the assistant's marker: 1 + 15 + 1
    assert size == 17
    assert recent_messages(tokenizer, messages, 17) == messages
    assert (
        recent_messages(tokenizer, messages, 16) == recent_messages(tokenizer, messages, 11) == messages[2:]
    )  # 17 - 6 = 11
    assert recent_messages(tokenizer, messages, 1) == messages[4:]


def test_the_oldest_exchanges_go_and_it_is_said_once(sft):
    notes = []
    talk = scripted(sft, "quick", notes.append, max_new=40)
    for text in ("one", "two", "three", "four"):
        list(talk.answer(text))
        assert len(encode_prompt(sft.tokenizer, talk.messages[:-1])) <= 64 - 40
    assert notes == [
        "the conversation has outgrown the context of 64 tokens: from now on its oldest exchanges are left out"
    ]
    assert talk.messages[-2]["content"] == "four" and talk.messages[0]["role"] == "user"
    talk.reset()
    assert talk.messages == []


def test_an_answer_cut_short_is_kept(sft):
    talk = scripted(sft, "quick brown fox")
    pieces = talk.answer("hi")
    said = next(pieces)
    pieces.close()  # what ctrl-C comes to
    assert "quick brown fox".startswith(said) and said not in ("", "quick brown fox")
    assert talk.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": said}]
    assert not talk.has_ended


def test_requests_that_cannot_be_served(sft):
    talk = scripted(sft, "fine")
    list(talk.answer("hi"))
    before = list(talk.messages)
    size = len(encode_prompt(sft.tokenizer, [{"role": "user", "content": "dog " * 40}]))
    with pytest.raises(UserError, match=f"the prompt has {size} tokens, but the model's context is 64: shorten it"):
        talk.answer("dog " * 40)
    with pytest.raises(UserError, match="the prompt is empty"):
        talk.answer(" \n")
    assert talk.messages == before, "a refused message leaves no trace"
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens and 60 more were asked for, but .* is 64"):
        Chat(sft, pytest.fail, max_new=60).answer("How are you today?")
    with pytest.raises(UserError, match="max_new_tokens is 64, but prompt and answer share 64: lower it"):
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
    done = run(
        f"--workdir={trained_workdir('sft')}",
        "--prompt=How are you?",
        "--seed=3",
        "--max_new_tokens=8",
        "--temperature=1",
    )
    ids = encode_prompt(sft.tokenizer, [{"role": "user", "content": "How are you?"}])
    drawn = sampled(sft, ids, jax.random.fold_in(jax.random.key(3), 0), max_new=8)
    assert done.stdout == printable_text(sft.tokenizer.decode(drawn)) + "\n", done.stderr
    assert done.returncode == 0


def test_a_session_end_to_end(trained_workdir):
    """An error does not end the session, /exit does; a raw model says what it is."""
    lines = ["hi", "", "dog " * 60, "/reset", "hi", "/exit", "no"]
    done = run(f"--workdir={trained_workdir('pretrain')}", "--max_new_tokens=4", stdin="\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert "pretrain model of " in done.stderr
    assert "context 64 tokens; temperature 0.7, top_k 0, top_p 1, min_p 0, repetition_penalty 1, seed 0" in done.stderr
    assert "only pretrained: it continues your text" in done.stderr
    assert "error: the prompt has" in done.stderr and "a new conversation" in done.stderr
    assert done.stdout.count("you> ") == 6, "five lines and /exit; what follows it is not read"


def test_a_piped_file_may_begin_with_a_byte_order_mark(monkeypatch):
    """No chat is there to answer: the mark would make a prompt of the command."""
    monkeypatch.setattr("builtins.input", lambda _: "\ufeff/exit")
    run_chat(None)


def test_bad_input_is_one_line_and_status_2():
    done = run("--prompt=hi", "--workdir=/nowhere/at/all")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no workdir /nowhere/at/all: train that stage first, or name another\n"


@pytest.mark.parametrize(
    "flag, line",
    [
        ("--prompt=", "the prompt is empty"),
        ("--top_p=0", "top_k is 0 and top_p 0.0"),
        ("--min_p=2", "min_p is 2.0; it must be from 0"),
        ("--repetition_penalty=-1", "repetition_penalty is -1.0; it must be above 0"),
        ("--stop=", "a stop string is empty: give it at least one character, or leave it out"),
        ("--temperature=hot", "argument --temperature: invalid float value: 'hot'"),
        ("--temprature=1", "--temprature is not a flag of this program; did you mean --temperature?"),
    ],
)
def test_bad_flags_name_the_fault(trained_workdir, flag, line):
    with pytest.raises(UserError, match=re.escape(line)):
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

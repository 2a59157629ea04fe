"""No clock, locale or hash seed enters the data: a template that tells the date tells one for every start of a run."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from datetime import date, datetime
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from ml_collections import ConfigDict
from runs import ROOT, assert_same_run, small
from tokenizers import decoders, models, pre_tokenizers

from lm import tokenizer as tk
from lm.core.config import load_config
from lm.core.errors import UserError
from lm.model import ModelConfig, make_model
from lm.runs import workdir
from lm.runs.workdir import load_trained_model
from lm.serve import chat
from lm.tokenizer import chat_template
from lm.tokenizer.chat_template import ChatTemplate, formatted_time
from lm.tokenizer.huggingface import HuggingFaceTokenizer, tokenizer_from_parts
from lm.train import loop
from lm.weights import convert

__all__ = ["small"]

DATED = (
    "<|start|>system\nToday is {{ strftime_now('%A, %d %B %Y') }}.<|end|>"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
ASKED = [{"role": "user", "content": "what day is it?"}]


def dated_tokenizer(source: str = DATED) -> HuggingFaceTokenizer:
    """One token a byte, and a template that tells the date."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(["<|start|>", "<|end|>", *alphabet])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|start|>", "<|end|>"])
    return tokenizer_from_parts(
        tokenizer_json=made.to_str(), chat_template=source, special_tokens=["<|start|>", "<|end|>"], stop_ids=[1]
    )


def said(tokenizer) -> str:
    """What a prompt holds before the question."""
    return "".join(tokenizer.pieces(tk.encode_prompt(tokenizer, ASKED))).partition("<|end|>")[0]


@pytest.fixture
def clock(monkeypatch):
    """clock(day): from now on it is that day, wherever a program looks."""

    def at(day: str) -> None:
        class Now(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromisoformat(f"{day}T23:59:00")

        class Today(date):
            @classmethod
            def today(cls):
                return cls.fromisoformat(day)

        monkeypatch.setattr(chat_template, "datetime", Now)
        monkeypatch.setattr(workdir, "date", Today)
        monkeypatch.setattr(chat, "datetime", Now)

    return at


def test_a_date_is_part_of_the_file_and_not_of_the_fingerprint(tmp_path, clock):
    plain = dated_tokenizer()
    dated = plain.dated("2024-05-01")
    clock("2031-01-01")
    assert plain.shows_date and said(dated) == "<|start|>system\nToday is Wednesday, 01 May 2024."
    for name, tokenizer in (("plain", plain), ("dated", dated)):
        tokenizer.save(tmp_path / name)
        again = tk.load_tokenizer(tmp_path / name)
        assert again == tokenizer == pickle.loads(pickle.dumps(tokenizer)) and again.date == tokenizer.date
        assert again.fingerprint == plain.fingerprint
    assert (tmp_path / "plain").read_bytes() == plain.proto
    assert said(tk.load_tokenizer(tmp_path / "dated")) == said(dated)
    assert json.loads((tmp_path / "dated").read_bytes())["date"] == "2024-05-01"


def test_a_template_without_a_date_has_none(tmp_path):
    silent = dated_tokenizer(DATED.replace("{{ strftime_now('%A, %d %B %Y') }}", "a day"))
    assert not silent.shows_date and silent.dated("2024-05-01") == silent and silent.date == ""
    assert silent.file == silent.proto
    own = tk.train_tokenizer(["some text to learn from. "] * 50, vocab_size=290)
    assert not own.shows_date and own.dated("2024-05-01") is own


@pytest.mark.parametrize("moment", ["2024-01-07", "2024-12-30", "2025-06-15T13:05:09"])
def test_the_words_of_a_date_are_english(moment):
    """As the C locale writes them, and no name is asked of the process."""
    now = datetime.fromisoformat(moment)
    for form in ("%a %A %b %B %p %d %Y", "%c", "%x %X", "%d %h %y 100%%", "%-d of %B", "%H:%M %Z|%", "%%B"):
        assert formatted_time(now, form) == now.strftime(form)

    class Elsewhere(datetime):
        def strftime(self, form):
            return "?" if any(f"%{name}" in form for name in "aAbBhcxXp") else super().strftime(form)

    assert formatted_time(Elsewhere.fromisoformat(moment), "%a %B %c %p") == now.strftime("%a %B %c %p")


@pytest.mark.parametrize("source", ["{{ messages | random }}", "{{ lipsum() }}"])
def test_nothing_in_a_template_is_random(source):
    with pytest.raises(UserError, match="the chat template"):
        ChatTemplate(source, {}).render(ASKED, add_generation_prompt=True)


def sft(tokenizer: Path, steps: int, init_from: str = "") -> ConfigDict:
    """A tiny SFT on the conversations of the small world, from random weights or another run."""
    config = load_config(f"{ROOT / 'experiments' / 'sft.py'}:tiny", [f"tokenizer={tokenizer}", "init_from="]).unlock()
    if init_from:
        config.tokenizer, config.init_from = "", str(init_from)
    else:
        sizes = dict(layers=1, width=16, heads=2, kv_heads=2, head_size=8, hidden=16, context=160)
        config.model = ConfigDict(sizes)
    config.data.update(sources="chitchat", turns=2, length=160, batch_size=2, held_out=0.01)
    config.train.update(steps=steps, log_every=1, save_every=1, evaluate_every=1)
    config.optimizer.total_steps, config.optimizer.warmup_steps = 2, 0
    return config.lock()


def test_a_run_resumed_after_midnight_is_the_same_run(small, tmp_path, clock):
    """Two steps in one go, and one step a day: bitwise the same; so are the ids of what starts from it a week later."""
    dated_tokenizer().save(tmp_path / "tokenizer.model")
    straight, parted = tmp_path / "straight", tmp_path / "parted"
    clock("2024-05-01")
    loop.train_stage(sft(tmp_path / "tokenizer.model", 2), straight)
    shutil.copytree(straight, parted)  # what a kill between the two steps would leave
    shutil.rmtree(parted / "checkpoints" / "2")
    (parted / "summary.json").unlink()
    clock("2024-05-02")
    loop.train_stage(sft(tmp_path / "tokenizer.model", 2), parted)
    assert_same_run(straight, parted)
    first = said(load_trained_model(parted, backend="cpu").tokenizer)
    assert first == "<|start|>system\nToday is Wednesday, 01 May 2024."

    clock("2024-05-09")
    loop.train_stage(sft(tmp_path / "tokenizer.model", 1, init_from=parted), tmp_path / "next")
    assert said(load_trained_model(tmp_path / "next", backend="cpu").tokenizer) == first
    loop.train_stage(sft(tmp_path / "tokenizer.model", 1), tmp_path / "other")  # the same file, started a week later
    assert (
        said(load_trained_model(tmp_path / "other", backend="cpu").tokenizer)
        == "<|start|>system\nToday is Thursday, 09 May 2024."
    )

    with pytest.MonkeyPatch.context() as patch:  # whoever asks the run is told its date; who talks to it, today's
        asked = []
        patch.setattr(chat.Chat, "_streamed_answer", lambda self, ids, max_new: asked.append(ids) or iter(()))
        list(chat.Chat(load_trained_model(parted, backend="cpu"), pytest.fail, max_new=4).answer("what?"))
        pieces = load_trained_model(parted, backend="cpu").tokenizer.pieces(asked[0])
    assert "".join(pieces).startswith("<|start|>system\nToday is Thursday, 09 May 2024.<|end|><|start|>user")


def test_a_converted_model_has_the_date_of_its_conversion(tmp_path, monkeypatch, clock):
    """So that ranking, evaluation and training over midnight ask it the same."""
    tokenizer = dated_tokenizer()
    sizes = dict(layers=1, width=8, heads=1, kv_heads=1, head_size=8, hidden=8)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **sizes)
    params = jax.tree.map(np.asarray, make_model(config.for_backend("cpu")).init(jax.random.key(0)))
    monkeypatch.setattr(convert, "read_source", lambda source: (config, params, tokenizer, "llama"))
    clock("2024-05-01")
    convert.import_model(tmp_path / "theirs", tmp_path / "run")
    clock("2024-05-02")
    assert load_trained_model(tmp_path / "run", backend="cpu").tokenizer.date == "2024-05-01"


ORDERS = """
import hashlib, json
from lm.data.conversations import arithmetic_conversations, prompt_contexts
from lm.data.sources import split_held_out
from lm.model import ModelConfig
from lm.model.params import param_specs
from lm.data.tasks.skills import TASKS, evaluation_items
from lm.weights.names import tensor_entries
c = ModelConfig(vocab_size=32, bias="qkv")
talk = arithmetic_conversations()[:200]
found = [
    list(param_specs(c)["layers"]),
    [str(entry) for entry in tensor_entries(c, "qwen2")],
    prompt_contexts(talk, turns=1),
    [item.name for side in split_held_out(talk, 0.1) for item in side],
    [evaluation_items(name, level, count=4, seed=0) for name, task in TASKS.items() for level in task.levels],
]
print(hashlib.sha256(json.dumps(found).encode()).hexdigest())
"""


def test_the_hash_seed_changes_no_order():
    digests = {
        subprocess.run(
            [sys.executable, "-c", ORDERS],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1

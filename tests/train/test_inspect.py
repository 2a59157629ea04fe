"""lm inspect: the loop's own batch, of any stage, from a run that it does not touch; as text, page, figures, status."""

import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from runs import WORDS, enter_small_world, made_dialogues

from lm.core.errors import UserError
from lm.data import packing
from lm.report import run
from lm.runs.workdir import open_workdir
from lm.stages.pretraining import conversation_batches
from lm.tokenizer import train_tokenizer
from lm.train import inspect, loop
from lm.train.batch_view import bracketed_text, colored_text, html_page, text_lines

MODEL = dict(layers=1, width=16, heads=2, kv_heads=1, head_size=8, hidden=24, context=64, query_blocks=1)
SAMPLED = dict(prompt_length=32, max_new=6, rollouts=8, held_out_rollouts=8, held_out=0.1)
ROLLOUTS = dict(**SAMPLED, rewards={"rule": 1.0}, truncation_penalty=0.0)
DATA = {
    "pretrain": dict(corpus="chitchat", length=32, batch_size=4, held_out_bytes=2000),
    "sft": dict(sources="chitchat", length=48, batch_size=4),
    "dpo": dict(length=48, prompts_per_batch=3, held_out=0.3),
    "kto": dict(length=48, prompts_per_batch=3, held_out=0.3),
    "reward": dict(length=48, prompts_per_batch=3, held_out=0.3),
    "grpo": dict(**ROLLOUTS, group=4),
    "ppo": ROLLOUTS,
    "online_dpo": dict(**ROLLOUTS, group=4),
    "best_of_n": dict(**ROLLOUTS, group=4),
    "distill": dict(sources="chitchat", length=48, batch_size=4),
    "gkd": dict(**SAMPLED, length=48, batch_size=4),
}


@pytest.fixture(scope="module", autouse=True)
def world():
    """Made conversations and a mesh of one device, as in tests/runs.py."""
    with pytest.MonkeyPatch.context() as patch:
        enter_small_world(patch.setattr)
        patch.setattr(run, "write_run_page", lambda path: path)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer, and rankings that prefer one answer of two to a prompt of their own."""
    path = tmp_path_factory.mktemp("inspect")
    texts = ["\n".join(turn for _, turns in made_dialogues() for turn in turns)]
    train_tokenizer(texts, vocab_size=320).save(path / "tokenizer.model")
    verdicts = [
        {
            "name": f"made/{i}",
            "prompt": [{"role": "user", "content": f"say {WORDS[i % len(WORDS)]} {i}"}],
            "responses": [f"the {WORDS[i % len(WORDS)]}", f"no {WORDS[(i + 1) % len(WORDS)]}"],
            "ranking": [1 + i % 2, 2 - i % 2],
            "rater": "rule",
            "time": "2024-05-01T12:00:00+00:00",
        }
        for i in range(30)
    ]
    (path / "rankings.jsonl").write_text("".join(json.dumps(verdict) + "\n" for verdict in verdicts))
    return path


def stage_config(folder: Path, stage: str, **data) -> ConfigDict:
    options = {**DATA[stage], **data}
    if stage in ("dpo", "kto", "reward"):
        options["rankings"] = str(folder / "rankings.jsonl")
    teacher = {"teacher": str(folder / "teacher")} if stage in ("distill", "gkd") else {}
    return ConfigDict(
        {
            "seed": 0,
            "tokenizer": str(folder / "tokenizer.model"),
            "init_from": "",
            "model": MODEL,
            "optimizer": {"name": "adamw", "learning_rate": 1e-2, "total_steps": 99},
            "stage": {"name": stage, **teacher},
            "data": options,
            "mesh": {},
            "train": {"steps": 3, "save_every": 1, "keep": 3, "logged_rollouts": 0},
        }
    )


@pytest.fixture(scope="module")
def trained(folder):
    """stage -> the workdir of three steps of it, a checkpoint after each, and the batches that its loop learnt from."""
    made = {}

    def train(stage: str) -> tuple[Path, list]:
        if stage not in made:
            batches, fetch = [], loop.device_batch

            def noted(r, state, i):
                batch, tokens = fetch(r, state, i)
                batches.append(jax.device_get(batch))
                return batch, tokens

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop, "device_batch", noted)
                loop.train_stage(stage_config(folder, stage), folder / f"run-{stage}")
            made[stage] = folder / f"run-{stage}", batches
        return made[stage]

    return train


@pytest.fixture
def teacher(folder, trained) -> None:
    """The pretrained model, where the configs of distillation look for it."""
    if not (folder / "teacher").exists():
        (folder / "teacher").symlink_to(trained("pretrain")[0])


def files_of(path: Path) -> dict[str, tuple]:
    """What a folder holds, by name: contents and times."""
    return {
        str(file.relative_to(path)): (file.stat().st_mtime_ns, hashlib.sha256(file.read_bytes()).hexdigest())
        if file.is_file()
        else file.stat().st_mtime_ns
        for file in sorted(path.rglob("*"))
    }


def assert_equal_batches(one, other) -> None:
    """All leaves the same, bitwise."""
    for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (one, other)), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b)), jax.tree_util.keystr(path)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_batch_is_the_loop_s_and_the_run_is_not_touched(folder, trained, stage):
    workdir, batches = trained(stage)
    before = files_of(workdir)
    with open_locked(workdir, stage_config(folder, stage)):
        locked = files_of(workdir)
        for step in (0, 2):
            found = inspect.inspect_batches(stage_config(folder, stage), workdir, step=step)
            assert_equal_batches(found.batch, batches[step])
            assert not found.has_fault
        assert files_of(workdir) == locked
    assert files_of(workdir).keys() == before.keys()


def open_locked(workdir, config):
    """The run as a process in progress holds it."""
    return open_workdir(workdir, config.to_dict(), changeable_keys=("train",))


def test_without_a_workdir_it_is_the_starting_state_s(folder, trained):
    _, batches = trained("grpo")
    assert_equal_batches(inspect.inspect_batches(stage_config(folder, "grpo")).batch, batches[0])


def test_the_newest_checkpoint_that_is_not_later(folder, trained, capsys):
    workdir, batches = trained("grpo")
    newest = inspect.inspect_batches(stage_config(folder, "grpo"), workdir, rows=0)
    assert newest.view.title == "batch 3 of stage grpo" and newest.view.state == "in the state after 3 steps"
    capsys.readouterr()
    later = inspect.inspect_batches(stage_config(folder, "grpo"), workdir, step=5, rows=0)
    assert later.view.state == "in the state after 3 steps"
    assert "batch 5 is sampled in the state after 3 steps; a run samples it in that after 5" in capsys.readouterr().err


@pytest.mark.parametrize("stage", DATA)
def test_every_stage_is_shown_and_has_no_fault(folder, teacher, stage):
    found = inspect.inspect_batches(stage_config(folder, stage), rows=2)
    assert not found.has_fault
    unseen = [check.name for check in found.checks if not check.count]
    assert unseen == (["no target across a segment boundary"] if stage == "reward" else [])
    assert found.view.rows and 0 <= found.padding < 1
    lines = "\n".join(text_lines(found.view, in_color=False))
    tokens = [t for row in found.view.rows for segment in row.segments for t in segment.tokens]
    if stage == "reward":
        assert not any(t.kind == "trained" for t in tokens)
    else:
        assert "⟦" in lines and all("logprob" in t.values for t in tokens if t.kind == "trained")
    named = "made/" if stage in ("dpo", "kto", "reward") else "chitchat/"
    assert named in lines
    assert any(note.startswith("rule: ") for note in found.notes)


def test_both_sides_of_a_preference(folder):
    found = inspect.inspect_batches(stage_config(folder, "kto"), rows=1)
    labels = [row.label for row in found.view.rows]
    assert labels == ["prompt 1, answer 1", "prompt 1, answer 2", "mismatched row 1"]
    ranks = [dict(row.facts)["rank"] for row in found.view.rows[:2]]
    assert sorted(ranks) == ["1", "2"]
    assert "baseline" in dict(found.view.rows[0].facts)


def test_rollouts_have_rewards_and_the_stage_s_own_advantages(folder):
    """GRPO's: (reward - mean) / (deviation + 1e-4), the same on all tokens; its reference is the policy itself."""
    found = inspect.inspect_batches(stage_config(folder, "grpo"), rows=4)
    facts = [dict(row.facts) for row in found.view.rows]
    rewards = np.array([float(each["reward"]) for each in facts])
    advantages = np.array([row.advantages()[0][1] for row in found.view.rows])
    wanted = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
    assert rewards.std() > 0 and advantages == pytest.approx(wanted, abs=0.05)  # facts have three digits
    assert all("on each token" in each["advantage"] for each in facts)
    assert [float(each["KL to the reference"]) for each in facts] == pytest.approx([0] * 4, abs=1e-4)
    assert {each["ended"] for each in facts} <= {"by itself", "cut off by the limit"}


def test_ppo_s_advantages_differ_by_token(folder):
    found = inspect.inspect_batches(stage_config(folder, "ppo"), rows=1)
    assert "  advantages: " in "\n".join(text_lines(found.view, in_color=False))
    assert {"value", "return"} <= set(found.view.rows[0].segments[0].tokens[-1].values)


def test_best_of_n_shows_the_answers_that_it_learns_from(folder):
    """Two of eight: the best of each group."""
    found = inspect.inspect_batches(stage_config(folder, "best_of_n"), rows=8)
    rewards = np.asarray(found.batch.rewards).reshape(2, 4)
    shown = [float(dict(row.facts)["reward"]) for row in found.view.rows]
    assert shown == pytest.approx(rewards.max(axis=1), abs=0.01)


def test_distillation_says_who_wrote(folder, teacher):
    writers = {
        share: dict(inspect.inspect_batches(stage_config(folder, "gkd", on_policy_fraction=share)).view.rows[0].facts)
        for share in (0.0, 1.0)
    }
    assert [writers[share]["written by"] for share in writers] == ["people", "the student"]


def test_several_batches_are_counted_and_none_trains_a_token_twice(folder):
    found = inspect.inspect_batches(stage_config(folder, "pretrain"), batches=6)
    (once,) = [check for check in found.checks if check.name == "no token trained twice in an epoch"]
    assert once.count == sum(length.trained for length in found.lengths) > 5 * 4 * 20
    assert {length.source for length in found.lengths} == {"chitchat"}


# The command


def write_config(folder: Path, stage: str) -> Path:
    path = folder / f"{stage}_config.py"
    options = json.dumps(stage_config(folder, stage).to_dict())
    path.write_text(
        "import json\n\nfrom ml_collections import ConfigDict\n\n\n"
        f"def get_config(arg=''):\n    return ConfigDict(json.loads({options!r}))\n"
    )
    return path


def test_the_command_prints_checks_and_writes_page_and_figures(folder, tmp_path, capsys):
    flags = [f"--html={tmp_path}/batch.html", f"--stats={tmp_path}/stats", "--rows=1", "--batches=3", "--step=1"]
    inspect.program([f"--config={write_config(folder, 'sft')}", *flags])
    said = capsys.readouterr().out
    assert "batch 1 of stage sft, in the state that the run starts from" in said
    assert re.search(r"^ok     every assistant end token trained: \d+ answers$", said, re.MULTILINE)
    assert re.search(r"^note   padding: \d+\.\d% of 576 positions$", said, re.MULTILINE)  # 3 batches of 4 rows of 48
    assert re.search(r"^note   left out or cut: skipped \d+, untrained 0$", said, re.MULTILINE)
    assert "tokens by source" in said and "FAULT" not in said and "\033" not in said
    for name in ("lengths.png", "shares.png"):
        assert (tmp_path / "stats" / name).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "batch.html").read_text()
    assert "<script" not in page and 'src="' not in page


def test_a_fault_gives_status_1(folder, monkeypatch, capsys):
    """A packer that forgets the weight of every end token."""
    packed = packing.packed_rows_and_contents

    def forgetful(examples, length):
        tokens, *rest = packed(examples, length)
        last = np.diff(tokens.weights, axis=1, append=0) < 0  # where a trained stretch ends
        return tokens.replace(weights=np.where(last, 0, tokens.weights).astype(np.float32)), *rest

    monkeypatch.setattr(conversation_batches, "packed_rows_and_contents", forgetful)
    with pytest.raises(SystemExit) as stopped:
        inspect.program([f"--config={write_config(folder, 'sft')}", "--rows=0"])
    assert stopped.value.code == 1
    assert re.search(
        r"^FAULT  every assistant end token trained: (\d+) of \1 answers not; first: row 1, token \d+$",
        capsys.readouterr().out,
        re.MULTILINE,
    )


class Tokens(HTMLParser):
    """The spans of the page's tokens."""

    def __init__(self, page: str):
        super().__init__()
        self.spans, self._kind = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "span" and "data-note" in given:
            self.spans.append([given["class"], given["data-note"], ""])
            self._kind = "token"

    def handle_data(self, data):
        if self._kind:
            self.spans[-1][2] += data

    def handle_endtag(self, tag):
        self._kind = ""


def test_the_page_tells_of_each_token(folder):
    found = inspect.inspect_batches(stage_config(folder, "ppo"), rows=2)
    page = html_page(found.view, found.checks, found.notes, "lm inspect")
    spans = Tokens(page).spans
    shown = [t for row in found.view.rows for s in row.segments for t in s.tokens if t.kind != "padding"]
    assert [(kind, text) for kind, _, text in spans] == [(t.kind, t.text) for t in shown]
    kind, note, _ = next(span for span in spans if span[0] == "trained")
    token = next(t for t in shown if t.kind == "trained")
    assert note.split("\n")[:4] == [f"id {token.id}", "weight 1", f"position {token.position}", "segment 1"]
    assert f"advantage {token.values['advantage']:.3f}" in note and "logprob -" in note
    assert page.count("var(--good)") + page.count("var(--bad)") > 2  # a line under trained tokens, by their advantage


def test_what_a_batch_says_cannot_act(folder):
    """Markup in a page, control characters in a terminal."""
    found = inspect.inspect_batches(stage_config(folder, "sft"), rows=1)
    row = found.view.rows[0]
    segment = row.segments[0]
    evil = segment.tokens[0]._replace(text="<script>\x1b[2J")
    view = found.view._replace(rows=[row._replace(segments=[segment._replace(tokens=[evil])])])
    page = html_page(view, found.checks, found.notes, "lm inspect")
    assert "<script>" not in page and "&lt;script&gt;␛[2J" in page
    assert "\x1b[2J" not in "\n".join(text_lines(view, in_color=True))


def test_trained_tokens_in_brackets_or_in_colour(folder):
    segment = inspect.inspect_batches(stage_config(folder, "sft"), rows=1).view.rows[0].segments[0]
    plain = bracketed_text(segment.tokens)
    assert re.search(r"<\|assistant\|>⟦[^⟧]+<\|end\|>⟧", plain) and plain.count("⟦") == plain.count("⟧")
    colored = colored_text(segment.tokens)
    assert re.sub(r"\033\[[\d;]*m", "", colored) == plain.replace("⟦", "").replace("⟧", "")
    assert all(color in colored for color in ("\033[32m", "\033[92m", "\033[90m"))


def test_refusals(folder, tmp_path):
    config = stage_config(folder, "sft")
    with pytest.raises(UserError, match="there is no workdir .*: leave --workdir out"):
        inspect.inspect_batches(config, tmp_path / "nothing")
    with pytest.raises(UserError, match="inspect.batches is 0"):
        inspect.inspect_batches(config, batches=0)
    with pytest.raises(UserError, match="stage tokenizer has no batches to inspect"):
        inspect.inspect_batches(ConfigDict({"seed": 0, "stage": {"name": "tokenizer"}, "data": {}}))
    with pytest.raises(UserError, match="data.packing is 'tight'"):
        inspect.inspect_batches(stage_config(folder, "pretrain", packing="tight"))


def test_a_config_that_differs_is_named(folder, trained, capsys):
    config = stage_config(folder, "sft", length=52)
    inspect.inspect_batches(config, trained("sft")[0], rows=0)
    assert "was made with another config: data.length: 48 -> 52" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over_and_stays(folder, trained, tmp_path, capsys):
    workdir = shutil.copytree(trained("grpo")[0], tmp_path / "run")
    torn = next(file for file in (workdir / "checkpoints" / "3" / "params").rglob("*") if file.name == "sha256.json")
    torn.write_text("{")
    found = inspect.inspect_batches(stage_config(folder, "grpo"), workdir, step=3, rows=0)
    assert found.view.state == "in the state after 2 steps"
    assert (workdir / "checkpoints" / "3").is_dir() and "is damaged" in capsys.readouterr().err


# Packing by best fit


def test_best_fit_is_an_option_of_pretraining(folder):
    found = {
        name: inspect.inspect_batches(stage_config(folder, "pretrain", packing=name), batches=5, rows=1)
        for name in packing.DOCUMENT_PACKINGS
    }
    cut = {name: int(re.search(r"documents cut (\d+)", "; ".join(f.notes))[1]) for name, f in found.items()}
    assert not any(f.has_fault for f in found.values()) and cut["stream"] > cut["best_fit"]
    assert "longer than 32 tokens cut into pieces" in "; ".join(found["best_fit"].notes)


def test_a_run_s_first_line_states_truncation_and_efficiency(folder, tmp_path, capsys):
    config = stage_config(folder, "pretrain", packing="best_fit")
    config.train.steps = 1
    loop.train_stage(config, tmp_path / "run")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("pretrain: length 32")]
    assert re.search(r"packing_efficiency 0\.9\d*, documents_cut \d+,", line)
    assert line.endswith("; chitchat: documents longer than 32 tokens cut into pieces of that size, nothing left out")

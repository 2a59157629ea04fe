"""The report: everything a run came to on one safe, self-contained page, with what is missing left out."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lm.core.errors import UserError
from lm.data import packing
from lm.data.conversations import CONVERSATION_SOURCES, Conversation
from lm.data.inspect import row_views
from lm.report import pipeline
from lm.report.terms import TERMS
from lm.rewards import assistant as assistant_rule
from lm.rewards.rule import CRITERIA, RULE
from lm.runs import html
from lm.tokenizer import Tokenizer, encode_chat, train_tokenizer

ATTACK = '<script>alert("x")</script><img src=http://evil.example/x.png onerror=1>'
STAGES = ["tokenizer", "pretrain", "sft", "rank", "reward", "ppo", "evaluate"]
MODELS = ("raw", "sft", "ppo")
SECTIONS = ["ran", "curves", "evaluation", "rater", "taste", "answers", "row", "configs"]
BUSY = "the machine was busy with something else while its peak was measured"
NAMES = ("Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal")


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def conversations() -> list[Conversation]:
    return [Conversation(f"made/{name}", [user(f"How are you, {name}?"), assistant("I am fine.")]) for name in NAMES]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["How are you today? I am fine, thank you, Ada, Bo, Cy and Di.\n" * 40], vocab_size=310)


@pytest.fixture
def run(tmp_path, tokenizer, monkeypatch) -> Path:
    """A finished run folder, written by hand."""
    monkeypatch.setitem(CONVERSATION_SOURCES, "made", conversations)
    write = lambda name, value: (tmp_path / name).write_text(json.dumps(value))
    write("pipeline.json", {"stages": STAGES, "seconds": dict.fromkeys(STAGES, 60.0)})
    trained = {"steps": 30, "parameters": 1_234_567, "tokens": 40_000, "model_flops": 8e9, "seconds": 50.0, "mfu": 0.05}
    before, after = {"loss": 4.0}, {"loss": 2.0}
    summaries = {
        "tokenizer": {"vocab_size": 310, "bytes_per_token": 1.5, "held_out_bytes": 10, "seconds": 1.0},
        "pretrain": {
            **trained,
            "before": {**before, "bits_per_byte": 5.126},
            "held_out": {**after, "bits_per_byte": 1.874},
            "about": {"documents": 4321, "xz_bits_per_byte": 2.69},
        },
        "sft": {**trained, "before": before, "held_out": after, "about": {"conversations": 8}},
        "rank": {"rater": "rule", "prompts": 3, "decided": 2, "tied": 1},
        "reward": {
            **trained,
            "before": before,
            "about": {"pairs": 2, "held_out_prompts": 213},
            "held_out": {"accuracy": 0.8125, "accuracy_se": 0.0267, "length_correlation": -0.11},
        },
        "ppo": {**trained, "before": {}, "held_out": {}, "about": {}},
        "evaluate": {
            "rater": "rule",
            "prompts": 78,
            "sampler": {"max_new": 48, "temperature": 1.0, "seed": 0},
            "models": {name: told(score) for name, score in zip(MODELS, (3.0, 4.0, 5.0))},
            "comparisons": [compared("sft", "raw", 1.0), compared("ppo", "sft", 1.25)],
        },
    }
    for name, summary in summaries.items():
        (tmp_path / name).mkdir()
        write(f"{name}/summary.json", {"stage": name, **summary})
        write(f"{name}/config.json", {"stage": {"name": name}, "note": ATTACK})
    taste = {"accuracy": estimate(0.81), "longer": estimate(0.5), "length_correlation": -0.11, "answers": [[0.5, 9]]}
    group = {"apart": 1, "last": False, "pairs": 9, "said": 0.7, **estimate(0.8)}
    write("reward/taste.json", {**taste, "apart": [group], "calibration": [group]})
    write("sft/config.json", {"data": {"sources": "made,docstrings", "length": 64, "held_out": 0.2}})
    write("evaluate/config.json", {"models": {name: f"run/{name}" for name in ("ppo", "raw", "sft")}})
    tokenizer.save(tmp_path / "sft" / "tokenizer.model")
    ppo = "reward score/rule kl entropy clip_fraction explained_variance response_length stopped"
    for name, logged in {"pretrain": "loss", "sft": "loss", "reward": "loss accuracy", "ppo": ppo}.items():
        lines = [{"step": 0, "held_out/loss": 4.0, "tokens": 0, "seconds": 1.0}]
        lines += [
            {
                "step": i,
                **dict.fromkeys(logged.split(), 1 / i),
                "tokens_per_second": 250.0,
                "tokens": 1000 * i,
                "seconds": 10.0 + 4 * i,
            }
            for i in range(1, 31)
        ]
        (tmp_path / name / "metrics.jsonl").write_text(jsonl(lines))
    prompt = [user(f"My dog is {ATTACK}")]
    ranking = {"name": "x", "prompt": prompt, "rater": "rule", "time": "2026-01-01T00:00:00+00:00"}
    (tmp_path / "rank" / "rankings.jsonl").write_text(
        jsonl(
            ranking | verdict
            for verdict in (
                {"responses": ["tied one", "tied two"], "ranking": [1, 1]},
                {"responses": [f"worse {ATTACK}", "Is your dog well?"], "ranking": [2, 1]},
                {"responses": ["I like your dog.", "no"], "ranking": [1, 2]},
            )
        )
    )
    answers = {
        name: {"text": f"{name} says \x1b[2J {ATTACK}", "length": 5, "stopped": name != "raw"} for name in MODELS
    }
    (tmp_path / "evaluate" / "answers.jsonl").write_text(
        jsonl(
            {"prompt": prompt, "answers": answers, "scores": {"raw": 3.0, "sft": 4.0, "ppo": 10.0 + i}}
            for i in range(9)
        )
    )
    return tmp_path


def jsonl(values) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def estimate(value: float) -> dict:
    return {"value": value, "se": 0.1, "low": value - 0.196, "high": value + 0.196}


def told(score: float) -> dict:
    return {
        "bits_per_byte": 1.9,
        "reply_loss": 4.0,
        "score": estimate(score),
        "stopped": estimate(score / 5 - 0.2),
        "length": estimate(20),
    }


def compared(a: str, b: str, gain: float) -> dict:
    return {"a": a, "b": b, "difference": estimate(gain), "win_rate": estimate(0.7)}


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of the page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def page_of(run: Path) -> tuple[str, Elements]:
    page = pipeline.write_report(run).read_text()
    return page, Elements(page)


def test_every_section_and_the_claims_as_measured(run):
    page, found = page_of(run)
    assert [attrs["id"] for tag, attrs in found.tags if tag == "h2"] == SECTIONS
    text = found.text.replace("\u00a0", " ")
    for claim in (
        "5.13 → 1.87",
        "xz -9 needs 2.69",
        "40 % → 60 %",
        "81.2 ± 2.7 %",
        "213 prompts",
        "score and length −0.11",
        "ppo over sft",
        "+1.25",
        "95 % interval [+1.05, +1.45], above zero",
        "wins 70 % [50 %, 90 %]",
    ):
        assert claim in text, claim
    assert "is not part of this run" not in text and "Not finished" not in text and "Left out" not in text
    assert "4,321 documents" in text and "1.23 M" in text and "420" in text, "what ran, and 7 x 60 s"
    assert BUSY not in text
    assert page.count("<td>5\u00a0%</td>") == 4, "the MFU of pretrain, sft, reward and ppo"
    assert page.count("<figure><strong>") == 1 + 1 + 2 + 8 + 3
    assert RULE in text and all(name in text for name in CRITERIA)
    assert "tied one" not in text and text.index("Is your dog well?") < text.index("worse"), "decided ones, best first"
    assert text.count("score 4 · ended by itself") == text.count("score 3 · cut off") == 8
    assert "score 17" in text and "score 18" not in text, "eight prompts"
    assert pipeline.write_report(run).read_text() == page, "the same folder gives the same page"
    assert [path for path in run.iterdir() if "tmp" in path.name] == []


def test_what_models_and_people_wrote_is_text(run):
    page, found = page_of(run)
    assert not [tag for tag, _ in found.tags if tag in ("script", "img")]
    assert found.text.count(ATTACK) == 8 * (1 + 3) + 2 + 1, "8 prompts, 3 answers each; 2 ranked prompts, 1 answer"
    assert found.text.count(json.dumps(ATTACK)) == 5, "in the configs of all stages but two, as JSON spells it"
    assert "\x1b" not in page and "␛[2J" in page


def test_nothing_is_loaded(run):
    page, found = page_of(run)
    loading = ("src", "href", "xlink:href", "data", "srcset", "poster", "action")
    links = [value for _, attrs in found.tags for name, value in attrs.items() if name in loading]
    assert links and all(value.startswith("#") for value in links), "only the marks inside the pictures"
    assert not [tag for tag, _ in found.tags if tag in ("link", "iframe", "object", "embed", "base")]
    assert not re.search(r"@import|url\((?!#)", page)
    assert html.TEXT_COLOR not in page and "currentColor" in page


@pytest.mark.parametrize("missing", STAGES)
def test_a_stage_that_has_not_finished_is_left_out_with_a_word(run, missing):
    (run / missing / "summary.json").unlink()
    page, found = page_of(run)
    assert [attrs["id"] for tag, attrs in found.tags if tag == "h2"] == SECTIONS
    assert f"Not finished: {missing}." in found.text
    words = found.text.count(f"Stage {missing} is not part of this run, or has not finished.")
    assert words == {"sft": 1, "rank": 1, "reward": 1, "evaluate": 2}.get(missing, 0)
    assert page.count("<figure><strong>") == 15 - {"pretrain": 1, "sft": 1, "reward": 5, "ppo": 8}.get(missing, 0)


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "pipeline.json").write_text(json.dumps({"stages": STAGES, "seconds": {}}))
    _, found = page_of(tmp_path)
    assert f"Not finished: {', '.join(STAGES)}." in found.text and "No stage that trains has finished." in found.text


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(
        UserError, match="no run of lm pipeline or lm train: it holds no pipeline.json, nor a stage's config"
    ):
        pipeline.program([f"--workdir={tmp_path}"])
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_cannot_be_built_again_is_left_out(run):
    (run / "sft" / "config.json").write_text(json.dumps({"data": {"sources": "made", "length": 4, "held_out": 0.2}}))
    message = r"Left out: none of \d conversations can be learnt from .* a row of 4 tokens"
    assert re.search(message, page_of(run)[1].text)


def test_colours_mark_exactly_what_the_assistant_says(tokenizer):
    """Two conversations in a row of 64, the longer one first: trained are the assistant's words and their <|end|>."""
    short = [user("Bo?"), assistant("I am fine.")]
    long = [{"role": "system", "content": "Cy"}, *short, user("How are you?"), assistant("Ada")]
    examples = [encode_chat(tokenizer, short), encode_chat(tokenizer, long)]
    first, second, padding = row_views(tokenizer, packing.packed_rows(examples, 64)[0], 0)
    said = lambda pieces, kind: "".join(piece.text for piece in pieces if piece.kind == kind)
    assert said(first, "trained") == "I am fine.<|end|>Ada<|end|>"
    assert said(first, "context") == (
        "<|bos|><|system|>Cy<|end|><|user|>Bo?<|end|><|assistant|><|user|>How are you?<|end|><|assistant|>"
    )
    assert said(second, "trained") == "I am fine.<|end|>"
    assert said(second, "context") == "<|bos|><|user|>Bo?<|end|><|assistant|>"
    used = sum(len(example.ids) - 1 for example in examples)  # n ids are n - 1 pairs of an input and its target
    assert [piece.kind for piece in padding] == ["padding"] * (64 - used)


def test_the_row_on_the_page(run, tokenizer):
    """Excerpts of one exchange each: all eight users are answered with the same words, and only those are green."""
    page, _ = page_of(run)
    green = re.findall(r'<span class="trained">(.*?)</span>', page)[1:]  # the first is the legend's
    assert set("".join(green).replace("&lt;|end|&gt;", "\n").split("\n")) == {"I am fine.", ""}
    assert '<span class="padding">·</span>' in page


def test_a_single_stage_gets_its_own_page(run, capsys):
    pipeline.program([f"--workdir={run / 'pretrain'}"])
    assert capsys.readouterr().out == f"report: {run / 'pretrain' / 'report.html'}\n"
    assert "<h1>pretrain</h1>" in (run / "pretrain" / "report.html").read_text()
    with pytest.raises(UserError, match="evaluate is no run of lm pipeline or lm train: .* nor a stage's config.json"):
        pipeline.write_report(run / "evaluate")


def test_an_mfu_over_one_is_explained(run):
    summary = json.loads((run / "sft" / "summary.json").read_text())
    (run / "sft" / "summary.json").write_text(json.dumps(summary | {"mfu": 1.2}))
    assert BUSY in page_of(run)[1].text


@pytest.fixture
def run_with_skills(run) -> Path:
    """The same run, of prompts that name a skill, whose PPO was stopped."""
    share = lambda value: {"value": value, "se": 0.01, "low": value - 0.02, "high": value + 0.02}
    row = lambda *values: {
        "prompts": 80,
        "models": dict(zip(MODELS, map(share, values))),
        "differences": [
            {"a": a, "b": b, "difference": share(values[i + 1] - values[i])}
            for i, (a, b) in enumerate(zip(MODELS[1:], MODELS))
        ],
    }
    skills = {"facts": row(0.01, 0.9, 0.95), "small_talk": row(0.1, 0.8, 0.75), "all": row(0.05, 0.85, 0.86)}
    path = run / "evaluate" / "summary.json"
    summary = json.loads(path.read_text())
    models = {name: {**each, "judge": estimate(7.25)} for name, each in summary["models"].items()}
    distinct = {"prompts": 100, "models": dict(zip(MODELS, (99, 88, 77)))}
    path.write_text(json.dumps({**summary, "skills": skills, "distinct": distinct, "models": models, "judge": "other"}))
    answers = run / "evaluate" / "answers.jsonl"
    lines = [json.loads(line) for line in answers.read_text().splitlines()] * 2
    checked = {"skill": "facts", "right_answer": "Paris", "right": {"raw": 0.0, "sft": 0.5, "ppo": 1.0}}
    answers.write_text(jsonl(line | checked for line in lines))
    ppo = run / "ppo" / "summary.json"
    stop = {"message": "stopped at step 12", "best_step": 8}
    ppo.write_text(json.dumps(json.loads(ppo.read_text()) | {"over_optimization": stop}))
    ranks = run / "rank" / "summary.json"
    ranks.write_text(json.dumps(json.loads(ranks.read_text()) | {"rater": "assistant"}))
    return run


def test_skills_come_first_with_a_picture_a_table_and_twelve_prompts(run_with_skills):
    page, found = page_of(run_with_skills)
    sections = [attrs["id"] for tag, attrs in found.tags if tag == "h2"]
    assert sections == ["skills", "answers", "curves", "ran", "evaluation", "rater", "taste", "row", "configs"]
    text = " ".join(found.text.replace("\u00a0", " ").split())
    assert (
        "Right answers: raw → sft → ppo5 % → 85 % → 86 %mean over the skills" in text
        and "ppo over sft +1.0 [−1.0, +3.0] points" in text
    )
    assert "facts (80) 1.0 %[-1, 3]90.0 %[88, 92]95.0 %[93, 97]+5.0[+3.0, +7.0]" in text
    assert "small talk (80)" in text and '<td class="no">−5.0' in page and '<td class="yes">+5.0' in page
    assert "different answers to 100998877" in text
    assert page.count("✓</b>") == page.count("✗</b>") == page.count("~</b>") == 12
    assert "ppo was stopped by its gauge of over-optimization. ppo stopped at step 12." in text
    assert "the held-out judge's score7.25" in text
    assert assistant_rule.ASSISTANT_RULE in found.text


def test_terms_are_explained_where_the_mouse_rests(run_with_skills):
    _, found = page_of(run_with_skills)
    told = [attrs["title"] for tag, attrs in found.tags if tag == "abbr"]
    assert set(told) <= set(TERMS.values())
    for term in ("sft", "ppo", "facts", "small_talk", "all", "distinct", "95 % interval", "held out", "judge", "MFU"):
        assert TERMS[term] in told, term

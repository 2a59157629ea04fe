"""Emergence: shares of rises by hand, made ladders that jump and do not, and the program over three tiny runs."""

import json
import shutil

import jax
import numpy as np
import pytest
from runs import EXPERIMENTS, ROOT, enter_small_world

from lm.core.config import config_module, load_config
from lm.core.errors import UserError
from lm.data.tasks import drills
from lm.data.tasks.skills import TASKS
from lm.report import run
from lm.runs.workdir import load_trained_model as load_run, read_json
from lm.studies.emergence import jumps, scoring, study
from lm.studies.emergence.jumps import (
    EDIT_DISTANCE,
    EXACT_MATCH,
    LOG_PROBABILITY,
    NO,
    PASS_AT_K,
    UNDECIDED,
    YES,
    jump_finding,
    steepest_step,
    step_share,
    task_curves,
)
from lm.studies.emergence.ladder import LadderRun, ModelLadder, read_ladder
from lm.studies.emergence.page import conclusion_sentences, curve_sentence, emergence_summary
from lm.studies.emergence.scoring import TaskPrograms, newline_ids, task_questions, tasks_for_corpora
from lm.tokenizer import train_tokenizer
from lm.train import loop

QUICK = dict(items=6, samples=2, k=2, shots=1, tasks=["sums", "facts"])


def test_a_share_by_hand():
    """Means 0, 0.1, 0.7, 0.8: of a rise of 0.8 the second step holds 0.6, three quarters."""
    values = np.array([[0.0, 0.0], [0.0, 0.2], [0.6, 0.8], [0.8, 0.8]])
    assert steepest_step(values) == 1
    assert [step_share(values, step) for step in range(3)] == pytest.approx([0.125, 0.75, 0.125])
    assert np.isnan(step_share(values[::-1], 1))  # it falls


# Made ladders: the probability p of a right token at each rung decides everything else.
FLOPS = [1e10, 3e10, 1e11, 3e11, 1e12, 3e12]
STEADY = [0.05, 0.1, 0.2, 0.4, 0.7, 0.99]
SUDDEN = [0.01, 0.01, 0.01, 0.99, 0.99, 0.99]


def made(chances, *, tokens=12, items=300, samples=4):
    """The scores of a ladder in which each token of an answer is right by itself, with that chance."""
    draw, each = np.random.default_rng(0), []
    for p in chances:
        right = draw.random((items, samples + 1, tokens)) < p
        whole = right.all(axis=2)
        nats = tokens * np.log(p) + 0.1 * draw.normal(size=items)
        level = {
            "shots": 1,
            "exact": whole[:, 0].tolist(),
            "edit": (1 - right[:, 0].mean(axis=1)).tolist(),
            "logprob": nats.tolist(),
            "tokens": [tokens] * items,
            "correct": whole[:, 1:].sum(axis=1).tolist(),
            "shown": [["1+1=", "2\n", "2\n"]],
        }
        each.append({"sums": {"3": level}})
    return each


def of(chances, **sizes):
    each = made(chances, **sizes)
    return task_curves(each, samples=4, k=2)[0], each


def test_curves_hold_what_was_scored():
    """p^n of p = 0.7 and 12 tokens is 0.0138; pass@2 of 4 samples is above pass@1, which is exact match by chance."""
    curve, _ = of(STEADY)
    assert curve.expected[4] == pytest.approx(0.7**12, rel=0.05)
    assert curve.values[LOG_PROBABILITY].mean(axis=1) == pytest.approx(np.log(STEADY), abs=0.01)
    assert curve.values[EXACT_MATCH][-1].mean() == pytest.approx(0.99**12, abs=0.06)
    assert curve.values[PASS_AT_K][-1].mean() > curve.values[EXACT_MATCH][-1].mean()
    assert curve.values[EDIT_DISTANCE].mean(axis=1) == pytest.approx(1 - np.array(STEADY), abs=0.03)


def test_rambling_counts_as_silence():
    """Ten wrong characters for two, and half of two wrong: 1 and 0.5, not 5 and 0.5."""
    each = made([0.5, 0.5], items=2)
    each[0]["sums"]["3"]["edit"] = [5.0, 0.5]
    assert task_curves(each, samples=4, k=2)[0].values[EDIT_DISTANCE][0].tolist() == [1.0, 0.5]


def test_a_steady_gain_jumps_by_exact_match_alone():
    found = jump_finding(of(STEADY)[0], FLOPS)
    assert found.step == 4 and found.log_flops_share == pytest.approx(np.log(3) / np.log(300))
    assert found.rises[EXACT_MATCH].jump == YES and found.rises[EXACT_MATCH].share.low > 0.9
    assert found.rises[EDIT_DISTANCE].jump == found.rises[LOG_PROBABILITY].jump == NO
    log_share = np.log(0.99 / 0.7) / np.log(0.99 / 0.05)  # 0.116
    assert found.rises[LOG_PROBABILITY].share.value == pytest.approx(log_share, abs=0.01)


def test_a_sudden_gain_jumps_by_every_metric():
    found = jump_finding(of(SUDDEN)[0], FLOPS)
    assert found.step == 2 and {rise.jump for rise in found.rises.values()} == {YES}
    assert found.rises[LOG_PROBABILITY].share.low < 1 < found.rises[LOG_PROBABILITY].share.high + 0.01


def test_what_does_not_rise_has_no_step():
    found = jump_finding(of([0.3] * 6)[0], FLOPS)
    assert found.step is None and {rise.jump for rise in found.rises.values()} == {UNDECIDED}
    assert np.isnan(found.rises[EXACT_MATCH].share.value)


def test_few_items_leave_it_untold():
    """One token an answer, 12 items: 0.6 of the rise of exact match lies in the last step, with a wide interval."""
    found = jump_finding(of([0.05, 0.1, 0.2, 0.3, 0.35, 0.95], tokens=1, items=12)[0], FLOPS)
    assert (
        found.rises[EXACT_MATCH].jump == UNDECIDED
        and found.rises[EXACT_MATCH].share.low < 0.5 < found.rises[EXACT_MATCH].share.high
    )


def test_sentences_say_what_survives():
    rungs = [LadderRun(ROOT / str(i), flops, 100, 100, 2.0, ["drills"]) for i, flops in enumerate(FLOPS)]
    ladder = ModelLadder(rungs, [], [])

    def said(chances):
        curve, each = of(chances)
        return conclusion_sentences(emergence_summary(ladder, [curve], each, {"k": 2, "samples": 4, "shots": 1}))

    assert "sums, 3 digits: exact match 0.00 to 0.8" in said(STEADY)[0] and "from 1 TFLOP to 3 TFLOP" in said(STEADY)[0]
    assert "a jump. In the same step edit distance makes 0.3" in said(STEADY)[0]
    assert said(STEADY)[1].startswith(
        "Jumps by exact match: 1. By edit distance, in the same step, 0 survive, 1 do not"
    )
    assert "By log-probability, in the same step, 1 survive, 0 do not" in said(SUDDEN)[1]
    flat = said([0.3] * 6)
    assert "no rise outside the noise." in flat[0] and flat[1].startswith("No step of this ladder")


def test_a_smooth_rise_below_exact_match_is_told():
    curve, each = of([0.01, 0.02, 0.03, 0.05, 0.1, 0.2])
    rungs = [LadderRun(ROOT / str(i), flops, 100, 100, 2.0, ["drills"]) for i, flops in enumerate(FLOPS)]
    summary = emergence_summary(ModelLadder(rungs, [], []), [curve], each, {"k": 2})
    text = curve_sentence(summary["curves"][0], summary["rungs"])
    assert text.endswith("no rise outside the noise, though edit distance and log-probability improve.")


# The program over three tiny runs of experiments/emergence.py


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """The tiny ladder: three runs of 3, 5 and 8 steps on 60 pages, in a folder that holds no more."""
    root = tmp_path_factory.mktemp("emergence")
    with pytest.MonkeyPatch.context() as patch:
        enter_small_world(patch.setattr)
        patch.setattr(drills, "PAGE_COUNT", 60)
        patch.setattr(run, "write_run_page", lambda path: path)
        train_tokenizer(drills.drill_pages(), vocab_size=400).save(root / "tokenizer.model")
        for changes in config_module(f"{EXPERIMENTS / 'emergence.py'}").sweep("tiny"):
            given = [f"{key}={value}" for key, value in changes.items()]
            config = load_config(f"{EXPERIMENTS / 'emergence.py'}:tiny", [f"tokenizer={root}/tokenizer.model", *given])
            loop.train_stage(config, root / "runs" / f"steps{config.train.steps}")
    return root / "runs"


@pytest.fixture(scope="module")
def summary(ladder):
    return study.run_emergence([ladder], **QUICK)


def test_the_ladder_is_in_the_order_of_compute(summary, ladder):
    assert [rung["path"] for rung in summary["rungs"]] == [str(ladder / f"steps{steps}") for steps in (3, 5, 8)]
    flops = [rung["flops"] for rung in summary["rungs"]]
    assert flops == [read_json(ladder / f"steps{n}" / "summary.json")["model_flops"] for n in (3, 5, 8)]
    assert {curve["task"] for curve in summary["curves"]} == {"sums", "facts"}
    assert len(summary["curves"]) == 7 and all(curve["items"] == 6 for curve in summary["curves"])


def test_numbers_page_and_figure_are_written(summary, ladder):
    folder = ladder / "emergence"
    assert read_json(folder / "emergence.json") == json.loads(json.dumps(summary))
    assert (folder / "emergence.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "emergence.html").read_text()
    for text in ("<svg", "Do skills come in a jump?", "sums, 4 digits", "facts, rare", "the capital of", str(ladder)):
        assert text in page
    assert "NaN" not in (folder / "emergence.json").read_text()


def test_a_second_start_scores_nothing_again(summary, ladder, tmp_path, monkeypatch):
    """A run that is scored is not loaded; one whose score is lost, or that is asked otherwise, is."""
    shutil.copytree(ladder / "emergence", tmp_path / "out")
    loaded = []
    monkeypatch.setattr(
        study, "load_trained_model", lambda path, **rest: loaded.append(path.name) or load_run(path, **rest)
    )
    assert study.run_emergence([ladder], output=tmp_path / "out", **QUICK) == summary and loaded == []
    lost = next(f for f in (tmp_path / "out/scores").iterdir() if read_json(f)["of"]["run"].endswith("steps5"))
    lost.unlink()
    assert study.run_emergence([ladder], output=tmp_path / "out", **QUICK) == summary and loaded == ["steps5"]
    monkeypatch.setattr(study, "task_scores", lambda trained, **rest: rest["seed"])
    settings = {key: value for key, value in summary["settings"].items() if key != "k"}
    rung = read_ladder([ladder]).rungs[2]
    assert study.cached_scores(rung, {**settings, "seed": 1}, tmp_path / "out" / "scores") == 1
    assert loaded == ["steps5", "steps8"]


def test_levels_that_are_scored_outlive_a_kill(summary, ladder, tmp_path, monkeypatch):
    """Of the seven levels of a run the fourth is killed: the other three are not asked again."""
    shutil.copytree(ladder / "emergence", tmp_path / "out")
    lost = next(f for f in (tmp_path / "out/scores").iterdir() if read_json(f)["of"]["run"].endswith("steps5"))
    before, score, asked = lost.read_bytes(), scoring.level_scores, []
    lost.unlink()

    def killed(*args):
        asked.append(args)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(scoring, "level_scores", killed)
    with pytest.raises(KeyboardInterrupt):
        study.run_emergence([ladder], output=tmp_path / "out", **QUICK)
    assert not lost.exists()
    assert study.run_emergence([ladder], output=tmp_path / "out", **QUICK) == summary
    assert len(asked) == 4 + 4 and lost.read_bytes() == before
    assert len(list((tmp_path / "out/scores").iterdir())) == 3  # nothing is left of the parts


def test_log_probabilities_are_those_of_the_whole_text(ladder):
    """Of prompt and target encoded together, under the plain forward pass without padding."""
    trained = load_run(ladder / "steps8", backend="cpu")
    questions = task_questions("sums", 2, trained.tokenizer, 100, items=3, shots=1, seed=0)
    found = TaskPrograms(trained, 8, 4).logprobs(questions)
    model = trained.model
    logprobs = jax.jit(lambda lm, *row: jax.nn.log_softmax(model.logits(lm, model.hidden_states(lm, *row)), axis=-1))
    for item, prompt, target, value in zip(questions.items, questions.prompts, questions.targets, found):
        ids = [*prompt, *target]
        text = trained.tokenizer.decode(ids)
        assert text.endswith(item.line) and trained.tokenizer.encode(text) == ids[1:]
        row = (np.array([each]) for each in (ids, range(len(ids)), [1] * len(ids)))
        nats = logprobs(trained.params["lm"], *row)[0]
        assert value == pytest.approx(sum(float(nats[t - 1, ids[t]]) for t in range(len(prompt), len(ids))), abs=1e-3)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.required_corpus != "stdlib"])
def test_prompt_and_target_are_encoded_as_the_corpus_is(ladder, name):
    tokenizer = load_run(ladder / "steps3", backend="cpu").tokenizer
    for level in TASKS[name].levels:
        questions = task_questions(name, level, tokenizer, 100, items=5, shots=2, seed=0)
        for prompt, target, item in zip(questions.prompts, questions.targets, questions.items):
            assert tokenizer.encode(tokenizer.decode(prompt) + item.target) == [*prompt[1:], *target]
            assert len(prompt) <= questions.prompt_length <= 100
            assert tokenizer.decode(prompt).count("\n") == questions.shots == (2 if TASKS[name].allows_examples else 0)


def test_fewer_examples_are_shown_where_there_is_no_room(ladder):
    tokenizer = load_run(ladder / "steps3", backend="cpu").tokenizer
    assert task_questions("copying", 16, tokenizer, 60, items=3, shots=2, seed=0).shots == 1
    assert task_questions("copying", 16, tokenizer, 30, items=3, shots=2, seed=0).shots == 0
    assert task_questions("copying", 16, tokenizer, 12, items=3, shots=2, seed=0) is None
    assert all("\n" in tokenizer.decode([i]) for i in newline_ids(tokenizer))


def test_tasks_are_those_that_the_corpus_tells():
    assert tasks_for_corpora({"drills"}) == ["copying", "sums", "brackets", "facts"]
    assert tasks_for_corpora({"stdlib", "chitchat"}) == ["copying", "sums", "brackets", "idioms"]


def refused(match, folders, **options):
    with pytest.raises(UserError, match=match):
        study.run_emergence(folders, **options)


def test_bad_input(ladder, tmp_path):
    config = read_json(ladder / "steps3" / "config.json")
    for name, changes in (("reward", {"stage": {"name": "reward"}}), ("later", {"init_from": "runs/other"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **changes}))
    refused("no folder is given", [])
    refused("there is no folder .*none", [tmp_path / "none"])
    refused("holds no run of lm train", [ladder / "steps3" / "checkpoints"])
    refused("reward is of stage reward, and a ladder is of pretraining", [ladder, tmp_path / "reward"])
    refused("later continued from runs/other, so its FLOPs are not all", [tmp_path / "later"])
    refused("needs finished runs of 3 different amounts of compute, and there are 1 in", [ladder / "steps3"])
    refused("--tasks=sewing is no task: choose among copying", [ladder], tasks=["sewing"])
    refused("samples is 4; it must be at least 8", [ladder], samples=4)
    refused("cannot make the folder .*: ", [ladder], output=ladder / "steps3" / "config.json")
    with pytest.raises(UserError, match="--item is not a flag of this program; did you mean --items"):
        study.program([str(ladder), "--item=3"])


def test_runs_that_are_not_on_the_ladder_are_named(ladder, tmp_path, capsys):
    """An unfinished run is left out, and so is the worse of two runs of equal compute."""
    folder = tmp_path / "runs"
    shutil.copytree(ladder, folder)
    shutil.rmtree(folder / "emergence", ignore_errors=True)
    for name in ("worse", "begun"):
        shutil.copytree(folder / "steps8", folder / name)
    told = read_json(folder / "worse/summary.json")
    told["held_out"]["bits_per_byte"] += 1
    (folder / "worse/summary.json").write_text(json.dumps(told))
    (folder / "begun/summary.json").unlink()
    found = read_ladder([folder, folder / "steps3"])  # one that is given twice counts once
    assert [rung.path.name for rung in found.rungs] == ["steps3", "steps5", "steps8"]
    assert [rung.path.name for rung in found.passed_over] == ["worse"] and [a.path.name for a in found.missing] == [
        "begun"
    ]
    study.print_excluded_runs(found)
    out = capsys.readouterr()
    assert "worse is skipped" in out.out and "begun is unfinished and not on the ladder" in out.err


def test_a_sweep_is_a_ladder(ladder, tmp_path):
    """Its own config is no run; its trials are."""
    shutil.copytree(ladder, tmp_path / "trials")
    (tmp_path / "sweep.json").write_text("{}")
    shutil.copy(ladder / "steps3" / "config.json", tmp_path)
    assert len(read_ladder([tmp_path]).rungs) == 3


def test_statistics_know_levels_that_not_all_were_asked():
    each = made(STEADY)
    del each[0]["sums"]["3"]
    assert jumps.task_curves(each, samples=4, k=2) == []

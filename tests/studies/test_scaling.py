"""lm scaling: the plan, the whole program, kills, bad input. Its runs are those of tests/scaling_trial.py."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from runs import EXPERIMENTS, ROOT, made_text
from scaling_trial import LAW

from lm.core.config import call_with_options
from lm.core.errors import UserError
from lm.runs import console
from lm.runs.workdir import read_json
from lm.studies.scaling import fit, page, study
from lm.studies.scaling.ladder import LadderPlan, PlannedRun, ladder_plan, planned_run, planned_runs
from lm.studies.scaling.parametric import ScalingLaw
from lm.studies.scaling.runs import SIX_ND, ScalingRun, ladder_runs
from lm.sweep import controller
from lm.sweep.space import ConfigSource

TINY = f"--config={EXPERIMENTS / 'scaling.py'}:tiny"
CODE = """
import sys
from lm.studies.scaling import study
from lm.sweep import controller
from lm.runs.console import run_program
of = controller.TrialGoal.from_config
controller.TrialGoal.from_config = lambda *args: of(*args)._replace(module="tests.scaling_trial")
controller.POLL_SECONDS = 0.02
controller.device_environments = lambda jobs: [{}] * (jobs or 1)
run_program(study.program)
"""


def command(root: Path, *flags: str) -> list[str]:
    return [TINY, f"--workdir={root}", f"--config.data.corpus={root.parent / 'text'}", "--jobs=2", *flags]


def started(root: Path, *flags: str) -> subprocess.Popen:
    """The program in a process of its own, with the stand-in for its runs."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *command(root, *flags)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def starts(root: Path) -> dict[str, int]:
    """How often each run was started."""
    return {str(file.parent.relative_to(root)): len(file.read_text().split()) for file in root.rglob("starts")}


def until(condition, process: subprocess.Popen, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def enter_stand_in(patch) -> None:
    of = controller.TrialGoal.from_config
    patch(controller.TrialGoal, "from_config", lambda *args: of(*args)._replace(module="tests.scaling_trial"))
    patch(controller, "POLL_SECONDS", 0.02)
    patch(controller, "device_environments", lambda jobs: [{}] * (jobs or 1))


@pytest.fixture(scope="module")
def ladder(tmp_path_factory) -> dict:
    """A tiny ladder, killed while the larger run goes on; then given again, and left to end."""
    folder = tmp_path_factory.mktemp("scaling")
    root, pause = folder / "s", folder / "s" / "pause"
    made_text(folder / "text")
    process = started(root)
    until(lambda: (root / "tokenizer").exists(), process)
    pause.write_text("0")
    until(lambda: (root / "ladder" / "trials" / "0007.json").exists(), process)
    pause.write_text("60")
    until(lambda: starts(root).get("larger/trials/0000"), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    predicted = (root / "prediction.json").read_bytes()
    pause.write_text("0")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
        enter_stand_in(patch.setattr)
        study.program(command(root))
    return {"root": root, "said": said.getvalue(), "predicted": predicted}


def test_it_ends_with_a_page_and_a_figure(ladder):
    root = ladder["root"]
    assert all((root / f"scaling.{ending}").stat().st_size > 1000 for ending in ("html", "svg", "png"))
    page = (root / "scaling.html").read_text()
    assert "nan" not in page.lower().split() and "held-out loss, nats a token" in page
    for sentence in ("N_opt grows as C^", "Predicted at", "The same runs, counted otherwise"):
        assert sentence in ladder["said"] and sentence in page


def test_what_was_done_before_a_kill_is_not_done_again(ladder):
    counts = starts(ladder["root"])
    assert counts.pop("larger/trials/0000") == 2
    assert len(counts) == 8 and set(counts.values()) == {1}


def test_the_prediction_stands_before_the_larger_run_starts_and_is_not_touched_again(ladder):
    root = ladder["root"]
    prediction = (root / "prediction.json").stat().st_mtime
    first = (root / "larger" / "trials" / "0000").stat()
    assert (root / "prediction.json").read_bytes() == ladder["predicted"]
    assert prediction < (root / "larger" / "trials" / "0000" / "starts").stat().st_mtime <= first.st_mtime
    assert prediction < (root / "larger" / "sweep.json").stat().st_mtime


def test_it_finds_the_law_of_its_runs(ladder):
    """Eight runs with a spread of 0.2 %: the larger one is predicted, and the intervals contain the true law."""
    summary = read_json(ladder["root"] / "summary.json")
    law = next(iter(summary["laws"].values()))
    assert all(law[name]["low"] <= value <= law[name]["high"] for name, value in LAW.items())
    loss = summary["prediction"]["loss"]
    assert loss["low"] < summary["larger"]["loss"] < loss["high"] and loss["high"] - loss["low"] < 0.5


def test_its_runs_are_listed_as_planned(ladder):
    runs = ladder_runs(ladder["root"])
    assert [run.budget for run in runs] == [1e9] * 4 + [4e9] * 4 + [8e9]
    assert all(run.flops == pytest.approx(run.budget, rel=0.1) for run in runs)  # whole steps
    assert all((run.workdir / "config.json").exists() for run in runs)
    widths = [run.width for run in runs[:4]]
    assert widths == sorted(set(widths))


def test_another_config_is_refused(ladder, capsys):
    with pytest.raises(UserError, match="was made with another config .ladder.target_flops: "):
        study.program(command(ladder["root"], "--config.ladder.target_flops=9e9"))


def test_a_failed_run_stops_it_with_its_error(ladder, tmp_path, monkeypatch):
    enter_stand_in(monkeypatch.setattr)
    root = tmp_path / "larger"
    (root / "trials" / "0000").mkdir(parents=True)
    (root / "trials" / "0000" / "torn").touch()
    (root / "sweep.json").write_text("{}")
    source = ConfigSource(TINY.removeprefix("--config="))
    flags = study.parsed_flags([], "", study.FLAGS)
    with pytest.raises(UserError, match="1 of 1 runs in .* failed; the first: the disk is torn: mend it; .*--retry_f"):
        study.run_planned(flags, source, root, [planned_run(source, 1e9, 8)])


def test_without_valleys_the_law_is_told_alone(tmp_path):
    """Runs that are all too small: the loss falls with size at every budget, so no best size is told."""
    law, found = ScalingLaw(**LAW), []
    for budget in (1e9, 4e9):
        for width, n in zip((8, 16, 24, 32), (200.0, 300.0, 450.0, 700.0)):
            tokens = round(budget / 6 / n)
            loss = law.loss(n, tokens) + 0.3 * math.log(n / 200) * (1 - math.log(n / 200))
            found.append(ScalingRun(tmp_path, budget, width, round(n), round(n / 2), tokens, budget, loss, 1.0, 0.1))
    plan = LadderPlan((1e9, 4e9), 4, 8e9, (1.0, 2.0), 20)
    parabolas, laws = fit.fitted_laws(found, plan)
    rung = PlannedRun(8e9, 40, 900, 400, 5400.0, 100, 1_000_000)
    assert fit.compute_optimal_size(parabolas, laws, 8e9) == laws[SIX_ND].law.optimum(8e9)[0]
    larger = found[-1]._replace(budget=8e9, parameters=900, tokens=1_000_000)
    summary = fit.scaling_summary(found, parabolas, laws, fit.loss_prediction(laws, rung), larger, "then")
    assert "NaN" not in json.dumps(summary) and all(one["sizes"] is None for one in summary["growth"].values())
    assert sum("so the growth is unknown" in sentence for sentence in fit.conclusion_sentences(summary)) == 3
    assert "nan" not in page.write_page(tmp_path, summary, parabolas, laws)[0].read_text().lower()


def refused(capsys, monkeypatch, *flags) -> str:
    monkeypatch.setattr(sys, "argv", ["", *map(str, flags)])
    with pytest.raises(SystemExit) as exit:
        console.run_program(study.program)
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    "override, error",
    [
        (
            "min_flops=1e7",
            "a budget of 1e+07 FLOPs pays 10 steps or more of 0 widths, and a ladder needs 4: raise ladder",
        ),
        (
            "min_flops=9e9",
            "ladder.min_flops 9e+09, max_flops 4e+09, target_flops 8e+09: each must be above the one before",
        ),
        ("sizes_per_budget=3", "ladder.sizes_per_budget is 3; it must be at least 4"),
        ("budgets=1", "ladder.budgets is 1; it must be at least 2"),
        ("tokens_per_parameter=(9,1)", "ladder.tokens_per_parameter is 9, 1: give two numbers, the smaller first"),
    ],
)
def test_a_ladder_that_cannot_be(override, error, capsys, monkeypatch, tmp_path):
    said = refused(capsys, monkeypatch, TINY, f"--workdir={tmp_path / 's'}", f"--config.ladder.{override}")
    assert said.startswith(error) and not (tmp_path / "s").exists()


def test_what_is_given_together(capsys, monkeypatch):
    assert "leave --config and --workdir out" in refused(capsys, monkeypatch, "--points=a.csv", TINY)
    assert refused(capsys, monkeypatch).startswith("give --config=experiments/scaling.py and --workdir=DIR, or --poi")
    other = f"--config={EXPERIMENTS / 'pretrain.py'}"
    assert "the config has no `vocabulary`: is it a config of lm scaling?" in refused(
        capsys, monkeypatch, other, "--workdir=x"
    )


def test_the_plan_spends_each_budget(monkeypatch):
    source = ConfigSource(f"{EXPERIMENTS / 'scaling.py'}")
    plan = call_with_options(ladder_plan, source.config({}).ladder, name="ladder")
    rungs = planned_runs(plan, source)
    assert len(rungs) == 25 and plan.budgets == pytest.approx([4e10, 10**11.1021, 4e11, 10**12.1021, 4e12], rel=1e-4)
    for rung in rungs:
        assert rung.tokens * rung.flops_per_token == pytest.approx(rung.budget, rel=0.01)
        assert source.config(rung.overrides).optimizer.total_steps == rung.steps
    for budget in plan.budgets:
        ratios = [rung.tokens / rung.parameters for rung in rungs if rung.budget == budget]
        assert ratios == sorted(ratios, reverse=True) and ratios[0] / ratios[-1] > 20


def test_anyone_s_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "BOOTSTRAP_DRAWS", 50)
    law, rows = ScalingLaw(**LAW), ["parameters,tokens,loss"]
    for n in (1e4, 3e4, 1e5, 3e5):
        rows += [f"{n:.0f},{d:.0f},{law.loss(n, d):.5f}" for d in (1e5, 1e6, 1e7)]
    (tmp_path / "runs.csv").write_text("\n".join(rows))
    study.program([f"--points={tmp_path / 'runs.csv'}"])
    said = capsys.readouterr().out
    found = {line.split()[0]: line.split()[1:] for line in said.split("\n") if line.split()[:1] and "[" in line}
    for name, value in LAW.items():
        assert float(found[name][0]) == pytest.approx(value, rel=0.02)
        low, high = (float(text.strip("[],")) for text in found[name][1:3])
        assert low <= float(found[name][0]) <= high
    assert "12 runs" in said and "percentiles of 50 fits" in said

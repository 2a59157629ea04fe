"""lm sweep: what is tried, who takes what, what becomes of it. Trials are tests/sweep_trial.py but for two."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from runs import EXPERIMENTS, ROOT, base

from lm.core.config import load_config
from lm.core.errors import UserError
from lm.runs.workdir import read_json, read_metrics
from lm.sweep import controller, launch, space
from lm.sweep.board import state_counts_text, trial_table, trials_to_show
from lm.sweep.space import ConfigSource, axis, product, zip_axes
from lm.sweep.study import Study, TrialStatus
from lm.sweep.trials import TrialGoal, failure_reason, trial_command

# Its trials import what get_config needs and no JAX, so each starts in a tenth of the time.
CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=""):
    return ConfigDict(dict(seed=0, rate=0.1, pause=0.0, fate="well", sizes=(1, 2), layers=2,
                           stage=dict(name="pretrain"), train=dict(steps=4, evaluate_every=0))).lock()

def sweep(arg=""):
    from lm.sweep.space import axis, product

    return product(axis("layers", 1, 2), axis("rate", 0.01, 0.1))
"""


@pytest.fixture
def file(tmp_path) -> str:
    (tmp_path / "config.py").write_text(CONFIG)
    return str(tmp_path / "config.py")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Trials are the stand-in's, polled often."""
    of = TrialGoal.from_config
    monkeypatch.setattr(
        controller.TrialGoal, "from_config", lambda *args: of(*args)._replace(module="tests.sweep_trial")
    )
    monkeypatch.setattr(controller, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(controller, "device_environments", lambda jobs: [{}] * (jobs or 1))


def swept(file: str, folder: Path, *flags: str) -> list[dict]:
    """What lies beside the runs, by number."""
    controller.program([f"--config={file}", f"--workdir={folder}", *flags])
    return told(folder)


def told(folder: Path) -> list[dict]:
    return [read_json(path) for path in sorted((folder / "trials").glob("*.json"))]


def test_axes_multiply_and_zip():
    a, b = axis("a", 1, 2), axis("b", 3, 4)
    assert product(a, b) == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]
    assert zip_axes(a, b) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    with pytest.raises(ValueError):
        zip_axes(a, axis("b", 3))


def test_a_grid_is_cut_outside_brackets(file):
    assert space.grid_points(["sizes=(1,2),(3,4)", "rate=1e-3"]) == [
        {"sizes": "(1,2)", "rate": "1e-3"},
        {"sizes": "(3,4)", "rate": "1e-3"},
    ]
    assert space.typed_overrides(ConfigSource(file), {"sizes": "(3,4)", "rate": "1e-3"}) == {
        "sizes": [3, 4],
        "rate": 0.001,
    }


def test_a_space_has_the_types_of_the_config(file):
    found = space.search_space(["rate=log:1e-4:1e-1", "layers=1:8", "fate=well,torn"], ConfigSource(file))
    assert found == {
        "rate": FloatDistribution(1e-4, 1e-1, log=True),
        "layers": IntDistribution(1, 8),
        "fate": CategoricalDistribution(["well", "torn"]),
    }


def test_options_that_the_file_does_not_list_can_be_swept(file, tmp_path, capsys):
    source = ConfigSource(str(EXPERIMENTS / "sft.py"))
    assert space.typed_overrides(source, {"optimizer.b2": "0.9", "train.evaluate_every": "5"}) == {
        "optimizer.b2": 0.9,
        "train.evaluate_every": 5,
    }
    found = space.search_space(["optimizer.b2=0.9:0.999", "train.keep=1:3", "model.dtype=float32,bfloat16"], source)
    assert found == {
        "optimizer.b2": FloatDistribution(0.9, 0.999),
        "train.keep": IntDistribution(1, 3),
        "model.dtype": CategoricalDistribution(["float32", "bfloat16"]),
    }
    pipeline = ConfigSource(str(EXPERIMENTS / "quickstart.py"))
    assert space.typed_overrides(pipeline, {"ppo.stage.kl_gain": "0.2"}) == {"ppo.stage.kl_gain": 0.2}
    grid = ["--grid", "optimizer.b2=0.9,0.99", "optimizer.total_steps=200,300"]
    assert swept(str(EXPERIMENTS / "sft.py"), tmp_path / "s", *grid, "--dry_run") == []
    assert "optimizer.b2" in capsys.readouterr().out
    trial = source.config({"optimizer.total_steps": "300"})
    assert (trial.optimizer.total_steps, trial.train.steps) == (300, 170)  # a sweep of schedules is no sweep of lengths
    with pytest.raises(
        UserError, match="config.optimizer.weigth_decay is not in .*; did you mean config.optimizer.weight"
    ):
        swept(str(EXPERIMENTS / "sft.py"), tmp_path / "s", "--grid", "optimizer.weigth_decay=0,1")


def test_a_sweep_of_the_file_with_seeds(file, tmp_path, capsys):
    runs = swept(file, tmp_path / "s", "--seeds=2")
    # sweep() has 4 settings; held-out loss = (log10(rate) + 2)^2 + 0.01 seed + 1/4
    assert [(run["overrides"]["rate"], run["seed"], run["state"]) for run in runs] == [
        (rate, seed, "complete") for _ in (1, 2) for rate in (0.01, 0.1) for seed in (0, 1)
    ]
    assert [run["value"] for run in runs[:4]] == pytest.approx([0.25, 0.26, 1.25, 1.26])
    said = capsys.readouterr().out
    assert "8 trials: 8 complete; held_out/loss, low is good" in said
    assert "best on average: layers 1, rate 0.01: held_out/loss 0.255" in said
    config = read_json(tmp_path / "s" / "trials" / "0005" / "config.json")
    assert (config["layers"], config["rate"], config["seed"]) == (2, 0.01, 1)


def test_given_again_it_repeats_nothing(file, tmp_path):
    swept(file, tmp_path / "s", "--grid", "rate=0.01,0.1")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s" / "trials").rglob("*") if path.is_file()}
    swept(file, tmp_path / "s", "--grid", "rate=0.01,0.1")
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_search_draws_prunes_and_averages_seeds(file, tmp_path):
    flags = ["--search=tpe", "--trials=8", "--space", "rate=log:1e-4:1", "--pruner=median", "--seeds=2"]
    runs = swept(file, tmp_path / "s", *flags)
    rates = {run["number"]: run["overrides"]["rate"] for run in runs}
    assert len(set(rates.values())) == 8 and all(1e-4 <= rate <= 1 for rate in rates.values())
    pruned = [run for run in runs if run["state"] == "pruned"]
    whole = [run for run in runs if run["state"] == "complete"]
    assert pruned, "the median pruner stopped nothing"
    assert {run["seed"] for run in whole} == {0, 1} and {run["seed"] for run in pruned} == {0}
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 's' / 'study.db'}")
    for trial in study.trials:
        if trial.state.name == "COMPLETE":
            seeds = [run["value"] for run in whole if run["number"] == trial.user_attrs["number"]]
            assert trial.value == pytest.approx(sum(seeds) / 2)


def test_the_same_search_draws_the_same(file, tmp_path):
    flags = ["--search=random", "--trials=2", "--space", "rate=log:1e-4:1"]
    one, other = (swept(file, tmp_path / name / "s", *flags) for name in "ab")
    assert [run["overrides"] for run in one] == [run["overrides"] for run in other]


@pytest.mark.parametrize(
    "fate, error",
    [
        ("torn", "data.rate is torn: mend it"),
        ("memory", "out of memory: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 TB"),
        ("killed", "killed (signal 9), as the system does when memory runs out: a smaller batch or model"),
    ],
)
def test_a_failed_trial_keeps_its_error_and_stops_nobody(file, tmp_path, capsys, fate, error):
    runs = swept(file, tmp_path / "s", "--grid", f"fate={fate},well")
    assert [run["state"] for run in runs] == ["failed", "complete"]
    assert runs[0]["error"].startswith(error)
    assert f"trial 0 failed: {error}" in capsys.readouterr().out.replace("\n", " ")
    swept(file, tmp_path / "s", "--grid", f"fate={fate},well")
    assert len(read_metrics(tmp_path / "s" / "trials" / "0000")) == 2  # it did not run again
    swept(file, tmp_path / "s", "--grid", f"fate={fate},well", "--retry_failed")
    assert len(read_metrics(tmp_path / "s" / "trials" / "0000")) > 2  # now it did, from where it stopped


def test_all_trials_failed_is_an_error(file, tmp_path):
    with pytest.raises(UserError, match="no trial was completed: see .*trials; the first: data.rate is torn"):
        swept(file, tmp_path / "s", "--grid", "fate=torn")


def test_a_metric_that_nobody_logs_stops_the_sweep(file, tmp_path):
    with pytest.raises(UserError, match="logged no held_out/accuracy: give --metric, one of held_out/loss, loss"):
        swept(file, tmp_path / "s", "--grid", "rate=0.1,0.2", "--metric=held_out/accuracy")
    with pytest.raises(UserError, match="logged no held_out/loss: give --metric, one of loss"):
        swept(file, tmp_path / "t", "--grid", "fate=silent")


def started(file: str, folder: Path, *flags: str, patch: str = "", hold: str = "") -> subprocess.Popen:
    """The sweep in a process of its own, with the stand-in. patch: a statement to run before it. hold: "NAME:STEP"
    after which that trial waits to be killed."""
    code = (
        "import sys; from lm.sweep import controller; from lm.runs.console import run_program\n"
        f"of = controller.TrialGoal.from_config\n{patch}\n"
        "controller.TrialGoal.from_config = lambda *args: of(*args)._replace(module='tests.sweep_trial')\n"
        "controller.POLL_SECONDS = 0.02; controller.device_environments = lambda jobs: [{}] * (jobs or 1)\n"
        "run_program(controller.program)"
    )
    command = [sys.executable, "-c", code, f"--config={file}", f"--workdir={folder}", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOLD": hold}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_after_a_kill_it_goes_on_where_it_was(file, tmp_path):
    flags = ["--grid", "rate=0.01,0.1", "--config.train.steps=20"]
    process = started(file, tmp_path / "s", *flags, hold="0001:6")
    second = tmp_path / "s" / "trials" / "0001"
    until(lambda: len(read_metrics(second)) == 6)
    first = (tmp_path / "s" / "trials" / "0000.json").stat().st_mtime_ns
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    runs = swept(file, tmp_path / "s", *flags)
    assert [run["state"] for run in runs] == ["complete", "complete"]
    assert (tmp_path / "s" / "trials" / "0000.json").stat().st_mtime_ns == first
    steps = [row["step"] for row in read_metrics(second)]
    assert steps == [*range(1, 21), 20]  # continued, not repeated


def test_interrupted_it_gives_its_trial_back(file, tmp_path):
    process = started(file, tmp_path / "s", "--grid", "rate=0.01", hold="0000:3")
    until(lambda: len(read_metrics(tmp_path / "s" / "trials" / "0000")) == 3)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "the same command continues" in said
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 's' / 'study.db'}")
    assert study.trials[-1].state.name == "WAITING"


JOINED = ("--grid", "rate=0.01,0.02,0.05,0.1,0.2,0.5", "--config.pause=0.1")


def joined(file: str, folders: tuple[Path, Path], *flags: str) -> None:
    """Two processes share the trials of one study: each takes some, none is taken twice."""
    processes = [started(file, folder, *flags, *JOINED) for folder in folders]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    runs = [run for folder in dict.fromkeys(folders) for run in told(folder)]
    assert sorted(run["number"] for run in runs) == list(range(6))
    assert all(run["state"] == "complete" for run in runs)
    rows = [read_metrics(path) for folder in dict.fromkeys(folders) for path in folder.glob("trials/*/metrics.jsonl")]
    assert [len(each) for each in rows] == [5] * 6


@pytest.mark.parametrize("made", ["trials", "workers", "sweep.json.tmp"])
def test_a_worker_that_starts_at_the_same_moment_is_no_foreign_folder(file, tmp_path, made):
    """What it has made so far; so too for what a kill at that moment leaves."""
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / made).write_text("{") if "." in made else (tmp_path / "s" / made).mkdir()
    (run,) = swept(file, tmp_path / "s", "--grid", "rate=0.1")
    assert run["state"] == "complete" and read_json(tmp_path / "s" / "sweep.json")["metric"] == "held_out/loss"


def workers_of(url: str) -> list[str]:
    return [trial.user_attrs["worker"] for trial in optuna.load_study(study_name="s", storage=url).trials]


def test_two_processes_share_a_study_in_sqlite(file, tmp_path):
    joined(file, (tmp_path / "s", tmp_path / "s"))
    assert len(set(workers_of(f"sqlite:///{tmp_path / 's' / 'study.db'}"))) == 2


@pytest.fixture
def postgres(tmp_path_factory) -> str:
    """The URL of a PostgreSQL server of this test's own, on a free port and in a temporary folder."""
    folders = [shutil.which("initdb"), *sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)]
    found = [Path(path).resolve().parent for path in folders if path and Path(path).resolve().exists()]
    if not found:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql): two machines at one study are not tried")
    data = tmp_path_factory.mktemp("postgres")
    # The server refuses to run as root.
    owner = {"user": "nobody", "cwd": "/"} if os.getuid() == 0 else {}
    if owner:
        for folder in (data, *(parent for parent in data.parents if not parent.stat().st_mode & 0o001)):
            folder.chmod(0o755)  # nobody must be able to pass
        shutil.chown(data, "nobody")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = dict(check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **owner)
    subprocess.run([found[0] / "initdb", "-D", data / "db", "-U", "lm", "-A", "trust"], **run)
    options = f"-p {port} -k {data} -c listen_addresses=127.0.0.1 -c fsync=off"
    subprocess.run([found[0] / "pg_ctl", "-D", data / "db", "-o", options, "-l", data / "log", "-w", "start"], **run)
    yield f"postgresql+psycopg://lm@127.0.0.1:{port}/postgres"
    subprocess.run([found[0] / "pg_ctl", "-D", data / "db", "-m", "fast", "-w", "stop"], **{**run, "check": False})


def test_two_machines_share_a_study_in_postgresql(file, tmp_path, postgres):
    # Two folders, as two machines have: nothing but the database keeps their workers apart.
    joined(file, (tmp_path / "one" / "s", tmp_path / "other" / "s"), f"--storage={postgres}")
    assert len(set(workers_of(postgres))) == 2
    assert swept(file, tmp_path / "third" / "s", f"--storage={postgres}", *JOINED) == []  # nothing is left


@pytest.mark.parametrize(
    "flags, error",
    [
        (["--grid", "rat=1"], "config.rat is not in .*; did you mean config.rate?"),
        (["--grid", "rate=low"], "config.rate=low: expected a number"),
        (["--grid", "rate"], "--grid rate: write KEY=V1,V2"),
        (["--grid", "rate="], "--grid rate=: write KEY=V1,V2"),
        (["--grid", "seed=1,2"], "seeds are given by --seeds=N"),
        (["--search=tpe", "--trials=2"], "--search=tpe needs --space"),
        (["--search=tpe", "--space", "rate=0:1"], "--search=tpe needs --trials=N"),
        (["--search=tpe", "--trials=0", "--space", "rate=0:1"], "trials is 0"),
        (["--search=tpe", "--trials=2", "--space", "rat=0:1"], "config.rat is not in"),
        (["--search=tpe", "--trials=2", "--space", "rate=1:0"], "give LOW < HIGH"),
        (["--search=tpe", "--trials=2", "--space", "rate=log:0:1"], "give 0 < LOW < HIGH"),
        (["--search=tpe", "--trials=2", "--space", "rate=0:1:2"], "write rate=LOW:HIGH"),
        (["--search=tpe", "--trials=2", "--space", "fate=a:b"], "config.fate is no number"),
        (["--space", "rate=0:1"], "--space needs --search"),
        (["--grid", "rate=1", "--search=tpe", "--space", "rate=0:1"], "--grid and --search: give one"),
        (["--seeds=0"], "seeds is 0"),
        (["--metric=sft:loss"], "the config is of a single stage"),
        (["--storage=nonsense"], "--storage nonsense is no database URL"),
        (["--storage=oracle9i://u:secret@h/d"], r"--storage oracle9i://u:\*\*\*@h/d: no driver"),
        (["--storage=postgresql+psycopg://u:secret@127.0.0.1:1/d"], r"u:\*\*\*@127.0.0.1:1/d cannot be reached"),
        (["--launcher=slurm", "--search=bad"], "invalid choice"),
    ],
)
def test_bad_input_is_one_line(file, tmp_path, flags, error):
    with pytest.raises(UserError, match=error) as caught:
        swept(file, tmp_path / "s", *flags)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert not told(tmp_path / "s")


def test_an_empty_sweep_and_none(file, tmp_path):
    Path(file).write_text(CONFIG.replace('product(axis("layers", 1, 2), axis("rate", 0.01, 0.1))', "[]"))
    with pytest.raises(UserError, match=r"sweep\(\) returns nothing to try"):
        swept(file, tmp_path / "s")
    Path(file).write_text(CONFIG.replace("def sweep", "def other"))
    with pytest.raises(UserError, match=r"has no sweep\(\): give --grid"):
        swept(file, tmp_path / "s")


def test_another_plan_and_a_foreign_folder_are_refused(file, tmp_path):
    swept(file, tmp_path / "s", "--grid", "rate=0.1")
    with pytest.raises(UserError, match="the study s has 1 trials, and this command leaves out 1 of them: name these"):
        swept(file, tmp_path / "s", "--grid", "rate=0.2")
    with pytest.raises(UserError, match="the study s was begun with another config: give another --workdir"):
        swept(file, tmp_path / "s", "--grid", "rate=0.1", "--config.layers=3")
    with pytest.raises(UserError, match="is not a sweep's folder: it holds config.py"):
        swept(file, tmp_path, "--grid", "rate=0.1")


def test_dry_run_touches_nothing(file, tmp_path, capsys):
    assert swept(file, tmp_path / "s", "--dry_run") == [] and not (tmp_path / "s").exists()
    said = capsys.readouterr().out
    assert "4 trials" in said and "layers" in said and "0.01" in said


def test_the_goal_of_a_pipeline_is_a_stage():
    goal = TrialGoal.from_config(load_config(f"{EXPERIMENTS / 'quickstart.py'}:tiny"), "", "")
    assert (goal.part, goal.metric, goal.direction) == ("ppo", "held_out/reward", "maximize")
    goal = TrialGoal.from_config(load_config(f"{EXPERIMENTS / 'quickstart.py'}:tiny"), "reward:held_out/accuracy", "")
    assert (goal.part, goal.watched, goal.direction) == ("reward", "accuracy", "maximize")
    with pytest.raises(UserError, match="nowhere is no stage of the config; choose among tokenizer, pretrain"):
        TrialGoal.from_config(load_config(f"{EXPERIMENTS / 'quickstart.py'}:tiny"), "nowhere:loss", "")
    with pytest.raises(UserError, match="lm sweep varies configs of lm train and lm pipeline"):
        TrialGoal.from_config(load_config(f"{EXPERIMENTS / 'evaluate.py'}:tiny"), "", "")


def test_every_seed_of_a_pipeline_is_set():
    given = trial_command(
        ConfigSource(f"{EXPERIMENTS / 'quickstart.py'}:tiny"),
        "lm.pipeline.runner",
        {"ppo.stage.beta": "0.2"},
        3,
        Path("w"),
    )
    assert {"--config.sft.seed=3", "--config.ppo.seed=3", "--config.ppo.stage.beta=0.2", "--workdir=w"} <= set(given)


def test_faults_in_one_line():
    assert failure_reason("a\nTraceback\nValueError: no\n", 1) == "ValueError: no"
    assert failure_reason("error: first\nmore\n", 2) == "first"
    assert failure_reason("", 3) == "ended with status 3"
    assert failure_reason("", -11) == "ended by signal 11"


def test_devices_are_shared_out():
    assert launch.split_devices("cpu", 8, None, {}) == [{}] and launch.split_devices("cpu", 1, 2, {}) == [{}, {}]
    name = "CUDA_VISIBLE_DEVICES"
    assert launch.split_devices("gpu", 2, None, {}) == [{name: "0"}, {name: "1"}]
    assert launch.split_devices("gpu", 4, 2, {name: "4,5,6,7"}) == [{name: "4,5"}, {name: "6,7"}]
    assert [share["TPU_VISIBLE_CHIPS"] for share in launch.split_devices("tpu", 4, 2, {})] == ["0,1", "2,3"]
    with pytest.raises(UserError, match="--jobs=3 is more than the 2 devices"):
        launch.split_devices("gpu", 2, 3, {})
    assert launch.device_environments(2) == [{}, {}]


def test_the_board_shows_what_matters():
    def one(number, state, value=None):
        return TrialStatus(number, state, {"a.rate": f"0.{number}1"}, (0,), value, None, None, None, None)

    told = [
        *(one(i, "complete", 1.0) for i in range(40)),
        one(40, "running"),
        *(one(i, "waiting") for i in range(41, 60)),
    ]
    assert state_counts_text(told) == "60 trials: 40 complete, 1 running, 19 waiting"
    numbers = [each.number for each in trials_to_show(told)]
    assert len(numbers) == 24 and numbers[-5:] == [40, 41, 42, 43, 44] and numbers[:2] == [21, 22]
    assert trial_table(told[:2], ["a.rate"]) == (["trial", "rate", "value"], [["0", "0.01", "1"], ["1", "0.11", "1"]])


@pytest.mark.parametrize("launcher, package", [("slurm", "submitit"), ("ray", "ray")])
def test_a_launcher_that_is_not_installed(file, tmp_path, monkeypatch, launcher, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"--launcher={launcher} needs .*: pip install {package}"):
        swept(file, tmp_path / "s", f"--launcher={launcher}", "--workers=2")


def test_a_sweep_of_lm_train(tmp_path, tmp_path_factory, monkeypatch, capsys):
    monkeypatch.undo()
    folder = base(tmp_path_factory)
    flags = [f"--config.tokenizer={folder / 'run' / 'tokenizer'}", f"--config.data.corpus={folder / 'text'}"]
    (run,) = swept(f"{EXPERIMENTS / 'pretrain.py'}:tiny", tmp_path / "s", "--grid", "train.steps=3", *flags)
    workdir = tmp_path / "s" / "trials" / run["workdir"]
    assert run["state"] == "complete", capsys.readouterr().out
    assert run["value"] == read_json(workdir / "summary.json")["held_out"]["loss"]
    assert read_json(workdir / "config.json")["optimizer"]["total_steps"] == 3  # what refers to the swept key follows


def test_the_study_knows_who_died(tmp_path):
    (tmp_path / "workers").mkdir()

    def study():
        return Study(
            tmp_path,
            f"sqlite:///{tmp_path / 'study.db'}",
            "s",
            direction="minimize",
            sampler="random",
            pruner="none",
            steps=4,
            seed=0,
        )

    gone = study()
    gone.add_trials({}, space.trials_of_points([{"rate": "0.1"}], [0]))
    assert gone.claim({}).trial.overrides == {"rate": "0.1"}
    with study() as living:
        assert living.claim({}) is None  # the other one has it, and lives
        gone._place.close()  # as the kernel does when a process dies
        claim = living.claim({})
        assert claim.trial.number == 0 and [one.state for one in living.trial_statuses()] == ["running"]
        claim.mark_complete(1.5, 2.0)
        assert [(one.state, one.value, one.seconds) for one in living.trial_statuses()] == [("complete", 1.5, 2.0)]


@pytest.mark.peer
def test_workers_of_slurm_s_launcher_join_the_study(tmp_path, tmp_path_factory, monkeypatch):
    """submitit's own local cluster in the place of Slurm: two jobs, each this sweep's command."""
    monkeypatch.undo()
    folder = base(tmp_path_factory)
    flags = [f"--config.tokenizer={folder / 'run' / 'tokenizer'}", f"--config.data.corpus={folder / 'text'}"]
    launch = ["--launcher=slurm", "--workers=2", "--options", "cluster=local", "timeout_min=5"]
    runs = swept(f"{EXPERIMENTS / 'pretrain.py'}:tiny", tmp_path / "s", "--grid", "train.steps=3,4", *flags, *launch)
    assert [run["state"] for run in runs] == ["complete", "complete"]
    assert len(set(workers_of(f"sqlite:///{tmp_path / 's' / 'study.db'}"))) == 2

"""Bad input: one clear line on stderr, exit code 2, and whatever was good is still there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import EXPERIMENTS, ROOT, finished, saved, settings, small, stage_config

from lm import tokenizer
from lm.core import sharding
from lm.evaluate import models
from lm.feedback import auto_rank
from lm.pipeline import runner
from lm.runs import checkpoint, console
from lm.runs.checkpoint import restore_params
from lm.runs.workdir import load_trained_model, open_workdir, read_json, read_metrics
from lm.train import config, loop, warm_start

__all__ = ["finished", "small"]


@pytest.fixture
def refused(capsys, monkeypatch, small):
    """refused(program, *flags): the line it prints as it exits with 2, and nothing else on stderr."""

    def of(program, *flags) -> str:
        monkeypatch.setattr(sys, "argv", ["", *map(str, flags)])
        with pytest.raises(SystemExit) as exit:
            console.run_program(program.program)
        said = capsys.readouterr()
        assert exit.value.code == 2
        assert said.err.startswith("error: ") and said.err.endswith("\n") and said.err.count("\n") == 1, said.err
        assert "Traceback" not in said.out
        return said.err.removeprefix("error: ").strip()

    return of


@pytest.fixture
def stage(finished, tmp_path):
    """stage(name, *overrides): the flags that run it, tiny, in tmp_path / name after the finished pipeline."""

    def flags(name, *overrides, workdir=None) -> list[str]:
        return [
            f"--config={EXPERIMENTS / name}.py:tiny",
            f"--workdir={workdir or tmp_path / name}",
            *settings(finished, name),
            *(f"--config.{override}" for override in overrides),
        ]

    return flags


def config_file(folder: Path, name: str, change: str) -> str:
    """A config of the user's own: an experiment, and a line that changes it."""
    path = folder / f"my_{name}.py"
    path.write_text(
        f"import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('base', {str(EXPERIMENTS / f'{name}.py')!r})\n"
        f"base = importlib.util.module_from_spec(spec); spec.loader.exec_module(base)\n"
        f"def get_config(arg=''):\n"
        f"    config = base.get_config('tiny').unlock()\n    {change}\n    return config.lock()\n"
    )
    return f"--config={path}"


@pytest.mark.parametrize(
    "name, override, message",
    [
        (
            "pretrain",
            "optimizer.learning_rat=1",
            "optimizer.learning_rat is not in {file}; did you mean config.optimizer.learning_rate?",
        ),
        ("pretrain", "train.steps=many", "train.steps=many: expected an integer, as in config.train.steps=8"),
        ("pretrain", "train.steps=0", "train.steps is 0; it must be at least 1"),
        ("pretrain", "train.log_every=0", "train.log_every is 0; it must be at least 1"),
        (
            "pretrain",
            "stage.name=pretrian",
            "stage.name is 'pretrian'; choose one of tokenizer, pretrain, sft, reward, listwise, dpo,",
        ),
        ("pretrain", "optimizer.schedule_name=cosin", "is 'cosin'; choose one of constant, linear, cosine, wsd"),
        ("pretrain", "optimizer.warmup_steps=8", "optimizer.warmup_steps 8 is not below optimizer.total_steps 8"),
        ("pretrain", "data.length=65", "data.length 65 is longer than model.context 64; lower it"),
        ("pretrain", "data.batch_size=0", "data.batch_size is 0; it must be at least 1"),
        (
            "pretrain",
            "data.ramp=4,2",
            "data.ramp is (4, 2); it must be pairs of a step and the rows of a batch before it",
        ),
        ("pretrain", "optimizer.name=adam", "optimizer.name is 'adam'; choose one of adamw, lion, adafactor, muon"),
        ("pretrain", "optimizer.ema_decay=1", "optimizer.ema_decay is 1.0; it must be from 0"),
        ("pretrain", "data.held_out=0", "of 79 documents none is held out at 0: raise the fraction"),
        ("pretrain", "seed=-1", "config.seed is -1; it must be at least 0"),
        (
            "pretrain",
            "tokenizer=",
            "neither config.tokenizer nor config.init_from is set: one of them must bring the tokenizer",
        ),
        ("pretrain", "tokenizer=nowhere", "no tokenizer at nowhere: train one, or name its workdir"),
        ("sft", "init_from=nowhere", "there is no workdir nowhere: train that stage first, or name another"),
        (
            "sft",
            "init_from={finished}/tokenizer",
            "{finished}/tokenizer/checkpoints holds no checkpoint: train that stage first",
        ),
        ("sft", "data.turns=3", "data.turns is 3; it must be even"),
        (
            "sft",
            "data.length=3",
            "none of 767 conversations can be learnt from (767 conversations longer than a row of 3 tokens): lengthen",
        ),
        ("sft", "data.sources=chitchet", "data.sources has 'chitchet'; choose among chitchat, docstrings"),
        ("reward", "data.rankings=nowhere", "no rankings at nowhere (No such file or directory): rank some first"),
        (
            "ppo",
            "data.reward_model={finished}/sft",
            "{finished}/sft is no finished reward model (it is sft): train stage reward there",
        ),
        (
            "ppo",
            "data.reward_model={finished}/../snapshots/reward/saving",
            "saving is no finished reward model (it is reward)",
        ),
        ("reward", "stage.flip_probability=0.5", "stage.flip_probability is 0.5; it must be in [0, 0.5)"),
        ("reward", "data.limit=-1", "data.limit is -1; it must be at least 0"),
        ("ppo", "data.rewards.model=0", "data.rewards gives no reward a weight: there is nothing to learn"),
        ("ppo", "data.reward_model=", "a workdir's name is empty: give the folder of a trained stage"),
        (
            "ppo",
            "data.max_new=32",
            "{finished}/reward was trained on rows of 64 tokens, but a prompt and its answer may have 65 here, which "
            "it would read cut: lower prompt_length or max_new by 1 in all, or train it with --config.data.length=65",
        ),
        (
            "ppo",
            "data.reward_model={finished}/reward,{finished}/sft",
            "{finished}/sft is no finished reward model (it is sft): train stage reward there",
        ),
        (
            "ppo",
            "init_from={finished}/reward",
            "config.init_from {finished}/reward is a reward model, which scores answers and writes none: name the ",
        ),
        ("ppo", "data.rater=rul", "data.rater is 'rul'; choose one of rule, assistant, "),
        ("ppo", "data.rollouts=15", "a batch of 15 rows cannot be cut into 2 equal parts"),
        (
            "ppo",
            "data.rollouts=512",
            "data.held_out_rollouts is 16, no whole batch of data.rollouts 512: raise it to 512 at least, or lower",
        ),
        ("ppo", "stage.temperature=0", "data.temperature is 0: greedy answers do not explore"),
        (
            "ppo",
            "data.prompt_length=60",
            "the prompt has 60 tokens and 8 more were asked for, but the model's context is 64",
        ),
    ],
)
def test_values(refused, stage, finished, tmp_path, name, override, message):
    names = {"finished": finished, "file": EXPERIMENTS / f"{name}.py"}
    assert message.format(**names) in refused(loop, *stage(name, override.format(**names)))
    assert not (tmp_path / name / "summary.json").exists()


def test_a_mended_config_may_take_the_folder_of_the_bad_one(refused, stage, tmp_path, capsys):
    refused(loop, *stage("pretrain", "data.batch_size=0", "train.steps=2", "optimizer.warmup_steps=1"))
    loop.program(stage("pretrain", "train.steps=2", "optimizer.warmup_steps=1"))
    assert "config changed since the last start: data.batch_size: 0 -> 8\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (
            "config.optimizer.lr = 1e-3",
            "optimizer.lr is not an option of lm.optim.optimizers.make_optimizer; did you mean learning_rate?",
        ),
        ("config.optimizer.beta = 0.9", "optimizer.beta is not an option of adamw, which has b1, b2, eps"),
        (
            "config.data.ramp, config.stage.microbatches = ((2, 4), (4, 6)), 4",
            "data.ramp has 6 rows before step 4, which cannot be cut into 4 equal parts: change them, or "
            "stage.microbatches",
        ),
        (
            "config.data.lenght = 64",
            "data.lenght is not an option of lm.stages.pretraining.pretrain.batches; did you mean length?",
        ),
        ("config.model.vocab_size = 100", "model.vocab_size is 100, but the tokenizer has 512 pieces: leave it out"),
        ("config.stage.name = 'ppo'", "stage.z_loss is not an option of lm.stages.rl.ppo.make"),
        ("del config.mesh", "the config has no `mesh`: is it a config of lm train?"),
        (
            "del config.optimizer.total_steps",
            "optimizer.total_steps is missing: lm.optim.optimizers.make_optimizer has no default for it",
        ),
    ],
)
def test_a_config_of_one_s_own(refused, stage, tmp_path, change, message):
    flags = stage("pretrain")[1:]
    assert refused(loop, config_file(tmp_path, "pretrain", change), *flags) == message


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("ppo", "config.data.rewards = {'modle': 1.0}", "the name in data.rewards is 'modle'; choose one of rule, "),
        ("reward", "config.data.axes = {'clear': 1.0}", "stage.axes is {'overall': 1.0}, but data.axes is {'clear"),
        ("reward", "config.data.axes.clear = 1.0", "no verdict scores the axis 'clear' of data.axes: leave it out"),
    ],
)
def test_rewards_and_axes_that_are_not_there(refused, stage, tmp_path, name, change, message):
    assert message in refused(loop, config_file(tmp_path, name, change), *stage(name)[1:])


def test_sizes_come_with_init_from(refused, stage, finished, tmp_path):
    flags = stage("sft")[1:]
    said = refused(loop, config_file(tmp_path, "sft", "config.model.width = 64"), *flags)
    assert said == f"config.model changes the shape of the model in {finished}/pretrain: leave its sizes out"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config=x"], "the following arguments are required: --workdir; --help lists the flags"),
        (
            ["--config=nowhere.py", "--workdir=x"],
            "there is no config file nowhere.py: give --config=experiments/NAME.py",
        ),
        (["--config=x", "--wrokdir=x"], "--wrokdir is not a flag of this program; did you mean --workdir?"),
    ],
)
def test_flags(refused, flags, message):
    assert refused(loop, *flags) == message


@pytest.mark.parametrize(
    "program, name, message",
    [
        (
            loop,
            "quickstart",
            "the config has no stage.name: is it a config of lm train? (lm pipeline runs experiments/quickstart.py)",
        ),
        (
            loop,
            "rank",
            "the config has no stage.name: is it a config of lm train? (lm pipeline runs experiments/quickstart.py)",
        ),
        (runner, "sft", "the config has no `stages`: is it a config of lm pipeline? (lm train runs a single stage)"),
        (auto_rank, "sft", "the config has no `rank`: is it a config of lm auto-rank?"),
        (models, "rank", "the config has no `models`: is it a config of lm evaluate?"),
    ],
)
def test_another_program_s_config(refused, tmp_path, program, name, message):
    assert refused(program, f"--config={EXPERIMENTS / name}.py", f"--workdir={tmp_path / 'run'}") == message
    assert not (tmp_path / "run").exists()


def test_a_stage_that_the_config_does_not_have(refused, tmp_path):
    said = refused(
        runner,
        f"--config={EXPERIMENTS / 'quickstart.py'}",
        "--config.stages=('tokenizer','dpo')",
        f"--workdir={tmp_path / 'run'}",
    )
    assert said == "the config has no `dpo`: is it a config of lm pipeline?"
    assert not (tmp_path / "run").exists()


def corpora(folder: Path) -> dict[str, Path]:
    """Corpora that nothing can be learnt from."""
    (folder / "empty").mkdir()
    (folder / "binary").mkdir()
    (folder / "binary" / "a.txt").write_bytes(bytes(range(256)) * 8)
    (folder / "blank").mkdir()
    (folder / "blank" / "a.txt").write_text(" \n")
    (folder / "short").mkdir()
    for i in range(40):
        (folder / "short" / f"{i}.txt").write_text(f"{i}")
    (folder / "one.txt").write_text("a")
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    return {name: folder / name for name in ("nowhere", "empty", "binary", "blank", "short", "one.txt", "bad.jsonl")}


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere", "no corpus at {}: give a file, a folder, a glob, hf:NAME, or built-in names (stdlib, "),
        ("empty", "no file to read in {}: give one that has some of .txt .md"),
        ("binary", "no text in {} (1 of its files are binary or damaged: "),
        ("blank", "no text in {}: give a corpus that has some"),
        ("short", "corpus too small for one row: "),
        ("one.txt", "of 1 documents none is held out at 0.05: all have the name 'one.txt#0001', which falls on"),
        ("bad.jsonl", "bad.jsonl:2"),
    ],
)
def test_a_corpus_to_pretrain_on(refused, stage, tmp_path, name, message):
    path = corpora(tmp_path)[name]
    assert message.format(path) in refused(loop, *stage("pretrain", f"data.corpus={path}"))


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.vocab_size=0", "data.vocab_size is 0; it must be at least 1"),
        (
            "data.vocab_size=100",
            "vocab_size=100 cannot hold the special ids, the bytes and the characters of this text: take at least",
        ),
        (
            "data.vocab_size=99999",
            "bytes of text are too few for vocab_size=99999: give more text, or a vocab_size of at most",
        ),
    ],
)
def test_a_tokenizer_s_size(refused, finished, tmp_path, override, message):
    flags = [f"--config={EXPERIMENTS / 'tokenizer.py'}:tiny", f"--workdir={tmp_path / 'run'}", f"--config.{override}"]
    assert message in refused(loop, *flags, f"--config.data.corpus={finished.parent / 'text'}")
    assert not (tmp_path / "run" / "tokenizer.model").exists()


@pytest.fixture(scope="module")
def other(finished, tmp_path_factory) -> Path:
    """The workdir of another tokenizer, of 400 pieces."""
    folder = tmp_path_factory.mktemp("other")
    loop.train_stage(stage_config(finished, "tokenizer", "data.vocab_size=400"), folder)
    return folder


def test_a_tokenizer_beside_init_from_must_agree(refused, stage, finished, other):
    said = refused(loop, *stage("sft", f"tokenizer={other}"))
    assert said.startswith(f"{finished}/pretrain was trained with tokenizer and template ")
    assert said.endswith(": leave config.tokenizer empty")
    warm_start.tokenizer_for_run(
        f"{finished}/tokenizer", load_trained_model(finished / "pretrain", backend="cpu")
    )  # the same one will do


def test_init_from_with_another_tokenizer(refused, stage, finished, other, tmp_path):
    swapped = shutil.copytree(finished / "pretrain", tmp_path / "swapped")
    shutil.copy(other / "tokenizer.model", swapped)
    said = refused(loop, *stage("sft", f"init_from={swapped}"))
    assert said.startswith(f"{swapped}: its checkpoint was trained with tokenizer and template ")
    assert said.endswith(": restore that file, or train the stage again")


def test_init_from_with_another_template(refused, stage, monkeypatch):
    monkeypatch.setattr(tokenizer.sentencepiece.SentencePieceTokenizer, "mask_rule", "template 2")
    assert "pretrain: its checkpoint was trained with tokenizer and template" in refused(loop, *stage("sft"))


def test_a_reward_model_of_another_tokenizer(refused, stage, finished, other, tmp_path):
    judge = shutil.copytree(finished / "reward", tmp_path / "judge")
    shutil.copy(other / "tokenizer.model", judge)
    fingerprint = tokenizer.load_tokenizer(other / "tokenizer.model").fingerprint
    for meta in judge.glob("checkpoints/*/meta/metadata"):
        record = json.loads(meta.read_text())
        record["meta"]["fingerprint"] = fingerprint
        meta.write_text(json.dumps(record))
    said = refused(loop, *stage("ppo", f"data.reward_model={judge}"))
    assert said.startswith(f"{judge} was trained with tokenizer and template {fingerprint[:8]}, but this run has ")


def test_a_workdir_of_another_config(refused, stage, finished, tmp_path):
    workdir = shutil.copytree(finished / "sft", tmp_path / "sft")
    before = saved(workdir), (workdir / "config.json").read_bytes(), read_metrics(workdir)
    flags = [
        f"--config={EXPERIMENTS / 'sft.py'}:tiny",
        f"--workdir={workdir}",
        f"--config.init_from={finished}/pretrain",
    ]
    assert refused(loop, *flags, "--config.optimizer.learning_rate=1", "--config.seed=3") == (
        f"{workdir} was made with another config (optimizer.learning_rate: 0.001 -> 1.0, seed: 0 -> 3): "
        "give another --workdir, or remove this one"
    )
    assert (saved(workdir), (workdir / "config.json").read_bytes(), read_metrics(workdir)) == before


def test_a_harmless_change_is_named_and_continues(finished, small, tmp_path, capsys):
    workdir = shutil.copytree(finished.parent / "snapshots" / "sft" / "saving", tmp_path / "sft")
    loop.train_stage(stage_config(finished, "sft", "train.log_every=1"), workdir)
    said = capsys.readouterr().out
    assert f"{workdir}: config changed since the last start: train.log_every: 4 -> 1\n" in said
    assert f"continues from step 4 of {workdir}" in said
    assert [row["step"] for row in read_metrics(workdir)] == [0, 4, 5, 6, 7, 8, 8]
    assert saved(workdir) == saved(finished / "sft")


def test_two_processes_on_one_workdir(refused, stage, finished, tmp_path):
    with open_workdir(tmp_path / "sft", {}):
        said = refused(loop, *stage("sft"))
    assert said == f"{tmp_path / 'sft'} is in use by process {os.getpid()}: wait for it, or give another --workdir"


def test_a_folder_of_something_else(refused, stage, tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "thesis.tex").write_text("x")
    assert "is not a run's folder: it holds thesis.tex but no config.json" in refused(loop, *stage("sft"))
    assert [path.name for path in (tmp_path / "sft").iterdir() if path.name != ".lock"] == ["thesis.tex"]


def test_a_mesh_that_does_not_fit(refused, stage, monkeypatch):
    monkeypatch.setattr(config, "make_mesh", sharding.make_mesh)
    said = refused(loop, *stage("pretrain", "mesh.data=3"))
    assert said.startswith("mesh {'data': 3, 'fsdp': 1, 'tensor': 1} does not fit 8 device(s)")


def test_a_loss_that_is_not_finite(refused, stage, tmp_path):
    """The first step flings the parameters away; the second sees it, and what the first saved can still be read."""
    said = refused(loop, *stage("pretrain", "optimizer.learning_rate=1e30", "train.save_every=1"))
    checkpoints = tmp_path / "pretrain" / "checkpoints"
    assert "is nan at step 2; the last good checkpoint stays in " in said
    assert said.endswith(f"{checkpoints}: lower optimizer.learning_rate and take a new --workdir")
    assert [folder.name for folder in checkpoints.iterdir()] == ["1"]
    assert restore_params(checkpoints)[1]["stage"] == "pretrain"
    assert [row["step"] for row in read_metrics(tmp_path / "pretrain")] == [0, 1]
    assert not (tmp_path / "pretrain" / "summary.json").exists()


def test_every_checkpoint_torn(refused, finished, tmp_path):
    workdir = shutil.copytree(finished / "sft", tmp_path / "sft")
    (workdir / "summary.json").unlink()
    for step in ("4", "8"):
        shutil.rmtree(workdir / "checkpoints" / step / "opt_state")
    config = stage_config(finished, "sft")
    with pytest.raises(loop.UserError, match="has no undamaged checkpoint: remove that folder to start from step 0"):
        loop.train_stage(config, workdir)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["4", "8"]


def test_a_checkpoint_of_another_model(refused, stage, finished, tmp_path):
    workdir = shutil.copytree(finished / "sft", tmp_path / "sft")
    (workdir / "summary.json").unlink()
    shutil.rmtree(workdir / "checkpoints")
    shutil.copytree(finished / "reward" / "checkpoints", workdir / "checkpoints")
    before = saved(workdir)
    flags = [
        f"--config={EXPERIMENTS / 'sft.py'}:tiny",
        f"--workdir={workdir}",
        f"--config.init_from={finished}/pretrain",
    ]
    said = refused(loop, *flags)
    assert said.startswith(f"checkpoint {workdir}/checkpoints/8 is of another model or optimizer: ")
    assert said.endswith("use its config, or another --workdir")
    assert saved(workdir) == before


@pytest.fixture
def disk(tmp_path):
    """disk(kB): a file system of that size."""
    mounted = []

    def of(size: int) -> Path:
        folder = tmp_path / f"disk{size}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", folder], capture_output=True)
        if done.returncode:
            pytest.skip("a file system of one's own takes root")
        mounted.append(folder)
        return folder

    yield of
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_keeps_what_was_saved(refused, stage, finished, small, disk, tmp_path):
    """A checkpoint takes 600 kB, so 900 hold one and not two. With room the run continues to the same bits."""
    full = disk(900) / "pretrain"
    said = refused(loop, *stage("pretrain", workdir=full))
    assert said == (
        f"cannot save a checkpoint in {full}/checkpoints: No space left on device; make room there or choose "
        "another --workdir, then start again: the run will continue from step 4"
    )
    assert [folder.name for folder in (full / "checkpoints").iterdir()] == ["4"]
    roomy = shutil.copytree(full, tmp_path / "roomy")
    loop.train_stage(stage_config(finished, "pretrain"), roomy)
    assert saved(roomy) == saved(finished / "pretrain")


def test_a_disk_too_full_for_the_tokenizer(refused, stage, disk):
    full = disk(12) / "pretrain"
    assert refused(loop, *stage("pretrain", workdir=full)) == (
        "No space left on device: make room, then give the same command again"
    )


def test_a_refused_write_without_a_disk_of_one_s_own(refused, stage, monkeypatch, tmp_path):
    """The same as a full disk, for those who may not mount one: the checkpoint's second save is refused."""
    finalize = checkpoint.SealedPyTreeHandler.finalize

    def full(item, directory):
        if Path(directory).parent.name.startswith("8."):
            raise OSError(28, "No space left on device")
        finalize(item, directory)

    monkeypatch.setattr(checkpoint.SealedPyTreeHandler, "finalize", full)
    said = refused(loop, *stage("pretrain"))
    assert said.startswith(f"cannot save a checkpoint in {tmp_path}/pretrain/checkpoints: No space left on device; ")
    assert [folder.name for folder in (tmp_path / "pretrain" / "checkpoints").iterdir()] == ["4"]


def test_the_program_itself(finished, tmp_path):
    """As the user starts it, in a process of its own: the exit code, and not a word more on stderr."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lm.train.loop",
            f"--config={EXPERIMENTS / 'sft.py'}:tiny",
            f"--workdir={tmp_path / 'run'}",
            "--config.init_from=nowhere",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no workdir nowhere: train that stage first, or name another\n"
    assert not read_json(tmp_path / "run" / "config.json")["train"]["steps"] > 8

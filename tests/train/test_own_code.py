"""Stages and models of one's own: what is wrong with them is one line, and what a run leaves names them."""

import json
import shutil
import sys

import pytest
from runs import EXPERIMENTS, finished, small

from lm.core.config import load_config, options_help
from lm.core.errors import UserError
from lm.core.imports import own_code_files
from lm.report import run
from lm.runs.workdir import load_trained_model, read_json
from lm.stages import named_stage
from lm.train import loop
from lm.train.config import train_functions
from lm.weights.convert import export_model

__all__ = ["finished", "small"]
METHODS = """
from lm.stages.pretraining.pretrain import PRETRAIN

NUMBER = 3
JUDGE = PRETRAIN._replace(module=__name__, trains_reward_model=True)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a model, a stage and files that will not do."""
    before = set(sys.modules)
    shutil.copy(EXPERIMENTS / "examples" / "my_model.py", tmp_path / "conv.py")
    shutil.copy(EXPERIMENTS / "examples" / "my_method.py", tmp_path / "priced.py")
    (tmp_path / "methods.py").write_text(METHODS)
    (tmp_path / "few.py").write_text("from conv import make as conv\n\ndef make():\n    return conv(vocab_size=16)\n")
    (tmp_path / "nothing.py").write_text("def make(*, vocab_size):\n    return {'params': vocab_size}\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def pretraining(finished, *overrides, model=None):
    config = load_config(f"{EXPERIMENTS / 'pretrain.py'}:tiny").unlock()
    if model:
        config.model = model
    config.tokenizer, config.data.corpus = str(finished / "tokenizer"), str(finished.parent / "text")
    for key, value in overrides:
        config.update_from_flattened_dict({key: value})
    return config.lock()


@pytest.mark.parametrize(
    "name, message",
    [
        ("pretrian", "stage.name is 'pretrian'; choose one of tokenizer, pretrain, .*, or yours, file.py:STAGE"),
        ("priced.py:STAG", "stage.name 'priced.py:STAG': priced.py has no STAG; did you mean STAGE?"),
        ("methods.py:NUMBER", "stage.name 'methods.py:NUMBER' is of type int, no lm.stages.Stage: name the Stage"),
        ("methods.py:JUDGE", "says trains_reward_model, but a reward model is known by .*reward, listwise.*: add"),
        ("gone.py:STAGE", "stage.name 'gone.py:STAGE': there is no file gone.py in "),
    ],
)
def test_a_stage_that_will_not_do_is_named(folder, finished, small, name, message):
    with pytest.raises(UserError, match=message):
        named_stage(name)
    with pytest.raises(UserError, match=message):
        loop.train_stage(pretraining(finished, ("stage.name", name)), folder / "run")


@pytest.mark.parametrize(
    "model, message",
    [
        ({"name": "conv"}, "model.name is 'conv': leave it out for lm's own decoder, or write file.py:function"),
        ({"name": "gone.py:make"}, "model.name 'gone.py:make': there is no file gone.py"),
        ({"name": "conv.py:make", "layers": 2}, "model.layers is not an option of conv.make"),
        ({"name": "nothing.py:make"}, "model.name 'nothing.py:make' gave a dict, not an lm.model.Model"),
        ({"name": "few.py:make"}, "model few.py:make has 16 ids, but the tokenizer has 512 pieces: give it an option"),
    ],
)
def test_a_model_that_will_not_do_is_named(folder, finished, small, model, message):
    with pytest.raises(UserError, match=message):
        loop.train_stage(pretraining(finished, model=model), folder / "run")


def test_options_of_one_s_own_are_listed_and_set(folder):
    name = f"{EXPERIMENTS / 'pretrain.py'}:tiny"
    overrides = ["stage.price=0.5", "stage.name=priced.py:STAGE"]  # the name comes first whatever the order
    config = load_config(name, overrides, train_functions)
    assert config.stage.price == 0.5
    told = options_help(config.to_dict(), train_functions(config))
    assert "stage: priced.make" in told and "stage.price" in told and "model.name" in told
    config = load_config(name, ["model.name=conv.py:make", "model.reach=4"], train_functions)
    assert config.model.reach == 4 and config.model.name == "conv.py:make"
    with pytest.raises(UserError, match="config.model.reech is not in .*; did you mean config.model.reach?"):
        load_config(name, ["model.name=conv.py:make", "model.reech=4"], train_functions)


@pytest.fixture
def trained(folder, finished, small):
    """A finished run of a stage and a model of one's own."""
    model = {"name": "conv.py:make", "width": 8}
    config = pretraining(finished, ("stage.name", "priced.py:STAGE"), model=model)
    loop.train_stage(config, folder / "run")
    return folder / "run"


def test_what_a_run_of_one_s_own_leaves(trained, folder, finished):
    """Its record holds the files; its page its curves; it goes on, and is refused by programs of the decoder alone."""
    assert [str(file) for file in own_code_files(read_json(trained / "config.json"))] == ["conv.py", "priced.py"]
    diff = (trained / json.loads((trained / "record.json").read_text())[0]["diff"]).read_text()
    for file in ("conv.py", "priced.py"):
        added = diff.partition(f"+++ b/{file}\n")[2].partition("diff --git")[0].splitlines()[1:]
        assert "".join(f"{line[1:]}\n" for line in added) == (folder / file).read_text()
    assert [panel.metric for _, panel, _ in run.metric_figures(run.stage_run(trained))] == ["loss", "entropy"]
    with pytest.raises(UserError, match=r"model of your own \(conv.py:make\), but lm convert knows lm's decoder"):
        export_model(trained, folder / "export", dtype="float32", step=None)
    config = pretraining(finished, ("init_from", str(trained)), model={"name": "conv.py:make", "width": 16})
    with pytest.raises(UserError, match="run holds .* for the parameter .*, but conv.py:make makes .* now"):
        loop.train_stage(config, folder / "other")
    with pytest.raises(UserError, match="model.name is set, but .*sft holds lm's own decoder: leave one of"):
        loop.train_stage(
            pretraining(finished, ("init_from", f"{finished}/sft"), model={"name": "conv.py:make"}), folder / "third"
        )


def test_a_run_whose_file_has_changed_or_gone_says_so(trained, folder):
    load_trained_model(trained, backend="cpu")
    text = (folder / "conv.py").read_text()
    (folder / "changed").mkdir()
    (folder / "changed" / "conv.py").write_text(text.replace("2 * self.width", "3 * self.width"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "changed")
        with pytest.raises(UserError, match="holds .* for the parameter .*, but conv.py:make makes .* now: restore"):
            load_trained_model(trained, backend="cpu")
        (folder / "changed" / "conv.py").unlink()
        with pytest.raises(UserError, match="model.name 'conv.py:make': there is no file conv.py in .*changed"):
            load_trained_model(trained, backend="cpu")

"""Every experiment loads, says how it is run, and gives each function options it has."""

import importlib
import inspect
import re

import pytest
from ml_collections import ConfigDict
from runs import EXPERIMENTS, TRAINED, finished, settings, small

from lm import contest, evaluate, model, optim, sharding, train, unseen, verdicts
from lm.config import arguments, load, module_of
from lm.errors import UserError
from lm.lab import climbs
from lm.ladder import planned
from lm.model import params
from lm.stages import STAGES
from lm.workdir import read_json

__all__ = ["finished", "small"]

FILES = sorted(path.stem for path in EXPERIMENTS.glob("*.py"))
EACH = pytest.mark.parametrize("name", FILES)
OF_MANY = {"contest": contest.examined, "overoptimisation": climbs.Lab}  # and what their `evaluate` goes to
BOTH = pytest.mark.parametrize("variant", ["", ":tiny"])


def config_of(name: str, variant: str = ""):
    return load(f"{EXPERIMENTS / name}.py{variant}")


def parts(name: str, config) -> dict:
    """The configs that a config holds, by the experiment that each is one of."""
    if name == "quickstart":
        return {stage: config[stage] for stage in config.stages}
    if name not in OF_MANY:
        return {}
    trained = {key: part for key, part in config.items() if isinstance(part, ConfigDict) and "stage" in part}
    return {"rank": config.verdicts, **trained}


def checked(name: str, config) -> None:
    """TypeError unless each subtree of a config is keyword arguments of the function it goes to, or such a config."""
    for part, inside in parts(name, config).items():
        checked(part, inside)
    if name == "quickstart":
        functions = {}
    elif name in OF_MANY:
        functions = {"prompts": unseen.asked, "evaluate": OF_MANY[name]}
    elif name == "rank":
        functions = {"rank": verdicts.rank}
    elif name == "evaluate":
        functions = {"evaluate": evaluate.evaluate}
    elif name == "tokenizer":
        functions = {"data": train.fit_tokenizer}
    else:
        stage = STAGES[config.stage.name]
        functions = {
            "model": model.Config,
            "optimizer": optim.make,
            "stage": stage.make,
            "data": stage.batches,
            "mesh": sharding.make_mesh,
            "train": train.Schedule,
        }
        if name == "scaling":
            functions |= {"vocabulary": train.fit_tokenizer, "ladder": planned.ladder}
    for subtree, function in functions.items():
        options = {
            key: value for key, value in config[subtree].to_dict().items() if (subtree, key) != ("stage", "name")
        }
        if function is model.Config:
            options["vocab_size"] = 1  # lm.train adds the tokenizer's
        given = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
        inspect.signature(function).bind(*given, **options)


def test_the_check_can_fail():
    config = config_of("pretrain").unlock()
    config.optimizer.lr = 1e-3
    with pytest.raises(TypeError, match="'lr'"):
        checked("pretrain", config)


@BOTH
@EACH
def test_loads_locked_with_options_that_exist(name, variant):
    config = config_of(name, variant)
    assert config.is_locked
    checked(name, config)


def test_the_contest_s_methods_are_all_checked():
    assert set(parts("contest", config_of("contest"))) > {"rank", "ppo", "grpo", "rloo", "dpo", "best_of_n"}
    assert set(parts("overoptimisation", config_of("overoptimisation"))) == {"rank", "reward", "ppo"}
    checked("contest", config_of("contest", ":tuning"))


@EACH
def test_another_variant_is_refused(name):
    with pytest.raises(UserError, match=f"{name}.py has no variant 'huge': choose nothing or tiny"):
        config_of(name, ":huge")


@EACH
def test_its_docstring_names_a_command_that_runs_it(name, monkeypatch):
    monkeypatch.chdir(EXPERIMENTS.parent)
    text = (EXPERIMENTS / f"{name}.py").read_text().split('"""')[1]
    assert "Change first: " in text and ("Paper: " in text or name in ("quickstart", "evaluate"))
    module, flags = re.search(r"Command: python -m ([\w.]+) (.*)", text).groups()
    program = importlib.import_module(module)
    _, config = arguments(flags.split(), program.__doc__, program.FLAGS)
    assert config.to_dict() == config_of(name).to_dict()


@EACH
def test_its_needs_are_where_the_pipeline_puts_them(name):
    """Each stage alone, run by its command, is the stage of the quickstart."""
    if name in config_of("quickstart").stages:
        assert config_of(name).to_dict() == config_of("quickstart")[name].to_dict()


@BOTH
def test_the_same_documents_are_unseen_in_every_stage(variant):
    config = config_of("quickstart", variant)
    fractions = {name: config[name].data.held_out for name in ("tokenizer", "pretrain", "sft", "ppo")}
    fractions |= {name: config[name][name].held_out for name in ("rank", "evaluate")}
    assert set(fractions.values()) == {0.05}, fractions


@BOTH
def test_schedules_are_as_long_as_their_runs(variant):
    for name in ("pretrain", "sft", "reward"):
        assert config_of(name, variant).optimizer.total_steps == config_of(name, variant).train.steps
    ppo = config_of("ppo", variant)
    assert ppo.optimizer.total_steps == ppo.train.steps * ppo.stage.epochs * ppo.stage.minibatch_count
    assert ppo.data.temperature == ppo.stage.temperature  # one distribution for sampler and losses
    assert ppo.data.rollouts % ppo.stage.minibatch_count == 0


def test_overrides_reach_whatever_refers_to_them():
    path = str(EXPERIMENTS / "quickstart.py")
    config = load(path, ["root=elsewhere", "corpus=mine", "sft.train.steps=7", "ppo.stage.temperature=0.8"])
    assert config.sft.init_from == "elsewhere/pretrain" and config.ppo.data.reward_model == "elsewhere/reward"
    assert config.evaluate.models.to_dict() == {
        name: f"elsewhere/{stage}" for name, stage in (("raw", "pretrain"), ("sft", "sft"), ("ppo", "ppo"))
    }
    assert config.tokenizer.data.corpus == config.pretrain.data.corpus == config.evaluate.evaluate.corpus == "mine"
    assert config.sft.optimizer.total_steps == 7
    assert config.ppo.data.temperature == 0.8


@pytest.mark.parametrize("name", TRAINED)
def test_tiny_trains_a_few_steps(finished, name):
    config, summary = config_of(name, ":tiny"), read_json(finished / name / "summary.json")
    assert summary["steps"] == config.train.steps <= 8
    assert summary["stage"] == config.stage.name == name
    assert summary["seconds"] < 60


def test_the_mixture_trains_and_its_twin_works_as_much_on_a_token(finished, small, tmp_path):
    """By lm.train, on the finished pipeline's tokenizer and text. The router is what the mixture computes beside."""
    flags = [flag.removeprefix("--config.") for flag in settings(finished, "pretrain")]
    path = f"{EXPERIMENTS / 'moe.py'}:tiny"
    held_out = train.run(load(path, flags), tmp_path / "moe")["held_out"]
    assert 0.9 < held_out["balance"] < 2 and held_out["router_z"] >= 0 and held_out["bits_per_byte"] > 1
    mixture, dense = (
        model.Config(vocab_size=300, **load(path, [f"{key}={value}" for key, value in changes.items()]).model)
        for changes in module_of(str(EXPERIMENTS / "moe.py")).sweep("tiny")
    )
    router = mixture.layers * mixture.width * mixture.experts
    assert mixture.experts and not dense.experts
    assert params.matmul_count(mixture) == params.matmul_count(dense) + router

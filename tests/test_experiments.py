"""Every experiment loads, says how it is run, and gives each function options it has."""

import copy
import importlib
import inspect
import itertools
import re
from collections.abc import Mapping

import pytest
from ml_collections import ConfigDict
from runs import EXPERIMENTS, TRAINED, finished, settings, small

from lm import model
from lm.__main__ import BY_NAME
from lm.core import sharding
from lm.core.config import config_module, flags_and_config, flatten, load_config, to_dict
from lm.core.errors import UserError
from lm.core.options import is_record, keyword_parameters, option_type, record_options
from lm.evaluate import models, policies
from lm.feedback import auto_rank
from lm.model import params
from lm.optim import optimizers
from lm.runs.workdir import read_json
from lm.stages import STAGES
from lm.studies.methods import study as methods_study
from lm.studies.overoptimization import measure, study as overoptimization_study
from lm.studies.scaling import ladder, study as scaling_study
from lm.sweep.config_functions import config_functions
from lm.train import loop, tokenizer_stage
from lm.train.config import TrainingSchedule, check_equal_options

__all__ = ["finished", "small"]

FILES = sorted(path.stem for path in EXPERIMENTS.glob("*.py"))
EACH = pytest.mark.parametrize("name", FILES)
PIPELINES = ("quickstart", "small_talk")
# For what takes the square of a config's size: the contest is one of two that hold many, and the largest.
ALL_BUT_CONTEST = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "contest")) for name in FILES]
)
OF_MANY = {
    "contest": methods_study.answer_recorder,
    "overoptimization": measure.GoldEvaluator,
}  # and what their `evaluate` goes to
BOTH = pytest.mark.parametrize("variant", ["", ":tiny"])


def config_of(name: str, variant: str = ""):
    return load_config(f"{EXPERIMENTS / name}.py{variant}")


def parts(name: str, config) -> dict:
    """The configs that a config holds, by the experiment that each is one of."""
    if name in PIPELINES:
        return {stage: config[stage] for stage in config.stages}
    if name not in OF_MANY:
        return {}
    trained = {key: part for key, part in config.items() if isinstance(part, ConfigDict) and "stage" in part}
    return {"rank": config.verdicts, **trained}


def functions_of(name: str):
    """What says the function that each subtree of an experiment calls."""
    own = {
        "contest": methods_study.study_functions,
        "overoptimization": overoptimization_study.study_functions,
        "scaling": scaling_study.study_functions,
    }
    return own[name] if name in own else config_functions


def checked(name: str, config) -> None:
    """TypeError unless each subtree of a config is keyword arguments of the function it goes to, or such a config."""
    for part, inside in parts(name, config).items():
        checked(part, inside)
    if name in PIPELINES:
        functions = {}
    elif name in OF_MANY:
        functions = {"prompts": policies.held_out_prompts, "evaluate": OF_MANY[name]}
    elif name == "rank":
        functions = {"rank": auto_rank.rank_sampled_answers}
    elif name == "evaluate":
        functions = {"evaluate": models.evaluate_models}
    elif name == "tokenizer":
        functions = {"data": tokenizer_stage.fit_tokenizer}
    else:
        stage = STAGES[config.stage.name]
        functions = {
            "model": model.ModelConfig,
            "optimizer": optimizers.make_optimizer,
            "stage": stage.make,
            "data": stage.batches,
            "mesh": sharding.make_mesh,
            "train": TrainingSchedule,
        }
        if name == "scaling":
            functions |= {"vocabulary": tokenizer_stage.fit_tokenizer, "ladder": ladder.ladder_plan}
    for subtree, function in functions.items():
        options = {
            key: value for key, value in config[subtree].to_dict().items() if (subtree, key) != ("stage", "name")
        }
        if function is model.ModelConfig:
            options["vocab_size"] = 1  # lm train adds the tokenizer's
        parameters = inspect.signature(function).parameters.values()
        given = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
        records = {p.name: record_options(p) for p in parameters if is_record(p)}
        fields = {field for record in records.values() for field in record}
        inspect.signature(function).bind(*given, **{key: options[key] for key in options if key not in fields})
    if not parts(name, config):
        assert {path: called.function for path, called in functions_of(name)(config).items()} == functions


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
    assert set(parts("overoptimization", config_of("overoptimization"))) == {"rank", "reward", "ppo"}
    checked("contest", config_of("contest", ":tuning"))


@EACH
def test_another_variant_is_refused(name):
    with pytest.raises(UserError, match=f"{name}.py has no variant 'huge': choose nothing or tiny"):
        config_of(name, ":huge")


def docstring(name: str) -> str:
    return (EXPERIMENTS / f"{name}.py").read_text().split('"""')[1]


def command(name: str) -> tuple:
    """The program that an experiment's docstring names, and the command line that it gives it."""
    command, flags = re.search(r"Command: python -m lm ([\w-]+) (.*)", docstring(name)).groups()
    return importlib.import_module(BY_NAME[command].module), flags.split()


@EACH
def test_its_docstring_names_a_command_that_runs_it(name, monkeypatch):
    monkeypatch.chdir(EXPERIMENTS.parent)
    text = docstring(name)
    assert "Change first: " in text and ("Paper: " in text or name in (*PIPELINES, "evaluate"))
    program, argv = command(name)
    _, config = flags_and_config(argv, program.__doc__, program.FLAGS)
    assert config.to_dict() == config_of(name).to_dict()


@EACH
def test_help_of_its_program_lists_every_option(name, monkeypatch, capsys):
    monkeypatch.chdir(EXPERIMENTS.parent)
    program, argv = command(name)
    with pytest.raises(SystemExit):
        program.program([*argv, "--help"])
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    for subtree, called in functions_of(name)(config_of(name)).items():
        for option, parameter in keyword_parameters(called.listed or inspect.signature(called.function)).items():
            default = "none" if parameter.default is parameter.empty else repr(parameter.default)
            if not isinstance(parameter.default, Mapping):
                assert f"  {default}" in rows[f"{subtree}.{option}"], f"{subtree}.{option}"


@EACH
def test_its_needs_are_where_the_pipeline_puts_them(name):
    """Each stage alone, run by its command, is the stage of small_talk.py."""
    if name in config_of("small_talk").stages:
        assert config_of(name).to_dict() == config_of("small_talk")[name].to_dict()


@BOTH
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_same_documents_are_unseen_in_every_stage(pipeline, variant):
    config = config_of(pipeline, variant)
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
    path = str(EXPERIMENTS / "small_talk.py")
    config = load_config(path, ["root=elsewhere", "corpus=mine", "sft.train.steps=7", "ppo.stage.temperature=0.8"])
    assert config.sft.init_from == "elsewhere/pretrain" and config.ppo.data.reward_model == "elsewhere/reward"
    assert config.evaluate.models.to_dict() == {
        name: f"elsewhere/{stage}" for name, stage in (("raw", "pretrain"), ("sft", "sft"), ("ppo", "ppo"))
    }
    assert config.tokenizer.data.corpus == config.pretrain.data.corpus == config.evaluate.evaluate.corpus == "mine"
    assert config.sft.optimizer.total_steps == 7
    assert config.ppo.data.temperature == 0.8


def changed(value):
    """Another value of the same type, far enough away to show in whatever is computed from it."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"{value}x"
    return (value or 1) * 1024 if isinstance(value, (int, float)) else (*value, *(value or (1,)))


def with_values(config: ConfigDict, *values: tuple) -> dict:
    """The entries, by dotted key, of a copy in which these are set, as code sets them."""
    config = copy.deepcopy(config).unlock()
    for key, value in values:
        *parents, leaf = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return flatten(config.to_dict())


def followers(config: ConfigDict) -> dict[str, list[str]]:
    """Of each entry that others follow, those: found by setting it."""
    before = flatten(config.to_dict())
    found = {}
    for key, value in before.items():
        if value != {} and value is not None:
            after = with_values(config, (key, changed(value)))
            found[key] = [other for other in before if other != key and after[other] != before[other]]
    return {key: others for key, others in found.items() if others}


@ALL_BUT_CONTEST
def test_what_follows_another_entry_can_be_set_alone_and_in_any_order(name):
    """Every derived entry of every config: in code, and by overrides as the command line and sweeps give them."""
    config = config_of(name)
    before, following = flatten(config.to_dict()), followers(config)
    if name not in ("rank", "evaluate", "tokenizer"):
        assert following, "a config whose entries follow each other lost that"
    mutual = {one for one, found in following.items() for each in found if each in following and one in following[each]}
    assert all(".axes." in key for key in mutual), mutual  # of stage and data: one dict, on purpose
    following = {leader: found for leader, found in following.items() if leader not in mutual}
    for follower in set(itertools.chain(*following.values())):
        value = changed(before[follower])
        alone = {key for key, now in with_values(config, (follower, value)).items() if now != before[key]}
        assert alone == {follower, *(following[follower] if follower in following else ())}, follower
    for leader, follower in {(leader, follower) for leader, found in following.items() for follower in found}:
        both = [(leader, changed(before[leader])), (follower, changed(changed(before[follower])))]
        assert with_values(config, *both) == with_values(config, *reversed(both))
        assert [with_values(config, *both)[key] for key, _ in both] == [value for _, value in both]
        if name not in OF_MANY:
            texts = [f"{key}={value}" for key, value in both]
            path = str(EXPERIMENTS / f"{name}.py")
            for order in (texts, texts[::-1]):
                assert flatten(load_config(path, order).to_dict()) == with_values(config, *both), order


def test_a_schedule_of_its_own_leaves_the_run_as_long_as_it_was():
    for overrides in (["train.steps=6", "optimizer.total_steps=14"], ["optimizer.total_steps=14", "train.steps=6"]):
        config = load_config(f"{EXPERIMENTS / 'sft.py'}", overrides)
        assert (config.train.steps, config.optimizer.total_steps) == (6, 14)
    config = load_config(f"{EXPERIMENTS / 'sft.py'}", ["optimizer.total_steps=14"])
    assert (config.train.steps, config.optimizer.total_steps) == (170, 14)
    config = load_config(f"{EXPERIMENTS / 'sft.py'}", ["train.steps=6"])
    assert (config.train.steps, config.optimizer.total_steps) == (6, 6)


@pytest.mark.parametrize(
    "name, override, error",
    [
        ("ppo", "data.temperature=0.7", "stage.temperature is 1.0, but data.temperature is 0.7: "),
        ("grpo", "stage.temperature=0.7", None),  # the other follows
        ("grpo", "data.temperature=0.7", "stage.temperature is 1.0, but data.temperature is 0.7: "),
        ("gkd", "data.temperature=0.7", "stage.temperature is 1.0, but data.temperature is 0.7: "),
        ("ppo", "data.temperature=1", None),
        ("reward", "stage.axes.overall=2", None),  # one dict
        ("reward", "data.axes.overall=2", None),
        ("ratings", "data.axes={'overall':1.0}", None),
    ],
)
def test_what_must_be_equal_is_refused_in_one_line_where_it_is_not(name, override, error):
    config = load_config(str(EXPERIMENTS / f"{name}.py"), [override], config_functions)
    if error is None:
        check_equal_options(config, config_functions(config))
        return
    with pytest.raises(UserError, match=error) as caught:
        check_equal_options(config, config_functions(config))
    assert "\n" not in str(caught.value)


@ALL_BUT_CONTEST
def test_every_option_of_every_function_can_be_set_and_shows(name):
    """Listed in the file or not; given its default as text it is the default. One that has no such name is refused."""
    path, config, functions = str(EXPERIMENTS / f"{name}.py"), config_of(name), functions_of(name)
    listed, texts, expected = config.to_dict(), [], {}
    for subtree, called in functions(config).items():
        for option, parameter in called.options.items():
            key, kind = f"{subtree}.{option}", option_type(parameter)
            if parameter.default is parameter.empty:
                continue
            default = dict(parameter.default) if dict in kind.types else parameter.default
            texts.append(f"{key}={default}")
            expected[key] = list(default) if isinstance(default, tuple) else default
    assert texts
    given = to_dict(load_config(path, texts, functions))
    for key, value in expected.items():
        node = given
        for part in key.split("."):
            node = node[part]
        assert node == value and type(node) is type(value), key
    for subtree in {called.function: subtree for subtree, called in functions(config).items()}.values():
        with pytest.raises(
            UserError, match=f"config.{subtree}.no_such_thing is not in .*{name}.py, and no option of lm."
        ):
            load_config(path, [f"{subtree}.no_such_thing=1"], functions)
    assert config_of(name).to_dict() == listed


@EACH
def test_what_a_file_lists_is_of_the_type_that_the_function_takes(name):
    config = config_of(name)
    for subtree, called in functions_of(name)(config).items():
        node = config
        for part in subtree.split("."):
            node = node[part]
        for option, value in node.items():
            if option in called.options:
                kind = option_type(called.options[option])
                value = dict(value) if isinstance(value, ConfigDict) else value
                assert type(value) in kind.types, f"{subtree}.{option}"


@pytest.mark.parametrize("name", TRAINED)
def test_tiny_trains_a_few_steps(finished, name):
    config, summary = config_of(name, ":tiny"), read_json(finished / name / "summary.json")
    assert summary["steps"] == config.train.steps <= 8
    assert summary["stage"] == config.stage.name == name
    assert summary["seconds"] < 60


def test_the_mixture_trains_and_its_twin_works_as_much_on_a_token(finished, small, tmp_path):
    """By lm train, on the finished pipeline's tokenizer and text. The router is what the mixture computes beside."""
    flags = [flag.removeprefix("--config.") for flag in settings(finished, "pretrain")]
    path = f"{EXPERIMENTS / 'moe.py'}:tiny"
    held_out = loop.train_stage(load_config(path, flags), tmp_path / "moe")["held_out"]
    assert 0.9 < held_out["balance"] < 2 and held_out["router_z"] >= 0 and held_out["bits_per_byte"] > 1
    mixture, dense = (
        model.ModelConfig(
            vocab_size=300, **load_config(path, [f"{key}={value}" for key, value in changes.items()]).model
        )
        for changes in config_module(str(EXPERIMENTS / "moe.py")).sweep("tiny")
    )
    router = mixture.layers * mixture.width * mixture.experts
    assert mixture.experts and not dense.experts
    assert params.matmul_param_count(mixture) == params.matmul_param_count(dense) + router

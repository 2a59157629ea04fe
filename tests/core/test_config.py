"""Configs: overrides keep types and references, and every mistake is named with the way out."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import pytest
from ml_collections import ConfigDict

from lm.core import config
from lm.core.errors import UserError
from lm.core.options import ConfigFunction, OptionType, option_docs, option_type

FILE = """
from ml_collections import ConfigDict, config_dict

def get_config(arg=""):
    width = {"": 64, "tiny": 8}[arg]
    c = ConfigDict({
        "corpus": "stdlib",
        "model": {"width": width, "tie_embeddings": True},
        "optimizer": {"learning_rate": 1e-3, "betas": (0.9, 0.95), "b1": 0.9, "weight_decay": 0.0},
        "data": {"mixture": ["a"], "shards": (), "seed": config_dict.placeholder(int), "filter": None},
    })
    c.data.corpus = c.get_ref("corpus")
    return c.lock()
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "quick.py"
    path.write_text(FILE)
    return str(path)


def test_argument_after_the_colon_reaches_get_config(file):
    assert config.load_config(file).model.width == 64
    assert config.load_config(f"{file}:tiny").model.width == 8
    assert config.load_config(file).is_locked


@pytest.mark.parametrize(
    "override, expected",
    [
        ("model.width=128", 128),
        ("model.tie_embeddings=false", False),
        ("model.tie_embeddings=True", True),
        ("optimizer.learning_rate=3e-4", 3e-4),
        ("optimizer.learning_rate=1", 1.0),
        ("optimizer.betas=(0.8, 1)", (0.8, 1.0)),
        ("optimizer.betas=0.8,0.9", (0.8, 0.9)),
        ("data.mixture=['b','c']", ["b", "c"]),
        ("data.shards=1,2", (1, 2)),
        ("data.seed=7", 7),
        ("data.seed=None", None),
        ("data.filter=3", 3),
        ("data.filter=short rows", "short rows"),
        ("corpus=a=b/123", "a=b/123"),
        ("corpus=123", "123"),
        ("corpus=None", None),
    ],
)
def test_override_takes_the_type_of_what_it_replaces(file, override, expected):
    key = override.partition("=")[0]
    value = config.flatten(config.load_config(file, [override]).to_dict())[key]
    assert value == expected and type(value) is type(expected)


def test_reference_follows_an_override(file):
    loaded = config.load_config(file, ["corpus=my.txt"])
    assert loaded.data.corpus == "my.txt"
    assert config.to_dict(loaded)["data"]["corpus"] == "my.txt"


@pytest.mark.parametrize(
    "override, message",
    [
        ("optimzer.lr=1", "config.optimzer.lr is not in {file}; did you mean config.optimizer.learning_rate?"),
        (
            "optimizer.learning_rat=1",
            "config.optimizer.learning_rat is not in {file}; did you mean config.optimizer.learning_rate?",
        ),
        ("learning_rate=1", "config.learning_rate is not in {file}; did you mean config.optimizer.learning_rate?"),
        ("optimizer.zzz=1", "config.optimizer.zzz is not in {file}"),
        ("optimizer=1", "config.optimizer is a group: set its entries, such as config.optimizer.b1"),
        ("model.width", "config.model.width has no value: write --config.model.width=VALUE"),
        ("model.width=2.5", "config.model.width=2.5: expected an integer, as in config.model.width=64"),
        ("model.width=wide", "config.model.width=wide: expected an integer, as in config.model.width=64"),
        ("model.width=True", "config.model.width=True: expected an integer, as in config.model.width=64"),
        ("model.width=None", "config.model.width=None: expected an integer, as in config.model.width=64"),
        (
            "model.tie_embeddings=1",
            "config.model.tie_embeddings=1: expected true or false, as in config.model.tie_embeddings=True",
        ),
        (
            "optimizer.learning_rate=fast",
            "config.optimizer.learning_rate=fast: expected a number, as in config.optimizer.learning_rate=0.001",
        ),
        (
            "optimizer.betas=0.9",
            "config.optimizer.betas=0.9: expected a tuple such as 1,2, as in config.optimizer.betas=(0.9, 0.95)",
        ),
        (
            "optimizer.betas=0.9,'x'",
            "config.optimizer.betas=0.9,'x': expected a tuple such as 1,2, as in config.optimizer.betas=(0.9, 0.95)",
        ),
        ("data.seed=x", "config.data.seed=x: expected an integer, as in config.data.seed=None"),
    ],
)
def test_bad_override_is_named(file, override, message):
    with pytest.raises(UserError) as error:
        config.load_config(file, [override])
    assert str(error.value) == message.format(file=file)


def test_bad_file_is_named(tmp_path, file):
    with pytest.raises(UserError, match="there is no config file nowhere.py: give --config="):
        config.load_config("nowhere.py:tiny")
    with pytest.raises(UserError, match="quick.py has no variant 'huge': 'huge'"):
        config.load_config(f"{file}:huge")
    (tmp_path / "other.py").write_text("x = 1")
    with pytest.raises(UserError, match=r"other.py has no get_config\(arg\)"):
        config.load_config(str(tmp_path / "other.py"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json is not a Python file"):
        config.load_config(str(tmp_path / "config.json"))


def test_a_fault_of_the_file_itself_keeps_its_traceback(tmp_path):
    (tmp_path / "broken.py").write_text("def get_config(arg=''):\n    return 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        config.load_config(str(tmp_path / "broken.py"))


def test_to_dict_is_json_and_flatten_keeps_empty_groups():
    assert config.to_dict(ConfigDict({"a": {"b": (1, 2)}, "c": {}})) == {"a": {"b": [1, 2]}, "c": {}}
    assert config.flatten({"a": {"b": 1, "c": {"d": 2}}, "e": {}}) == {"a.b": 1, "a.c.d": 2, "e": {}}


def make(model, params=None, *, learning_rate, betas=(0.9, 0.95), steps=10):
    return model, params, learning_rate, betas, steps


def test_call_passes_options_and_extras():
    options = ConfigDict({"learning_rate": 0.1, "betas": (0.5, 0.6)})
    assert config.call_with_options(make, options, "m", name="optimizer", steps=3) == ("m", None, 0.1, (0.5, 0.6), 3)


class Sampling(NamedTuple):
    length: int
    heat: float | Sequence = 1.0  # 0 is greedy
    copies: int = 1
    set_by_code = ("copies",)


EIGHT = Sampling(length=8)


def asked(prompts, *, sampling: Sampling = EIGHT, rows: int = 4):
    return prompts, sampling, rows


def test_the_fields_of_a_record_are_options_of_the_function():
    assert config.call_with_options(asked, {"heat": 0.5}, "p", name="ask") == ("p", Sampling(8, 0.5), 4)
    assert config.call_with_options(asked, {"length": 2, "rows": 1}, "p", name="ask") == ("p", Sampling(2), 1)
    options = ConfigFunction(asked).options
    assert {name: option.default for name, option in options.items()} == {"length": 8, "heat": 1.0, "rows": 4}
    assert option_type(options["heat"]) == OptionType((float,)) and option_docs(ConfigFunction(asked)) == {
        "heat": "0 is greedy"
    }
    for name in ("copies", "sampling"):
        with pytest.raises(UserError, match=f"ask.{name} is not an option of .*asked"):
            config.call_with_options(asked, {name: 2}, "p", name="ask")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": 1.0}, "optimizer.lr is not an option of test_config.make; did you mean learning_rate?"),
        ({"learning_rate": 1.0, "beta": 1}, "optimizer.beta is not an option of test_config.make; did you mean betas?"),
        (
            {"learning_rate": 1.0, "model": 1},
            "optimizer.model is not an option of test_config.make",
        ),  # given by position
        (
            {"learning_rate": 1.0, "steps": 1},
            "optimizer.steps is not an option of test_config.make",
        ),  # given as an extra
        ({}, "optimizer.learning_rate is missing: test_config.make has no default for it"),
    ],
)
def test_call_names_what_does_not_fit(options, message):
    with pytest.raises(UserError) as error:
        config.call_with_options(make, options, "m", name="optimizer", steps=3)
    assert str(error.value).replace(make.__module__, "test_config") == message


def optimizer(
    model,
    *,
    learning_rate: float,
    b2: float = 0.95,
    nesterov: bool = False,
    blocks: str | int = "auto",
    limit: int | None = None,
    ramp: Sequence[tuple[int, int]] = (),
    axes: Mapping[str, float] = MappingProxyType({"overall": 1.0}),
    names: tuple[str, ...] = ("a",),
    unsaid=3,
    network: ConfigDict = None,
):
    """Steps. b2: of the second moment. Nothing is said of `learning_rate` but here; `limit` ends it, `ramp` begins."""


def functions(config):
    return {"optimizer": ConfigFunction(optimizer)} if "optimizer" in config else {}


OPTIONS = """
from ml_collections import ConfigDict

def get_config(arg=""):
    return ConfigDict({"steps": 5, "optimizer": {"learning_rate": 1e-3, "axes": {"overall": 1.0, "fun": 0.0}}}).lock()
"""


@pytest.fixture
def options_file(tmp_path):
    (tmp_path / "short.py").write_text(OPTIONS)
    return str(tmp_path / "short.py")


@pytest.mark.parametrize(
    "override, expected",
    [
        ("b2=1", 1.0),
        ("nesterov=true", True),
        ("blocks=4", 4),
        ("blocks=auto", "auto"),
        ("limit=7", 7),
        ("limit=None", None),
        ("ramp=(10,4),(20,8)", ((10, 4), (20, 8))),
        ("axes={'overall': 1, 'new': 2.0}", {"overall": 1.0, "new": 2.0}),
        ("axes.fun=1", {"overall": 1.0, "fun": 1.0}),
        ("names=('b', 'c')", ("b", "c")),
        ("unsaid=4", 4),
        ("network=runs/a", "runs/a"),  # a class that no config can hold is named by a text
    ],
)
def test_an_option_of_the_function_can_be_set_though_the_file_does_not_list_it(options_file, override, expected):
    loaded = config.load_config(options_file, [f"optimizer.{override}"], functions)
    value = loaded.to_dict()["optimizer"][override.partition("=")[0].partition(".")[0]]
    assert value == expected and type(value) is type(expected)
    assert loaded.is_locked
    with pytest.raises(UserError, match="config.optimizer.b2 is not in"):
        config.load_config(options_file, ["optimizer.b2=1"])  # nobody has said what the subtree calls


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "optimizer.nestrov=true",
            "config.optimizer.nestrov is not in {file}; did you mean config.optimizer.nesterov?",
        ),
        (
            "optimizer.zzz=1",
            "config.optimizer.zzz is not in {file}, and no option of test_config.optimizer; --help lists all there are",
        ),
        (
            "optimizer.model=1",
            "config.optimizer.model is not in {file}, and no option of test_config.optimizer; "
            "--help lists all there are",
        ),  # given by position
        ("nesterov=true", "config.nesterov is not in {file}; did you mean config.optimizer.nesterov?"),
        (
            "optimizer.axes.funn=1",
            "config.optimizer.axes.funn is not in {file}; did you mean config.optimizer.axes.fun?",
        ),
        (
            "optimizer.axes.witty=1",
            "config.optimizer.axes.witty is not in {file}; give config.optimizer.axes as a whole, such as "
            "{{'witty': 1.0}}",
        ),
        ("optimizer.axes=1", "config.optimizer.axes is a group: set its entries, such as config.optimizer.axes.fun"),
        ("optimizer.b2=high", "config.optimizer.b2=high: expected a number, as in config.optimizer.b2=0.95"),
        ("optimizer.limit=2.5", "config.optimizer.limit=2.5: expected an integer, as in config.optimizer.limit=None"),
        (
            "optimizer.ramp=1,2",  # items that are no pairs
            "config.optimizer.ramp=1,2: expected a tuple such as 1,2, as in config.optimizer.ramp=()",
        ),
    ],
)
def test_an_option_that_there_is_not_is_named(options_file, override, message):
    with pytest.raises(UserError) as error:
        config.load_config(options_file, [override], functions)
    assert str(error.value).replace(optimizer.__module__, "test_config") == message.format(file=options_file)


def test_a_mapping_that_two_subtrees_share_stays_one(tmp_path):
    twice = 'c = get(arg).unlock(); c.other = ConfigDict({"axes": c.optimizer.axes}); return c.lock()'
    text = OPTIONS.replace("get_config", "get") + f"\n\ndef get_config(arg=''):\n    {twice}\n"
    (tmp_path / "twice.py").write_text(text)
    for override, axes in (
        ("optimizer.axes={'overall': 2, 'new': 3.0}", {"overall": 2.0, "new": 3.0}),
        ("other.axes.fun=1", {"overall": 1.0, "fun": 1.0}),
    ):
        loaded = config.load_config(str(tmp_path / "twice.py"), [override], functions)
        assert loaded.optimizer.axes.to_dict() == loaded.other.axes.to_dict() == axes


CHOOSING = """
from ml_collections import ConfigDict

def get_config(arg=""):
    return ConfigDict({"stage": {"name": "a"}}).lock()
"""


def test_the_order_of_overrides_does_not_matter_where_one_names_the_function(tmp_path):
    (tmp_path / "choosing.py").write_text(CHOOSING)

    def of_a(*, x: int = 1):
        pass

    def of_b(*, y: float = 2.0):
        pass

    def chosen(config):
        return {"stage": ConfigFunction({"a": of_a, "b": of_b}[config.stage.name])}

    for order in (["stage.y=3", "stage.name=b"], ["stage.name=b", "stage.y=3"]):
        assert config.load_config(str(tmp_path / "choosing.py"), order, chosen).to_dict() == {
            "stage": {"name": "b", "y": 3.0}
        }


FOLLOWING = """
from ml_collections import ConfigDict

def get_config(arg=""):
    c = ConfigDict({"train": {"steps": 4}, "optimizer": {"learning_rate": 0.1}})
    c.optimizer.total_steps = c.train.get_oneway_ref("steps")
    return c.lock()
"""


def test_what_follows_can_be_set_alone_in_any_order_and_writes_nothing_back(tmp_path):
    (tmp_path / "following.py").write_text(FOLLOWING)

    def steps(*overrides):
        loaded = config.load_config(str(tmp_path / "following.py"), overrides)
        return loaded.train.steps, loaded.optimizer.total_steps

    assert steps() == (4, 4)
    assert steps("train.steps=6") == (6, 6)
    assert steps("optimizer.total_steps=14") == (4, 14)
    assert steps("train.steps=6", "optimizer.total_steps=14") == steps("optimizer.total_steps=14", "train.steps=6")
    assert steps("optimizer.total_steps=14", "train.steps=6") == (6, 14)


def test_help_lists_every_entry_with_its_value_here_its_default_and_what_it_is(options_file, capsys):
    argv = [f"--config={options_file}", "--config.optimizer.b2=0.5", "--help"]
    with pytest.raises(SystemExit) as ended:
        config.flags_and_config(argv, "train", FLAGS, functions)
    said = capsys.readouterr().out
    assert ended.value.code == 0
    rows = {line.split()[0]: line.split()[1:] for line in said[said.index("entries of") :].split("\n") if line.strip()}
    assert rows["steps"] == ["5"]
    assert rows["optimizer.b2"] == ["0.5", "0.95", "of", "the", "second", "moment"]
    assert rows["optimizer.learning_rate"][:2] == ["0.001", "none"]
    assert rows["optimizer.limit"] == ["None", "None", "`limit`", "ends", "it"]
    assert rows["optimizer.ramp"] == ["()", "()", "`ramp`", "begins"]
    assert set(rows) >= {f"optimizer.{name}" for name in ConfigFunction(optimizer).options}
    with pytest.raises(UserError, match="nesterof is not in .*; did you mean config.optimizer.nesterov"):
        config.flags_and_config([*argv, "--config.optimizer.nesterof=true"], "train", FLAGS, functions)
    with pytest.raises(SystemExit):
        config.flags_and_config(["--help"], "train", FLAGS, functions)
    assert "--workdir" in capsys.readouterr().out


FLAGS = {"workdir": dict(required=True, help="where the run lives"), "top_k": dict(type=int, default=0)}


def test_arguments_reads_flags_and_config(file):
    argv = [
        f"--config={file}:tiny",
        "--config.corpus",
        "x.txt",
        "--workdir",
        "w",
        "--config.model.tie_embeddings=false",
    ]
    namespace, loaded = config.flags_and_config(argv, "train", FLAGS)
    assert (namespace.workdir, namespace.top_k) == ("w", 0)
    assert (loaded.model.width, loaded.corpus, loaded.model.tie_embeddings) == (8, "x.txt", False)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--workdri=w"], "--workdri is not a flag of this program; did you mean --workdir?"),
        (["--qqq"], "--qqq is not a flag of this program"),
        (["--config.model.width"], "--config.model.width has no value: write --config.model.width=VALUE"),
        (
            ["--config.model.width", "--workdir=w"],
            "--config.model.width has no value: write --config.model.width=VALUE",
        ),
        (["--config=x.py"], "the following arguments are required: --workdir; --help lists the flags"),
        (
            ["--config=x.py", "--workdir=w", "--top_k=many"],
            "argument --top_k: invalid int value: 'many'; --help lists the flags",
        ),
        (["--config=x.py", "--workdir=w", "stray"], "unrecognized arguments: stray; --help lists the flags"),
    ],
)
def test_bad_arguments_are_named(argv, message):
    with pytest.raises(UserError) as error:
        config.flags_and_config(argv, "train", FLAGS)
    assert str(error.value) == message


def test_what_has_no_flag_may_stand_among_flags():
    flags = config.parsed_flags(["a", "--top_k=5", "b"], "chat", FLAGS | {"workdir": {}}, {"folders": dict(nargs="*")})
    assert flags.folders == ["a", "b"] and flags.top_k == 5


def test_parsed_needs_no_config():
    assert config.parsed_flags(["--workdir=w", "--top_k=5"], "chat", FLAGS).top_k == 5


REWARDS_FILE = """
from ml_collections import ConfigDict

def get_config(arg=""):
    if arg == "text":
        return ConfigDict({"data": {"rewards": "rule=1.0"}})
    if arg == "dots":
        return ConfigDict({"data": {"rewards": {"mine.py:accuracy": 1.0}}})
    rewards = {"model": 1.0, "rule": 0.0} | ({"punctuation": 0.0} if arg == "penalty" else {})
    return ConfigDict({"data": {"rewards": rewards}}, allow_dotted_keys=arg == "allowed")
"""


def reward_batches(context, *, rewards: Mapping[str, float] | str = MappingProxyType({})):
    """Takes rewards as a mapping, or as text."""


def reward_functions(config):
    return {"data": ConfigFunction(reward_batches)}


def test_rewards_may_be_text_where_the_file_has_a_mapping(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS_FILE)
    load = lambda name, *overrides: config.to_dict(config.load_config(name, overrides, reward_functions))["data"]
    assert load(str(path), "data.rewards.rule=0.5") == {"rewards": {"model": 1.0, "rule": 0.5}}
    assert load(str(path), "data.rewards={'rule': 2.0}") == {"rewards": {"rule": 2.0}}
    assert load(str(path), "data.rewards=rule=1.0,mine.py:accuracy=2.0") == {"rewards": "rule=1.0,mine.py:accuracy=2.0"}
    assert load(f"{path}:text", "data.rewards={'rule': 2.0}") == {"rewards": {"rule": 2.0}}
    assert load(f"{path}:text", "data.rewards=form=2.0") == {"rewards": "form=2.0"}
    found = load(f"{path}:allowed", "data.rewards={'mine.py:accuracy': 2.0}")
    assert found == {"rewards": {"mine.py:accuracy": 2.0}}
    new = "config.data.rewards.form is not in .*; it is called config.data.rewards.punctuation now"
    with pytest.raises(UserError, match=new):
        load(f"{path}:penalty", "data.rewards.form=1.0")
    message = "the key 'mine.py:accuracy' holds a dot, .* write a mapping of rewards as text, .*'mine.py:accuracy=1.0'"
    with pytest.raises(UserError, match=f"rewards.py: {message}"):
        load(f"{path}:dots")
    with pytest.raises(UserError, match=f"config.data.rewards=.*: {message}"):
        load(str(path), "data.rewards={'mine.py:accuracy': 2.0}")

"""The program that has people rank: who answers, that it goes on where it stopped, one line for bad input."""

import os
import re
import signal
import socket

import jax
import numpy as np
import pytest
import uvicorn
from runs import finished, small

from lm.core.errors import UserError
from lm.data.annotations import Annotation, AnnotationStore, read_rankings
from lm.feedback import answering_models, rank
from lm.rewards.load import load_reward_model
from lm.runs.console import SigtermExit
from lm.runs.workdir import load_trained_model
from tests.test_bad_input import refused

__all__ = ["finished", "refused", "small"]

TWO = [{"content": "is it so?", "role": "user"}, {"content": "it is", "role": "assistant"}]
QUESTIONS = [f"the {word} is what?" for word in "object class type value name method list string number".split()]


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    """The server stops as soon as it would serve; answers are drawn four prompts at a time."""
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: [each.close() for each in sockets])
    monkeypatch.setattr(answering_models, "PROMPTS_AT_ONCE", 4)


@pytest.fixture
def asking(finished, tmp_path):
    """The flags that have the SFT and the PPO model of the finished pipeline answer QUESTIONS."""
    (tmp_path / "prompts.txt").write_text("\n".join(QUESTIONS))
    models = f"--models={finished}/sft,after={finished}/ppo"
    return [f"--prompts={tmp_path / 'prompts.txt'}", models, "--max_new_tokens=6", "--port=0"]


def items(workdir):
    with AnnotationStore(workdir / "people.db") as store:
        return store.items()


def run(workdir, *flags) -> None:
    rank.program([f"--workdir={workdir}", *map(str, flags)])


def test_models_answer_in_turn(asking, finished, tmp_path, capsys):
    run(tmp_path / "w", *asking, "--responses=3", "--seed=7")
    found = items(tmp_path / "w")
    assert [item.prompt[0]["content"] for item in found] == QUESTIONS
    sampler = {"seed": 7, "max_new_tokens": 6, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    fingerprints = {
        name: answering_models.params_sha256(load_trained_model(finished / stage, backend="cpu").params)
        for name, stage in (("sft", "sft"), ("after", "ppo"))
    }
    for i, item in enumerate(found):
        assert len(set(item.responses)) == 3
        assert [source["model"] for source in item.sources] == [("sft", "after")[(i + j) % 2] for j in range(3)]
        assert all(source["sampler"] == sampler for source in item.sources)
        assert all(source["fingerprint"] == fingerprints[source["model"]] for source in item.sources)
    said = capsys.readouterr().out
    assert re.search(r"rank at http://127\.0\.0\.1:\d+/ \(9 items; ctrl-C stops\)", said)
    assert f"--config.data.rankings={tmp_path}/w/people.db" in said and "stopped: 0 verdicts in" in said


def test_the_same_command_goes_on(asking, tmp_path, monkeypatch, capsys):
    """Stopped after four prompts it comes to the answers of a run that was not; then there is nothing left to do."""
    run(tmp_path / "whole", *asking)
    add = AnnotationStore.add_items

    def stopped_after(store, new):
        os.kill(os.getpid(), signal.SIGTERM)
        return add(store, new)

    with monkeypatch.context() as patch:
        patch.setattr(AnnotationStore, "add_items", stopped_after)
        with pytest.raises(SigtermExit):
            run(tmp_path / "cut", *asking)
    assert len(items(tmp_path / "cut")) == 4
    capsys.readouterr()
    run(tmp_path / "cut", *asking)
    assert "answers: 5 prompts were answered, 4 had answers already" in capsys.readouterr().out
    assert items(tmp_path / "cut") == items(tmp_path / "whole")
    monkeypatch.setattr(AnnotationStore, "add_items", pytest.fail)
    run(tmp_path / "cut", *asking)
    assert "answers: 0 prompts were answered, 9 had answers already" in capsys.readouterr().out
    run(tmp_path / "cut", "--port=0")


def test_another_seed_adds_other_answers(asking, tmp_path):
    run(tmp_path, *asking)
    run(tmp_path, *asking, "--seed=1")
    found = items(tmp_path)
    assert len(found) == 18 and [item.prompt for item in found[:9]] == [item.prompt for item in found[9:]]


def test_answers_that_are_alike_are_left_out(asking, finished, tmp_path, capsys):
    flags = [asking[0], f"--models={finished}/sft", *asking[2:], "--temperature=0"]
    with pytest.raises(UserError, match="there is nothing to rank in .*people.db: give --prompts=FILE"):
        run(tmp_path / "w", *flags)
    said = capsys.readouterr().err
    assert "9 answers were left out, since 3 attempts gave only answers that were there, and so 9 prompts" in said
    run(tmp_path / "w", *asking, "--temperature=0", "--responses=4")
    assert all(2 <= len(item.responses) == len(set(item.responses)) for item in items(tmp_path / "w"))


def test_doubt_by_hand():
    """One model: p = sigmoid(log 3) = 3/4, so 3/16. Two that say 3/4 and 1/4: p = 1/2, so 1/4: 3/16 and the variance
    1/16. Three responses: the mean over their pairs."""
    log3 = np.log(3)
    assert rank.reward_uncertainty(np.array([[log3, 0.0]])) == pytest.approx(3 / 16)
    assert rank.reward_uncertainty(np.array([[log3, 0.0], [0.0, log3]])) == pytest.approx(1 / 4)
    assert rank.reward_uncertainty(np.array([[log3, 0.0, 0.0]])) == pytest.approx((3 / 16 + 3 / 16 + 1 / 4) / 3)


def test_what_a_reward_model_is_least_sure_of_comes_first(asking, finished, tmp_path):
    run(tmp_path, *asking, f"--reward={finished}/reward,{finished}/reward")
    _, judge = load_reward_model(finished / "reward", backend="cpu", normalized=False, jit=jax.jit)
    with AnnotationStore(tmp_path / "people.db") as store:
        gaps = [
            abs(float(np.diff(judge([{"messages": item.prompt}] * 2, item.responses))[0]))
            for item in store.unjudged_items("ann")
        ]
    assert len(gaps) == 9 and gaps == sorted(gaps) and gaps[0] < gaps[-1]


def test_import_export_and_results(asking, tmp_path, capsys):
    run(tmp_path / "w", *asking)
    with AnnotationStore(tmp_path / "w" / "people.db") as store:
        for item in store.items():
            for rater in ("ann", "ben"):
                store.record_verdict(Annotation(f"{rater} {item.id}", item.id, rater, [1, 2], seconds=1.5))
    capsys.readouterr()
    run(tmp_path / "w", f"--export={tmp_path / 'out.jsonl'}", "--results")
    said = capsys.readouterr().out
    assert "18 verdicts exported to" in said and "Krippendorff's alpha" in said and "log-strength" in said
    assert "What the raters say" in (tmp_path / "w" / "results.html").read_text()
    for source in (tmp_path / "out.jsonl", tmp_path / "w" / "people.db"):
        run(tmp_path / "new", f"--import={source}")
    said = capsys.readouterr().out
    assert "18 verdicts imported into" in said and ", 0 were there already" in said
    assert "0 verdicts imported into" in said and ", 18 were there already" in said
    assert read_rankings(tmp_path / "new" / "people.db") == read_rankings(tmp_path / "out.jsonl")


def test_other_machines_come_by_a_secret_address(asking, tmp_path, capsys):
    run(tmp_path, *asking, "--host=0.0.0.0")
    addresses = re.findall(r"(http://\S+)", capsys.readouterr().out)
    assert all(re.fullmatch(rf"http://{socket.gethostname()}:\d+/(results)?\?token=[\w-]{{43}}", a) for a in addresses)
    assert len(addresses) == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--workdir={tmp}/w"], "there is no {tmp}/w/people.db yet: give --prompts=FILE to have them answered, or"),
        (["--workdir={tmp}/w", "--results"], "there is no {tmp}/w/people.db yet"),
        (
            ["--workdir={tmp}/w", "--prompts={tmp}/no.txt"],
            "no prompts at {tmp}/no.txt (No such file or directory): give",
        ),
        (["--workdir={tmp}/w", "--prompts={tmp}/p.pdf"], "{tmp}/p.pdf: give prompts as a .txt file, one a line, or as"),
        (["--workdir={tmp}/w", "--prompts={tmp}/empty.txt"], "no prompt in {tmp}/empty.txt: it is empty"),
        (
            ["--workdir={tmp}/w", "--prompts={tmp}/p.txt"],
            "there is no model in {tmp}/w: name those that answer, --models",
        ),
        (["--models={tmp}/none"], "there is no workdir {tmp}/none: train that stage first, or name another"),
        (["--models={run}/reward"], "{run}/reward is a reward model, which scores answers and writes none"),
        (["--models={run}/sft,{run}/sft"], "two models are called sft: tell them apart, --models=NAME=DIR,NAME=DIR"),
        (["--models="], "there is no model in {tmp}/w"),
        (["--models=x="], "--models=x= names no folder: give those of trained models"),
        (["--models={run}", "--responses=1"], "responses is 1; it must be from 2 to 5"),
        (["--models={run}", "--responses=6"], "responses is 6; it must be from 2 to 5"),
        (["--models={run}", "--max_new_tokens=0"], "max_new_tokens is 0; it must be at least 1"),
        (
            ["--models={run}", "--max_new_tokens=62"],
            "no prompt leaves room for an answer: shorten them, or lower --max_n",
        ),
        (["--models={run}", "--temperature=-1"], "temperature is -1"),
        (["--models={run}", "--top_p=0"], "top_k is 0 and top_p 0.0"),
        (["--models={run}", "--seed=-1"], "seed is -1; it must be from 0 to 4294967295"),
        (["--models={run}", "--port=70000"], "cannot serve at 127.0.0.1:70000"),
        (["--models={run}", "--port={taken}"], "cannot serve at 127.0.0.1:{taken} ("),
        (["--models={run}", "--host=nowhere.invalid"], "cannot serve at nowhere.invalid:8000 ("),
        (["--models={run}", "--raters=ann,,ben"], "rater is '': a name has 1 to 64 printable characters"),
        (
            ["--models={run}", "--reward={run}/sft"],
            "{run}/sft is no finished reward model (it is sft): train stage reward",
        ),
        (["--workdir={tmp}/w", "--import={tmp}/p.txt"], "{tmp}/p.txt:1: not JSON"),
        (["--workdir={tmp}/w", "--import={tmp}/none"], "no rankings at {tmp}/none"),
        (["--workdir={tmp}/old", "--export={tmp}/p.txt"], "{tmp}/p.txt exists: name a new file to export to"),
        (["--workdir={tmp}/w", "--promts=x"], "--promts is not a flag of this program; did you mean --prompts?"),
        (["--workdir={tmp}/p.txt", "--import={tmp}/rankings.jsonl"], "cannot write {tmp}/p.txt/people.db"),
    ],
)
def test_bad_input(refused, finished, tmp_path, flags, message):
    (tmp_path / "p.txt").write_text("is it?\n")
    (tmp_path / "p.pdf").write_text("is it?\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "rankings.jsonl").write_text("")
    AnnotationStore(tmp_path / "old" / "people.db").close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"tmp": tmp_path, "run": finished, "taken": taken.getsockname()[1]}
        if "workdir" not in flags[0]:
            flags = [
                "--workdir={tmp}/w",
                "--prompts={tmp}/p.txt",
                *flags,
                *["--max_new_tokens=6"] * ("max" not in flags[-1]),
            ]
        said = refused(rank, *(flag.format(**names) for flag in flags))
    assert message.format(**names) in said

"""Evaluation: the same unseen prompts for every model, and numbers that can be worked out again from what it writes."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from runs import finished, made_dialogues, small, stage_config

from lm.core.errors import UserError
from lm.data import sources
from lm.data.conversations import Conversation, reward_example
from lm.data.prompts import padded_prompts, prompts_at
from lm.evaluate import measurements, models
from lm.generate.answers import GeneratedAnswer, batch_answerer
from lm.generate.sampler import SamplingParams
from lm.rewards import REWARDS
from lm.runs.workdir import load_trained_model, read_json
from lm.tokenizer import encode_prompt, load_tokenizer

__all__ = ["finished", "small"]


@pytest.fixture(scope="module")
def summary(finished) -> dict:
    return read_json(finished / "evaluate" / "summary.json")


@pytest.fixture(scope="module")
def lines(finished) -> list[dict]:
    return [json.loads(line) for line in (finished / "evaluate" / "answers.jsonl").read_text().splitlines()]


def test_every_model_answers_the_same_unseen_prompts(lines, summary):
    turns = {tuple(turns[:3]) for name, turns in made_dialogues() if sources.is_held_out(name, 0.05)}
    prompts = [tuple(message["content"] for message in line["prompt"]) for line in lines]
    assert len(set(prompts)) == len(lines) == summary["prompts"] > 10
    assert all(any(prompt in (whole[:1], whole) for whole in turns) for prompt in prompts)
    assert all(list(line["answers"]) == list(line["scores"]) == ["raw", "sft", "ppo"] for line in lines)


def test_scores_are_the_rule_s(lines):
    for name in ("raw", "sft", "ppo"):
        again = REWARDS["rule"](
            [{"messages": line["prompt"]} for line in lines], [line["answers"][name]["text"] for line in lines]
        )
        assert [line["scores"][name] for line in lines] == list(again)


def test_the_table_follows_from_the_answers(lines, summary):
    for name, told in summary["models"].items():
        assert told["score"]["value"] == pytest.approx(np.mean([line["scores"][name] for line in lines]))
        assert told["length"]["value"] == pytest.approx(np.mean([line["answers"][name]["length"] for line in lines]))
        assert told["stopped"]["value"] == pytest.approx(np.mean([line["answers"][name]["stopped"] for line in lines]))
        assert all(line["answers"][name]["length"] <= 16 for line in lines)
        assert all(line["answers"][name]["length"] == 16 for line in lines if not line["answers"][name]["stopped"])
    assert [(c["a"], c["b"]) for c in summary["comparisons"]] == [("sft", "raw"), ("ppo", "sft")]
    for c in summary["comparisons"]:
        pairs = [(line["scores"][c["a"]], line["scores"][c["b"]]) for line in lines]
        assert c["difference"]["value"] == pytest.approx(np.mean([a - b for a, b in pairs]))
        assert c["win_rate"]["value"] == pytest.approx(np.mean([(a > b) + (a == b) / 2 for a, b in pairs]))


def test_losses_are_those_the_stages_report(finished, summary):
    """The same held-out documents and replies, in other batches: equal up to the rounding of a sum."""
    models = summary["models"]
    own = {name: read_json(finished / name / "summary.json")["held_out"] for name in ("pretrain", "sft")}
    assert models["raw"]["bits_per_byte"] == pytest.approx(own["pretrain"]["bits_per_byte"], rel=1e-5)
    assert models["sft"]["reply_loss"] == pytest.approx(own["sft"]["loss"], rel=1e-5)
    assert models["sft"]["bits_per_byte"] != pytest.approx(models["raw"]["bits_per_byte"], rel=1e-5)


def test_a_comparison_by_hand():
    """Differences 2, 0, -1, 2: mean 0.75 with se 0.75 (see test_intervals); won, tied, lost, won: 0.625."""
    compared = models.paired_comparison("a", "b", {"a": np.array([3.0, 1, 2, 2]), "b": np.array([1.0, 1, 3, 0])})
    assert (compared["a"], compared["b"]) == ("a", "b")
    assert compared["difference"]["value"] == 0.75 and compared["difference"]["se"] == pytest.approx(0.75)
    assert compared["win_rate"]["value"] == 0.625


def test_a_description_by_hand():
    given = [GeneratedAnswer("", 4, True), GeneratedAnswer("", 8, False)]
    told = models.answer_statistics(given, np.array([7.0, 3.0]))
    assert {name: estimate["value"] for name, estimate in told.items()} == {"score": 5, "stopped": 0.5, "length": 6}


def test_a_model_is_asked_as_it_was_trained(finished):
    tokenizer = load_tokenizer(finished / "tokenizer" / "tokenizer.model")
    messages = [{"role": "user", "content": "the name"}, {"role": "assistant", "content": "a list"}]
    plain = measurements.prompt_ids(SimpleNamespace(tokenizer=tokenizer, stage="pretrain"), messages)
    assert plain[0] == tokenizer.bos and tokenizer.decode(plain) == "the name\na list\n"
    chat = measurements.prompt_ids(SimpleNamespace(tokenizer=tokenizer, stage="ppo"), messages)
    roles = tokenizer.role_ids
    assert [int(i) for i in chat if i in (*roles.values(), tokenizer.end_of_message)] == [
        roles["user"],
        tokenizer.end_of_message,
        roles["assistant"],
        tokenizer.end_of_message,
        roles["assistant"],
    ]


def test_an_answer_depends_on_its_place_not_on_what_follows(finished):
    """Five prompts, four at a time, and the first three of them alone: the same answers, each within its limit."""
    trained = load_trained_model(finished / "sft", backend="cpu")
    asked = ("the name", "the type", "a list", "the form", "test")
    examples = [reward_example([{"role": "user", "content": text}]) for text in asked]
    ids = [encode_prompt(trained.tokenizer, example["messages"]) for example in examples]
    rows = padded_prompts(ids, examples, 16)

    ask = batch_answerer(
        trained.model, trained.params["lm"], trained.tokenizer, SamplingParams(6), rows_at_once=4, jit=jax.jit
    )
    five, three = ask(rows, jax.random.key(0)), ask(prompts_at(rows, np.arange(3)), jax.random.key(0))
    assert five[:3] == three and len(five) == 5
    assert len(set(five)) == 5  # chunks and rows draw with keys of their own
    assert all(1 <= answer.length <= 6 and (answer.stopped or answer.length == 6) for answer in five)


def test_prompts_fit_every_model(finished):
    """What is short enough for one template may be too long for the other: then nobody is asked."""
    tokenizer = load_tokenizer(finished / "tokenizer" / "tokenizer.model")
    trained = [SimpleNamespace(tokenizer=tokenizer, stage=stage) for stage in ("pretrain", "sft")]
    contexts = [
        Conversation(text, [{"role": "user", "content": text}]) for text in ("the name", "the name of the type")
    ]
    sizes = [[len(measurements.prompt_ids(model, context.messages)) for context in contexts] for model in trained]
    assert sizes[0][0] < sizes[1][0] < sizes[0][1] < sizes[1][1]
    assert measurements.shared_prompts(trained, contexts, sizes[1][1]) == contexts
    assert measurements.shared_prompts(trained[:1], contexts, sizes[0][1]) == contexts
    assert measurements.shared_prompts(trained, contexts, sizes[0][1]) == contexts[:1]
    with pytest.raises(
        UserError, match=f"no held-out prompt has at most {sizes[1][0] - 1} tokens; raise evaluate.prompt_length"
    ):
        measurements.shared_prompts(trained, contexts, sizes[1][0] - 1)


@pytest.mark.parametrize(
    "override, message",
    [
        ("evaluate.order=('raw','sft')", "evaluate.order raw, sft does not name the models ppo, raw, sft, each once"),
        ("evaluate.rows_at_once=0", "evaluate.rows_at_once is 0; it must be at least 1"),
        ("evaluate.rater=rul", "evaluate.rater is 'rul'; choose one of rule"),
        ("models.ppo=nowhere", "there is no workdir nowhere: train that stage first"),
        ("models.ppo={finished}/reward", "models.ppo .*/reward is a reward model, which scores answers and"),
        ("evaluate.length=65", r"evaluate.length is 65, but the context of raw \(.*/pretrain\) is 64: lower it"),
        ("evaluate.max_new=33", "evaluate.prompt_length and max_new together is 65, but the context of raw .* is 64"),
    ],
)
def test_bad_options(finished, small, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        config = stage_config(finished, "evaluate", override.format(finished=finished))
        models.run_evaluation(config, tmp_path / "evaluate")
    assert not (tmp_path / "evaluate" / "summary.json").exists()


def test_a_finished_evaluation_is_shown_again(finished, small, capsys):
    before = (finished / "evaluate" / "answers.jsonl").read_bytes()
    models.run_evaluation(stage_config(finished, "evaluate"), finished / "evaluate")
    assert "sft over raw: score" in capsys.readouterr().out
    assert (finished / "evaluate" / "answers.jsonl").read_bytes() == before

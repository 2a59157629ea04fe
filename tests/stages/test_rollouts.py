"""Rollouts: their rewards checked, groups refilled, conversations with an environment masked, tables for people."""

import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import CLOCK, EXPERIMENTS, finished, small

from lm.core.config import load_config
from lm.core.errors import UserError
from lm.core.types import Completions, Rollouts, Tokens
from lm.data import packing, sources as corpora
from lm.data.arithmetic import expression_value
from lm.data.prompts import padded_prompts
from lm.rewards import weighted_reward
from lm.rewards.environments import calculator
from lm.rewards.verifiers.arithmetic import arithmetic_reward
from lm.runs.workdir import read_metrics
from lm.stages.rl.multi_turn import multi_turn_sampler
from lm.stages.rl.rollout_rewards import answer_token_rewards, reward_labels
from lm.stages.rl.rollouts import equal_reward_groups, held_out_prompts, resampled_batch, rollout_table, text_batches
from lm.tokenizer import encode_prompt, load_tokenizer
from lm.train import loop
from lm.train.config import train_functions

__all__ = ["finished", "small"]
KEY = jax.random.key(0)


# Rewards

ASKED = {"messages": [{"role": "user", "content": "What is 2 + 3?"}]}


def test_rewards_add_up_by_weight():
    parts = {"a": (2.0, lambda e, t: [1, 2]), "b": (-0.5, lambda e, t: [4, 0])}
    total, parts, _ = weighted_reward(parts)([ASKED, ASKED], ["x", "y"])
    np.testing.assert_allclose(total, [0, 4])
    np.testing.assert_allclose(parts["b"], [4, 0])


def test_rewards_of_tokens_stand_where_their_tokens_are_predicted():
    """Two answers in the first row, of 2 and 3 tokens: the rewards are the last one's."""
    weights = np.float32([[0, 1, 1, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0, 0]])
    rows = np.zeros(weights.shape, np.int32)
    tokens = Tokens(rows, rows, weights, rows, rows)
    found = answer_token_rewards(tokens, [np.float32([1, 2, 3]), np.float32([4, 5])])
    np.testing.assert_array_equal(found, [[0, 0, 0, 0, 0, 1, 2, 3], [0, 0, 4, 5, 0, 0, 0, 0]])


def test_rewards_are_logged_by_the_names_of_their_functions():
    names = ["rule", "a.py:accuracy", "b.py:accuracy", "a.py:length", "my.package:style"]
    labels = ["rule", "a.py:accuracy", "b.py:accuracy", "length", "style"]
    assert reward_labels(names) == dict(zip(names, labels))


REWARDS_FILE = """
def accuracy(examples, texts):
    return [float(len(text) % 2) for text in texts]

def dense(example, text, tokens):
    return [0.25] * len(tokens)
"""


def test_rewards_of_one_s_own_in_a_run(finished, small, tmp_path, monkeypatch):
    """PPO learns from a sum of a built-in reward, a file's and one per token; the rater is a file's function too."""
    (tmp_path / "own_rewards.py").write_text(REWARDS_FILE)
    monkeypatch.chdir(tmp_path)
    rewards = "punctuation=1.0,own_rewards.py:accuracy=2.0,own_rewards.py:dense=0.5"
    overrides = (f"init_from={finished}/sft", f"data.rewards={rewards}", "data.rater=own_rewards.py:accuracy")
    overrides += ("data.reward_timeout=30", "train.steps=2", "train.log_every=1", "data.truncation_penalty=0.0")
    config = load_config(f"{EXPERIMENTS / 'ppo.py'}:tiny", overrides, train_functions)
    loop.train_stage(config, tmp_path / "run")
    for row in read_metrics(tmp_path / "run"):
        if "reward/accuracy" in row:
            parts = row["reward/punctuation"] + 2 * row["reward/accuracy"] + 0.5 * row["reward/dense"]
            np.testing.assert_allclose(row["reward"], parts, rtol=1e-4)
            np.testing.assert_allclose(row["reward/dense"], 0.25 * row["response_length"], rtol=1e-4)
            np.testing.assert_allclose(row["score/accuracy"], row["reward/accuracy"])
    assert any("reward/accuracy" in row for row in read_metrics(tmp_path / "run"))


# Dynamic sampling


def rewarded(*rewards, mark=0) -> Rollouts:
    rows = np.full((len(rewards), 3), mark, np.int32)
    tokens = Tokens(rows, rows, np.ones((len(rewards), 3), np.float32), rows, rows)
    return Rollouts(tokens, np.float32(rewards), {}, np.ones(len(rewards), bool), np.zeros((len(rewards), 3)), group=2)


def test_groups_of_equal_rewards_are_replaced_by_such_as_differ():
    batch = resampled_batch(rewarded(1, 1, 0, 2, 3, 3, 5, 5), rewarded(7, 7, 8, 9, 4, 4, 1, 2, mark=6))
    np.testing.assert_array_equal(batch.rewards, [8, 9, 0, 2, 1, 2, 5, 5])  # the fourth found no more to take
    np.testing.assert_array_equal(batch.tokens.inputs[:, 0], [6, 6, 0, 0, 6, 6, 0, 0])
    np.testing.assert_array_equal(equal_reward_groups(batch), [False, False, False, True])


# An environment


def test_the_calculator():
    asked = ["calc(2 + 3)", "so calc(4*5) it is", "no call", "calc(2**9)", "calc(999999 * 999999)", "calc(open('x'))"]
    assert calculator([[]] * 6, asked) == ["5", "20", None, "error", "error", None]
    assert (
        expression_value("(2 - 10) * 3") == "-24"
        and expression_value("1/2") == "error"
        and expression_value("7" * 200) == "error"
    )


def test_an_answer_to_a_sum_is_verified():
    messages = [{"role": "user", "content": "What is 12 - 15?"}, {"role": "assistant", "content": "calc(12 - 15)"}]
    example = {"messages": messages}
    got = arithmetic_reward([example] * 5, ["-3", "It is -3.", "3", "", "-3 or 4"])
    np.testing.assert_array_equal(got, [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(
        arithmetic_reward([{"messages": [{"role": "user", "content": "Hello there"}]}], ["5"]), [0]
    )


@pytest.fixture(scope="module")
def tokenizer(finished):
    return load_tokenizer(finished / "tokenizer" / "tokenizer.model")


def test_what_an_environment_says_is_context(tokenizer):
    """Rule 2. Two prompts: one calls the tool and answers, one answers at once; only what was sampled has weight."""
    asked = [ASKED | {"answer": "5"}, {"messages": [{"role": "user", "content": "What is 4 - 1?"}]}]
    said = {(0, 0): "calc(2 + 3)", (0, 1): "5", (1, 0): "3"}  # (row, exchange)
    turn = iter(range(2))

    def sampled(lm, ids, lengths, key):
        exchange = next(turn)
        tokens, logprobs = np.zeros((2, 12), np.int32), np.zeros((2, 12), np.float32)
        count = np.zeros(2, np.int32)
        for row in range(2):
            if (row, exchange) in said:
                answer = [*tokenizer.encode(said[row, exchange]), tokenizer.end_of_message]
                tokens[row, : len(answer)], count[row] = answer, len(answer)
                logprobs[row, : len(answer)] = -1 - exchange - 0.01 * np.arange(len(answer))
        return None, None, Completions(tokens, logprobs, count, np.ones(2, bool))

    rows = padded_prompts([encode_prompt(tokenizer, example["messages"]) for example in asked], asked, 24)
    drawn = multi_turn_sampler(sampled, tokenizer, calculator, exchanges=2, max_new=12, reply_length=8)(None, rows, KEY)
    assert drawn.tokens.inputs.shape == (2, 24 + 2 * 12 + 8 - 1) == drawn.logprobs.shape
    trained = [tokenizer.pieces(drawn.tokens.targets[b][drawn.tokens.weights[b] > 0]) for b in range(2)]
    assert "".join(trained[0]) == "calc(2 + 3)<|end|>5<|end|>" and "".join(trained[1]) == "3<|end|>"
    whole = "".join(tokenizer.pieces(drawn.tokens.targets[0][drawn.tokens.segments[0] > 0]))
    assert "<|assistant|>calc(2 + 3)<|end|><|tool|>5<|end|><|assistant|>5<|end|>" in whole
    first = len(tokenizer.encode("calc(2 + 3)")) + 1
    at = np.flatnonzero(drawn.tokens.weights[0])
    np.testing.assert_allclose(
        drawn.logprobs[0, at[[0, first - 1, first]]], [-1, -1 - 0.01 * (first - 1), -2], rtol=1e-6
    )
    assert not drawn.logprobs[0][drawn.tokens.weights[0] == 0].any()
    assert drawn.texts == ["5", "3"] and [len(e["messages"]) for e in drawn.examples] == [3, 1]
    assert drawn.examples[0]["messages"][-1] == {"role": "tool", "content": "5"} and drawn.examples[0]["answer"] == "5"
    assert len(asked[0]["messages"]) == 1  # the row itself stays as it is
    assert ["".join(tokenizer.pieces(ids)) for ids in drawn.last_ids] == ["5<|end|>", "3<|end|>"]
    np.testing.assert_array_equal(drawn.lengths, [first + len(tokenizer.encode("5")) + 1, len(trained[1])])
    assert drawn.stopped.all()


def test_an_answer_that_was_cut_off_ends_its_conversation(tokenizer):
    asked = [ASKED]

    def sampled(lm, ids, lengths, key):
        answer = np.array([tokenizer.encode("calc(2 + 3) ")], np.int32)
        return None, None, Completions(answer, np.zeros(answer.shape), np.array([answer.shape[1]]), np.zeros(1, bool))

    rows = padded_prompts([encode_prompt(tokenizer, ASKED["messages"])], asked, 24)
    drawn = multi_turn_sampler(sampled, tokenizer, calculator, exchanges=3, max_new=16, reply_length=8)(None, rows, KEY)
    assert not drawn.stopped[0] and drawn.examples == asked and drawn.texts[0].startswith("calc(2 + 3)")


# Text beside rollouts


def test_text_that_is_held_out_is_never_trained(finished, tokenizer):
    """PPO-ptx measures itself on documents that pretraining did not see either."""
    context = SimpleNamespace(tokenizer=tokenizer, seed=0, check_length=lambda length: None)
    corpus = str(finished.parent / "text")
    train_text, unseen_text = text_batches(context, corpus, 16, 8, 0.2)
    _, unseen = corpora.split_held_out(corpora.load_documents(corpus), 0.2)
    all_unseen = {row.tobytes() for row in packing.document_rows(tokenizer, [d.text for d in unseen], 16).inputs}
    assert all(row.tobytes() in all_unseen for row in unseen_text(0).inputs)
    assert not any(row.tobytes() in all_unseen for i in range(4) for row in train_text(i).inputs)
    assert [text(0) for text in text_batches(context, "", 16, 8, 0.2)] == [None, None]


# Tables


def test_the_table_shows_prompt_response_rewards_and_kl(tokenizer, tiny_model):
    ids = np.array(
        [
            *encode_prompt(tokenizer, [{"role": "user", "content": "hi"}]),
            *tokenizer.encode("a list"),
            tokenizer.end_of_message,
        ]
    )
    answer = len(tokenizer.encode("a list")) + 1
    padding = np.zeros(3, np.int32)  # the model's vocabulary is not used: log-probs are made up below
    row = np.concatenate([ids, padding]).astype(np.int32)[None]
    real = (np.arange(row.shape[1] - 1) < len(ids) - 1)[None]
    weights = (real & (np.arange(row.shape[1] - 1) >= len(ids) - 1 - answer)).astype(np.float32)
    tokens = Tokens(row[:, :-1], row[:, 1:], weights, real.astype(np.int32), real.astype(np.int32))
    sampler = -1.0 * weights
    batch = Rollouts(tokens, np.float32([2.5]), {"score/rule": np.float32([4])}, np.array([True]), sampler)
    model = tiny_model._replace(token_logprobs=lambda ref, tokens, temperature: jnp.full(tokens.inputs.shape, -1.5))
    context = SimpleNamespace(model=model, tokenizer=tokenizer, jit=jax.jit)
    shown = list(rollout_table(context, 1.0)(SimpleNamespace(memory={}, frozen={"ref": {}}), batch, 4))
    assert shown == [
        {
            "prompt": "<|bos|><|user|>hi<|end|><|assistant|>",
            "response": "a list<|end|>",
            "reward": 2.5,
            "score/rule": 4.0,
            "kl": 0.5 * answer,
            "tokens": answer,
            "stopped": True,
        }
    ]


# Whole runs of tiny configs


def tiny(finished, name, *overrides):
    paths = [f"init_from={finished}/sft", f"data.reward_model={finished}/reward"]
    return load_config(f"{EXPERIMENTS / name}.py:tiny", [*paths, "train.log_every=1", "train.save_every=1", *overrides])


CASES = {
    "ppo that remembers": (
        "ppo",
        "stage.kl_target=0.5",
        "stage.refresh_reference_every=2",
        "stage.text_coefficient=0.1",
    ),
    "grpo that refreshes": ("grpo", "stage.refresh_reference_every=2", "stage.epochs=2"),
    "dapo that samples again": ("dapo", "data.resample_rounds=1"),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case != "ppo that remembers")) for case in CASES]
)
def test_resumed_equals_never_stopped(finished, small, tmp_path, case):
    """Rule 13, bitwise: sampler keys, a KL coefficient that adapts, a reference that moves, rows that were shown.

    The parted run is what a kill after the checkpoint of step 2 would leave.
    """
    name, *overrides = CASES[case]
    if name == "ppo":
        overrides += [f"data.corpus={finished.parent}/text", "data.text_length=24"]
    straight, parted = tmp_path / "straight", tmp_path / "parted"
    loop.train_stage(tiny(finished, name, *overrides, "train.steps=3"), straight)
    shutil.copytree(straight, parted)
    shutil.rmtree(parted / "checkpoints" / "3")
    (parted / "summary.json").unlink()
    loop.train_stage(tiny(finished, name, *overrides, "train.steps=3"), parted)
    assert (parted / "rollouts.jsonl").read_text() == (straight / "rollouts.jsonl").read_text()
    assert {row["step"] for row in read_metrics(straight / "rollouts.jsonl")} == {1, 2, 3}
    logged = read_metrics(straight)
    if name == "dapo":
        assert {row["rounds"] for row in logged if "rounds" in row} <= {1, 2} and "rounds" in logged[1]
    last = [read_metrics(run)[-1] for run in (straight, parted)]
    for name in last[0]:
        if name not in CLOCK:
            assert last[0][name] == last[1][name], name


def test_a_run_that_does_not_start_where_its_policy_is_stops(finished, small, tmp_path, monkeypatch):
    """Rule 6, in the training loop itself: a reference that is another network is not what a run may start from."""
    prepare = loop.training_setup

    def tampered(*args):
        r = prepare(*args)
        ref = jax.tree.map(lambda x: 1.5 * x, r.initial_state.frozen["ref"])
        return r._replace(initial_state=r.initial_state.replace(frozen={"ref": ref}))

    monkeypatch.setattr(loop, "training_setup", tampered)
    with pytest.raises(UserError, match=r"grpo: held-out kl is .* before the first step; it must be 0 within 0.05"):
        loop.train_stage(tiny(finished, "grpo"), tmp_path / "run")


@pytest.mark.parametrize(
    "name, override, message",
    [
        ("grpo", "data.group=1", "data.group is 1: this stage compares answers to one prompt; give it at least 2"),
        ("grpo", "data.group=5", "data.rollouts 16 is no multiple of data.group 5"),
        ("grpo", "data.environment=moon", "data.environment is 'moon'; choose one of calculator, or leave it empty"),
        ("grpo", "stage.refresh_reference_every=-1", "stage.refresh_reference_every is -1"),
        ("ppo", "stage.text_coefficient=0.5", "stage.text_coefficient needs text to learn from: set data.corpus"),
    ],
)
def test_options_that_cannot_work_say_so(finished, small, tmp_path, name, override, message):
    with pytest.raises(UserError, match=message):
        loop.train_stage(tiny(finished, name, override), tmp_path / "run")


def test_what_the_held_out_side_lacks_is_named():
    """Of 40 prompts there, batches of 16 rollouts, 2 to a prompt: 20 rollouts are one batch, 128 all five."""
    sizes = dict(rollouts=16, group=2)
    assert held_out_prompts(40, held_out_rollouts=20, **sizes) == 8
    assert held_out_prompts(40, held_out_rollouts=128, **sizes) == 40
    assert held_out_prompts(39, held_out_rollouts=128, **sizes) == 32
    with pytest.raises(UserError, match="data.held_out_rollouts is 15, no whole batch .* 16: raise it to 16 at least"):
        held_out_prompts(40, held_out_rollouts=15, **sizes)
    with pytest.raises(UserError, match="has 7 prompts, no whole batch of 8 .*: raise data.held_out, or lower"):
        held_out_prompts(7, held_out_rollouts=128, **sizes)


def test_equal_rewards_in_every_group_are_said_once_and_lose_nothing(finished, small, tmp_path, capsys):
    """No answer of this model is ever toxic: the run ends, the policy is where it was, one line says why."""
    overrides = ("data.rewards.model=0.0", "data.truncation_penalty=0.0", "data.rewards.toxicity=1.0", "stage.beta=0.0")
    summary = loop.train_stage(tiny(finished, "grpo", *overrides), tmp_path / "run")
    said = capsys.readouterr().err
    assert said.count("equal_groups is 1 by step 1: in every group all answers got the same reward") == 1
    assert summary["held_out"]["equal_groups"] == 1 and summary["held_out"]["kl"] == 0

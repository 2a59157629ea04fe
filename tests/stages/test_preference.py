"""The offline preference stages: their batches, their losses by hand and at their limits, and that they learn."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import EXPERIMENTS, finished, small

from lm import tokenizer as tokenizers
from lm.core.config import load_config
from lm.core.errors import UserError
from lm.core.types import RankedAnswers
from lm.data import preferences as records
from lm.data.tokenized_rankings import TokenizedRanking
from lm.optim import optimizers
from lm.rewards.reward_model import conversation_with_answer
from lm.stages import STAGES
from lm.stages.context import StageContext
from lm.stages.preference import dpo, ipo, kto, preference_batches
from lm.stages.reward_model import reward
from lm.train import loop

__all__ = ["finished", "small"]

KEY = jax.random.key(0)
V = 31
OPTIONS = {
    "dpo": {"beta": 0.2},
    "ipo": {"beta": 0.5},
    "kto": {"beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.5},
    "orpo": {"odds_coefficient": 0.5},
    "simpo": {"beta": 2.0, "gamma": 0.5},
}
ANCHORED = ("dpo", "ipo", "kto")  # those with a reference
EACH = pytest.mark.parametrize("name", OPTIONS)


def some_by_default(*default: str):
    """One test item a stage; those beside `default` repeat its kind and are slow."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in default)) for name in OPTIONS]
    )


SOME = some_by_default(
    "dpo", "kto"
)  # one that compares pairs with a reference, and the one that does not compare pairs


# eps 1e-5 as in rule 4: where a gradient is rounding noise, Adam with a smaller one would divide noise by noise.
def optimizer():
    return optimizers.make_optimizer(
        learning_rate=0.01, total_steps=1000, schedule_name="constant", weight_decay=0.0, eps=1e-5
    )


def other(lm):
    return jax.tree.map(lambda x: 1.1 * x, lm)


def ranked(rows, ids, lengths, ranks, starts):
    """Answers ids i32[P,K,n] of which `lengths` [P,K] tokens are real and those from `starts` [P] on are the answer."""
    P, K, n = np.shape(ids)
    tokens = rows(np.reshape(ids, (P * K, n)), np.reshape(lengths, -1), start=np.repeat(starts, K))
    tokens = jax.tree.map(lambda x: x.reshape(P, K, n - 1), tokens)
    return RankedAnswers(tokens, np.asarray(ranks, np.int32)[..., None])


LENGTHS = np.array([[8, 5, 6], [8, 7, 1], [6, 9, 4], [5, 5, 5]])
STARTS = np.array([3, 2, 3, 4])
RANKS = np.array([[2, 1, 3], [1, 2, 0], [1, 2, 2], [1, 1, 1]])  # an order; a pair; a winner of two; nothing decided
BETTER = [(0, 1, 0), (0, 1, 2), (0, 0, 2), (1, 0, 1), (2, 0, 1), (2, 0, 2)]  # (prompt, better, worse)
SIZES = LENGTHS - STARTS[:, None]  # of the answers in tokens; the absent one has none


@pytest.fixture(scope="module")
def verdicts(rows):
    """Four prompts of up to three answers, and all but the last with an answer to another prompt."""
    draw = np.random.default_rng(3)
    found = ranked(rows, draw.integers(1, V, (4, 3, 9)), LENGTHS, RANKS, STARTS)
    return found.replace(mismatched_tokens=rows(draw.integers(1, V, (4, 9)), [9, 6, 7, 1], start=STARTS))


@pytest.fixture(scope="module")
def summed(tiny_model):
    """(lm, Tokens) -> log p of each row's answer, f64[B], token by token: the weights say which."""
    logprobs = jax.jit(tiny_model.token_logprobs)

    def of(lm, tokens):
        found = np.asarray(logprobs(lm, tokens), np.float64)
        return np.array([sum(row[t] for t in np.flatnonzero(w)) for row, w in zip(found, np.asarray(tokens.weights))])

    return of


@pytest.fixture(scope="module")
def by_hand(summed, tiny_lm, verdicts):
    """log p of each answer under the policy, and under another network, f64[P,K]."""
    flat = jax.tree.map(lambda x: x.reshape(12, -1), verdicts.tokens)
    return [summed(lm, flat).reshape(4, 3) for lm in (tiny_lm, other(tiny_lm))]


@pytest.fixture(scope="module")
def learner(tiny_model, tiny_lm):
    """name -> (its jitted update, with OPTIONS; a state whose reference, if it has one, is another network)."""

    @functools.cache
    def of(name, **options):
        update = STAGES[name].make(tiny_model, optimizer(), **OPTIONS[name], **options)
        frozen = {"ref": other(tiny_lm)} if name in ANCHORED else {}
        return jax.jit(update.update), update.init(KEY, {"lm": tiny_lm}, frozen)

    return of


def assert_same(a, b, atol=2e-5):
    for (path, x), y in zip(jax.tree.leaves_with_path(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, err_msg=jax.tree_util.keystr(path))


def per_prompt(values):
    """The mean over prompts of the mean over their pairs: three of the first, one of the second, two of the third."""
    return (np.mean(values[:3]) + values[3] + np.mean(values[4:])) / 3


def log1pexp(x):
    return np.logaddexp(0, x)


# From sums p, under the policy, and q, under the reference, and sizes n: the reward; and the loss of a lead in it.
PAIRWISE = {
    "dpo": (lambda p, q, n: 0.2 * (p - q), lambda d: log1pexp(-d)),
    "ipo": (lambda p, q, n: 0.5 * (p - q) / n, lambda d: (d / 0.5 - 1) ** 2),
    "orpo": (lambda p, q, n: p / n - np.log(1 - np.exp(p / n)), lambda d: log1pexp(-d)),
    "simpo": (lambda p, q, n: 2 * p / n, lambda d: log1pexp(0.5 - d)),
}


@pytest.mark.parametrize("name", PAIRWISE)
def test_all_pairs_by_hand(name, learner, verdicts, by_hand):
    """Rule 8: sums (DPO) or means (the others) over answer tokens; each prompt counts once, a tie never."""
    reward_of, loss_of = PAIRWISE[name]
    step, state = learner(name)
    _, found = step(state, verdicts)
    rewards = lambda p, k: reward_of(by_hand[0][p, k], by_hand[1][p, k], SIZES[p, k])
    chosen, rejected = (np.array([rewards(p, pair[side]) for p, *pair in BETTER]) for side in (0, 1))
    expected = {
        "loss": per_prompt(loss_of(chosen - rejected)),
        "accuracy": per_prompt(chosen > rejected),
        "margin": per_prompt(chosen - rejected),
        "reward_chosen": per_prompt(chosen),
        "reward_rejected": per_prompt(rejected),
        "chosen_logprob": per_prompt([by_hand[0][p, i] for p, i, _ in BETTER]),
        "rejected_logprob": per_prompt([by_hand[0][p, j] for p, _, j in BETTER]),
    }
    for key, value in expected.items():
        np.testing.assert_allclose(found[key].value(), value, rtol=1e-4, err_msg=key)
    assert found["loss"].weight == 3  # the fourth prompt decides nothing


def test_orpo_adds_the_nll_of_the_preferred_over_their_own_tokens(learner, verdicts, by_hand):
    """Answers 1, 0 and 0 of the first three prompts are unbeaten: 2 + 6 + 3 tokens. Each term has its own weight."""
    step, state = learner("orpo")
    _, found = step(state, verdicts)
    logprobs = by_hand[0]
    assert found["nll"].weight == SIZES[0, 1] + SIZES[1, 0] + SIZES[2, 0] == 2 + 6 + 3
    np.testing.assert_allclose(
        found["nll"].value(), -(logprobs[0, 1] + logprobs[1, 0] + logprobs[2, 0]) / 11, rtol=1e-5
    )


def test_kto_by_hand(learner, verdicts, by_hand, summed, tiny_lm):
    """Labels: + of the order's best, - of its worst, none of its middle; + -; + - -; none where all tie."""
    desirable, undesirable = kto.desirability_labels(verdicts.ranks)
    assert desirable.tolist() == [[False, True, False], [True, False, False], [True, False, False], [False] * 3]
    assert undesirable.tolist() == [[False, False, True], [False, True, False], [False, True, True], [False] * 3]
    step, state = learner("kto")
    _, found = step(state, verdicts)
    policy, reference = (summed(lm, verdicts.mismatched_tokens) for lm in (tiny_lm, other(tiny_lm)))
    z = np.mean((policy - reference)[:3])  # the fourth prompt has no such answer
    assert z > 0.01
    np.testing.assert_allclose(found["baseline"].value(), z, rtol=1e-4)
    lead = 0.2 * (by_hand[0] - by_hand[1] - z)
    losses = 1.5 / (1 + np.exp(lead)) * desirable + 0.5 / (1 + np.exp(-lead)) * undesirable
    np.testing.assert_allclose(found["loss"].value(), losses.sum() / 7, rtol=1e-4)
    assert found["loss"].weight == 7


def test_kto_s_baseline_is_never_negative(learner, verdicts, tiny_lm):
    """Policy and reference swapped, the mean of the log-ratios is negative: 0."""
    step, state = learner("kto")
    swapped = state.replace(params={"lm": other(tiny_lm)}, frozen={"ref": tiny_lm})
    assert step(swapped, verdicts)[1]["baseline"].value() == 0


@pytest.mark.parametrize("name", ANCHORED)
def test_starts_where_its_contract_says(name, learner, verdicts, tiny_lm):
    """Policy = reference: no answer leads, so DPO costs log 2, IPO 1 / (4 beta^2), KTO half a lambda an answer."""
    step, state = learner(name)
    _, found = step(state.replace(frozen={"ref": tiny_lm}), verdicts)
    losses = {"dpo": math.log(2), "ipo": 1.0, "kto": (3 * 1.5 + 4 * 0.5) / 7 / 2}
    np.testing.assert_allclose(found["loss"].value(), losses[name], rtol=1e-6)
    assert found["margin"].value() == 0 and found["accuracy"].value() == 0.5
    for key, (value, tolerance) in STAGES[name].start_metrics.items():
        assert abs(found[key].value() - value) <= tolerance / 100


def test_nothing_is_promised_of_a_start_without_a_reference():
    assert STAGES["orpo"].start_metrics == STAGES["simpo"].start_metrics == {}


@some_by_default("dpo")
def test_microbatches_change_nothing(name, learner, verdicts, tiny_lm):
    """Rule 1: pairs, tokens and labels are spread unevenly over the prompts, and one prompt decides nothing."""
    (step, state), (in_four, _) = learner(name), learner(name, microbatches=4)
    (one, metrics), (four, again) = step(state, verdicts), in_four(state, verdicts)
    assert_same(one, four)
    for key in metrics:
        np.testing.assert_allclose(metrics[key].value(), again[key].value(), rtol=1e-3, atol=1e-6, err_msg=key)
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), one.params["lm"], tiny_lm)
    assert max(jax.tree.leaves(moved)) > 5e-3


@EACH
def test_what_no_verdict_speaks_of_counts_for_nothing(name, learner, verdicts):
    """Weight 0 equals deleting the token: targets of prompts and padding, an answer of rank 0, a prompt of ties."""
    step, state = learner(name)
    draw = np.random.default_rng(8)

    def garbled(tokens):
        return tokens.replace(targets=np.where(tokens.weights > 0, tokens.targets, draw.integers(1, V, (9 - 1,))))

    changed = verdicts.replace(tokens=garbled(verdicts.tokens), mismatched_tokens=garbled(verdicts.mismatched_tokens))
    absent = changed.replace(tokens=jax.tree.map(lambda x: x * (np.arange(4) < 3)[:, None, None], changed.tokens))
    absent.tokens.weights[1, 2], absent.tokens.segments[1, 2] = 1, 1  # were it ranked, it would be an answer
    expected, metrics = step(state, verdicts)
    for batch in (changed, absent):
        got, again = step(state, batch)
        assert_same(got, expected)
        for key in metrics:
            np.testing.assert_allclose(again[key].value(), metrics[key].value(), rtol=1e-4, atol=1e-6, err_msg=key)


@SOME
def test_learns_unseen_verdicts_and_touches_nothing_else(name, tiny_model, rows):
    """The better of two answers holds lower ids than the worse: accuracy on fresh batches goes from 0.5 to over 0.95.

    The reference, the key and what is frozen stay as they were.
    """
    draw = np.random.default_rng(0)

    def batch():
        ids = draw.integers(3, V, (32, 3, 7))
        ids[:, 1, :3] = ids[:, 2, :3] = ids[:, 0, :3]  # one prompt
        ids[:, 0, 3:], ids[:, 1, 3:] = draw.integers(3, 17, (32, 4)), draw.integers(17, V, (32, 4))
        both = ranked(rows, ids[:, :2], np.full((32, 2), 7), [[1, 2]] * 32, [3] * 32)
        return both.replace(mismatched_tokens=rows(ids[:, 2], [7] * 32, start=3))

    fresh = jax.jit(tiny_model.init)(KEY)
    update = STAGES[name].make(tiny_model, optimizer(), **OPTIONS[name])
    state, step, seen = update.init(KEY, {"lm": fresh}, {}), jax.jit(update.update), []
    for _ in range(40):
        state, metrics = step(state, batch())
        seen.append({key: float(metrics[key].value()) for key in ("accuracy", "loss")})
    assert seen[0]["accuracy"] < 0.75 and seen[-1]["accuracy"] > 0.95
    assert seen[-1]["loss"] < 0.7 * seen[0]["loss"]
    assert set(state.params) == {"lm"} and state.step == 40 and state.key == KEY and state.memory == {}
    assert set(state.frozen) == ({"ref"} if name in ANCHORED else set())
    for ref in state.frozen.values():
        jax.tree.map(np.testing.assert_array_equal, ref, fresh)


@pytest.mark.parametrize("name", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_a_refreshed_reference_becomes_the_policy(name, learner, verdicts, tiny_lm):
    """After every second update: the third finds no margin, the second does. What moves is saved, not frozen."""
    step, start = learner(name, refresh_reference_every=2)
    once, _ = step(start, verdicts)
    twice, second = step(once, verdicts)
    _, third = step(twice, verdicts)
    assert start.frozen == once.frozen == twice.frozen == {}
    jax.tree.map(np.testing.assert_array_equal, once.memory["ref"], other(tiny_lm))
    jax.tree.map(np.testing.assert_array_equal, twice.memory["ref"], twice.params["lm"])
    assert abs(second["margin"].value()) > 1e-3 and third["margin"].value() == 0


@pytest.mark.parametrize(
    "stage, options, message",
    [
        (
            dpo,
            {"label_smoothing": 0.5},
            "stage.label_smoothing is 0.5; it must be in [0, 0.5): at one half verdicts say nothing",
        ),
        (ipo, {"beta": 0.0}, "stage.beta is 0.0; it must be above 0: the lead asked for is 1 / (2 beta)"),
    ],
)
def test_options_that_ask_for_nothing_are_refused(stage, options, message, tiny_model):
    with pytest.raises(UserError) as error:
        stage.make(tiny_model, optimizer(), **options)
    assert str(error.value) == message


# Batches from verdicts

ASKED = [{"role": "user", "content": "what is it"}]
LATER = [*ASKED, {"role": "assistant", "content": "a word"}, {"role": "user", "content": "and then"}]


def verdict(name, prompt, responses, ranking):
    return records.Ranking(name, prompt, responses, ranking, "me", "2024-05-01T12:00:00+00:00")


VERDICTS = [
    verdict("a", ASKED, ["one", "two or three"], [2, 1]),
    verdict("b", LATER, ["", "a long answer", "no"], [1, 2, 2]),  # the empty one is the best
    verdict("c", ASKED, ["same", "same"], [1, 2]),  # prefers a text to itself
    verdict("d", LATER, ["word " * 60, "short"], [2, 1]),  # nothing is left to compare with
    verdict("e", ASKED, ["x", "word " * 60, "y"], [1, 2, 3]),  # two are left
    verdict("f", LATER, ["tied", "alike"], [1, 1]),
    verdict("g", LATER, ["yes", "yes", "not at all"], [1, 1, 2]),  # the same text twice, but not against itself
]


@pytest.fixture(scope="module")
def tokenizer():
    text = " ".join(message["content"] for message in LATER) + " ".join(t for v in VERDICTS for t in v.responses)
    return tokenizers.train_tokenizer([text], vocab_size=300)


@pytest.fixture
def lent(tiny_model, tokenizer):
    return StageContext(tiny_model, tokenizer, 0, jax.jit, None)


@pytest.fixture
def file(tmp_path):
    def of(verdicts):
        path = tmp_path / "rankings.jsonl"
        path.unlink(missing_ok=True)
        records.append_rankings(path, verdicts)
        return str(path)

    return of


@pytest.fixture
def halves(monkeypatch):
    """The held-out side is what is named so: the real split draws by hash."""
    both = lambda items, *_: [[i for i in items if (i.name in "be") == unseen] for unseen in (False, True)]
    monkeypatch.setattr("lm.stages.reward_model.ranking_batches.split_held_out", both)


def test_verdicts_become_rows(lent, file, halves):
    """Rule 2: the template's ids; weights on the answer and its end token only, also after an earlier answer."""
    found = dpo.batches(lent, rankings=file(VERDICTS), length=60, prompts_per_batch=2)
    assert found.dataset_info == {
        "length": 60,
        "prompts": 2,  # a, g
        "pairs": 1 + 2,
        "held_out_prompts": 2,  # b, e
        "held_out_pairs": 2 + 1,
        "undecided": 2,  # f, and d without its long answer
        "equal": 1,  # c
        "skipped": 2,  # of d, of e
        "shortened": 0,
        "untrained": 0,
        "empty": 1,  # of b
        "bad_rows": 0,
        "duplicate_rows": 0,
    }
    (batch,) = found.held_out(None)
    tokenizer = lent.tokenizer
    assert batch.ranks[..., 0].tolist() == [[1, 2, 2], [1, 0, 3]] and batch.mismatched_tokens is None
    for p, ranking in enumerate((VERDICTS[1], VERDICTS[4])):
        for k, text in enumerate(ranking.responses):
            row = jax.tree.map(lambda x: x[p, k], batch.tokens)
            if batch.ranks[p, k] == 0:
                assert not row.segments.any() and not row.weights.any()
                continue
            ids = tokenizers.encode_chat(tokenizer, conversation_with_answer(ranking.prompt, text)).ids
            n = len(ids) - 1
            assert row.inputs[:n].tolist() == ids[:-1].tolist() and row.targets[:n].tolist() == ids[1:].tolist()
            assert row.segments.tolist() == [1] * n + [0] * (60 - n)
            assert row.targets[row.weights > 0].tolist() == [*tokenizer.encode(text), tokenizer.end_of_message]
    assert batch.tokens.weights[0, 0].sum() == 1  # the empty answer is its end token


def test_batch_is_a_function_of_seed_and_number(lent, file, halves):
    a, b = (dpo.batches(lent, rankings=file(VERDICTS), length=60, prompts_per_batch=2) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, a.train(None, 3), b.train(None, 3))


def test_the_same_prompts_are_held_out_as_in_stage_reward(lent, file):
    """And `limit` draws the same verdicts; reward rows take one token more, its end of document."""
    many = [verdict(f"name {i}", [{"role": "user", "content": f"{i}"}], ["one", "two"], [1, 2]) for i in range(40)]
    options = {"rankings": file(many), "length": 40, "held_out": 0.3, "prompts_per_batch": 30, "limit": 12}
    theirs, ours = reward.batches(lent, **options), dpo.batches(lent, **options)
    for key in ("prompts", "pairs", "held_out_prompts", "held_out_pairs"):
        assert ours.dataset_info[key] == theirs.dataset_info[key] > 0
    for their, our in ((next(b.held_out(None)) for b in (theirs, ours)), (b.train(None, 0) for b in (theirs, ours))):
        np.testing.assert_array_equal(their.tokens.inputs[..., :5], our.tokens.inputs[..., :5])  # which question
        np.testing.assert_array_equal(their.ranks, our.ranks)


def test_kto_pairs_prompts_with_answers_to_others(lent, file, halves):
    """Prompt of verdict i, and answer i (counted in a circle) of the next verdict on another prompt."""
    found = kto.batches(lent, rankings=file(VERDICTS), length=60, prompts_per_batch=2)
    (batch,) = found.held_out(None)  # b and e: e's first answer after b's prompt, b's second after e's
    tokenizer = lent.tokenizer
    for row, prompt, text in ((0, LATER, "x"), (1, ASKED, "a long answer")):
        ids = tokenizers.encode_chat(tokenizer, conversation_with_answer(prompt, text)).ids
        tokens = jax.tree.map(lambda x: x[row], batch.mismatched_tokens)
        assert tokens.inputs[tokens.segments > 0].tolist() == ids[:-1].tolist()
        assert tokens.targets[tokens.weights > 0].tolist() == [*tokenizer.encode(text), tokenizer.end_of_message]
    sides = preference_batches.batches(lent, rankings=file(VERDICTS), length=60, prompts_per_batch=2)
    jax.tree.map(np.testing.assert_array_equal, batch.replace(mismatched_tokens=None), next(sides.held_out(None)))


def test_labelled_answers_are_measured_by_themselves(lent, tmp_path):
    """Rewards 2 and -1 of a good and a bad answer, reference point 0.5: both are told right, by 1.5 each."""
    rows = [{"prompt": f"question {i}", "completion": f"reply {i}", "label": i % 2 == 0} for i in range(12)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = kto.batches(lent, rankings=str(tmp_path / "labels.jsonl"), length=60, prompts_per_batch=12, held_out=0.4)
    assert {tuple(labels) for labels in found.train(None, 0).ranks.reshape(-1, 2).tolist()} == {(1, 1), (1, 10)}
    ranks = np.array([[[1, 1]], [[1, 10]]])
    desirable, _ = kto.desirability_labels(jnp.asarray(ranks))
    assert desirable.tolist() == [[True], [False]]
    rewards = jnp.where(desirable, 2.0, -1.0)
    measured = kto.single_answer_metrics(rewards, rewards - 0.5, 10 * rewards, jnp.asarray(ranks))
    assert {name: float(m.value()) for name, m in measured.items()} == {
        "accuracy": 1.0,
        "margin": 1.5,
        "reward_chosen": 2.0,
        "reward_rejected": -1.0,
        "chosen_logprob": 20.0,
        "rejected_logprob": -10.0,
    }
    compared = kto.single_answer_metrics(rewards[:1], rewards[:1], rewards[:1], jnp.array([[[1, 0]]]))
    assert float(compared["accuracy"].weight) == 0, "an answer without a label says nothing"
    with pytest.raises(UserError, match="holds answers that are good or bad by themselves, and no pairs"):
        dpo.batches(lent, rankings=str(tmp_path / "labels.jsonl"), length=60)


def test_an_answer_that_would_not_fit_another_prompt_is_passed_over(tokenizer):
    said = [(ASKED, "one"), (LATER, "two"), (ASKED, "word " * 9)]
    found = [TokenizedRanking(verdict("x", prompt, [text], [1]), [], [[1]]) for prompt, text in said]
    whole = lambda prompt, text: tokenizers.encode_chat(tokenizer, conversation_with_answer(prompt, text)).ids.tolist()
    length = len(whole(LATER, "word " * 9)) - 2
    expected = [(ASKED, "two"), (LATER, "one"), (ASKED, "two")]  # the third's is too long; the same prompt is no other
    for i, mixed in enumerate(expected):
        assert kto.mismatched_example(tokenizer, found, i, length).ids.tolist() == whole(*mixed)


@pytest.mark.parametrize(
    "stage, verdicts, message",
    [
        (dpo, VERDICTS[5:6], "{file}: no ranking prefers one answer to another; rank more answers, or less alike ones"),
        (
            dpo,
            [VERDICTS[1], VERDICTS[2]],
            "{file}: no verdict is left to learn from (1 verdicts that prefer an answer to the same one): "
            "raise data.length, or rank other answers",
        ),
        (
            dpo,
            [VERDICTS[0], VERDICTS[3]._replace(name="e")],
            "{file}: no verdict is left held out (1 verdicts with no preference left, 1 answers longer than "
            "data.length 60): raise data.length, or rank other answers",
        ),
        (
            kto,
            [VERDICTS[0], VERDICTS[1]],
            "of 1 verdicts no prompt takes an answer to another one within data.length 60: KTO's baseline needs some; "
            "rank different prompts, or raise data.length or data.held_out",
        ),
    ],
)
def test_verdicts_that_teach_nothing_are_refused(stage, verdicts, message, lent, file, halves):
    path = file(verdicts)
    with pytest.raises(UserError) as error:
        stage.batches(lent, rankings=path, length=60)
    assert str(error.value) == message.format(file=path)


@SOME
def test_its_config_trains_a_few_steps(name, finished, small, tmp_path):
    run = {"init_from": finished / "sft", "data.rankings": finished / "rank" / "rankings.jsonl"}
    config = load_config(f"{EXPERIMENTS / name}.py:tiny", [f"{key}={value}" for key, value in run.items()])
    summary = loop.train_stage(config, tmp_path / name)
    before, after = summary["before"], summary["held_out"]
    assert summary["steps"] == 8 and summary["stage"] == name and summary["about"]["prompts"] > 8
    assert before["loss"] != after["loss"] and after["accuracy_se"] > 0

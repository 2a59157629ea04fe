"""Each stage on hand-made batches: what its loss is, by hand and at its limits, and that it learns."""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import ROOT

from lm import tokenizer as tokenizers
from lm.core.metrics import Mean
from lm.core.types import RankedAnswers, Rollouts
from lm.data.conversations import conversation_with_answer
from lm.data.preferences import Ranking
from lm.data.tokenized_rankings import ranked_answers_batch
from lm.generate.sampler import SamplingParams
from lm.losses.advantages import whiten
from lm.losses.policy import kl_k1
from lm.losses.ranking import bradley_terry_loss
from lm.optim import optimizers
from lm.rewards.reward_model import reward_scores
from lm.stages import STAGES
from lm.stages.pretraining import pretrain, sft
from lm.stages.reward_model import listwise, ranking_batches as ranking, reward
from lm.stages.rl import multi_turn as sampling, policy_gradient, ppo

KEY = jax.random.key(0)
T = 0.7
V = 31


def optimizer(learning_rate=0.01):
    return optimizers.make_optimizer(
        learning_rate=learning_rate, total_steps=1000, schedule_name="constant", weight_decay=0.0
    )


@pytest.fixture(scope="module")
def fresh(tiny_model):
    """A decoder as it is before any training."""
    return jax.jit(tiny_model.init)(KEY)


@pytest.fixture(scope="module")
def seen(tiny_model, tiny_lm):
    """Tokens -> the tiny decoder's states f32[B,T,D] and their Scores at temperature 1."""

    def of(tokens):
        x = tiny_model.hidden_states(tiny_lm, tokens.inputs, tokens.positions, tokens.segments)
        return x, tiny_model.target_stats(tiny_lm, x, tokens.targets)

    return jax.jit(of)


def trained(update, state, batch, steps):
    """The state after so many steps, batch(i) each, and the last step's metrics as floats."""
    step = jax.jit(update.update)
    for i in range(steps):
        state, metrics = step(state, batch(i))
    return state, {name: float(m.value()) for name, m in metrics.items()}


def test_every_stage_is_listed_by_its_name_and_whole():
    for name, stage in STAGES.items():
        assert stage.name == name and stage.title and (ROOT / stage.path).is_file()
        assert stage.shown_metrics and all(map(callable, (stage.make, stage.batches, stage.summary)))
    ends = [path for path in (ROOT / "lm" / "stages").glob("*/*.py") if "= Stage(" in path.read_text()]
    assert {path.stem for path in ends} == set(STAGES) and len(ends) == len(STAGES)


# Next-token prediction


@pytest.mark.parametrize("stage", [pretrain, sft])
def test_next_token_loss_is_the_mean_over_weighted_targets(stage, tiny_model, tiny_lm, seen, rows):
    """Rules 1 and 2: nats per trained target, a target of weight 0 counting for nothing; z-loss beside it."""
    ids = np.random.default_rng(0).integers(1, V, (3, 7))
    tokens = rows(ids, [7, 4, 6], start=3)
    update = stage.make(tiny_model, optimizer(), z_loss=0.1)
    state = update.init(KEY, {"lm": tiny_lm}, {})
    found = jax.jit(update.evaluate)(state, tokens)
    scores = jax.device_get(seen(tokens)[1])
    by_hand = [-scores.logprobs[b, t - 1] for b, n in enumerate([7, 4, 6]) for t in range(3, n)]  # target t at t - 1
    assert found["loss"].weight == len(by_hand) == 4 + 1 + 3
    np.testing.assert_allclose(found["loss"].value(), np.mean(by_hand), rtol=1e-6)
    z = np.square(scores.log_z)[tokens.weights > 0].mean()
    np.testing.assert_allclose(found["z_loss"].value(), 0.1 * z, rtol=1e-5)


def test_pretraining_learns_a_repeating_sequence(tiny_model, fresh, rows):
    """Period 5 from every phase: the next token is certain, so the loss goes from log 31 = 3.4 to near 0."""
    tokens = rows([np.tile([3, 14, 15, 9, 26], 4)[i : i + 14] for i in range(5)], [14] * 5)
    update = pretrain.make(tiny_model, optimizer(0.02))
    state = update.init(KEY, {"lm": fresh}, {})
    start = jax.jit(update.evaluate)(state, tokens)["loss"].value()
    _, metrics = trained(update, state, lambda i: tokens, 60)
    assert start > 3 and metrics["loss"] < 0.1


def test_sft_learns_replies_and_leaves_prompts_alone(tiny_model, fresh, rows):
    """Prompts are noise, the reply repeats the prompt's last token and ends with 2; only the reply is trained."""
    draw = np.random.default_rng(0)

    def batch(i):
        ids = draw.integers(3, V, (64, 7))
        ids[:, 4:6], ids[:, 6] = ids[:, 3:4], 2
        return rows(ids, [7] * 64, start=4)

    update = sft.make(tiny_model, optimizer(0.02))
    state, _ = trained(update, update.init(KEY, {"lm": fresh}, {}), batch, 150)
    replies = batch(0)
    logprobs = np.asarray(jax.jit(tiny_model.token_logprobs)(state.params["lm"], replies))
    assert logprobs[replies.weights > 0].mean() > -0.1  # unseen prompts
    assert logprobs[replies.weights == 0].mean() < -math.log(V - 3)  # no better than not knowing


# Reward model


def ranked(rows, ids, lengths, ranks):
    """Ranked answers: ids i32[P,K,n], lengths [P,K], ranks [P,K] or [P,K,A]."""
    P, K, n = np.shape(ids)
    tokens = rows(np.reshape(ids, (P * K, n)), np.reshape(lengths, -1))
    ranks = np.asarray(ranks, np.int32).reshape(P, K, -1)
    return RankedAnswers(jax.tree.map(lambda x: x.reshape(P, K, n - 1), tokens), ranks)


@pytest.fixture(scope="module")
def verdicts(rows):
    """Three answers to a prompt, all ordered, and two to another, of which the first is better."""
    draw = np.random.default_rng(3)
    return ranked(rows, draw.integers(1, V, (2, 3, 8)), [[8, 5, 6], [8, 7, 1]], [[2, 1, 3], [1, 2, 0]])


def headed(tiny_lm, axes=()):
    """Parameters whose scalar head, or heads, do not score everything alike."""
    score = np.random.default_rng(9).normal(size=(16, *axes))
    return {"lm": tiny_lm, "value": {"score": jnp.asarray(score, jnp.float32), "offset": jnp.full(axes, 0.3)}}


@pytest.fixture(scope="module")
def by_hand(tiny_model, tiny_lm, verdicts):
    """The scores f64[P,K] that `headed` with one axis gives the verdicts' answers."""
    found = jax.jit(functools.partial(ranking.answer_scores, tiny_model))(headed(tiny_lm, (1,)), verdicts.tokens)
    return np.asarray(found, np.float64)[..., 0]


BETTER = [(0, 1, 0), (0, 1, 2), (0, 0, 2), (1, 0, 1)]  # (prompt, better, worse) of the four pairs in `verdicts`


def per_prompt(values):
    """The mean over prompts of the mean over their pairs: three of the first, one of the second."""
    return (np.mean(values[:3]) + values[3]) / 2


@pytest.mark.parametrize("stage", [reward, listwise])
def test_reward_starts_at_log_two(stage, tiny_model, tiny_lm, rows):
    """Rule 9: the heads are zero, so all score 0: log 2 a pair, accuracy one half."""
    pairs = ranked(rows, np.ones((4, 2, 5)), [[5, 4]] * 4, [[1, 2]] * 4)
    update = stage.make(tiny_model, optimizer())
    found = jax.jit(update.evaluate)(update.init(KEY, {"lm": tiny_lm}, {}), pairs)
    np.testing.assert_allclose(found["loss"].value(), math.log(2), rtol=1e-6)
    assert found["accuracy"].value() == 0.5 and found["margin"].value() == 0 and found["score"].value() == 0


def test_all_pairs_of_a_prompt_weigh_one_prompt(tiny_model, tiny_lm, verdicts, by_hand):
    """Rule 9: ((l1 + l2 + l3) / 3 + l4) / 2, whatever the number of pairs; a padded prompt counts for nothing."""
    update = reward.make(tiny_model, optimizer())
    state = update.init(KEY, headed(tiny_lm, (1,)), {})
    lead = np.array([by_hand[p, i] - by_hand[p, j] for p, i, j in BETTER])
    evaluate = jax.jit(update.evaluate)
    found = evaluate(state, verdicts)
    np.testing.assert_allclose(found["loss"].value(), per_prompt(np.log1p(np.exp(-lead))), rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"].value(), per_prompt(lead > 0), rtol=1e-6)
    np.testing.assert_allclose(found["margin"].value(), per_prompt(lead), rtol=1e-5)
    padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), verdicts)
    for name, value in evaluate(state, padded).items():
        np.testing.assert_allclose(value.value(), found[name].value(), rtol=1e-5, err_msg=name)


def test_margin_and_flipped_verdicts(tiny_model, tiny_lm, verdicts, by_hand):
    """A margin is asked per rank of distance: 2 - 1, 3 - 1, 3 - 2 and 2 - 1; a share of verdicts may be wrong."""
    update = reward.make(tiny_model, optimizer(), margin=0.5, flip_probability=0.1)
    found = jax.jit(update.evaluate)(update.init(KEY, headed(tiny_lm, (1,)), {}), verdicts)
    lead = np.array([by_hand[p, i] - by_hand[p, j] for p, i, j in BETTER]) - 0.5 * np.array([1, 2, 1, 1])
    right = 1 / (1 + np.exp(-lead))
    np.testing.assert_allclose(found["loss"].value(), per_prompt(-np.log(0.9 * right + 0.1 * (1 - right))), rtol=1e-5)


def test_listwise_is_the_likelihood_of_the_order(tiny_model, tiny_lm, verdicts, by_hand):
    """Order 1, 0, 2 of the first prompt: two choices; the second prompt: one. Each prompt counts once."""
    update = listwise.make(tiny_model, optimizer())
    found = jax.jit(update.evaluate)(update.init(KEY, headed(tiny_lm, (1,)), {}), verdicts)
    s, t = np.exp(by_hand)
    first = -np.log(s[1] / s.sum() * s[0] / (s[0] + s[2])) / 2
    np.testing.assert_allclose(found["loss"].value(), (first - np.log(t[0] / (t[0] + t[1]))) / 2, rtol=1e-5)


def test_axes_have_heads_of_their_own(tiny_model, tiny_lm, rows):
    """Two axes that disagree: each head's loss is of its own ranks, and both are summed."""
    ids = np.random.default_rng(4).integers(1, V, (3, 2, 6))
    ranks = np.stack([[[1, 2]] * 3, [[2, 1], [0, 0], [1, 1]]], axis=-1)  # the second axis decides the first prompt only
    batch = ranked(rows, ids, [[6, 5]] * 3, ranks)
    params = headed(tiny_lm, (2,))
    s = np.asarray(ranking.answer_scores(tiny_model, params, batch.tokens), np.float64)
    loss = ranking.ranking_loss(
        tiny_model,
        lambda s, ranks: bradley_terry_loss(s[:, 0], s[:, 1]),
        axes=("overall", "clear"),
        centring_coefficient=0.0,
    )
    terms, metrics = loss(params, {}, batch, KEY)
    assert metrics["loss"].weight == 3 and metrics["loss/clear"].weight == 1
    np.testing.assert_allclose(metrics["accuracy/clear"].value(), s[0, 1, 1] > s[0, 0, 1])
    np.testing.assert_allclose(metrics["margin"].value(), np.mean(s[:, 0, 0] - s[:, 1, 0]), rtol=1e-5)
    assert terms["clear"].value() == metrics["loss/clear"].value() != metrics["loss"].value()


def test_centring_is_the_mean_square_of_a_pair_s_sum(tiny_model, tiny_lm, verdicts, by_hand):
    loss = ranking.ranking_loss(tiny_model, lambda s, ranks: s[:, 0], axes=("overall",), centring_coefficient=0.01)
    terms, _ = loss(headed(tiny_lm, (1,)), {}, verdicts, KEY)
    sums = np.array([by_hand[p, i] + by_hand[p, j] for p, i, j in BETTER])
    np.testing.assert_allclose(terms["overall centring"].value(), 0.01 * per_prompt(sums**2), rtol=1e-5)


def test_measures_by_margin_and_of_calibration(verdicts):
    """Leads of the four pairs: 0.2, 2.2, 2 and -1; said 0.55, 0.90, 0.88 and 0.73; the last is wrong."""
    total = jnp.array([[2.0, 2.2, 0.0], [0.0, 1.0, 0.0]])
    found = {
        name: (float(m.total), float(m.weight)) for name, m in ranking.reward_model_metrics(total, verdicts).items()
    }
    assert (
        found["margin_accuracy/1"] == (2, 3)
        and found["margin_accuracy/2"] == (1, 1)
        and found["margin_accuracy/3"] == (0, 0)
    )
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    for low, lead, was_right in ((0.5, 0.2, 1), (0.9, 2.2, 1), (0.8, 2.0, 1), (0.7, 1.0, 0)):
        np.testing.assert_allclose(found[f"confidence/{low}"], (sigmoid(lead), 1), rtol=1e-5)
        assert found[f"confidence_accuracy/{low}"] == (was_right, 1)
    about = {"held_out_prompts": 2}
    metrics = ranking.reward_model_metrics(total, verdicts) | {"accuracy": Mean(jnp.float32(1), jnp.float32(2))}
    told = ranking.summary(metrics, about)
    gaps = [1 - sigmoid(0.2), 1 - sigmoid(2.2), 1 - sigmoid(2.0), sigmoid(1.0)]
    np.testing.assert_allclose(told["calibration_error"], np.mean(gaps), rtol=1e-5)
    assert "margin_accuracy/3" not in told and "confidence/0.6" not in told  # nothing was seen there
    lengths = np.asarray(jnp.sum(verdicts.tokens.segments > 0, axis=-1), float)
    real = lengths > 0
    np.testing.assert_allclose(
        told["length_correlation"], np.corrcoef(np.asarray(total)[real], lengths[real])[0, 1], rtol=1e-4
    )


def test_answers_are_grouped_by_verdict():
    """Rankings of three and of two responses, the second padded with nothing; an axis is ranked where it was scored."""
    tokenizer = tokenizers.train_tokenizer(["what is it one two three"], vocab_size=280)
    asked = [{"role": "user", "content": "what is it"}]
    record = functools.partial(Ranking, prompt=asked, rater="me", time="2024-05-01T12:00:00+00:00")
    rankings = [
        record("a", responses=["one", "two", "three"], ranking=[2, 1, 3], axes={"clear": [5, None, 4]}),
        record("b", responses=["one", "three"], ranking=[1, 2]),
    ]
    verdicts, counts = ranking.reward_model_rows(tokenizer, rankings, ("overall", "clear"), 40)
    found = ranked_answers_batch(verdicts, 40, 3)
    np.testing.assert_array_equal(found.ranks[..., 0], [[2, 1, 3], [1, 2, 0]])
    np.testing.assert_array_equal(found.ranks[..., 1], [[6, 0, 7], [0, 0, 0]])
    for v, record in enumerate(rankings):
        for k, text in enumerate(record.responses):
            row = jax.tree.map(lambda x: x[v, k], found.tokens)
            ids = tokenizers.encode_chat(tokenizer, conversation_with_answer(asked, text)).ids
            assert row.inputs[row.segments > 0].tolist() == ids.tolist() and not row.weights.any()
    assert not found.tokens.segments[1, 2].any() and not any(counts.values())


def test_score_is_read_at_the_last_real_token_by_length(tiny_model, tiny_lm, seen, rows):
    """Rule 9: never by id. Padding is 0 and so is a real token here; the score is of the prefix, whatever follows."""
    params = headed(tiny_lm, (1,))
    score = jax.jit(functools.partial(reward_scores, tiny_model, params))
    tokens = rows([[5, 9, 0, 0, 1], [5, 9, 4, 8, 1], [0, 0, 0, 0, 0]], [4, 5, 1])  # inputs 5 9 0; 5 9 4 8; none
    every = np.asarray(tiny_model.value(params["value"], seen(tokens)[0]))[..., 0]
    np.testing.assert_allclose(score(tokens)[:, 0], [every[0, 2], every[1, 3], 0], rtol=1e-5)
    assert abs(every[0, 2] - every[0, 1]) > 1e-3 and abs(every[0, 2] - every[0, 3]) > 1e-3


@pytest.mark.parametrize("stage", [reward, pytest.param(listwise, marks=pytest.mark.slow)])
def test_reward_learns_that_an_answer_holds_a_seven(stage, tiny_model, fresh, rows):
    """Unseen pairs in the right order: 0.5 at the start, over 0.95 after 100 batches of 32."""
    draw = np.random.default_rng(0)

    def batch(i):
        ids = draw.integers(8, V, (32, 2, 9))
        ids[np.arange(32), 0, draw.integers(0, 8, 32)] = 7
        return ranked(rows, ids, np.full((32, 2), 9), [[1, 2]] * 32)

    update = stage.make(tiny_model, optimizer(0.01))
    state = update.init(KEY, {"lm": fresh}, {})
    state, _ = trained(update, state, batch, 100)
    assert jax.jit(update.evaluate)(state, batch(0))["accuracy"].value() > 0.95


# PPO


@pytest.fixture(scope="module")
def rollouts(tiny_model, tiny_lm):
    """Eight answers of the tiny model at temperature 0.7 to ragged prompts, with made-up rewards."""
    draw = np.random.default_rng(0)
    prompts, lengths = draw.integers(1, V, (8, 5)).astype(np.int32), np.array([5, 3, 1, 4, 5, 2, 5, 3], np.int32)
    run = jax.jit(functools.partial(sampling.rollout_rows, tiny_model, sampling=SamplingParams(6, T, stop=(3, 5, 11))))
    tokens, logprobs, completions = run(tiny_lm, prompts, lengths, KEY)
    assert 0 < completions.stopped.sum() < 8
    rewards = jnp.asarray(draw.normal(size=8), jnp.float32)
    return Rollouts(tokens, rewards, {"score/length": jnp.sum(tokens.weights, axis=1)}, completions.stopped, logprobs)


def other(lm):
    return jax.tree.map(lambda x: 1.1 * x, lm)


def test_ppo_starts_where_the_policy_is(tiny_model, tiny_lm, rollouts):
    """Rules 4 and 6, on real rollouts: ratio 1, nothing clipped, no KL, the sampler's log-probs are the trainer's.

    The head is zero, so advantages before whitening are the returns, and the value loss is 0.5 * mean(returns^2).
    """
    update = ppo.make(tiny_model, optimizer(), temperature=T, beta=0.0, lam=1.0)
    evaluate = jax.jit(update.evaluate)
    state = update.init(KEY, {"lm": tiny_lm}, {})
    found = {name: float(m.value()) for name, m in evaluate(state, rollouts).items()}
    np.testing.assert_allclose(found["ratio"], 1, rtol=1e-6)
    for name in ("clip_fraction", "kl", "kl_k3", "update_kl", "policy_loss"):
        np.testing.assert_allclose(found[name], 0, atol=1e-6, err_msg=name)
    assert found["sampler_gap"] < 1e-5
    w = rollouts.tokens.weights
    by_token = np.sum(w * rollouts.rewards[:, None] ** 2) / np.sum(w)
    np.testing.assert_allclose(found["value_loss"], 0.5 * by_token, rtol=1e-5)
    np.testing.assert_allclose(found["explained_variance"], 0, atol=1e-6)
    np.testing.assert_allclose(found["reward"], rollouts.rewards.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["response_length"], w.sum() / 8, rtol=1e-6)
    assert found["score/length"] == found["response_length"] and found["stopped"] == rollouts.stopped.mean()


def test_another_temperature_would_trip_the_gate(rollouts, seen):
    """Rule 6: drawn at 0.7 and scored at 1.0 is two distributions; the gap is far above its limit."""
    gap = np.abs(seen(rollouts.tokens)[1].logprobs - rollouts.sampler_logprobs)
    assert np.average(gap, weights=rollouts.tokens.weights) > 2 * policy_gradient.METRIC_LIMITS["sampler_gap"]


@pytest.fixture(scope="module")
def annotated(tiny_model, tiny_lm, rollouts):
    """The rollouts with their signal: a reference that is another network, a value head that is not zero."""
    memory = {"beta": jnp.float32(0.5)}
    state = SimpleNamespace(params=headed(tiny_lm), frozen={"ref": other(tiny_lm)}, memory=memory)
    signal = ppo.gae_annotation(
        tiny_model, gamma=1.0, lam=1.0, whiten_advantages=True, importance_ratio_cap=0.0, temperature=T
    )
    return jax.jit(lambda batch: signal(state, batch))(rollouts)


def test_kl_is_counted_in_the_reward(annotated, rollouts):
    """Rule 4, gamma and lambda 1: the return at t is the answer's reward minus beta times the KL from t to its end."""
    batch, metrics = annotated
    w = np.asarray(batch.tokens.weights)
    kl = np.asarray(kl_k1(batch.old_logprobs, batch.ref_logprobs))
    to_come = np.cumsum((kl * w)[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(batch.returns, w * (np.asarray(rollouts.rewards)[:, None] - 0.5 * to_come), atol=1e-5)
    np.testing.assert_allclose(metrics["kl"].value(), (kl * w).sum(axis=1).mean(), rtol=1e-5)
    assert np.abs(kl[w > 0]).max() > 0.1


def test_kl_is_not_counted_in_the_loss_again(annotated, tiny_model, tiny_lm):
    """Rule 4: whatever the reference says, the annotated batch has the same loss."""
    batch, _ = annotated
    method, value = ppo.method(clip=0.2, dual_clip=0.0), policy_gradient.ValueTerm(clip=0.2, coefficient=0.1)
    loss = policy_gradient.policy_gradient_loss(tiny_model, method, entropy_bonus=0.0, temperature=T, value=value)
    run = jax.jit(lambda batch: loss(headed(tiny_lm), {}, batch, KEY)[0])
    once, again = run(batch), run(batch.replace(ref_logprobs=7 * batch.ref_logprobs - 3))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, once, again))


def test_values_returns_and_whitening(annotated, tiny_model, tiny_lm, seen):
    """Rule 4: V(s_t) where token t is predicted; returns = advantages + values *before* whitening over the batch."""
    batch, _ = annotated
    tokens, w = batch.tokens, np.asarray(batch.tokens.weights)
    values = np.asarray(tiny_model.value(headed(tiny_lm)["value"], seen(tokens)[0])) * w
    np.testing.assert_allclose(batch.old_values, values, atol=1e-5)
    np.testing.assert_allclose(batch.advantages, whiten(batch.returns - values, jnp.asarray(w)), atol=1e-4)
    kept = np.asarray(batch.advantages)[w > 0]
    np.testing.assert_allclose([kept.mean(), kept.std()], [0, 1], atol=1e-5)
    assert abs(np.asarray(batch.returns)[w > 0].std() - 1) > 0.05


def test_ppo_raises_the_frequency_of_a_rewarded_token(tiny_model, fresh):
    """Reward: the fraction of an answer's six tokens that are 7. From 1/31 to over 0.6 in 25 batches of 64.

    Each batch takes 2 epochs x 4 minibatches = 8 steps; the KL rises, the reference and the key stay as they were.
    """
    update = ppo.make(tiny_model, optimizer(0.01), beta=0.01)
    state = update.init(KEY, {"lm": fresh}, {})
    prompts, lengths = jnp.asarray(np.random.default_rng(0).integers(1, V, (64, 3))), jnp.full(64, 3)

    @jax.jit
    def step(state, i):
        key = jax.random.fold_in(jax.random.key(1), i)
        tokens, logprobs, drawn = sampling.rollout_rows(
            tiny_model, state.params["lm"], prompts, lengths, key, SamplingParams(6)
        )
        rewards = jnp.mean(drawn.tokens == 7, axis=1)
        return update.update(state, Rollouts(tokens, rewards, {}, drawn.stopped, logprobs))

    found = []
    for i in range(25):
        state, metrics = step(state, i)
        found.append(float(metrics["reward"].value()))
        assert metrics["sampler_gap"].value() < 1e-4
    assert found[0] < 0.1 and np.mean(found[-3:]) > 0.6, found
    assert state.step == 25 * 8 and state.key == KEY and metrics["kl"].value() > 1
    jax.tree.map(np.testing.assert_array_equal, state.frozen["ref"], fresh)

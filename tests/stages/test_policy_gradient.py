"""The methods that learn from their own samples: what each composes, at its limits, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import model
from lm.core.errors import UserError
from lm.core.types import Rollouts
from lm.generate.sampler import SamplingParams
from lm.losses.advantages import group_advantages, leave_one_out_advantages
from lm.optim import optimizers
from lm.stages import STAGES
from lm.stages.rl import best_of_n, cispo, dapo, dr_grpo, grpo, gspo, policy_gradient, ppo, reinforce_pp, rloo
from lm.stages.rl.multi_turn import rollout_rows

KEY = jax.random.key(0)
V, T = 31, 0.7
GROUPED = [grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce_pp, best_of_n]


def some_by_default(stages, *default):
    """One test item a stage; those beside `default` repeat its kind and are slow."""
    return pytest.mark.parametrize(
        "stage",
        [
            pytest.param(stage, id=stage.__name__.split(".")[-1], marks=[pytest.mark.slow] * (stage not in default))
            for stage in stages
        ],
    )


EACH = some_by_default(GROUPED, grpo, rloo, reinforce_pp, best_of_n)


def optimizer(learning_rate=0.01):
    return optimizers.make_optimizer(
        learning_rate=learning_rate, total_steps=1000, schedule_name="constant", weight_decay=0.0
    )


@pytest.fixture(scope="module")
def shallow():
    """One layer: these tests spend their time on compiling."""
    shape = model.ModelConfig(vocab_size=V, layers=1, width=16, heads=2, kv_heads=2, head_size=8, hidden=24, context=16)
    return model.make_model(shape.for_backend("cpu"))


@pytest.fixture(scope="module")
def lm(shallow):
    return jax.jit(shallow.init)(jax.random.key(3))


@pytest.fixture(scope="module")
def rollouts(shallow, lm):
    """Four answers each to three ragged prompts; the second prompt's are all worth the same."""
    prompts = np.random.default_rng(0).integers(1, V, (3, 5)).astype(np.int32).repeat(4, axis=0)
    lengths = np.array([5, 3, 1], np.int32).repeat(4)
    run = jax.jit(functools.partial(rollout_rows, shallow, sampling=SamplingParams(6, T, stop=(3, 5, 11))))
    tokens, logprobs, completions = run(lm, prompts, lengths, KEY)
    assert 0 < completions.stopped.sum() < 12
    rewards = jnp.array([1.0, 0.0, 0.5, 2.0] + [0.1] * 4 + [3.0, 3.0, -1.0, 0.0])
    return Rollouts(tokens, rewards, {}, completions.stopped, logprobs, group=4)


def other(lm):
    return jax.tree.map(lambda x: 1.1 * x, lm)


def values(metrics):
    return {name: float(m.value()) for name, m in metrics.items()}


def annotated(shallow, lm, batch, method, *, correction=0.0, ref=None):
    """What a method's objective is given, with `ref` as the reference."""
    update = policy_gradient.policy_gradient_update(shallow, optimizer(), method, temperature=T)
    state = update.init(KEY, {"lm": lm}, {"ref": ref or other(lm)})
    batch, _, _ = policy_gradient.annotated_rollouts(shallow, state, batch, temperature=T)
    return policy_gradient.importance_corrected(batch.replace(advantages=method.advantages(batch)), correction)


@EACH
def test_starts_where_the_policy_is(stage, shallow, lm, rollouts):
    """Rule 6, on real rollouts: ratio 1, nothing clipped, no KL, the sampler's log-probs are the trainer's."""
    update = stage.make(shallow, optimizer(), temperature=T)
    found = values(jax.jit(update.evaluate)(update.init(KEY, {"lm": lm}, {}), rollouts))
    for name, (value, tolerance) in STAGES[stage.__name__.rpartition(".")[2]].start_metrics.items():
        assert abs(found[name] - value) < min(tolerance, 1e-5), name
    assert found["sampler_gap"] < 1e-5 and found["kl_k3"] < 1e-6
    np.testing.assert_allclose(found["reward"], rollouts.rewards.mean(), rtol=1e-6)
    if stage is not best_of_n:
        np.testing.assert_allclose(found["equal_groups"], 1 / 3, rtol=1e-6)


@some_by_default(GROUPED, grpo, reinforce_pp, best_of_n)
def test_equal_rewards_move_nothing(stage, shallow, lm, rollouts):
    """Rule 5: where every answer is worth the same, the policy's gradient is exactly zero (REINFORCE++ whitens 0)."""
    alike = rollouts.replace(rewards=jnp.full(12, 0.1))
    options = {"beta": 0.0} if stage in (grpo, gspo, rloo, reinforce_pp) else {}
    update = stage.make(shallow, optimizer(), temperature=T, **options)
    state = update.init(KEY, {"lm": lm}, {})
    moved, metrics = jax.jit(update.update)(state, alike)
    limit = 0.01 if stage is reinforce_pp else 0.0  # whitening divides a rounding error by 1e-4
    assert values(metrics)["grad_norm"] <= limit
    if stage is not reinforce_pp:
        jax.tree.map(np.testing.assert_array_equal, moved.params, state.params)


@pytest.mark.parametrize("stage", [stage for stage in GROUPED if stage is not reinforce_pp])
def test_a_group_of_one_is_refused(stage, shallow, lm, rollouts):
    update = stage.make(shallow, optimizer(), temperature=T)
    state = update.init(KEY, {"lm": lm}, {})
    with pytest.raises(UserError, match="data.group is 1: this stage compares answers to one prompt; give it at least"):
        jax.eval_shape(update.update, state, rollouts.replace(group=1))  # as jit finds it: nothing is computed


@some_by_default([grpo, dr_grpo, dapo, best_of_n], dapo)
def test_microbatches_do_not_change_the_update(stage, shallow, lm, rollouts):
    """Rule 1: rows of unequal lengths, every average divided once."""
    norms = []
    for microbatches in (1, 3):
        update = stage.make(shallow, optimizer(), temperature=T, microbatches=microbatches, entropy_bonus=0.01)
        state, metrics = jax.jit(update.update)(update.init(KEY, {"lm": lm}, {"ref": other(lm)}), rollouts)
        norms.append(values(metrics)["grad_norm"])
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-4)


def test_options_of_a_stage_are_its_own_and_the_shared_ones(shallow):
    with pytest.raises(TypeError, match="hihg"):
        dapo.make(shallow, optimizer(), hihg=0.3)
    with pytest.raises(UserError, match="stage.epochs is 0"):
        dapo.make(shallow, optimizer(), epochs=0)


# The parts in which the methods differ


def test_kl_is_in_the_reward_of_rloo(shallow, lm, rollouts):
    """Rule 4 and 7: the answer's reward less beta times the sum of log(p / p_ref), then the mean of the others."""
    batch = annotated(shallow, lm, rollouts, rloo.method(beta=0.5, clip=0.2))
    w = np.asarray(batch.tokens.weights)
    kl = ((np.asarray(batch.old_logprobs) - np.asarray(batch.ref_logprobs)) * w).sum(axis=1)
    assert np.abs(kl).max() > 0.1
    by_hand = leave_one_out_advantages(jnp.asarray(np.asarray(rollouts.rewards) - 0.5 * kl), 4)
    np.testing.assert_allclose(batch.advantages, np.asarray(by_hand)[:, None] * (w > 0), atol=1e-5)


def test_reinforce_pp_whitens_rewards_to_go_over_the_whole_batch(shallow, lm, rollouts):
    batch = annotated(shallow, lm, rollouts, reinforce_pp.method(beta=0.5, clip=0.2))
    w = np.asarray(batch.tokens.weights)
    kl = (np.asarray(batch.old_logprobs) - np.asarray(batch.ref_logprobs)) * w
    to_come = np.cumsum(kl[:, ::-1], axis=1)[:, ::-1]
    raw = (np.asarray(rollouts.rewards)[:, None] - 0.5 * to_come)[w > 0]
    np.testing.assert_allclose(np.asarray(batch.advantages)[w > 0], (raw - raw.mean()) / raw.std(), atol=1e-4)


def test_best_of_n_keeps_the_first_best_answer_of_groups_that_differ(rollouts):
    kept = best_of_n.best_answers(rollouts)
    np.testing.assert_array_equal(kept.rewards, [2.0, jnp.float32(0.1), 3.0])
    np.testing.assert_array_equal(kept.tokens.inputs, rollouts.tokens.inputs[jnp.array([3, 4, 8])])
    assert kept.group == 1 and not kept.tokens.weights[1].any()
    np.testing.assert_array_equal(kept.tokens.weights[2], rollouts.tokens.weights[8])


def test_truncated_importance_correction(shallow, lm, rollouts):
    """A sampler that thought a token half or four times as likely as the trainer: weights 2 and 1/4, cut at 1.5."""
    shift = jnp.log(jnp.where(jnp.arange(12)[:, None] % 2 == 0, 0.5, 4.0)) * rollouts.tokens.weights
    drawn = rollouts.replace(sampler_logprobs=rollouts.sampler_logprobs + shift)
    method = grpo.method(beta=0.04, clip=0.2)
    plain, corrected = (annotated(shallow, lm, drawn, method, correction=c) for c in (0.0, 1.5))
    weight = jnp.where(jnp.arange(12)[:, None] % 2 == 0, 1.5, 0.25)
    np.testing.assert_allclose(corrected.advantages, plain.advantages * weight, rtol=1e-4, atol=1e-6)


def test_entropy_bonus_pulls_towards_the_uniform_distribution(shallow, lm, rollouts):
    alike = rollouts.replace(rewards=jnp.full(12, 0.1))
    update = dr_grpo.make(shallow, optimizer(0.001), temperature=T, entropy_bonus=1.0)
    state = update.init(KEY, {"lm": lm}, {})
    after, _ = jax.jit(update.update)(state, alike)
    before, now = (values(jax.jit(update.evaluate)(s, alike))["entropy"] for s in (state, after))
    assert now > before + 1e-4


def test_clipped_answers_of_gspo_teach_nothing(shallow, lm, rollouts):
    """A policy that has moved: whole answers are beyond the narrow clip, and only those."""
    method = gspo.method(beta=0.0, clip_low=3e-4, clip_high=4e-4)
    batch = annotated(shallow, lm, rollouts, method)
    logprobs = batch.old_logprobs + 0.01 * batch.tokens.weights  # every ratio exp(0.01) > 1 + 4e-4
    slope = jax.grad(lambda x: method.average(method.token_loss(x, batch), batch.tokens.weights).total)(logprobs)
    good = np.asarray(batch.advantages) > 0
    assert not np.asarray(slope)[good].any() and np.asarray(slope)[np.asarray(batch.advantages) < 0].all()


def test_a_refreshed_reference_is_remembered(shallow, lm, rollouts):
    """Every second batch of two epochs and two minibatches: the KL to it starts again from 0."""
    update = grpo.make(shallow, optimizer(), temperature=T, epochs=2, minibatch_count=2, refresh_reference_every=2)
    state = update.init(KEY, {"lm": lm}, {})
    step, seen = jax.jit(update.update), []
    for _ in range(4):
        state, metrics = step(state, rollouts)
        seen.append(values(metrics)["kl"])
    assert seen[0] == seen[2] == 0 and abs(seen[1]) > 1e-3 and abs(seen[3]) > 1e-3


# PPO's own


def test_the_kl_controller_by_hand(shallow, lm, rollouts):
    """Target 1 nat, KL 0: the error is cut to -0.2, so beta falls by a tenth of that: 0.5 * 0.98."""
    update = ppo.make(
        shallow, optimizer(), temperature=T, beta=0.5, kl_target=1.0, kl_gain=0.1, epochs=1, minibatch_count=1
    )
    state = update.init(KEY, {"lm": lm}, {})
    state, metrics = jax.jit(update.update)(state, rollouts)
    assert metrics["beta"].value() == 0.5
    np.testing.assert_allclose(state.memory["beta"], 0.5 * (1 - 0.1 * 0.2), rtol=1e-6)
    fixed = ppo.make(shallow, optimizer(), temperature=T, beta=0.5, epochs=1, minibatch_count=1)
    state, _ = jax.jit(fixed.update)(fixed.init(KEY, {"lm": lm}, {}), rollouts)
    assert state.memory["beta"] == 0.5


def test_ppo_ptx_goes_on_learning_from_text(shallow, lm, rollouts, rows):
    """Equal rewards: only the text moves the policy, and it becomes likelier."""
    text = rows(np.random.default_rng(5).integers(1, V, (12, 9)), [9] * 12)
    batch = rollouts.replace(rewards=jnp.full(12, 0.1), text_tokens=text)
    update = ppo.make(shallow, optimizer(), temperature=T, beta=0.0, text_coefficient=1.0, epochs=1, minibatch_count=2)
    state, step = update.init(KEY, {"lm": lm}, {}), jax.jit(update.update)
    losses = []
    for _ in range(8):
        state, metrics = step(state, batch)
        losses.append(values(metrics)["text_loss"])
    assert losses[-1] < losses[0] - 0.1
    with pytest.raises(UserError, match="stage.text_coefficient needs text to learn from: set data.corpus"):
        update.update(state, batch.replace(text_tokens=None))


@some_by_default(GROUPED, grpo)
def test_it_raises_the_frequency_of_a_rewarded_token(stage, shallow, lm):
    """Reward: the fraction of an answer's six tokens that are 7. From 1/31 to over a half in 40 batches of 16 x 4."""
    options = {gspo: {"clip_low": 0.2, "clip_high": 0.2}, rloo: {"beta": 0.01}, reinforce_pp: {"beta": 0.01}}
    update = stage.make(shallow, optimizer(0.02), **(options[stage] if stage in options else {}))
    state = update.init(KEY, {"lm": lm}, {})
    prompts, lengths = jnp.asarray(np.random.default_rng(0).integers(1, V, (16, 3)).repeat(4, axis=0)), jnp.full(64, 3)

    @jax.jit
    def step(state, i):
        key = jax.random.fold_in(jax.random.key(1), i)
        tokens, logprobs, drawn = rollout_rows(shallow, state.params["lm"], prompts, lengths, key, SamplingParams(6))
        rewards = jnp.mean(drawn.tokens == 7, axis=1)
        return update.update(state, Rollouts(tokens, rewards, {}, drawn.stopped, logprobs, group=4))

    found = []
    for i in range(40):
        state, metrics = step(state, i)
        found.append(float(metrics["reward"].value()))
    assert found[0] < 0.1 and np.mean(found[-3:]) > 0.5, found


def test_standardised_is_what_grpo_uses(shallow, lm, rollouts):
    batch = annotated(shallow, lm, rollouts, grpo.method(beta=0.04, clip=0.2))
    by_hand = np.asarray(group_advantages(rollouts.rewards, 4))[:, None] * (np.asarray(batch.tokens.weights) > 0)
    np.testing.assert_allclose(batch.advantages, by_hand, rtol=1e-6)

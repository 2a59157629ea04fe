"""Losses and learning signals against code we did not write: TRL's numbers on the same arrays, values and gradients.

Stored numbers (tests/peers/fixtures.json) are compared in every run. The tests marked `peer` compute them anew with TRL
itself; they need tests/peers.txt, and .ci/run gives them an environment of their own.
"""

import json
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.core.metrics import mean, row_mean, row_sum
from lm.core.types import RankedAnswers, Rollouts, Tokens
from lm.losses import distillation, policy, preference, ranking
from lm.losses.advantages import (
    centered_group_advantages,
    gae,
    group_advantages,
    kl_rewards,
    leave_one_out_advantages,
    overlong_penalty,
    whiten,
)
from lm.model import decoder
from lm.optim.update import gradient
from lm.stages import STAGES, rl
from lm.stages.rl.policy_gradient import policy_gradient_loss

PEERS = Path(__file__).parents[1] / "peers"
STORED = json.loads((PEERS / "fixtures.json").read_text())
GROUP = 4  # answers to a prompt in `rewards`
INPUTS = {name: jnp.array(array) for name, array in STORED["inputs"].items()}
LONGEST = INPUTS["weights"].shape[1]


def close(got, expected):
    np.testing.assert_allclose(got, np.array(expected), rtol=1e-5, atol=1e-7)


def ratio(a):
    return policy.token_ratio(a.logprobs, a.old_logprobs)


def clipped(a, *, low=0.2, high=0.2, dual=0.0):
    return policy.clipped_surrogate(ratio(a), a.advantages[:, None], clip_low=low, clip_high=high, dual_clip=dual)


def gspo(a):
    of_answer = policy.sequence_ratio(a.logprobs, a.old_logprobs, a.weights)
    return row_mean(
        policy.clipped_surrogate(of_answer, a.advantages[:, None], clip_low=0.1, clip_high=0.15), a.weights
    ).value()


def with_k3(average, a):
    k3 = policy.kl_k3(a.logprobs, a.ref_logprobs)
    return average(clipped(a), a.weights).value() + 0.04 * average(k3, a.weights).value()


def cispo(a):
    # TRL's epsilon_high is the bound of the ratio itself, ours its distance from 1
    each = policy.truncated_reinforce_loss(a.logprobs, ratio(a), a.advantages[:, None], clip_high=1.3 - 1)
    return mean(each, a.weights).value()


def rloo(a):
    # TRL clips the ratio of whole answers: ours is elementwise, and takes the sums. (Stage rloo clips token by token.)
    of_answer = policy.token_ratio(answer_sum(a.logprobs, a), answer_sum(a.old_logprobs, a))
    each = policy.clipped_surrogate(of_answer, a.advantages, clip_low=0.2, clip_high=0.2)
    return jnp.mean(each)


def ppo_signal(a, *, kl=policy.kl_k1, gamma=1.0):
    """TRL lets an answer that ended before its row end one state later: there it reads a value, gives the reward, and
    counts no KL. Our functions do the same when that state is a token of theirs."""
    states = jnp.pad(a.weights, ((0, 0), (1, 0)), constant_values=1)[:, :-1]
    kl_of_tokens = kl(a.old_logprobs, a.ref_logprobs) * a.weights
    rewards = kl_rewards(a.rewards, kl_of_tokens, states, beta=0.05)
    advantages, returns = gae(rewards, a.old_values, states, gamma=gamma, lam=0.95)
    return {"rewards": rewards, "advantages": trl_whiten(advantages, a.weights), "returns": returns}, states


def trl_whiten(x, weights):
    """TRL divides by the deviation of a sample (n - 1), ours is that of the n numbers."""
    n = jnp.sum(weights)
    return whiten(x, weights) * jnp.sqrt((n - 1) / n)


def ppo(a):
    known, states = ppo_signal(a)
    of_policy = policy.clipped_surrogate(ratio(a), known["advantages"], clip_low=0.2, clip_high=0.2)
    of_value = policy.clipped_value_loss(a.values, a.old_values, known["returns"], clip=0.2)
    return mean(of_policy, a.weights).value() + 0.1 * mean(of_value, states).value()


def answer_sum(x, a):
    return jnp.sum(x * a.weights, axis=1)


def answer_mean(x, a):
    return answer_sum(x, a) / jnp.sum(a.weights, axis=1)


def pair(x):
    """[chosen, rejected] of rows, which hold all chosen answers first."""
    return jnp.split(x, 2)


def dpo(a, *, beta=0.1, smoothing=0.0):
    rewards = beta * answer_sum(a.logprobs - a.ref_logprobs, a)
    return jnp.mean(preference.dpo_loss(*pair(rewards), label_smoothing=smoothing))


def ipo(a):
    return jnp.mean(preference.ipo_loss(*pair(answer_mean(a.logprobs - a.ref_logprobs, a)), beta=0.5))


def kto(a):
    desirable = jnp.arange(len(a.weights)) < len(a.weights) // 2
    rewards = answer_sum(a.logprobs - a.ref_logprobs, a)
    mismatched, _ = pair(answer_sum(a.old_logprobs - a.ref_logprobs, a))
    baseline = jnp.maximum(jnp.mean(mismatched), 0.0)
    return jnp.mean(preference.kto_loss(rewards, baseline, desirable, beta=0.5, undesirable_weight=1.2))


def orpo(a):
    chosen, weights = pair(a.logprobs)[0], pair(a.weights)[0]
    # TRL's cross entropy counts the prompt too; this prompt is one token, which nothing predicts
    return mean(-chosen, weights).value() + 0.25 * jnp.mean(
        preference.odds_ratio_loss(*pair(answer_mean(a.logprobs, a)))
    )


def simpo(a):
    return jnp.mean(preference.simpo_loss(*pair(answer_mean(a.logprobs, a)), beta=2.0, gamma=0.5))


def reward(a, *, margin=0.0, centring=0.0):
    chosen, rejected = pair(a.scores)
    ordered = ranking.bradley_terry_loss(chosen, rejected, margin=margin)
    return jnp.mean(ordered) + centring * jnp.mean(jnp.square(chosen + rejected))


def gkd(a, *, beta, temperature=1.0):
    student, teacher = (jax.nn.log_softmax(x / temperature) for x in (a.student_logits, a.teacher_logits))
    each = distillation.jensen_shannon(student, teacher, beta=beta)
    return mean(each, a.weights[: len(each)]).value()


LOSSES: Mapping[str, Callable] = {
    "grpo": lambda a: row_mean(clipped(a), a.weights).value(),
    "grpo with k3": lambda a: with_k3(row_mean, a),
    "dapo": lambda a: mean(clipped(a, high=0.28), a.weights).value(),
    "bnpo with k3": lambda a: with_k3(mean, a),
    "dr_grpo": lambda a: row_sum(clipped(a), a.weights, length=LONGEST).value(),
    "dual clip": lambda a: mean(clipped(a, dual=1.3), a.weights).value(),
    "gspo": gspo,
    "cispo": cispo,
    "rloo": rloo,
    "ppo": ppo,
    "dpo": dpo,
    "dpo with smoothing": lambda a: dpo(a, beta=0.3, smoothing=0.1),
    "ipo": ipo,
    "kto": kto,
    "orpo": orpo,
    "simpo": simpo,
    "reward": reward,
    "reward with margins": lambda a: reward(a, margin=a.margin),
    "reward with one margin and centring": lambda a: reward(a, margin=0.4, centring=0.05),
    "gkd, forward": lambda a: gkd(a, beta=0.0),
    "gkd, 0.5": lambda a: gkd(a, beta=0.5),
    "gkd, 0.2 at temperature 2": lambda a: gkd(a, beta=0.2, temperature=2.0),
    "gkd, reverse": lambda a: gkd(a, beta=1.0),
}


def leave_one_out_with_k1(a):
    kl = answer_sum(policy.kl_k1(a.old_logprobs, a.ref_logprobs), a)
    return {"advantages": leave_one_out_advantages(a.rewards - 0.05 * kl, GROUP)}


SIGNALS: Mapping[str, Callable] = {
    "standardised": lambda a: {"advantages": group_advantages(a.rewards, GROUP)},
    "centred": lambda a: {"advantages": centered_group_advantages(a.rewards, GROUP)},
    "leave one out": lambda a: {"advantages": leave_one_out_advantages(a.rewards, GROUP)},
    "leave one out, k1 in the reward": leave_one_out_with_k1,
    "whiten": lambda a: {"whitened": trl_whiten(a.token_advantages, a.weights)},
    "ppo": lambda a: ppo_signal(a)[0],
    "ppo, k3 in the reward, gamma 0.9": lambda a: ppo_signal(a, kl=policy.kl_k3, gamma=0.9)[0],
    "overlong": lambda a: {"penalties": overlong_penalty(jnp.sum(a.weights, axis=1), limit=5, buffer=4)},
}


@pytest.mark.parametrize("case", STORED["losses"])
def test_loss_and_gradients_equal_trl(case):
    expected = dict(STORED["losses"][case])
    loss = expected.pop("loss")
    of = lambda moved: LOSSES[case](SimpleNamespace(**INPUTS | moved))
    got, gradients = jax.value_and_grad(of)({name: INPUTS[name] for name in expected})
    close(got, loss)
    for name, found in gradients.items():
        close(found, expected[name])


@pytest.mark.parametrize("case", STORED["signals"])
def test_learning_signal_equals_trl(case):
    got = SIGNALS[case](SimpleNamespace(**INPUTS))
    for name, array in STORED["signals"][case].items():
        close(got[name], array)


# A model whose decoder is a table: log-probs f32[rows,T], or scores f32[rows], of rows whose inputs are their number.
TABLE = SimpleNamespace(
    hidden_states=lambda lm, inputs, positions, segments: inputs[:, 0],
    target_stats=lambda lm, x, targets, **options: SimpleNamespace(logprobs=lm[x], entropy=jnp.zeros_like(lm[x])),
    token_logprobs=lambda lm, tokens, **options: lm[tokens.inputs[:, 0]],
)
SCORED = SimpleNamespace(
    hidden_states=lambda lm, inputs, positions, segments: lm[inputs][..., None], value=decoder.value
)
# An optimizer whose state is the last gradient.
KEPT = optax.GradientTransformation(lambda params: params, lambda gradient, state, params=None: (gradient, gradient))

# case: the stage and its options
PREFERENCES = {
    "dpo": ("dpo", {"beta": 0.1}),
    "dpo with smoothing": ("dpo", {"beta": 0.3, "label_smoothing": 0.1}),
    "ipo": ("ipo", {"beta": 0.5}),
    "kto": ("kto", {"beta": 0.5, "undesirable_weight": 1.2}),
    "orpo": ("orpo", {"odds_coefficient": 0.25}),
    "simpo": ("simpo", {"beta": 2.0, "gamma": 0.5}),
}

# stage: its method, TRL's loss, TRL's advantages. TRL's RLOO clips whole answers, ours tokens: it has no such loss.
GROUPS = {
    "grpo": (rl.grpo.method(beta=0.04, clip=0.2), "grpo with k3", "standardised"),
    "dapo": (rl.dapo.method(clip_low=0.2, clip_high=0.28), "dapo", "standardised"),
    "dr_grpo": (rl.dr_grpo.method(clip=0.2, max_response_length=LONGEST), "dr_grpo", "centred"),
    "gspo": (rl.gspo.method(beta=0.0, clip_low=0.1, clip_high=0.15), "gspo", "standardised"),
    "cispo": (rl.cispo.method(clip_high=1.3 - 1), "cispo", "standardised"),
    "rloo": (rl.rloo.method(beta=0.05, clip=0.2), None, "leave one out, k1 in the reward"),
}


def numbered(rows):
    """Tokens of rows of the arrays, by number i32[...]; a second round of numbers stands for the same rows."""
    weights = INPUTS["weights"][rows % len(INPUTS["weights"])]
    alike = jnp.ones(weights.shape, jnp.int32)
    return Tokens(rows[..., None] * alike, alike, weights, alike, alike)


def pairs(**more):
    """Four prompts with two answers each, the first preferred."""
    rows = jnp.stack(pair(jnp.arange(len(INPUTS["weights"]))), axis=1)
    return RankedAnswers(numbered(rows), jnp.broadcast_to(jnp.array([[1], [2]]), (*rows.shape, 1)), **more)


@pytest.mark.parametrize("case", PREFERENCES)
def test_gradient_of_a_preference_stage_equals_trl(case):
    B = len(INPUTS["weights"])
    stage, options = PREFERENCES[case]
    # KTO's mismatched answers follow: those that the policy finds as likely as the old one found the first four rows
    lm = {"lm": jnp.concatenate([INPUTS["logprobs"], INPUTS["old_logprobs"]])}
    ref = {"ref": jnp.concatenate([INPUTS["ref_logprobs"]] * 2)}
    update = STAGES[stage].make(TABLE, KEPT, **options)
    after, _ = update.update(
        update.init(jax.random.key(0), lm, ref), pairs(mismatched_tokens=numbered(B + jnp.arange(B // 2)))
    )
    found, of_mismatched = pair(after.opt_state["lm"])
    close(found, STORED["losses"][case]["logprobs"])
    assert not jnp.any(of_mismatched)


def test_gradient_of_stage_reward_equals_trl():
    update = STAGES["reward"].make(SCORED, KEPT, margin=0.4, centring_coefficient=0.05)
    params = {"lm": INPUTS["scores"], "value": {"score": jnp.ones((1, 1)), "offset": jnp.zeros(1)}}
    after, _ = update.update(update.init(jax.random.key(0), params, {}), pairs())
    close(after.opt_state["lm"], STORED["losses"]["reward with one margin and centring"]["scores"])


@pytest.mark.parametrize("stage", GROUPS)
def test_gradient_and_advantages_of_a_group_stage_equal_trl(stage):
    method, loss, advantages = GROUPS[stage]
    a = SimpleNamespace(**INPUTS)
    batch = Rollouts(
        numbered(jnp.arange(len(a.weights))),
        rewards=a.rewards,
        row_metrics={},
        stopped=jnp.ones(len(a.weights), bool),
        sampler_logprobs=a.old_logprobs,
        old_logprobs=a.old_logprobs * a.weights,
        ref_logprobs=a.ref_logprobs * a.weights,
        advantages=a.advantages[:, None] * a.weights,
        group=GROUP,
    )
    close(method.advantages(batch), np.array(STORED["signals"][advantages]["advantages"])[:, None] * a.weights)
    if loss:
        update = gradient(policy_gradient_loss(TABLE, method, entropy_bonus=0.0, temperature=1.0), KEPT)
        after, _ = update.update(update.init(jax.random.key(0), {"lm": a.logprobs}, {}), batch)
        close(after.opt_state["lm"], STORED["losses"][loss]["logprobs"])


def test_the_arrays_reach_what_the_losses_bend_at():
    """Else a clip that does nothing would equal TRL's too."""
    a = SimpleNamespace(**INPUTS)
    bad, good = (side[:, None] & (a.weights > 0) for side in (a.advantages < 0, a.advantages > 0))
    assert jnp.any((ratio(a) > 1.3) & bad) and jnp.any((ratio(a) < 0.8) & bad) and jnp.any((ratio(a) > 1.3) & good)
    assert {1.0, LONGEST} <= set(np.array(jnp.sum(a.weights, axis=1)))
    assert len(set(np.array(a.rewards[GROUP:]))) == 1 and not jnp.any(group_advantages(a.rewards, GROUP)[GROUP:])
    far = jnp.abs(a.values - a.old_values)
    assert jnp.any(far > 0.2) and jnp.any(far < 0.2)


def test_the_stored_numbers_are_of_the_pinned_versions():
    pins = (PEERS.parent / "peers.txt").read_text()
    assert all(f"\n{name}=={version} " in pins for name, version in STORED["versions"].items())


@pytest.fixture(scope="module")
def computed():
    from peers import make

    return make.numbers(STORED["inputs"])


@pytest.mark.peer
@pytest.mark.parametrize("kind, case", [(kind, case) for kind in ("losses", "signals") for case in STORED[kind]])
def test_stored_numbers_are_trl_s(computed, kind, case):
    """What may differ is the order in which another machine adds, in float64; in float32 in TRL's ORPO."""
    stored = STORED[kind][case]
    assert set(computed[kind][case]) == set(stored)
    for name, array in stored.items():
        np.testing.assert_allclose(computed[kind][case][name], array, rtol=1e-6, atol=1e-8)


@pytest.mark.peer
def test_every_number_of_trl_is_stored(computed):
    assert {kind: set(cases) for kind, cases in computed.items()} == {k: set(STORED[k]) for k in computed}
    installed = {name: metadata.version(name).partition("+")[0] for name in STORED["versions"]}
    assert installed == STORED["versions"]

"""Certificates (rule 16): each holds, each known bias is there, and an update that is wrong is caught."""

import functools
import itertools

import jax.numpy as jnp
import pytest

from lm.core.errors import UserError
from lm.losses.advantages import centered_group_advantages, last_token_mask
from lm.stages.rl import policy_gradient
from lm.stages.rl.policy_gradient import advantages_within_group
from lm.studies.gradients import __main__ as program, on_policy_losses
from lm.studies.gradients.certificate import GRADIENT_RECORDER, UNBIASED_TOLERANCE, certificate_of, certificate_result
from lm.studies.gradients.objectives import expected_reward_loss
from lm.studies.gradients.tiny_world import POLICIES, ragged_world


@pytest.fixture(scope="module")
def table():
    return POLICIES["tabular"]()


# The default run certifies the updates as published; those of this section come with the slow tests (.ci/run).
SLOW_SECTIONS = ("Policy gradients at the first update",)


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(section, marks=[pytest.mark.slow] * (section in SLOW_SECTIONS))
        for section in program.SECTIONS | program.STATIONARY_SECTIONS
    ],
)
def test_every_certificate_holds_for_a_table_of_logits(table, section):
    found = [certificate_result(c) for c in (program.SECTIONS | program.STATIONARY_SECTIONS)[section](table)]
    assert found
    for m in found:
        assert m.holds, m
        assert (m.residue if m.scale is not None else m.off) > 1e-3 if m.biased else m.off < UNBIASED_TOLERANCE, m


def shifted(learn):
    """Log-probs of the next target on each token."""
    recipe = on_policy_losses.rloo_without_kl()
    wrong = lambda logprobs, batch: recipe.token_loss(jnp.roll(logprobs, 1, axis=1), batch)
    return learn(recipe._replace(token_loss=wrong))


def unmasked(learn):
    """The last token of every answer, its end, left out."""
    recipe = on_policy_losses.rloo_without_kl()
    return learn(recipe._replace(average=lambda x, w: recipe.average(x, w * (1 - last_token_mask(w)))))


def own_baseline(learn):
    """The mean of the whole group, whose factor nobody mends."""
    return learn(on_policy_losses.rloo_without_kl(advantages_within_group(centered_group_advantages)))


@pytest.mark.parametrize("broken", [shifted, unmasked, own_baseline])
def test_a_wrong_update_is_caught(table, broken):
    w = ragged_world(table)
    learn = functools.partial(policy_gradient.policy_gradient_update, table.model, GRADIENT_RECORDER)
    good = certificate_of(
        w,
        "",
        "E r",
        expected_reward_loss(w),
        learn(on_policy_losses.rloo_without_kl()),
        on_policy_losses.rollout_batches(w),
    )
    assert certificate_result(good).holds
    assert not certificate_result(good._replace(update=broken(learn))).holds


def test_an_unbiased_update_that_is_said_to_be_biased_is_caught(table):
    w = ragged_world(table)
    update = policy_gradient.policy_gradient_update(table.model, GRADIENT_RECORDER, on_policy_losses.rloo_without_kl())
    assert not certificate_result(
        certificate_of(
            w, "", "E r", expected_reward_loss(w), update, on_policy_losses.rollout_batches(w), is_biased=True
        )
    ).holds


def test_numbers_cannot_be_written_where_there_is_no_folder(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        program.program([f"--json={tmp_path}/none/x.json"])


@pytest.mark.slow
def test_a_small_transformer_is_certified_too():
    """REINFORCE without baseline, the KL in the reward, and RLOO, through the real model."""
    found = [
        certificate_result(c)
        for c in itertools.islice(on_policy_losses.first_update_certificates(POLICIES["transformer"]()), 3)
    ]
    assert [m.name for m in found][-1] == "RLOO" and all(m.holds and m.off < UNBIASED_TOLERANCE for m in found)

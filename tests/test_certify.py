"""Certificates (rule 16): each holds, each known bias is there, and an update that is wrong is caught."""

import functools
import itertools

import jax.numpy as jnp
import pytest

from lm.certify import __main__ as program, sampled
from lm.certify.certificate import AGREES, RECORDED, claim, measured
from lm.certify.objectives import sought
from lm.certify.world import POLICIES, ragged
from lm.errors import UserError
from lm.returns import centred, last_token
from lm.stages import policy
from lm.stages.policy import within_group


@pytest.fixture(scope="module")
def table():
    return POLICIES["tabular"]()


@pytest.mark.parametrize("section", program.SECTIONS | program.STILL)
def test_every_certificate_holds_for_a_table_of_logits(table, section):
    found = [measured(c) for c in (program.SECTIONS | program.STILL)[section](table)]
    assert found
    for m in found:
        assert m.holds, m
        assert (m.residue if m.scale is not None else m.off) > 1e-3 if m.biased else m.off < AGREES, m


def shifted(learn):
    """Log-probs of the next target on each token."""
    recipe = sampled.recipe()
    wrong = lambda logprobs, batch: recipe.objective(jnp.roll(logprobs, 1, axis=1), batch)
    return learn(recipe._replace(objective=wrong))


def unmasked(learn):
    """The last token of every answer, its end, left out."""
    recipe = sampled.recipe()
    return learn(recipe._replace(average=lambda x, w: recipe.average(x, w * (1 - last_token(w)))))


def own_baseline(learn):
    """The mean of the whole group, whose factor nobody mends."""
    return learn(sampled.recipe(within_group(centred)))


@pytest.mark.parametrize("broken", [shifted, unmasked, own_baseline])
def test_a_wrong_update_is_caught(table, broken):
    w = ragged(table)
    learn = functools.partial(policy.learner, table.model, RECORDED)
    good = claim(w, "", "E r", sought(w), learn(sampled.recipe()), sampled.rollouts(w))
    assert measured(good).holds
    assert not measured(good._replace(update=broken(learn))).holds


def test_an_unbiased_update_that_is_said_to_be_biased_is_caught(table):
    w = ragged(table)
    update = policy.learner(table.model, RECORDED, sampled.recipe())
    assert not measured(claim(w, "", "E r", sought(w), update, sampled.rollouts(w), biased=True)).holds


def test_numbers_cannot_be_written_where_there_is_no_folder(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        program.program([f"--json={tmp_path}/none/x.json"])


def test_a_small_transformer_is_certified_too():
    """REINFORCE without baseline, the KL in the reward, and RLOO, through the real model."""
    found = [measured(c) for c in itertools.islice(sampled.first_update(POLICIES["transformer"]()), 3)]
    assert [m.name for m in found][-1] == "RLOO" and all(m.holds and m.off < AGREES for m in found)

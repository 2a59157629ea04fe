"""Rule 16: every loss's mean gradient, over every batch there is, is that of its objective, or its bias is shown."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.certify import __main__ as certify, given, sampled
from lm.certify.certificate import AGREES, BIASED, RECORDED, claim, measured
from lm.certify.objectives import exact, sought
from lm.certify.world import LONGEST, POLICIES, PROMPTS, chances, logprobs, ragged, says, short, single, total, world
from lm.errors import UserError
from lm.losses.policy import clipped_surrogate, token_ratio
from lm.metrics import row_sum
from lm.returns import centred, grouped
from lm.sample import sample
from lm.stages import STAGES, policy, rloo, sft
from lm.stages.policy import within_group

EVERY = certify.SECTIONS | certify.STILL
SAME_AS = {"pretrain": "sft"}  # the same loss on other data


@pytest.fixture(scope="module")
def nets():
    return POLICIES["tabular"]()


@pytest.fixture(scope="module")
def small():
    return POLICIES["transformer"]()


@pytest.fixture(scope="module")
def certificates(nets):
    """{section: its certificates} of the table, and the stages whose `make` they came from."""
    made = set()

    def noting(name, make):
        @functools.wraps(make)
        def noted(*args, **options):
            made.add(name)
            return make(*args, **options)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for name, stage in STAGES.items():
            patch.setattr(stage, "make", noting(name, stage.make))
        return {title: list(section(nets)) for title, section in EVERY.items()}, made


@pytest.fixture(scope="module")
def found(certificates):
    """{(section, name, objective): what came of it} of the table."""
    return {(title, c.name, c.objective): measured(c) for title, some in certificates[0].items() for c in some}


def of(found, name, section=""):
    """The one certificate of this name."""
    (one,) = [m for (title, known, _), m in found.items() if known.strip() == name and title.startswith(section)]
    return one


def test_every_stage_has_a_certificate(certificates):
    missing = set(STAGES) - certificates[1] - set(SAME_AS)
    assert not missing, f"{', '.join(missing)}: say in lm/certify what it optimises, or how it is biased"


def test_names_tell_certificates_apart(certificates, found):
    assert len(found) == sum(map(len, certificates[0].values()))


def test_what_claims_to_be_unbiased_is(found):
    wrong = {key: m.off for key, m in found.items() if not m.biased and m.off >= AGREES}
    assert not wrong
    assert sum(not m.biased for m in found.values()) > 40


def test_what_is_known_to_be_biased_is(found):
    biased = {key: m.off if m.residue is None else m.residue for key, m in found.items() if m.biased}
    assert not {key: size for key, size in biased.items() if size <= BIASED}
    names = {name.strip() for _, name, _ in biased}
    assert {"GRPO", "its deviation", "its row mean", "its k3", "DAPO", "its token mean", "its whitening"} <= names


def test_a_baseline_lowers_the_noise(found):
    """At equal samples: leave-one-out below none; a true value function, which also shortens the traces, lower still."""
    bare, left_out, four = of(found, "REINFORCE"), of(found, "Dr. GRPO"), of(found, "RLOO, groups of 4")
    assert left_out.noise < 0.8 * bare.noise
    assert four.noise < of(found, "RLOO, 2 prompts").noise  # the same objective and number of answers, in groups of 2
    assert of(found, "true head, λ .5").noise < 0.5 * of(found, "PPO, bare").noise
    assert left_out.variance * 36 == pytest.approx(left_out.noise * bare.ours**2, rel=1e-4)  # its scale is 1/6


def test_a_larger_batch_cures_the_token_mean_and_not_the_deviation(found):
    one, two, four = (of(found, f"token mean, {n}").residue for n in ("1 answer", "2 answers", "4 answers"))
    assert four < 0.7 * two < 0.7 * one
    assert of(found, "deviation, groups of 4").residue > 0.8 * of(found, "deviation, groups of 2").residue


@pytest.mark.parametrize(
    "section, names",
    [
        (sampled.first_update, ("RLOO", "Dr. GRPO")),
        (sampled.as_published, ("GRPO",)),
        (sampled.actor_critic, ("  true head, λ .5",)),
        (given.preferences, ("DPO",)),
    ],
)
def test_a_decoder_s_gradient(section, names, small):
    """The same through attention, norms and a tied embedding."""
    some = [measured(c) for c in section(small) if c.name in names]
    assert len(some) == len(names) and all(m.holds for m in some), some


# What must be caught


def off_by(w, update, *, mixes=sampled.ALONE, beta=0.0):
    return measured(claim(w, "", "", sought(w, beta=beta), update, sampled.rollouts(w, mixes=mixes))).off


def learner(w, **options):
    return policy.learner(w.nets.model, RECORDED, sampled.recipe()._replace(**options))


def shifted(log_p, batch):
    late = jnp.roll(log_p, 1, axis=1)
    return clipped_surrogate(token_ratio(late, jax.lax.stop_gradient(late)), batch.advantages)


def without_the_end(values, weights):
    """A row_sum that leaves out the last token of every row."""
    after = jnp.cumsum(weights[:, ::-1], axis=1)[:, ::-1]
    return row_sum(values, weights * (after > 1))


def all_but_the_first(rewards, group):
    """An answer less the mean of the others, those of the other prompt among them."""
    r = rewards.reshape(group, -1)
    return (2 * (r - r.mean(axis=0))).reshape(-1)


BROKEN = {
    "a baseline that counts itself": dict(advantages=within_group(centred)),
    "log-probs of the token before": dict(objective=shifted),
    "the end token is not trained": dict(average=without_the_end),
    "the prompt and the padding are trained": dict(
        advantages=lambda batch: jnp.broadcast_to(batch.rewards[:, None], batch.tokens.weights.shape),
        average=lambda values, weights: row_sum(values, jnp.ones_like(weights)),
    ),
    "a KL that was not asked for": dict(kl_in_loss=1e-3),
    "rewards of the other answer": dict(advantages=within_group(lambda r, group: grouped(r, group)[:, ::-1].reshape(-1))),
}


def test_the_sound_recipe_passes(nets):
    assert off_by(short(nets), learner(short(nets))) < AGREES


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_loss_is_caught(name, nets):
    assert off_by(short(nets), learner(short(nets), **BROKEN[name])) > 1e-4


def test_groups_that_mix_prompts_are_caught(nets):
    """One prompt a batch cannot show it; two can."""
    w = short(nets)
    broken = learner(w, advantages=within_group(all_but_the_first))
    assert off_by(w, broken) < AGREES
    sound = off_by(w, learner(w), mixes=sampled.TOGETHER)
    # The other prompt's reward is a baseline as well, if a worse one: it is the variance that tells.
    assert sound < AGREES


def test_a_swapped_reference_and_another_beta_are_caught(nets):
    w = short(nets)
    assert off_by(w, rloo.make(nets.model, RECORDED, beta=0.3), beta=0.3) < AGREES
    assert off_by(w, rloo.make(nets.model, RECORDED, beta=0.301), beta=0.3) > 1e-4
    swapped = w._replace(nets=nets._replace(reference=nets.sampler))
    c = claim(w, "", "", sought(swapped, beta=0.3), rloo.make(nets.model, RECORDED, beta=0.3), sampled.rollouts(w))
    assert measured(c).off > 1e-3


def test_even_the_z_loss_is_seen(nets):
    """1e-4 of it, the stage's default, beside a gradient of order one."""
    (c,) = [c for c in given.teachers(nets) if c.name == "SFT"]
    assert AGREES < measured(c._replace(update=sft.make(nets.model, RECORDED))).off < 0.1


# The world itself


@pytest.mark.parametrize("stops, longest, count", [((0,), 3, 40), ((), 2, 16), ((0, 2, 3), 2, 7), ((), 1, 4)])
def test_the_answers_are_all_there_are(stops, longest, count, nets):
    w = world(nets, stops=stops, longest=longest)
    assert len(set(w.answers)) == len(w.answers) == count
    np.testing.assert_allclose(chances(w, nets.policy).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(sampled.rollouts(w).chances.sum(), 1, rtol=1e-5)
    assert len(np.unique(np.asarray(w.rewards))) < w.rewards.size  # ties


def test_the_sampler_draws_from_this_world(small):
    """Answers of lm.sample are among the enumerated ones, its log-probs are theirs, and the frequencies fit."""
    w, each = ragged(small), 300
    prompts = np.array([[*p, *[0] * (3 - len(p))] for p in PROMPTS for _ in range(each)], np.int32)
    lengths = np.repeat([len(p) for p in PROMPTS], each)
    run = functools.partial(sample, small.model, max_new=LONGEST, stop=(0,))
    drawn = jax.device_get(jax.jit(run)(small.policy, prompts, lengths, jax.random.key(0)))
    known = np.asarray(logprobs(w, says(w, small.policy)))
    met = np.zeros(known.shape[:2])
    for row, (ids, n) in enumerate(zip(drawn.tokens, drawn.lengths)):
        y = w.answers.index(tuple(ids[:n].tolist()))
        np.testing.assert_allclose(drawn.logprobs[row], known[row // each, y], atol=1e-5)
        met[row // each, y] += 1
    p = chances(w, small.policy)
    assert np.abs((met - each * p) / np.sqrt(each * p * (1 - p) + 1)).max() < 4


def test_the_exact_gradient_by_hand(nets):
    """One token of a table: d/d logit_v of -(sum of p r) / 2 prompts is -p_v (r_v - sum of p r) / 2."""
    w = single(nets)
    p, r = chances(w, nets.policy), np.asarray(w.rewards, np.float64)
    by_hand = -p * (r - np.sum(p * r, axis=1, keepdims=True)) / 2
    gradient = np.asarray(exact(w, sought(w))["head"])
    pulled = np.flatnonzero(np.abs(gradient).sum(axis=1))
    np.testing.assert_allclose(gradient[pulled], by_hand, atol=1e-7)


def test_the_best_of_two_by_hand(nets):
    """Every pair of answers: the better one counts, the pair of equals does not."""
    w = single(nets)
    p, r = chances(w, nets.policy), np.asarray(w.rewards)
    by_hand = np.zeros_like(p)
    for x in range(len(PROMPTS)):
        for a in range(4):
            for b in range(4):
                if r[x, a] != r[x, b]:
                    by_hand[x, a if r[x, a] > r[x, b] else b] += p[x, a] * p[x, b]
    np.testing.assert_allclose(sampled.best_of(w, 2), by_hand, rtol=1e-6, atol=1e-12)


def test_the_answers_log_probs_are_the_stages_own(small):
    """Two ways to the same numbers: plain lists of ids here, `joined` rows and their weights there."""
    w = ragged(small)
    of_rows = jnp.sum(small.model.token_logprobs(small.policy, w.tokens) * w.tokens.weights, axis=1)
    np.testing.assert_allclose(np.ravel(total(w, says(w, small.policy))), of_rows, atol=1e-5)


# The program


@pytest.fixture
def one_section(monkeypatch):
    """The program with a section of one sound, one biased and, if asked, one broken certificate."""

    def section(nets, *, broken: bool):
        w = short(nets)
        draws, loss = sampled.rollouts(w), sought(w)
        yield claim(w, "sound", "E r", loss, learner(w), draws)
        yield claim(w, "biased", "E r", loss, learner(w, average=without_the_end), draws, biased=True)
        if broken:
            yield claim(w, "broken", "E r", loss, learner(w, average=without_the_end), draws)

    def use(broken: bool):
        monkeypatch.setattr(certify, "SECTIONS", {"Section": functools.partial(section, broken=broken)})
        monkeypatch.setattr(certify, "STILL", {})

    return use


def test_the_program_prints_and_writes(one_section, tmp_path, capsys):
    one_section(broken=False)
    certify.program(["--policy=tabular", f"--json={tmp_path / 'found.json'}"])
    out = capsys.readouterr().out
    assert "Section (tabular)" in out and "= sound" in out and "~ biased" in out and "2 of 2 certificates hold" in out
    first, second = json.loads((tmp_path / "found.json").read_text())
    assert first["policy"] == "tabular" and first["off"] < AGREES and second["biased"] and second["cosine"] < 1


def test_the_program_fails_with_what_disagrees(one_section, capsys):
    one_section(broken=True)
    with pytest.raises(SystemExit) as status:
        certify.program(["--policy=tabular"])
    assert status.value.code == 1
    out = capsys.readouterr().out
    assert "! broken" in out and "2 of 3 certificates hold" in out


def test_bad_flags_are_named(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        certify.program([f"--json={tmp_path}/none/found.json"])
    with pytest.raises(UserError, match="invalid choice"):
        certify.program(["--policy=lstm"])

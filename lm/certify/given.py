"""Certificates of the losses that learn from what was given: verdicts on answers, texts, a teacher's distribution.

The verdicts: every pair of answers to a prompt, met as often as another sampler writes both, decided either way as
often as a Bradley-Terry rater would. A policy or reward model from whose own rewards the verdicts come must be left
alone.
"""

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from lm.certify.certificate import RECORDED, Certificate, Draws, claim, rows_of
from lm.certify.objectives import Loss, after_prefixes, imitated, kl, leads, paired
from lm.certify.sampled import rollouts
from lm.certify.world import PROMPTS, Nets, World, chances, even, ragged, says, short, total
from lm.stages import distill, dpo, gkd, ipo, kto, listwise, orpo, reward, sft, simpo
from lm.types import Params, Ranked

BETA, FLIPPED = 0.5, 0.1


def sigmoid(x) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def turned(wins: np.ndarray) -> np.ndarray:
    """The same verdicts, of which a share is turned around."""
    return (1 - FLIPPED) * wins + FLIPPED * (1 - wins)


def met(w: World) -> np.ndarray:
    """The chance of a prompt and of two different answers to it, in any order: f64[X,Y,Y], symmetric."""
    mu = chances(w, w.nets.sampler)
    both = mu[:, :, None] * mu[:, None, :] * (1 - np.eye(len(w.answers)))
    return 2 * both / both.sum(axis=(1, 2), keepdims=True) / len(PROMPTS)


def ratios(w: World) -> np.ndarray:
    """log(p/q) of each answer, f64[X,Y]."""
    return np.log(chances(w, w.nets.policy)) - np.log(chances(w, w.nets.reference))


def verdicts(w: World, wins: np.ndarray) -> Draws:
    """One verdict a batch; wins f64[X,Y,Y] is the chance that the first answer beats the second."""
    Y, chance, found = len(w.answers), met(w), []
    for x, (a, b) in itertools.product(range(len(PROMPTS)), itertools.combinations(range(Y), 2)):
        for ranks, won in (((1, 2), wins[x, a, b]), ((2, 1), wins[x, b, a])):
            found.append(((x * Y + a, x * Y + b), ranks, chance[x, a, b] * won))
    rows, ranks, likely = map(np.array, zip(*found))
    batch = lambda indices: Ranked(rows_of(w.tokens, indices[0][None]), indices[1][None, :, None])
    return Draws((rows, ranks), likely, batch, 2)


def rankings(w: World, scores: np.ndarray) -> Draws:
    """Every four answers to a prompt, as likely, in the orders that Plackett-Luce gives them from scores f64[X,Y]."""
    Y, found = len(w.answers), []
    fours = list(itertools.combinations(range(Y), 4))
    for x, four in itertools.product(range(len(PROMPTS)), fours):
        for order in itertools.permutations(range(4)):
            left = np.exp(scores[x, [four[i] for i in order]])
            likely = np.prod([left[i] / left[i:].sum() for i in range(4)])
            ranks = [order.index(i) + 1 for i in range(4)]
            found.append(([x * Y + y for y in four], ranks, likely / len(fours) / len(PROMPTS)))
    rows, ranks, likely = map(np.array, zip(*found))
    batch = lambda indices: Ranked(rows_of(w.tokens, indices[0][None]), indices[1][None, :, None])
    return Draws((rows, ranks), likely, batch, 4)


def preferences(nets: Nets) -> Iterator[Certificate]:
    w, model = ragged(nets), nets.model
    wins = sigmoid(leads(w.rewards))
    draws, log_q = verdicts(w, wins), total(w, says(w, nets.reference))
    softplus = jax.nn.softplus  # -log sigmoid(x) = softplus(-x)

    def cdpo(h):
        return 0.9 * softplus(-BETA * leads(h)) + 0.1 * softplus(BETA * leads(h))

    def odds(m):
        return -m[:, :, None] + 0.1 * softplus(-leads(m - jnp.log(1 - jnp.exp(m))))

    ratio = lambda said: total(w, said) - log_q
    mean_ratio = lambda said: ratio(said) / w.lengths
    mean_logprob = lambda said: total(w, said) / w.lengths
    make = lambda stage, **options: stage.make(model, RECORDED, **options)
    for name, update, has, loss in (
        ("DPO", make(dpo, beta=BETA), ratio, lambda h: softplus(-BETA * leads(h))),
        ("cDPO", make(dpo, beta=BETA, smoothing=0.1), ratio, cdpo),
        ("IPO", make(ipo, beta=BETA), mean_ratio, lambda h: jnp.square(leads(h) - 1 / (2 * BETA))),
        ("SimPO", make(simpo, beta=2.0, gamma=1.0), mean_logprob, lambda m: softplus(1 - 2 * leads(m))),
        ("ORPO", make(orpo, odds_coefficient=0.1), mean_logprob, odds),
    ):
        yield claim(w, name, "its formula", paired(w, met(w) * wins, has, loss), update, draws)
    yield from prospects(short(nets))


def prospects(w: World, beta: float = 2.0) -> Iterator[Certificate]:
    """KTO: the better answer of a pair is desirable, the other is not; an answer to the other prompt is the
    baseline."""
    wins = sigmoid(leads(w.rewards))
    Y, X, pairs = len(w.answers), len(PROMPTS), verdicts(w, wins)
    other = chances(w, w.nets.sampler)[::-1]  # the chance of each answer to the other prompt
    prompt = pairs.indices[0][:, :1] // Y
    mismatched = (prompt * Y + np.arange(Y)).reshape(-1)
    likely = (pairs.chances[:, None] * other[prompt[:, 0]]).reshape(-1)
    indices = jax.tree.map(lambda x: np.repeat(x, Y, axis=0), pairs.indices)

    def batch(indices) -> Ranked:
        pair, row = indices
        return pairs.batch(pair).replace(mismatched=rows_of(w.tokens, row[None]))

    def against(points: np.ndarray, weights: np.ndarray) -> Loss:
        """The loss with the reference points f64[X,Z], each as often as its weight."""
        log_q = total(w, says(w, w.nets.reference))

        def loss(said):
            lead = beta * ((total(w, said) - log_q)[:, :, None] - points[:, None, :])
            good, bad = (jnp.sum(weights[:, None, :] * jax.nn.sigmoid(s * lead), axis=2) for s in (-1, 1))
            return jnp.sum(met(w) * wins * (good[:, :, None] + bad[:, None, :]) / 2)

        return loss

    h = ratios(w)
    drawn = against(np.maximum(h, 0), other)
    whole = np.sum(chances(w, w.nets.policy) * h) / X
    known = against(np.full((X, 1), whole), np.ones((X, 1)))
    update, draws = kto.make(w.nets.model, RECORDED, beta=beta), Draws((indices, mismatched), likely, batch, 2)
    yield claim(w, "KTO", "eq. 8, z = max(0,r')", drawn, update, draws)
    yield claim(w, "KTO", "eq. 8, z = KL(p,q)", known, update, draws, biased=True)


def optima(nets: Nets) -> Iterator[Certificate]:
    """With r = β log(p/q) the policy is q exp(r/β) / Z: the best there is for the rater's rewards at that price of
    KL."""
    w, small = ragged(nets), short(nets)
    h, make = ratios(w), functools.partial(dpo.make, nets.model, RECORDED)
    wins = sigmoid(BETA * leads(h))
    still = functools.partial(claim, w, loss=None, objective="p = q exp(r/β) / Z")
    yield still("DPO", update=make(beta=BETA), draws=verdicts(w, wins))
    four = rankings(small, BETA * ratios(small))
    yield claim(small, "DPO, rankings of 4", "p = q exp(r/β) / Z", None, make(beta=BETA), four)
    noisy = verdicts(w, turned(wins))
    yield still("DPO, a tenth flipped", update=make(beta=BETA), draws=noisy, biased=True)
    yield still("cDPO, a tenth flipped", update=make(beta=BETA, smoothing=FLIPPED), draws=noisy, biased=True)
    # A lead that smoothing cannot reach is nobody's optimum: beta keeps all within it.
    beta = 0.9 * np.log(1 / FLIPPED - 1) / np.abs(leads(h)).max()
    sharper = (sigmoid(beta * leads(h)) - FLIPPED) / (1 - 2 * FLIPPED)
    update = make(beta=beta, smoothing=FLIPPED)
    yield claim(w, "cDPO", "σ(βd) = .1 + .8 P", None, update, verdicts(w, sharper))
    means = leads(h / w.lengths)
    beta = 0.9 / (2 * np.abs(means).max())
    update = ipo.make(nets.model, RECORDED, beta=beta)
    yield claim(w, "IPO", "d = (P - ½) / β", None, update, verdicts(w, 0.5 + beta * means))


def judges(nets: Nets) -> Iterator[Certificate]:
    """Reward models, which read an answer to its last token."""
    w, model = short(nets), nets.model
    x = model.hidden(nets.policy, w.tokens.inputs, w.tokens.positions, w.tokens.segments)
    ends = np.array([len(prompt) + len(answer) - 1 for prompt in PROMPTS for answer in w.answers])
    scores = np.asarray(model.value(nets.head, x[np.arange(len(x)), ends]), np.float64).reshape(len(PROMPTS), -1)
    wins = sigmoid(leads(scores))
    heads = {"value": jax.tree.map(lambda x: x[..., None], nets.head)}  # of one axis
    make = lambda stage, **options: stage.make(model, RECORDED, centring=0.0, **options)
    still = functools.partial(claim, w, objective="r is the rater's", loss=None, heads=heads, part="value")
    yield still("reward", update=make(reward), draws=verdicts(w, wins))
    yield still("reward, rankings of 4", update=make(reward), draws=rankings(w, scores))
    yield still("listwise, rankings of 4", update=make(listwise), draws=rankings(w, scores))
    yield still("reward, a tenth flipped", update=make(reward), draws=verdicts(w, turned(wins)), biased=True)
    yield still("  flipped = 0.1", update=make(reward, flipped=FLIPPED), draws=verdicts(w, turned(wins)))


def teachers(nets: Nets) -> Iterator[Certificate]:
    w, uneven, model = even(nets), ragged(nets), nets.model

    def texts(w: World, writer: Params) -> Draws:
        return rollouts(w, sampler=writer)._replace(batch=lambda rows: rows_of(w.tokens, rows))

    say = says(w, nets.teacher)
    own, peoples, students = (texts(w, writer) for writer in (nets.teacher, nets.sampler, nets.policy))
    alike, half = imitated(w, chances(w, nets.teacher)), functools.partial(claim, w, scale=1 / 2)
    make = lambda stage, **options: stage.make(model, RECORDED, teacher=model, **options)
    likelihood = sft.make(model, RECORDED, z_loss=0.0)
    yield half("SFT", "½ E log p", imitated(w, chances(w, nets.sampler)), likelihood, peoples)
    target = imitated(uneven, chances(uneven, nets.sampler))
    yield claim(uneven, "  its token mean", "E log p", target, likelihood, texts(uneven, nets.sampler), biased=True)
    yield half("distill, teacher's", "½ KL(t,p)", alike, make(distill), own)
    forward = after_prefixes(w, nets.sampler, lambda said: kl(say, said))
    yield half("distill, people's", "½ KL(t,p) per token", forward, make(distill), peoples)

    def between(said):
        middle = jnp.log(0.3 * jnp.exp(say) + 0.7 * jnp.exp(said))
        return 0.3 * kl(say, middle) + 0.7 * kl(said, middle)

    middle = after_prefixes(w, nets.sampler, between)
    yield half("distill, beta 0.3", "½ JS(t,p) per token", middle, make(distill, beta=0.3), peoples)
    reverse = after_prefixes(w, nets.policy, lambda said: kl(said, say))
    yield half("GKD", "½ KL(p,t) per token", reverse, make(gkd), students)
    log_t = total(w, say)
    whole = lambda said: jnp.mean(jnp.sum(jnp.exp(total(w, said)) * (total(w, said) - log_t), axis=1))
    yield claim(w, "GKD", "KL(p,t)", whole, make(gkd), students, biased=True)

"""Certificates of the losses that learn from given data: verdicts on answers, texts, a teacher's distribution.

The verdicts: every pair of answers to a prompt, weighted by the chance that another sampler writes both, and decided as
a Bradley-Terry rater would decide it. A policy or reward model whose own rewards give the verdicts must not change.
"""

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.types import Params, RankedAnswers
from lm.stages.distillation import distill, gkd
from lm.stages.preference import dpo, ipo, kto, orpo, simpo
from lm.stages.pretraining import sft
from lm.stages.reward_model import listwise, reward
from lm.studies.gradients.certificate import (
    GRADIENT_RECORDER,
    BatchDistribution,
    Certificate,
    certificate_of,
    rows_by_index,
)
from lm.studies.gradients.objectives import (
    PolicyLoss,
    expected_prefix_loss,
    imitation_loss,
    kl_divergence,
    pairwise_differences,
    pairwise_loss,
)
from lm.studies.gradients.on_policy_losses import rollout_batches
from lm.studies.gradients.tiny_world import (
    PROMPTS,
    Networks,
    TinyWorld,
    answer_logprobs,
    answer_probabilities,
    fixed_length_world,
    next_token_logprobs,
    ragged_world,
    short_answer_world,
)

BETA, FLIP_PROBABILITY = 0.5, 0.1


def sigmoid(x) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def flipped_wins(wins: np.ndarray) -> np.ndarray:
    """The same verdicts, with a share of them reversed."""
    return (1 - FLIP_PROBABILITY) * wins + FLIP_PROBABILITY * (1 - wins)


def pair_probabilities(w: TinyWorld) -> np.ndarray:
    """The chance of a prompt and of two different answers to it, in any order: f64[X,Y,Y], symmetric."""
    mu = answer_probabilities(w, w.nets.sampler)
    both = mu[:, :, None] * mu[:, None, :] * (1 - np.eye(len(w.answers)))
    return 2 * both / both.sum(axis=(1, 2), keepdims=True) / len(PROMPTS)


def answer_log_ratios(w: TinyWorld) -> np.ndarray:
    """log(p/q) of each answer, f64[X,Y]."""
    return np.log(answer_probabilities(w, w.nets.policy)) - np.log(answer_probabilities(w, w.nets.reference))


def pairwise_batches(w: TinyWorld, wins: np.ndarray) -> BatchDistribution:
    """One verdict a batch; wins f64[X,Y,Y] is the chance that the first answer beats the second."""
    Y, chance, found = len(w.answers), pair_probabilities(w), []
    for x, (a, b) in itertools.product(range(len(PROMPTS)), itertools.combinations(range(Y), 2)):
        for ranks, won in (((1, 2), wins[x, a, b]), ((2, 1), wins[x, b, a])):
            found.append(((x * Y + a, x * Y + b), ranks, chance[x, a, b] * won))
    rows, ranks, likely = map(np.array, zip(*found))
    batch = lambda indices: RankedAnswers(rows_by_index(w.tokens, indices[0][None]), indices[1][None, :, None])
    return BatchDistribution((rows, ranks), likely, batch, 2)


def ranking_batches(w: TinyWorld, scores: np.ndarray) -> BatchDistribution:
    """All sets of four answers to a prompt, equally likely, in the orders that Plackett-Luce gives them from scores
    f64[X,Y]."""
    Y, found = len(w.answers), []
    fours = list(itertools.combinations(range(Y), 4))
    for x, four in itertools.product(range(len(PROMPTS)), fours):
        for order in itertools.permutations(range(4)):
            left = np.exp(scores[x, [four[i] for i in order]])
            likely = np.prod([left[i] / left[i:].sum() for i in range(4)])
            ranks = [order.index(i) + 1 for i in range(4)]
            found.append(([x * Y + y for y in four], ranks, likely / len(fours) / len(PROMPTS)))
    rows, ranks, likely = map(np.array, zip(*found))
    batch = lambda indices: RankedAnswers(rows_by_index(w.tokens, indices[0][None]), indices[1][None, :, None])
    return BatchDistribution((rows, ranks), likely, batch, 4)


def preference_certificates(nets: Networks) -> Iterator[Certificate]:
    w, model = ragged_world(nets), nets.model
    wins = sigmoid(pairwise_differences(w.rewards))
    draws, log_q = pairwise_batches(w, wins), answer_logprobs(w, next_token_logprobs(w, nets.reference))
    softplus = jax.nn.softplus  # -log sigmoid(x) = softplus(-x)

    def cdpo(h):
        return 0.9 * softplus(-BETA * pairwise_differences(h)) + 0.1 * softplus(BETA * pairwise_differences(h))

    def odds(m):
        return -m[:, :, None] + 0.1 * softplus(-pairwise_differences(m - jnp.log(1 - jnp.exp(m))))

    ratio = lambda said: answer_logprobs(w, said) - log_q
    mean_ratio = lambda said: ratio(said) / w.answer_lengths
    mean_logprob = lambda said: answer_logprobs(w, said) / w.answer_lengths
    make = lambda stage, **options: stage.make(model, GRADIENT_RECORDER, **options)
    for name, update, has, loss in (
        ("DPO", make(dpo, beta=BETA), ratio, lambda h: softplus(-BETA * pairwise_differences(h))),
        ("cDPO", make(dpo, beta=BETA, label_smoothing=0.1), ratio, cdpo),
        ("IPO", make(ipo, beta=BETA), mean_ratio, lambda h: jnp.square(pairwise_differences(h) - 1 / (2 * BETA))),
        ("SimPO", make(simpo, beta=2.0, gamma=1.0), mean_logprob, lambda m: softplus(1 - 2 * pairwise_differences(m))),
        ("ORPO", make(orpo, odds_coefficient=0.1), mean_logprob, odds),
    ):
        yield certificate_of(
            w, name, "its formula", pairwise_loss(w, pair_probabilities(w) * wins, has, loss), update, draws
        )
    yield from kto_certificates(short_answer_world(nets))


def kto_certificates(w: TinyWorld, beta: float = 2.0) -> Iterator[Certificate]:
    """KTO: the better answer of a pair is desirable, the other is not; an answer to the other prompt is the
    baseline."""
    wins = sigmoid(pairwise_differences(w.rewards))
    Y, X, pairs = len(w.answers), len(PROMPTS), pairwise_batches(w, wins)
    other = answer_probabilities(w, w.nets.sampler)[::-1]  # the chance of each answer to the other prompt
    prompt = pairs.indices[0][:, :1] // Y
    mismatched = (prompt * Y + np.arange(Y)).reshape(-1)
    likely = (pairs.probabilities[:, None] * other[prompt[:, 0]]).reshape(-1)
    indices = jax.tree.map(lambda x: np.repeat(x, Y, axis=0), pairs.indices)

    def batch(indices) -> RankedAnswers:
        pair, row = indices
        return pairs.make_batch(pair).replace(mismatched_tokens=rows_by_index(w.tokens, row[None]))

    def against(points: np.ndarray, weights: np.ndarray) -> PolicyLoss:
        """The loss with the reference points f64[X,Z], each as often as its weight."""
        log_q = answer_logprobs(w, next_token_logprobs(w, w.nets.reference))

        def loss(said):
            lead = beta * ((answer_logprobs(w, said) - log_q)[:, :, None] - points[:, None, :])
            good, bad = (jnp.sum(weights[:, None, :] * jax.nn.sigmoid(s * lead), axis=2) for s in (-1, 1))
            return jnp.sum(pair_probabilities(w) * wins * (good[:, :, None] + bad[:, None, :]) / 2)

        return loss

    h = answer_log_ratios(w)
    drawn = against(np.maximum(h, 0), other)
    whole = np.sum(answer_probabilities(w, w.nets.policy) * h) / X
    known = against(np.full((X, 1), whole), np.ones((X, 1)))
    update, draws = (
        kto.make(w.nets.model, GRADIENT_RECORDER, beta=beta),
        BatchDistribution((indices, mismatched), likely, batch, 2),
    )
    yield certificate_of(w, "KTO", "eq. 8, z = max(0,r')", drawn, update, draws)
    yield certificate_of(w, "KTO", "eq. 8, z = KL(p,q)", known, update, draws, is_biased=True)


def optimum_certificates(nets: Networks) -> Iterator[Certificate]:
    """With r = β log(p/q) the policy is q exp(r/β) / Z: the optimum for the rater's rewards with KL coefficient β."""
    w, small = ragged_world(nets), short_answer_world(nets)
    h, make = answer_log_ratios(w), functools.partial(dpo.make, nets.model, GRADIENT_RECORDER)
    wins = sigmoid(BETA * pairwise_differences(h))
    still = functools.partial(certificate_of, w, loss=None, objective="p = q exp(r/β) / Z")
    yield still("DPO", update=make(beta=BETA), batches=pairwise_batches(w, wins))
    four = ranking_batches(small, BETA * answer_log_ratios(small))
    yield certificate_of(small, "DPO, rankings of 4", "p = q exp(r/β) / Z", None, make(beta=BETA), four)
    noisy = pairwise_batches(w, flipped_wins(wins))
    yield still("DPO, a tenth flipped", update=make(beta=BETA), batches=noisy, is_biased=True)
    yield still(
        "cDPO, a tenth flipped", update=make(beta=BETA, label_smoothing=FLIP_PROBABILITY), batches=noisy, is_biased=True
    )
    # Smoothing bounds the leads that an optimum can have; this beta keeps all leads within the bound.
    beta = 0.9 * np.log(1 / FLIP_PROBABILITY - 1) / np.abs(pairwise_differences(h)).max()
    sharper = (sigmoid(beta * pairwise_differences(h)) - FLIP_PROBABILITY) / (1 - 2 * FLIP_PROBABILITY)
    update = make(beta=beta, label_smoothing=FLIP_PROBABILITY)
    yield certificate_of(w, "cDPO", "σ(βd) = .1 + .8 P", None, update, pairwise_batches(w, sharper))
    means = pairwise_differences(h / w.answer_lengths)
    beta = 0.9 / (2 * np.abs(means).max())
    update = ipo.make(nets.model, GRADIENT_RECORDER, beta=beta)
    yield certificate_of(w, "IPO", "d = (P - ½) / β", None, update, pairwise_batches(w, 0.5 + beta * means))


def reward_model_certificates(nets: Networks) -> Iterator[Certificate]:
    """Reward models, which read an answer to its last token."""
    w, model = short_answer_world(nets), nets.model
    x = model.hidden_states(nets.policy, w.tokens.inputs, w.tokens.positions, w.tokens.segments)
    ends = np.array([len(prompt) + len(answer) - 1 for prompt in PROMPTS for answer in w.answers])
    scores = np.asarray(model.value(nets.value_head, x[np.arange(len(x)), ends]), np.float64).reshape(len(PROMPTS), -1)
    wins = sigmoid(pairwise_differences(scores))
    heads = {"value": jax.tree.map(lambda x: x[..., None], nets.value_head)}  # of one axis
    make = lambda stage, **options: stage.make(model, GRADIENT_RECORDER, centring_coefficient=0.0, **options)
    still = functools.partial(
        certificate_of, w, objective="r is the rater's", loss=None, heads=heads, param_group="value"
    )
    yield still("reward", update=make(reward), batches=pairwise_batches(w, wins))
    yield still("reward, rankings of 4", update=make(reward), batches=ranking_batches(w, scores))
    yield still("listwise, rankings of 4", update=make(listwise), batches=ranking_batches(w, scores))
    yield still(
        "reward, a tenth flipped", update=make(reward), batches=pairwise_batches(w, flipped_wins(wins)), is_biased=True
    )
    yield still(
        "  flipped = 0.1",
        update=make(reward, flip_probability=FLIP_PROBABILITY),
        batches=pairwise_batches(w, flipped_wins(wins)),
    )


def distillation_certificates(nets: Networks) -> Iterator[Certificate]:
    w, uneven, model = fixed_length_world(nets), ragged_world(nets), nets.model

    def texts(w: TinyWorld, writer: Params) -> BatchDistribution:
        return rollout_batches(w, sampler=writer)._replace(make_batch=lambda rows: rows_by_index(w.tokens, rows))

    say = next_token_logprobs(w, nets.teacher)
    own, peoples, students = (texts(w, writer) for writer in (nets.teacher, nets.sampler, nets.policy))
    alike, half = (
        imitation_loss(w, answer_probabilities(w, nets.teacher)),
        functools.partial(certificate_of, w, scale=1 / 2),
    )
    make = lambda stage, **options: stage.make(model, GRADIENT_RECORDER, teacher=model, **options)
    likelihood = sft.make(model, GRADIENT_RECORDER, z_loss=0.0)
    yield half("SFT", "½ E log p", imitation_loss(w, answer_probabilities(w, nets.sampler)), likelihood, peoples)
    target = imitation_loss(uneven, answer_probabilities(uneven, nets.sampler))
    yield certificate_of(
        uneven, "  its token mean", "E log p", target, likelihood, texts(uneven, nets.sampler), is_biased=True
    )
    yield half("distill, teacher's", "½ KL(t,p)", alike, make(distill), own)
    forward = expected_prefix_loss(w, nets.sampler, lambda said: kl_divergence(say, said))
    yield half("distill, people's", "½ KL(t,p) per token", forward, make(distill), peoples)

    def answer_pairs(said):
        middle = jnp.log(0.3 * jnp.exp(say) + 0.7 * jnp.exp(said))
        return 0.3 * kl_divergence(say, middle) + 0.7 * kl_divergence(said, middle)

    middle = expected_prefix_loss(w, nets.sampler, answer_pairs)
    yield half("distill, beta 0.3", "½ JS(t,p) per token", middle, make(distill, beta=0.3), peoples)
    reverse = expected_prefix_loss(w, nets.policy, lambda said: kl_divergence(said, say))
    yield half("GKD", "½ KL(p,t) per token", reverse, make(gkd), students)
    log_t = answer_logprobs(w, say)
    whole = lambda said: jnp.mean(
        jnp.sum(jnp.exp(answer_logprobs(w, said)) * (answer_logprobs(w, said) - log_t), axis=1)
    )
    yield certificate_of(w, "GKD", "KL(p,t)", whole, make(gkd), students, is_biased=True)

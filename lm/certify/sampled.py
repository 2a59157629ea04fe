"""Certificates of the losses that learn from the policy's own samples: what each claims, and each part of it alone.

"At the first update": the policy is still the one that was sampled, as in the first minibatch of every batch.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lm.certify.certificate import RECORDED, Certificate, Draws, claim, rows_of
from lm.certify.objectives import (
    after_prefixes,
    best_of,
    clipped_gain,
    entropy,
    imitated,
    kl,
    leads,
    paired,
    sought,
    states,
    values,
    wins_over_itself,
)
from lm.certify.world import LONGEST, PROMPTS, Nets, World, chances, even, logprobs, ragged, says, short, single, total
from lm.losses.policy import kl_k1, token_ratio, truncated_reinforce
from lm.metrics import mean, row_mean, row_sum
from lm.returns import kl_rewards, leave_one_out, standardised, to_go, whiten
from lm.stages import best_of_n, cispo, dapo, dr_grpo, grpo, gspo, online_dpo, policy, ppo, reinforce_pp, rloo
from lm.stages.policy import Recipe, clipped, spread, within_group
from lm.types import Array, Params, Rollouts
from lm.update import Update, gradient

BETA = 0.3  # the price of a nat of KL, high enough to be seen beside the reward
REWARD, PRICED = "E r", "E r - β KL(p,q)"
ALONE = tuple((x,) for x in range(len(PROMPTS)))  # one prompt a batch
TOGETHER = (tuple(range(len(PROMPTS))),)  # all of them in each


def rollouts(
    w: World,
    *,
    group: int = 2,
    mixes: Sequence[Sequence[int]] = ALONE,
    sampler: Params | None = None,
    temperature: float = 1.0,
    rewards: Array | None = None,
) -> Draws:
    """Batches of `group` answers to each prompt of a mix, by the policy or by `sampler`; every mix is as likely."""
    lm = w.nets.policy if sampler is None else sampler
    p = chances(w, lm, temperature=temperature)
    heard = on_rows(w, logprobs(w, says(w, lm, temperature=temperature)))
    worth = (w.rewards if rewards is None else rewards).reshape(-1)
    Y, B = len(w.answers), len(mixes[0]) * group
    answers = np.tile(tuples(Y, B), (len(mixes), 1))
    prompts = np.repeat([np.repeat(mix, group) for mix in mixes], Y**B, axis=0)

    def batch(rows) -> Rollouts:
        return Rollouts(rows_of(w.tokens, rows), worth[rows], {}, jnp.ones(B, bool), heard[rows], group=group)

    return Draws(prompts * Y + answers, np.prod(p[prompts, answers], axis=1) / len(mixes), batch, B)


def tuples(count: int, size: int) -> np.ndarray:
    """Every tuple of `size` numbers below `count`, i64[count^size,size]."""
    return np.stack(np.unravel_index(np.arange(count**size), (count,) * size), axis=1)


def on_rows(w: World, x: Array) -> Array:
    """What is known of answers' tokens, f32[X,Y,N], where the rows of `w.tokens` predict them: f32[X*Y,T]."""
    out = np.zeros(w.tokens.weights.shape, np.float32)
    for row, (prompt, (y, answer)) in enumerate(itertools.product(PROMPTS, enumerate(w.answers))):
        start = len(prompt) - 1
        out[row, start : start + len(answer)] = np.asarray(x)[row // len(w.answers), y, : len(answer)]
    return jnp.asarray(out)


LEAVE_ONE_OUT = within_group(leave_one_out)


def recipe(advantages=LEAVE_ONE_OUT, average=row_sum, **options) -> Recipe:
    """RLOO without KL, but for what is given: parts of the stages, put together one by one."""
    return Recipe(advantages, clipped(0.2, 0.2), average, band=(0.2, 0.2), **options)


def bare(batch: Rollouts) -> Array:
    return spread(batch.rewards, batch)


def rewards_to_go(batch: Rollouts) -> Array:
    """What stage reinforce_pp whitens."""
    w = batch.tokens.weights
    return to_go(kl_rewards(batch.rewards, kl_k1(batch.old_logprobs, batch.ref_logprobs), w, beta=BETA), w)


def whitened(batch: Rollouts) -> Array:
    return whiten(rewards_to_go(batch), batch.tokens.weights)


def first_update(nets: Nets) -> Iterator[Certificate]:
    w, small, model = ragged(nets), short(nets), nets.model
    draws, plain, priced = rollouts(w), sought(w), sought(w, beta=BETA)
    learn = functools.partial(policy.learner, model, RECORDED)
    loo = rloo.make(model, RECORDED, beta=BETA)
    yield claim(w, "REINFORCE", REWARD, plain, learn(recipe(bare)), draws)
    yield claim(w, "KL in rewards to go", PRICED, priced, learn(recipe(rewards_to_go)), draws)
    yield claim(w, "RLOO", PRICED, priced, loo, draws)
    cool = {"temperature": 0.7}
    update = rloo.make(model, RECORDED, beta=BETA, **cool)
    yield claim(w, "RLOO, T = 0.7", PRICED, sought(w, beta=BETA, **cool), update, rollouts(w, **cool), **cool)
    small_priced = sought(small, beta=BETA)
    yield claim(small, "RLOO, groups of 4", PRICED, small_priced, loo, rollouts(small, group=4))
    yield claim(small, "RLOO, 2 prompts", PRICED, small_priced, loo, rollouts(small, mixes=TOGETHER))
    doctor, scale = dr_grpo.make(model, RECORDED, length=LONGEST), 1 / (2 * LONGEST)  # (group - 1) / (group * length)
    yield claim(w, "Dr. GRPO", "⅙ E r", plain, doctor, draws, scale=scale)
    rewards = np.asarray(w.rewards).reshape(-1)[draws.indices]
    differ = draws.chances * (rewards[:, 0] != rewards[:, 1])  # what dynamic sampling leaves, drawn without end
    resampled, scale = draws._replace(chances=differ / differ.sum()), scale / differ.sum()
    yield claim(w, "Dr. GRPO, resampled", "⅙ E r / P(differ)", plain, doctor, resampled, scale=scale)
    level = even(nets)
    best = best_of_n.make(model, RECORDED)
    target = imitated(level, best_of(level, 2))
    yield claim(level, "best-of-2, 2 tokens", "½ E best log p", target, best, rollouts(level), scale=1 / 2)
    p, log_q = chances(w, nets.policy), total(w, says(w, nets.reference))
    won = 2 * p[:, :, None] * p[:, None, :] * (leads(w.rewards) > 0) / len(PROMPTS)  # drawn in either order
    online = paired(w, won, lambda said: total(w, said) - log_q, lambda h: jnp.logaddexp(0.0, -BETA * leads(h)))
    yield claim(w, "online DPO", "E -log σ(β d)", online, online_dpo.make(model, RECORDED, beta=BETA), draws)


def as_published(nets: Nets) -> Iterator[Certificate]:
    w, model = ragged(nets), nets.model
    draws, plain, priced = rollouts(w), sought(w), sought(w, beta=BETA)
    learn = functools.partial(policy.learner, model, RECORDED)
    deviation = learn(recipe(within_group(standardised)))

    def biased(name, objective, loss, update):
        return claim(w, name, objective, loss, update, draws, biased=True)

    yield biased("GRPO", PRICED, priced, grpo.make(model, RECORDED, beta=BETA))
    yield biased("  its deviation", REWARD, plain, deviation)
    yield biased("  its row mean", REWARD, plain, learn(recipe(average=row_mean)))
    yield biased("  its k3", PRICED, priced, learn(recipe(kl_in_loss=BETA)))
    yield biased("GSPO", REWARD, plain, gspo.make(model, RECORDED))
    yield biased("DAPO", REWARD, plain, dapo.make(model, RECORDED))
    yield biased("  its token mean", REWARD, plain, learn(recipe(average=mean)))
    yield biased("CISPO", REWARD, plain, cispo.make(model, RECORDED))
    yield biased("REINFORCE++", PRICED, priced, reinforce_pp.make(model, RECORDED, beta=BETA))
    yield biased("  its whitening", PRICED, priced, learn(recipe(whitened)))
    yield biased("best-of-2", "E best log p", imitated(w, best_of(w, 2)), best_of_n.make(model, RECORDED))
    yield claim(w, "deviation, groups of 2", "wins over itself", wins_over_itself(w), deviation, draws)


def divergences(nets: Nets) -> Iterator[Certificate]:
    w, level = ragged(nets), even(nets)
    learn = functools.partial(policy.learner, nets.model, RECORDED)
    nothing = jnp.zeros_like(w.rewards)
    draws, whole, log_q = rollouts(w, rewards=nothing), sought(w, beta=1.0, rewards=nothing), says(w, nets.reference)
    per_token = after_prefixes(w, nets.policy, lambda said: kl(log_q, said))
    k3 = learn(recipe(kl_in_loss=1.0))
    yield claim(w, "k1 in the reward", "KL(p,q)", whole, rloo.make(nets.model, RECORDED, beta=1.0), draws)
    yield claim(w, "k3 in the loss", "KL(p,q)", whole, k3, draws, biased=True)
    yield claim(w, "k3 in the loss", "KL(q,p) per token", per_token, k3, draws)
    draws = rollouts(level, rewards=jnp.zeros_like(level.rewards))
    bonus = learn(recipe(), entropy_bonus=1.0)
    per_token = after_prefixes(level, nets.policy, lambda said: jnp.sum(jnp.exp(said) * said, axis=-1))
    yield claim(level, "entropy bonus", "H(p)", entropy(level), bonus, draws, biased=True)
    yield claim(level, "entropy bonus", "½ H(p) per token", per_token, bonus, draws, scale=1 / 2)


def nothing_pulls(nets: Nets) -> Iterator[Certificate]:
    w = ragged(nets)
    k1 = recipe()._replace(objective=lambda log_p, batch: kl_k1(log_p, batch.ref_logprobs))
    yield claim(w, "k1 in the loss", "everywhere", None, policy.learner(nets.model, RECORDED, k1), rollouts(w))


def actor_critic(nets: Nets) -> Iterator[Certificate]:
    w, uneven = even(nets), ragged(nets)
    draws, wrong, right = rollouts(w), {"value": nets.head}, {"value": true_head(w)}

    def make(**options) -> Update:
        options = {"lam": 1.0, "whitened": False, "value_coefficient": 0.0, "beta": BETA} | options
        return ppo.make(nets.model, RECORDED, epochs=1, minibatch_count=1, **options)

    half = functools.partial(claim, w, objective=f"½ ({PRICED})", loss=sought(w, beta=BETA), draws=draws, scale=1 / 2)
    yield half("PPO, bare", update=make())
    yield half("  wrong head, λ 1", update=make(), heads=wrong)
    yield half("  true head, λ .5", update=make(lam=0.5), heads=right)
    yield half("  no head, λ .95", update=make(lam=0.95), biased=True)
    yield half("  wrong head, λ .95", update=make(lam=0.95), heads=wrong, biased=True)
    yield half("  whitened", update=make(whitened=True), biased=True)
    loss = sought(uneven, beta=BETA)
    yield claim(uneven, "  its token mean", PRICED, loss, make(), rollouts(uneven), biased=True)
    text = rows_of(w.tokens, jnp.array([0, 21]))
    with_text = draws._replace(batch=lambda rows: draws.batch(rows).replace(text=text))
    written = np.zeros(w.rewards.shape)
    written[0, 0] = written[1, 5] = 1 / 2  # rows 0 and 21, of two tokens each; `imitated` is a mean over two prompts
    of_both = lambda said: sought(w, beta=BETA)(said) / 2 + 0.5 * imitated(w, written)(said)
    ptx = make(text_coefficient=0.5)
    yield claim(w, "  with text (ptx)", "both terms", of_both, ptx, with_text)
    found = claim(w, "PPO's value head", "¼ E (V - v)²", None, make(value_coefficient=1.0), draws, heads=wrong)
    yield found._replace(exact=value_gradient(w), part="value")


def true_head(w: World) -> Params:
    """The scalar head that says what is still to come, exactly: prefixes are no more than its own numbers."""
    real = np.broadcast_to(w.real > 0, (len(PROMPTS), *w.real.shape))
    x, v = np.asarray(states(w), np.float64)[real], values(w, beta=BETA)[real]
    *score, offset = np.linalg.lstsq(np.append(x, np.ones((len(x), 1)), axis=1), v, rcond=1e-9)[0]
    return {"score": jnp.array(score, jnp.float32), "offset": jnp.float32(offset)}


def value_gradient(w: World) -> Params:
    """Of the mean over prompts of E of the mean over two tokens of (V - what is still to come)^2 / 2, in the head."""
    fixed, x, v = chances(w, w.nets.policy)[:, :, None] * w.real, states(w), values(w, beta=BETA)
    squares = lambda head: fixed * jnp.square(w.nets.model.value(head, x) - v) / 2
    return jax.grad(lambda head: jnp.sum(squares(head)) / 2 / len(PROMPTS))(w.nets.head)


def off_policy(nets: Nets) -> Iterator[Certificate]:
    one, w, model = single(nets), ragged(nets), nets.model

    def given(w: World) -> Draws:
        """Drawn by the sampler, and annotated with its log-probs: as in a later minibatch of a batch."""
        draws = rollouts(w, sampler=nets.sampler)

        def batch(rows):
            found = draws.batch(rows)
            return found.replace(old_logprobs=found.sampler_logprobs, advantages=bare(found))

        return draws._replace(batch=batch)

    def learn(objective) -> Update:
        part = recipe()._replace(objective=objective)
        return gradient(policy.surrogate(model, part, entropy_bonus=0.0, temperature=1.0), RECORDED)

    def cut(high) -> Update:
        def objective(log_p, batch):
            return truncated_reinforce(log_p, token_ratio(log_p, batch.old_logprobs), batch.advantages, high=high)

        return learn(objective)

    def corrected(correction) -> Update:
        return rloo.make(model, RECORDED, beta=0.0, correction=correction)

    free, near = learn(clipped(1.0, jnp.inf)), learn(clipped(0.2, 0.2))
    first, every = sought(one), sought(w)
    draws = given(one)
    yield claim(one, "ratio, 1 token each", REWARD, first, free, draws)
    yield claim(one, "  clipped at 0.2", REWARD, first, near, draws, biased=True)
    yield claim(one, "  CISPO, no cut", REWARD, first, cut(jnp.inf), draws)
    yield claim(one, "  CISPO, cut at 1.2", REWARD, first, cut(0.2), draws, biased=True)
    draws = given(w)
    yield claim(w, "ratios, 1 to 3 tokens", REWARD, every, free, draws, biased=True)
    yield claim(w, "  clipped at 0.2", "itself, clipped", clipped_gain(w), near, draws)
    draws = rollouts(one, sampler=nets.sampler)
    yield claim(one, "other sampler, 1 token", REWARD, first, corrected(0.0), draws, biased=True)
    yield claim(one, "  correction up to 1", REWARD, first, corrected(1.0), draws, biased=True)
    yield claim(one, "  correction up to 100", REWARD, first, corrected(100.0), draws)
    draws = rollouts(w, sampler=nets.sampler)
    yield claim(w, "other sampler, 1 to 3", REWARD, every, corrected(0.0), draws, biased=True)
    yield claim(w, "  correction up to 100", REWARD, every, corrected(100.0), draws, biased=True)


def larger_batches(nets: Nets) -> Iterator[Certificate]:
    w = short(nets)
    plain, priced = sought(w), sought(w, beta=BETA)
    learn = functools.partial(policy.learner, nets.model, RECORDED)
    deviation, white, tokens = (
        learn(part) for part in (recipe(within_group(standardised)), recipe(whitened), recipe(bare, mean))
    )
    one, two = rollouts(w, group=1), rollouts(w)
    for draws in (two, rollouts(w, group=4)):
        yield claim(w, f"deviation, groups of {draws.rows}", REWARD, plain, deviation, draws, biased=True)
    four = rollouts(w, mixes=TOGETHER)
    for draws in (two, four):
        yield claim(w, f"whitening, {draws.rows} answers", PRICED, priced, white, draws, biased=True)
    for draws in (one, two, four):
        name = f"token mean, {draws.rows} answer{'s' * (draws.rows > 1)}"
        yield claim(w, name, REWARD, plain, tokens, draws, biased=True)

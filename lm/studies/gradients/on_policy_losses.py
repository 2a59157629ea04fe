"""Certificates of the losses that learn from the policy's own samples: the claim of each loss, and each of its parts.

"At the first update": the policy is still the one that was sampled, as in the first minibatch of every batch.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.metrics import mean, row_mean, row_sum
from lm.core.types import Array, Params, Rollouts
from lm.losses.advantages import group_advantages, kl_rewards, leave_one_out_advantages, rewards_to_go, whiten
from lm.losses.policy import kl_k1, token_ratio, truncated_reinforce_loss
from lm.optim.update import Update, gradient
from lm.stages.rl import (
    best_of_n,
    cispo,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    online_dpo,
    policy_gradient,
    ppo,
    reinforce_pp,
    rloo,
)
from lm.stages.rl.policy_gradient import (
    PolicyGradientMethod,
    advantages_within_group,
    clipped_objective,
    token_advantages,
)
from lm.studies.gradients.certificate import (
    GRADIENT_RECORDER,
    BatchDistribution,
    Certificate,
    certificate_of,
    rows_by_index,
)
from lm.studies.gradients.objectives import (
    answer_hidden_states,
    best_of_n_probabilities,
    clipped_reward_loss,
    expected_prefix_loss,
    expected_reward_loss,
    imitation_loss,
    kl_divergence,
    negative_entropy,
    pairwise_differences,
    pairwise_loss,
    prefix_values,
    self_win_loss,
)
from lm.studies.gradients.tiny_world import (
    MAX_ANSWER_LENGTH,
    PROMPTS,
    Networks,
    TinyWorld,
    answer_logprobs,
    answer_probabilities,
    fixed_length_world,
    next_token_logprobs,
    ragged_world,
    realized_logprobs,
    short_answer_world,
    single_token_world,
)

BETA = 0.3  # the KL coefficient, large enough to matter beside the reward
REWARD_TEXT, REWARD_LESS_KL_TEXT = "E r", "E r - β KL(p,q)"
SINGLE_PROMPT_MIXES = tuple((x,) for x in range(len(PROMPTS)))  # one prompt a batch
ALL_PROMPTS_MIX = (tuple(range(len(PROMPTS))),)  # all of them in each


def rollout_batches(
    w: TinyWorld,
    *,
    group: int = 2,
    prompt_mixes: Sequence[Sequence[int]] = SINGLE_PROMPT_MIXES,
    sampler: Params | None = None,
    temperature: float = 1.0,
    rewards: Array | None = None,
) -> BatchDistribution:
    """Batches of `group` answers to each prompt of a mix, by the policy or by `sampler`; every mix is as likely."""
    lm = w.nets.policy if sampler is None else sampler
    p = answer_probabilities(w, lm, temperature=temperature)
    logprobs = token_rows(w, realized_logprobs(w, next_token_logprobs(w, lm, temperature=temperature)))
    answer_rewards = (w.rewards if rewards is None else rewards).reshape(-1)
    Y, B = len(w.answers), len(prompt_mixes[0]) * group
    answers = np.tile(index_tuples(Y, B), (len(prompt_mixes), 1))
    prompts = np.repeat([np.repeat(mix, group) for mix in prompt_mixes], Y**B, axis=0)

    def batch(rows) -> Rollouts:
        return Rollouts(
            rows_by_index(w.tokens, rows), answer_rewards[rows], {}, jnp.ones(B, bool), logprobs[rows], group=group
        )

    return BatchDistribution(prompts * Y + answers, np.prod(p[prompts, answers], axis=1) / len(prompt_mixes), batch, B)


def index_tuples(count: int, size: int) -> np.ndarray:
    """Every tuple of `size` numbers below `count`, i64[count^size,size]."""
    return np.stack(np.unravel_index(np.arange(count**size), (count,) * size), axis=1)


def token_rows(w: TinyWorld, x: Array) -> Array:
    """What is known of answers' tokens, f32[X,Y,N], where the rows of `w.tokens` predict them: f32[X*Y,T]."""
    out = np.zeros(w.tokens.weights.shape, np.float32)
    for row, (prompt, (y, answer)) in enumerate(itertools.product(PROMPTS, enumerate(w.answers))):
        start = len(prompt) - 1
        out[row, start : start + len(answer)] = np.asarray(x)[row // len(w.answers), y, : len(answer)]
    return jnp.asarray(out)


LEAVE_ONE_OUT_ADVANTAGES = advantages_within_group(leave_one_out_advantages)


def rloo_without_kl(advantages=LEAVE_ONE_OUT_ADVANTAGES, average=row_sum, **options) -> PolicyGradientMethod:
    """RLOO without KL, with the given parts replaced: the parts of other stages, added one by one."""
    return PolicyGradientMethod(advantages, clipped_objective(0.2, 0.2), average, clip_range=(0.2, 0.2), **options)


def reward_advantages(batch: Rollouts) -> Array:
    return token_advantages(batch.rewards, batch)


def kl_rewards_to_go(batch: Rollouts) -> Array:
    """The values that stage reinforce_pp whitens."""
    w = batch.tokens.weights
    return rewards_to_go(kl_rewards(batch.rewards, kl_k1(batch.old_logprobs, batch.ref_logprobs), w, beta=BETA), w)


def whitened_rewards_to_go(batch: Rollouts) -> Array:
    return whiten(kl_rewards_to_go(batch), batch.tokens.weights)


def first_update_certificates(nets: Networks) -> Iterator[Certificate]:
    w, small, model = ragged_world(nets), short_answer_world(nets), nets.model
    draws, plain, priced = rollout_batches(w), expected_reward_loss(w), expected_reward_loss(w, beta=BETA)
    learn = functools.partial(policy_gradient.policy_gradient_update, model, GRADIENT_RECORDER)
    loo = rloo.make(model, GRADIENT_RECORDER, beta=BETA)
    yield certificate_of(w, "REINFORCE", REWARD_TEXT, plain, learn(rloo_without_kl(reward_advantages)), draws)
    yield certificate_of(
        w, "KL in rewards to go", REWARD_LESS_KL_TEXT, priced, learn(rloo_without_kl(kl_rewards_to_go)), draws
    )
    yield certificate_of(w, "RLOO", REWARD_LESS_KL_TEXT, priced, loo, draws)
    cool = {"temperature": 0.7}
    update = rloo.make(model, GRADIENT_RECORDER, beta=BETA, **cool)
    yield certificate_of(
        w,
        "RLOO, T = 0.7",
        REWARD_LESS_KL_TEXT,
        expected_reward_loss(w, beta=BETA, **cool),
        update,
        rollout_batches(w, **cool),
        **cool,
    )
    small_priced = expected_reward_loss(small, beta=BETA)
    yield certificate_of(
        small, "RLOO, groups of 4", REWARD_LESS_KL_TEXT, small_priced, loo, rollout_batches(small, group=4)
    )
    yield certificate_of(
        small,
        "RLOO, 2 prompts",
        REWARD_LESS_KL_TEXT,
        small_priced,
        loo,
        rollout_batches(small, prompt_mixes=ALL_PROMPTS_MIX),
    )
    doctor = dr_grpo.make(model, GRADIENT_RECORDER, max_response_length=MAX_ANSWER_LENGTH)
    scale = 1 / (2 * MAX_ANSWER_LENGTH)  # (group - 1) / (group * length)
    yield certificate_of(w, "Dr. GRPO", "⅙ E r", plain, doctor, draws, scale=scale)
    rewards = np.asarray(w.rewards).reshape(-1)[draws.indices]
    differ = draws.probabilities * (rewards[:, 0] != rewards[:, 1])  # dynamic sampling without a limit of rounds
    resampled, scale = draws._replace(probabilities=differ / differ.sum()), scale / differ.sum()
    yield certificate_of(w, "Dr. GRPO, resampled", "⅙ E r / P(differ)", plain, doctor, resampled, scale=scale)
    level = fixed_length_world(nets)
    best = best_of_n.make(model, GRADIENT_RECORDER)
    target = imitation_loss(level, best_of_n_probabilities(level, 2))
    yield certificate_of(
        level, "best-of-2, 2 tokens", "½ E best log p", target, best, rollout_batches(level), scale=1 / 2
    )
    p, log_q = answer_probabilities(w, nets.policy), answer_logprobs(w, next_token_logprobs(w, nets.reference))
    is_better = pairwise_differences(w.rewards) > 0
    won = 2 * p[:, :, None] * p[:, None, :] * is_better / len(PROMPTS)  # drawn in either order
    online = pairwise_loss(
        w,
        won,
        lambda said: answer_logprobs(w, said) - log_q,
        lambda h: jnp.logaddexp(0.0, -BETA * pairwise_differences(h)),
    )
    yield certificate_of(
        w, "online DPO", "E -log σ(β d)", online, online_dpo.make(model, GRADIENT_RECORDER, beta=BETA), draws
    )


def published_method_certificates(nets: Networks) -> Iterator[Certificate]:
    w, model = ragged_world(nets), nets.model
    draws, plain, priced = rollout_batches(w), expected_reward_loss(w), expected_reward_loss(w, beta=BETA)
    learn = functools.partial(policy_gradient.policy_gradient_update, model, GRADIENT_RECORDER)
    deviation = learn(rloo_without_kl(advantages_within_group(group_advantages)))

    def case_of(name, objective, loss, update):
        return certificate_of(w, name, objective, loss, update, draws, is_biased=True)

    yield case_of("GRPO", REWARD_LESS_KL_TEXT, priced, grpo.make(model, GRADIENT_RECORDER, beta=BETA))
    yield case_of("  its deviation", REWARD_TEXT, plain, deviation)
    yield case_of("  its row mean", REWARD_TEXT, plain, learn(rloo_without_kl(average=row_mean)))
    yield case_of("  its k3", REWARD_LESS_KL_TEXT, priced, learn(rloo_without_kl(kl_coefficient=BETA)))
    yield case_of("GSPO", REWARD_TEXT, plain, gspo.make(model, GRADIENT_RECORDER))
    yield case_of("DAPO", REWARD_TEXT, plain, dapo.make(model, GRADIENT_RECORDER))
    yield case_of("  its token mean", REWARD_TEXT, plain, learn(rloo_without_kl(average=mean)))
    yield case_of("CISPO", REWARD_TEXT, plain, cispo.make(model, GRADIENT_RECORDER))
    yield case_of("REINFORCE++", REWARD_LESS_KL_TEXT, priced, reinforce_pp.make(model, GRADIENT_RECORDER, beta=BETA))
    yield case_of("  its whitening", REWARD_LESS_KL_TEXT, priced, learn(rloo_without_kl(whitened_rewards_to_go)))
    yield case_of(
        "best-of-2",
        "E best log p",
        imitation_loss(w, best_of_n_probabilities(w, 2)),
        best_of_n.make(model, GRADIENT_RECORDER),
    )
    yield certificate_of(w, "deviation, groups of 2", "wins over itself", self_win_loss(w), deviation, draws)


def divergence_certificates(nets: Networks) -> Iterator[Certificate]:
    w, level = ragged_world(nets), fixed_length_world(nets)
    learn = functools.partial(policy_gradient.policy_gradient_update, nets.model, GRADIENT_RECORDER)
    nothing = jnp.zeros_like(w.rewards)
    draws, kl_of_answers = rollout_batches(w, rewards=nothing), expected_reward_loss(w, beta=1.0, rewards=nothing)
    log_q = next_token_logprobs(w, nets.reference)
    per_token = expected_prefix_loss(w, nets.policy, lambda said: kl_divergence(log_q, said))
    k3 = learn(rloo_without_kl(kl_coefficient=1.0))
    k1 = rloo.make(nets.model, GRADIENT_RECORDER, beta=1.0)
    yield certificate_of(w, "k1 in the reward", "KL(p,q)", kl_of_answers, k1, draws)
    yield certificate_of(w, "k3 in the loss", "KL(p,q)", kl_of_answers, k3, draws, is_biased=True)
    yield certificate_of(w, "k3 in the loss", "KL(q,p) per token", per_token, k3, draws)
    draws = rollout_batches(level, rewards=jnp.zeros_like(level.rewards))
    bonus = learn(rloo_without_kl(), entropy_bonus=1.0)
    per_token = expected_prefix_loss(level, nets.policy, lambda said: jnp.sum(jnp.exp(said) * said, axis=-1))
    yield certificate_of(level, "entropy bonus", "H(p)", negative_entropy(level), bonus, draws, is_biased=True)
    yield certificate_of(level, "entropy bonus", "½ H(p) per token", per_token, bonus, draws, scale=1 / 2)


def zero_gradient_certificates(nets: Networks) -> Iterator[Certificate]:
    w = ragged_world(nets)
    k1 = rloo_without_kl()._replace(token_loss=lambda log_p, batch: kl_k1(log_p, batch.ref_logprobs))
    yield certificate_of(
        w,
        "k1 in the loss",
        "everywhere",
        None,
        policy_gradient.policy_gradient_update(nets.model, GRADIENT_RECORDER, k1),
        rollout_batches(w),
    )


def ppo_certificates(nets: Networks) -> Iterator[Certificate]:
    w, uneven = fixed_length_world(nets), ragged_world(nets)
    draws, wrong, right = rollout_batches(w), {"value": nets.value_head}, {"value": exact_value_head(w)}

    def make(**options) -> Update:
        options = {"lam": 1.0, "whiten_advantages": False, "value_coefficient": 0.0, "beta": BETA} | options
        return ppo.make(nets.model, GRADIENT_RECORDER, epochs=1, minibatch_count=1, **options)

    half = functools.partial(
        certificate_of,
        w,
        objective=f"½ ({REWARD_LESS_KL_TEXT})",
        loss=expected_reward_loss(w, beta=BETA),
        batches=draws,
        scale=1 / 2,
    )
    yield half("PPO, bare", update=make())
    yield half("  wrong head, λ 1", update=make(), heads=wrong)
    yield half("  true head, λ .5", update=make(lam=0.5), heads=right)
    yield half("  no head, λ .95", update=make(lam=0.95), is_biased=True)
    yield half("  wrong head, λ .95", update=make(lam=0.95), heads=wrong, is_biased=True)
    yield half("  whitened", update=make(whiten_advantages=True), is_biased=True)
    loss = expected_reward_loss(uneven, beta=BETA)
    yield certificate_of(
        uneven, "  its token mean", REWARD_LESS_KL_TEXT, loss, make(), rollout_batches(uneven), is_biased=True
    )
    text = rows_by_index(w.tokens, jnp.array([0, 21]))
    with_text = draws._replace(make_batch=lambda rows: draws.make_batch(rows).replace(text_tokens=text))
    written = np.zeros(w.rewards.shape)
    # Rows 0 and 21, of two tokens each; `imitation_loss` is a mean over two prompts.
    written[0, 0] = written[1, 5] = 1 / 2
    both_terms = lambda said: expected_reward_loss(w, beta=BETA)(said) / 2 + 0.5 * imitation_loss(w, written)(said)
    ptx = make(text_coefficient=0.5)
    yield certificate_of(w, "  with text (ptx)", "both terms", both_terms, ptx, with_text)
    head = certificate_of(w, "PPO's value head", "¼ E (V - v)²", None, make(value_coefficient=1.0), draws, heads=wrong)
    yield head._replace(exact_gradient=exact_value_gradient(w), param_group="value")


def exact_value_head(w: TinyWorld) -> Params:
    """The scalar head that predicts the rewards to come exactly: prefixes are no more than its own numbers."""
    real = np.broadcast_to(w.answer_mask > 0, (len(PROMPTS), *w.answer_mask.shape))
    x, v = np.asarray(answer_hidden_states(w), np.float64)[real], prefix_values(w, beta=BETA)[real]
    *score, offset = np.linalg.lstsq(np.append(x, np.ones((len(x), 1)), axis=1), v, rcond=1e-9)[0]
    return {"score": jnp.array(score, jnp.float32), "offset": jnp.float32(offset)}


def exact_value_gradient(w: TinyWorld) -> Params:
    """The gradient in the head of the mean over prompts of E of the mean over two tokens of (V - rewards to come)^2
    / 2."""
    weights = answer_probabilities(w, w.nets.policy)[:, :, None] * w.answer_mask
    x, v = answer_hidden_states(w), prefix_values(w, beta=BETA)
    squares = lambda head: weights * jnp.square(w.nets.model.value(head, x) - v) / 2
    return jax.grad(lambda head: jnp.sum(squares(head)) / 2 / len(PROMPTS))(w.nets.value_head)


def off_policy_certificates(nets: Networks) -> Iterator[Certificate]:
    one, w, model = single_token_world(nets), ragged_world(nets), nets.model

    def annotated_batches(w: TinyWorld) -> BatchDistribution:
        """Batches drawn by the sampler and annotated with its log-probs, as in a later minibatch of a batch."""
        draws = rollout_batches(w, sampler=nets.sampler)

        def batch(rows):
            drawn = draws.make_batch(rows)
            return drawn.replace(old_logprobs=drawn.sampler_logprobs, advantages=reward_advantages(drawn))

        return draws._replace(make_batch=batch)

    def learn(objective) -> Update:
        part = rloo_without_kl()._replace(token_loss=objective)
        return gradient(
            policy_gradient.policy_gradient_loss(model, part, entropy_bonus=0.0, temperature=1.0), GRADIENT_RECORDER
        )

    def cut(high) -> Update:
        def objective(log_p, batch):
            return truncated_reinforce_loss(
                log_p, token_ratio(log_p, batch.old_logprobs), batch.advantages, clip_high=high
            )

        return learn(objective)

    def capped_update(cap) -> Update:
        return rloo.make(model, GRADIENT_RECORDER, beta=0.0, importance_ratio_cap=cap)

    free, near = learn(clipped_objective(1.0, jnp.inf)), learn(clipped_objective(0.2, 0.2))
    first, every = expected_reward_loss(one), expected_reward_loss(w)
    draws = annotated_batches(one)
    yield certificate_of(one, "ratio, 1 token each", REWARD_TEXT, first, free, draws)
    yield certificate_of(one, "  clipped at 0.2", REWARD_TEXT, first, near, draws, is_biased=True)
    yield certificate_of(one, "  CISPO, no cut", REWARD_TEXT, first, cut(jnp.inf), draws)
    yield certificate_of(one, "  CISPO, cut at 1.2", REWARD_TEXT, first, cut(0.2), draws, is_biased=True)
    draws = annotated_batches(w)
    yield certificate_of(w, "ratios, 1 to 3 tokens", REWARD_TEXT, every, free, draws, is_biased=True)
    yield certificate_of(w, "  clipped at 0.2", "itself, clipped", clipped_reward_loss(w), near, draws)
    draws = rollout_batches(one, sampler=nets.sampler)
    yield certificate_of(one, "other sampler, 1 token", REWARD_TEXT, first, capped_update(0.0), draws, is_biased=True)
    yield certificate_of(one, "  correction up to 1", REWARD_TEXT, first, capped_update(1.0), draws, is_biased=True)
    yield certificate_of(one, "  correction up to 100", REWARD_TEXT, first, capped_update(100.0), draws)
    draws = rollout_batches(w, sampler=nets.sampler)
    yield certificate_of(w, "other sampler, 1 to 3", REWARD_TEXT, every, capped_update(0.0), draws, is_biased=True)
    yield certificate_of(w, "  correction up to 100", REWARD_TEXT, every, capped_update(100.0), draws, is_biased=True)


def batch_size_certificates(nets: Networks) -> Iterator[Certificate]:
    w = short_answer_world(nets)
    plain, priced = expected_reward_loss(w), expected_reward_loss(w, beta=BETA)
    learn = functools.partial(policy_gradient.policy_gradient_update, nets.model, GRADIENT_RECORDER)
    deviation, white, tokens = (
        learn(part)
        for part in (
            rloo_without_kl(advantages_within_group(group_advantages)),
            rloo_without_kl(whitened_rewards_to_go),
            rloo_without_kl(reward_advantages, mean),
        )
    )
    one, two = rollout_batches(w, group=1), rollout_batches(w)
    for draws in (two, rollout_batches(w, group=4)):
        yield certificate_of(
            w, f"deviation, groups of {draws.answers_per_batch}", REWARD_TEXT, plain, deviation, draws, is_biased=True
        )
    four = rollout_batches(w, prompt_mixes=ALL_PROMPTS_MIX)
    for draws in (two, four):
        yield certificate_of(
            w,
            f"whitening, {draws.answers_per_batch} answers",
            REWARD_LESS_KL_TEXT,
            priced,
            white,
            draws,
            is_biased=True,
        )
    for draws in (one, two, four):
        name = f"token mean, {draws.answers_per_batch} answer{'s' * (draws.answers_per_batch > 1)}"
        yield certificate_of(w, name, REWARD_TEXT, plain, tokens, draws, is_biased=True)

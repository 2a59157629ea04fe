"""REINFORCE++: no value network and no group: the whole batch is the baseline.

Objective: E[reward(x, y)] - beta * KL(policy, reference) through PPO's clipped surrogate, with A_t = r - beta * the sum
of log(p / p_ref) from t to the answer's end, whitened over all tokens of the batch. Frozen: "ref". A batch is
`Rollouts`; answers to one prompt may be several or one. Hu 2025, arXiv 2501.03262.

Biased: the batch's own mean and deviation are part of the advantage, and the number of its tokens depends on what was
sampled.
"""

from lm.losses.policy import kl_k1
from lm.metrics import mean
from lm.returns import kl_rewards, to_go, whiten
from lm.stages.policy import LIMITS, SHOWN, START, Recipe, clipped, method, summary
from lm.stages.rollouts import batches

__all__ = ["LIMITS", "SHOWN", "START", "batches", "make", "summary"]


@method
def make(*, beta: float = 0.05, clip: float = 0.2) -> Recipe:
    """KL rewards to go, whitened over the batch; clipped surrogate; mean over all tokens."""

    def advantages(batch):
        w = batch.tokens.weights
        rewards = kl_rewards(batch.rewards, kl_k1(batch.old_logprobs, batch.ref_logprobs), w, beta=beta)
        return whiten(to_go(rewards, w), w)

    return Recipe(advantages=advantages, objective=clipped(clip, clip), average=mean, band=(clip, clip))

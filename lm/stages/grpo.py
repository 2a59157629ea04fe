"""GRPO: answers to one prompt are judged against each other, so no value network is needed.

Objective: the mean over answers of the mean over an answer's tokens of min(ratio * A, clip(ratio) * A) - beta * k3,
with A = (r - mean of the group) / (its standard deviation + 1e-4), the same for every token of the answer. Frozen:
"ref", the policy this run starts from. A batch is `Rollouts` of `data.group` answers to each prompt. Shao et al. 2024,
eq. 3, arXiv 2402.03300.

Three choices of the paper bias its gradient, and `python -m lm.certify` prints by how much: the deviation in the
advantage, the mean over each answer's own length, and k3 in the loss, whose gradient is that of the other KL. They are
kept, for this is GRPO as published; `dr_grpo` and `rloo` do without.
"""

from lm.metrics import row_mean
from lm.returns import standardised
from lm.stages.policy import LIMITS, SHOWN, START, Recipe, clipped, method, summary, within_group
from lm.stages.rollouts import batches

__all__ = ["LIMITS", "SHOWN", "START", "batches", "make", "summary"]


@method
def make(*, beta: float = 0.04, clip: float = 0.2) -> Recipe:
    """Standardised within the group, clipped surrogate, mean of row means, beta * k3."""
    return Recipe(
        advantages=within_group(standardised),
        objective=clipped(clip, clip),
        average=row_mean,
        band=(clip, clip),
        kl_in_loss=beta,
    )

"""Distillation: on the conversations of SFT, a small student learns to say what a teacher would, with all its doubts.

Objective: the mean over the assistant's tokens of D(teacher, student), between the two distributions of the next token
after the same words. D is KL(teacher, student) at beta 0, whose target is the teacher's probabilities where SFT's is
the written token; KL(student, teacher) at beta 1; a Jensen-Shannon divergence between. Frozen: "teacher", a network of
any size that shares the tokenizer. A batch is `Tokens`, as in stage sft.
Hinton et al. 2015, arXiv 1503.02531; of language models: Sanh et al. 2019, arXiv 1910.01108; the family of D: Agarwal
et al. 2023, eq. 1, arXiv 2306.13649.

Ours differs: no factor of temperature^2 (Hinton et al., sec. 2), which Adam would divide out again, and no term of the
written token; `loss` is that term, logged but not learned from.
"""

from collections.abc import Mapping

import optax

from lm.metrics import Metrics, values
from lm.model import Model
from lm.stages.conversations import batches
from lm.stages.distillation import comparison, taught
from lm.update import Update, gradient

__all__ = ["LIMITS", "SHOWN", "START", "batches", "make", "summary"]

SHOWN = ("divergence", "loss")  # in the live line
LIMITS: Mapping[str, float] = {}  # metrics the loop keeps below a bound
START: Mapping[str, tuple[float, float]] = {}  # held-out metrics before the first step: (value, tolerance)


def make(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    teacher: Model,
    beta: float = 0.0,
    temperature: float = 1.0,
    microbatches: int = 1,
) -> Update:
    """gradient(mean divergence from the teacher)."""
    compare = comparison(model, teacher, beta=beta, temperature=temperature)
    return gradient(taught(compare), optimizer, microbatches=microbatches)


def summary(metrics: Metrics, about) -> dict[str, float]:
    """Held-out divergence from the teacher, nats per trained token, and how often both would say the same."""
    return values(metrics)

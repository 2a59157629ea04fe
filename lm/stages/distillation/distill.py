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

import optax

from lm.core.metrics import Metrics, metric_values
from lm.model import Model
from lm.optim.combinators import decoder_gradient
from lm.optim.update import Update
from lm.stages.distillation.teacher_divergence import distillation_loss, divergence_from_teacher
from lm.stages.pretraining.conversation_batches import batches
from lm.stages.stage import Stage


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
    compare = divergence_from_teacher(model, teacher, beta=beta, temperature=temperature)
    return decoder_gradient(distillation_loss(compare), optimizer, microbatches=microbatches)


def summary(metrics: Metrics, about) -> dict[str, float]:
    """Held-out divergence from the teacher, nats per trained token, and how often both would say the same."""
    return metric_values(metrics)


DISTILL = Stage(__name__, make, batches, summary, shown_metrics=("divergence", "loss"), has_teacher=True)

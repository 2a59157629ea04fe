"""Checks exactly that the expected gradient of every loss is the gradient of its objective.

    python -m lm certify
    python -m lm certify --policy=tabular --json=certificates.json

The world is small enough to enumerate every batch: two prompts, four tokens, answers of up to three tokens. Every batch
of answers or verdicts goes through the stage's own update. The gradients, weighted by each batch's probability, are
compared with autodiff of the objective, which is written out separately and summed over all answers. A loss that is
called unbiased must agree to 1e-5, else the exit status is 1. For a loss that is known to be biased, the bias is shown,
and each of its causes.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lm.core.config import parsed_flags
from lm.core.errors import UserError
from lm.runs.console import print_table, run_program, say
from lm.runs.workdir import write_text
from lm.studies.gradients import offline_losses, on_policy_losses
from lm.studies.gradients.certificate import UNBIASED_TOLERANCE, Certificate, CertificateResult, certificate_result
from lm.studies.gradients.tiny_world import POLICIES, Networks

FLAGS = {
    "policy": dict(
        choices=[*POLICIES, "both"], default="both", help="a table, a small decoder, or one after the other"
    ),
    "json": dict(metavar="PATH", help="write all numbers there, more than the tables show"),
}
SECTIONS: Mapping[str, Callable[[Networks], Iterator[Certificate]]] = {
    "Policy gradients at the first update": on_policy_losses.first_update_certificates,
    "As published, and each cause of bias alone": on_policy_losses.published_method_certificates,
    "What a larger batch cures, and what it does not": on_policy_losses.batch_size_certificates,
    "PPO, a value head and GAE": on_policy_losses.ppo_certificates,
    "KL and entropy, where they are counted": on_policy_losses.divergence_certificates,
    "Drawn by another policy": on_policy_losses.off_policy_certificates,
    "Preferences, over all verdicts": offline_losses.preference_certificates,
    "Texts and teachers": offline_losses.distillation_certificates,
}
STATIONARY_SECTIONS: Mapping[str, Callable[[Networks], Iterator[Certificate]]] = {
    "Policies at the optimum": lambda nets: (
        *offline_losses.optimum_certificates(nets),
        *on_policy_losses.zero_gradient_certificates(nets),
    ),
    "Reward models at the optimum": offline_losses.reward_model_certificates,
}
LEGEND = f"""\
p the policy that learns, q its reference, t a teacher, r the reward, d a lead in
log(p/q) of one answer over another, r' that of a mismatched one, P how often it
is preferred; "per token": of the next token, after prefixes as they were drawn.

=       unbiased: within {UNBIASED_TOLERANCE:g} of the gradient of its objective; else marked !
~       biased, as its file says: "off by" is what is left at the best scale
exact   norm of the gradient of the objective, summed over all answers
off by  |mean of ours - exact| / |exact|; where all should be still, |mean of ours|
        over its root mean square in one batch
noise   answers in a batch whose noise is as large as the mean of ours"""


def print_section(title: str, results: list[CertificateResult]) -> None:
    """A section as a table: certificates whose exact gradient is zero have other columns."""
    if results[0].scale is None:
        rows = [
            [marked_name(m), m.objective, rounded_number(m.ours), rounded_number(m.size), rounded_number(m.off, 2)]
            for m in results
        ]
        print_table(title, ["", "still where", "ours", "one batch", "off by"], rows)
        return
    rows = [
        [
            marked_name(m),
            m.objective,
            rounded_number(m.exact),
            rounded_number(m.residue if m.biased else m.off, 2),
            rounded_number(m.cosine),
            rounded_number(m.noise),
        ]
        for m in results
    ]
    print_table(title, ["", "objective", "exact", "off by", "cosine", "noise"], rows)


def marked_name(m: CertificateResult) -> str:
    return f"{'!' if not m.holds else '~' if m.biased else '='} {m.name}"


def rounded_number(x: float, digits: int = 3) -> float:
    return float(f"{x:.{digits}g}")


def program(argv: list[str]) -> None:
    flags = parsed_flags(argv, __doc__, FLAGS)
    path = Path(flags.json) if flags.json else None
    if path and not path.absolute().parent.is_dir():
        raise UserError(f"--json={path}: there is no folder {path.absolute().parent}")
    results = []
    for policy in POLICIES if flags.policy == "both" else [flags.policy]:
        nets = POLICIES[policy]()
        for title, section in (SECTIONS | STATIONARY_SECTIONS).items():
            measures = [certificate_result(certificate) for certificate in section(nets)]
            print_section(f"{title} ({policy})", measures)
            results += [{"policy": policy, "section": title, **m._asdict()} for m in measures]
    say(LEGEND)
    if path:
        write_text(path, json.dumps(results, ensure_ascii=False, indent=1) + "\n")
        say(f"numbers: {path}")
    wrong = [one for one in results if not one["holds"]]
    for one in wrong:
        kind = "biased, but is not" if one["biased"] else f"unbiased, but is off by {one['off']:.2g}"
        say(f"! {one['name'].strip()} ({one['policy']}, {one['objective']}) is marked as {kind}")
    say(f"{len(results) - len(wrong)} of {len(results)} certificates hold")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    run_program(program)

"""Is our gradient the gradient of what we say we optimise? Exactly, for every loss, where every batch can be
enumerated.

    python -m lm.certify
    python -m lm.certify --policy=tabular --json=certificates.json

Two prompts, four tokens, answers of up to three. Every batch of answers or verdicts goes through the stage's own
update; the gradients, weighted by the batch's chance, are held against autodiff of the objective, which is written
anew, summed over all answers. What claims to be unbiased must agree to 1e-5, else the exit status is 1; what is known
to be biased shows its bias, and each cause of it alone.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lm.certify import given, sampled
from lm.certify.certificate import AGREES, Certificate, Measured, measured
from lm.certify.world import POLICIES, Nets
from lm.config import parsed
from lm.console import main, say, table
from lm.errors import UserError
from lm.workdir import write_text

FLAGS = {
    "policy": dict(
        choices=[*POLICIES, "both"], default="both", help="a table, a small decoder, or one after the other"
    ),
    "json": dict(metavar="PATH", help="write all numbers there, more than the tables show"),
}
SECTIONS: Mapping[str, Callable[[Nets], Iterator[Certificate]]] = {
    "Policy gradients at the first update": sampled.first_update,
    "As published, and each cause of bias alone": sampled.as_published,
    "What a larger batch cures, and what it does not": sampled.larger_batches,
    "PPO, a value head and GAE": sampled.actor_critic,
    "KL and entropy, where they are counted": sampled.divergences,
    "Drawn by another policy": sampled.off_policy,
    "Preferences, over all verdicts": given.preferences,
    "Texts and teachers": given.teachers,
}
STILL: Mapping[str, Callable[[Nets], Iterator[Certificate]]] = {
    "Policies at the optimum": lambda nets: (*given.optima(nets), *sampled.nothing_pulls(nets)),
    "Reward models at the optimum": given.judges,
}
LEGEND = f"""\
p the policy that learns, q its reference, t a teacher, r the reward, d a lead in
log(p/q) of one answer over another, r' that of a mismatched one, P how often it
is preferred; "per token": of the next token, after prefixes as they were drawn.

=       unbiased: within {AGREES:g} of the gradient of its objective; else marked !
~       biased, as its file says: "off by" is what is left at the best scale
exact   norm of the gradient of the objective, summed over all answers
off by  |mean of ours - exact| / |exact|; where all should be still, |mean of ours|
        over its root mean square in one batch
noise   answers in a batch whose noise is as large as the mean of ours"""


def show(title: str, found: list[Measured]) -> None:
    """A section as a table: with the columns of those whose exact gradient is zero, or of the others."""
    if found[0].scale is None:
        rows = [[marked(m), m.objective, rounded(m.ours), rounded(m.size), rounded(m.off, 2)] for m in found]
        table(title, ["", "still where", "ours", "one batch", "off by"], rows)
        return
    rows = [
        [
            marked(m),
            m.objective,
            rounded(m.exact),
            rounded(m.residue if m.biased else m.off, 2),
            rounded(m.cosine),
            rounded(m.noise),
        ]
        for m in found
    ]
    table(title, ["", "objective", "exact", "off by", "cosine", "noise"], rows)


def marked(m: Measured) -> str:
    return f"{'!' if not m.holds else '~' if m.biased else '='} {m.name}"


def rounded(x: float, digits: int = 3) -> float:
    return float(f"{x:.{digits}g}")


def program(argv: list[str]) -> None:
    flags = parsed(argv, __doc__, FLAGS)
    path = Path(flags.json) if flags.json else None
    if path and not path.absolute().parent.is_dir():
        raise UserError(f"--json={path}: there is no folder {path.absolute().parent}")
    found = []
    for policy in POLICIES if flags.policy == "both" else [flags.policy]:
        nets = POLICIES[policy]()
        for title, section in (SECTIONS | STILL).items():
            measures = [measured(certificate) for certificate in section(nets)]
            show(f"{title} ({policy})", measures)
            found += [{"policy": policy, "section": title, **m._asdict()} for m in measures]
    say(LEGEND)
    if path:
        write_text(path, json.dumps(found, ensure_ascii=False, indent=1) + "\n")
        say(f"numbers: {path}")
    wrong = [one for one in found if not one["holds"]]
    for one in wrong:
        kind = "biased, but is not" if one["biased"] else f"unbiased, but is off by {one['off']:.2g}"
        say(f"! {one['name'].strip()} ({one['policy']}, {one['objective']}) is said to be {kind}")
    say(f"{len(found) - len(wrong)} of {len(found)} certificates hold")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main(program)

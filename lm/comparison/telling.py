"""A comparison in words and in tables, on the terminal and for the page."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm.comparison.reading import UNRECORDED, Absent, Run
from lm.comparison.settings import NOTHING, Settings, different, shortened, shown
from lm.comparison.statistics import BETTER, MINIMIZE, NOISE, PAIRED, UNJUDGED, Contrast, Measured, Spread, family
from lm.console import say, table
from lm.intervals import Estimate

SHOWN = 60  # characters of a value in a table
ROWS = 20  # settings that the terminal and the figures show
FEW_NAMES = 4  # settings that a sentence names


class Comparison(NamedTuple):
    """All that the page shows."""

    metric: str
    direction: str  # MINIMIZE or MAXIMIZE
    confidence: float
    settings: Settings
    found: Sequence[Measured]  # the best mean first
    reference: str  # the setting that all others are held against
    chosen: bool  # by its mean, not by name
    spread: Spread | None  # of all settings together; None where they are too few
    contrasts: Mapping[str, Contrast]  # by the name of the other
    absent: Sequence[Absent]

    @property
    def runs(self) -> list[Run]:
        return [run for one in self.found for run in one.setting.runs]

    def of(self, verdict: str) -> list[Contrast]:
        return [contrast for contrast in self.contrasts.values() if contrast.verdict == verdict]

    @property
    def tested(self) -> list[Contrast]:
        return [contrast for contrast in self.contrasts.values() if contrast.verdict != UNJUDGED]


def number(value: float) -> str:
    """Four significant digits, zeros at the end included."""
    return f"{value:#.4g}".rstrip(".").replace("-", "−")


def change(value: float) -> str:
    """Three, with the sign."""
    return f"{value:+#.3g}".rstrip(".").replace("-", "−")


def bracket(estimate: Estimate, form=number) -> str:
    """ "[4.01, 4.23]"; nothing for an infinite interval."""
    return f"[{form(estimate.low)}, {form(estimate.high)}]" if math.isfinite(estimate.se) else ""


def probability(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def seeds(n: int) -> str:
    return "one seed" if n == 1 else f"{n} seeds"


def spread(one: Measured) -> str:
    """A mean's interval, or why there is none."""
    return bracket(one.mean) or "one seed: no interval"


def sentences(told: Comparison) -> list[str]:
    """What may be concluded, and what may not."""
    reference = next(one for one in told.found if one.name == told.reference)
    if not told.contrasts:
        return [
            f"{reference.name}: {told.metric} {number(reference.mean.value)} "
            f"{bracket(reference.mean) or '(one seed: no interval)'}".strip()
            + (f", {seeds(len(reference.values))}" if len(reference.values) > 1 else "")
            + ". There is one setting only, so nothing is compared."
        ]
    said = [sentence(contrast) for contrast in told.contrasts.values() if contrast.verdict != UNJUDGED]
    if unjudged := told.of(UNJUDGED):
        names = "; ".join(
            f"{one.name} ({change(one.difference.value)}, {seeds(one.n)})" for one in unjudged[:FEW_NAMES]
        )
        rest = f"; and {len(unjudged) - FEW_NAMES} more" if len(unjudged) > FEW_NAMES else ""
        said.append(
            f"Against {told.reference} the noise cannot be judged, for want of three seeds on both sides: "
            f"{names}{rest}. Such a difference may be chance, however large it looks."
        )
    if said and told.chosen and told.tested:
        said.append(
            f"{told.reference} was taken as the reference because its mean is the best here, which flatters it: on new "
            "seeds it would do a little worse. A reference named beforehand (--baseline) has narrower intervals."
        )
    return said


def sentence(contrast: Contrast) -> str:
    """One contrast, plainly; the winner first."""
    d = contrast.difference
    numbers = f"{probability(contrast.p)}, n = {seeds(contrast.n)}, {contrast.tested}"
    effect = f", effect size {abs(contrast.effect):.1f}" if contrast.effect is not None else ""
    if contrast.verdict == NOISE:
        return (
            f"{contrast.name} and {contrast.reference} cannot be told apart: a difference of {change(d.value)} "
            f"{bracket(d, change)} is inside the noise ({numbers})."
        )
    winner, loser = contrast.name, contrast.reference
    if contrast.verdict != BETTER:
        winner, loser = loser, winner
    low, high = sorted(map(abs, (d.low, d.high)))
    by = f"{number(abs(d.value))} [{number(low)}, {number(high)}]"
    return f"{winner} is better than {loser} by {by} ({numbers}{effect})."


def warnings(told: Comparison) -> list[str]:
    """What a reader must know before believing any of it."""
    said = list(told.settings.notes)
    labels = {one.name: dict.fromkeys(run.code.label for run in one.setting.runs) for one in told.found}
    every = list(dict.fromkeys(label for each in labels.values() for label in each))
    if len(every) > 1:
        said.append(
            f"The runs were made by different code ({', '.join(every[:4])}{', ...' if len(every) > 4 else ''}): a "
            "difference between settings may come from that. See the table of code."
        )
    elif every == [UNRECORDED]:
        said.append("No run has a record of the code that made it, so that it was the same code cannot be checked.")
    versions = [run.code.versions for run in told.runs if run.code.versions]
    if keys := different(versions) if versions else []:
        said.append(f"The runs were made with different versions of {', '.join(keys)}.")
    for one in told.found:
        if lost := of_setting(one, told.absent):
            said.append(
                f"{one.name}: {len(lost)} of {len(lost) + len(one.values)} runs gave no number ({states(lost)}). "
                "Its mean is that of the others, which may be the luckier ones."
            )
    return said


def of_setting(one: Measured, absent: Sequence[Absent]) -> list[Absent]:
    """Those of the runs without a number that were of this setting, as far as their sweep tells."""
    config = one.setting.config
    return [
        gone
        for gone in absent
        if gone.given and all(key in config and config[key] == value for key, value in gone.given.items())
    ]


def states(absent: Sequence[Absent]) -> str:
    """ "2 failed, 1 pruned"."""
    return ", ".join(f"{count} {state}" for state, count in Counter(gone.state for gone in absent).items())


def given(gone: Absent) -> str:
    """What a sweep had set for a trial: "learning_rate=0.001, width=64"."""
    short = shortened(list(gone.given))
    return ", ".join(f"{short[key]}={shown(gone.given, key)}" for key in gone.given)


def configs(told: Comparison) -> list[list[str]]:
    """A row for each key that differs between settings: the key, and its value in each."""
    return [[key, *(clipped(shown(one.setting.config, key)) for one in told.found)] for key in told.settings.differing]


def codes(told: Comparison) -> list[list[str]]:
    """A row for each code that runs were made by: the code, its package versions, the settings, and how many runs."""
    made: dict[tuple[str, str], list[str]] = {}
    for one in told.found:
        for run in one.setting.runs:
            versions = ", ".join(f"{name} {version}" for name, version in run.code.versions.items())
            made.setdefault((run.code.label, versions or NOTHING), []).append(one.name)
    rows = []
    for (label, versions), names in made.items():
        distinct = list(dict.fromkeys(names))
        who = "all settings" if len(distinct) == len(told.found) else "; ".join(distinct)
        rows.append([label, versions, who, str(len(names))])
    return rows


def clipped(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def row(told: Comparison, one: Measured) -> dict[str, Any]:
    """A setting as the tables show it."""
    measured = {"name": one.name, "seeds": len(one.values), "mean": number(one.mean.value), "interval": spread(one)}
    told_of_it = dict.fromkeys(("difference", "range", "p", "over", "effect"), "")
    if one.name not in told.contrasts:
        return {**measured, **told_of_it, "verdict": "the reference" if told.contrasts else ""}
    contrast = told.contrasts[one.name]
    told_of_it |= {"difference": change(contrast.difference.value), "verdict": contrast.verdict}
    if contrast.verdict != UNJUDGED:
        told_of_it |= {
            "range": bracket(contrast.difference, change),
            "p": probability(contrast.p).removeprefix("p ").removeprefix("= "),
            "over": f"{contrast.n} pairs" if contrast.tested == PAIRED else f"{seeds(contrast.n)}, {contrast.tested}",
            "effect": "" if contrast.effect is None else change(contrast.effect),
        }
    return {**measured, **told_of_it}


def corrected(told: Comparison) -> str:
    """How the comparisons were made, and for how many of them p and intervals are corrected."""
    tests = len(told.tested)
    counted = family(tests, told.chosen)
    by = "Holm"
    if told.spread and told.spread.equal:
        how = f"Tested by one spread between seeds, {told.spread.words}. "
        by = "Tukey" if told.chosen else by
    elif told.spread:
        how = "The spread differs between settings (Cochran's C), so each pair is tested on its own seeds. "
    else:
        how = ""
    if counted == 1:
        return f"{how}One comparison."
    if counted == tests:
        return f"{how}{tests} comparisons; their p and intervals are corrected for that number ({by})."
    return (
        f"{how}{tests} comparisons with the best of {tests + 1}; their p and intervals are corrected for all {counted} "
        f"pairs ({by}), as any setting might have been the best."
    )


def show(told: Comparison) -> None:
    """The comparison as a table and sentences on the terminal."""
    better = "lower" if told.direction == MINIMIZE else "higher"
    percent = f"{100 * told.confidence:g} %"
    lines = [row(told, one) for one in told.found]
    table(
        f"{told.metric} ({better} is better)",
        ["", "seeds", f"mean [{percent}]", ""],
        [[line["name"], line["seeds"], f"{line['mean']} {line['interval']}", line["verdict"]] for line in lines[:ROWS]],
    )
    if len(lines) > ROWS:
        say(f"These are the best {ROWS} of {len(lines)}; the page has all.")
    if told.tested:
        say(f"{corrected(told)} Intervals are {percent}, over seeds.")
    for text in sentences(told):
        say(text)

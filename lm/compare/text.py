"""A comparison in words and tables, for the terminal and the page."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm.compare.read import CODE_NOT_RECORDED, MissingRun, Run
from lm.compare.settings import NO_VALUE, SettingGroups, config_value_text, differing_keys, short_keys
from lm.compare.statistics import (
    BETTER,
    INSIDE_NOISE,
    MINIMIZE,
    NOT_JUDGED,
    PAIRED,
    Contrast,
    PooledSpread,
    SettingResult,
    comparison_count,
)
from lm.core.statistics import Estimate, interval_text
from lm.runs.console import print_table, say

MAX_VALUE_CHARACTERS = 60  # characters of a value in a table
MAX_ROWS = 20  # settings that the terminal and the figures show
MAX_NAMES = 4  # settings that a sentence names


class Comparison(NamedTuple):
    """All that the page shows."""

    metric: str
    direction: str  # MINIMIZE or MAXIMIZE
    confidence: float
    settings: SettingGroups
    results: Sequence[SettingResult]  # the best mean first
    reference: str  # the setting that all others are compared with
    reference_is_best: bool  # by its mean, not by name
    pooled_spread: PooledSpread | None  # of all settings together; None where they are too few
    contrasts: Mapping[str, Contrast]  # by the name of the other
    missing: Sequence[MissingRun]

    @property
    def runs(self) -> list[Run]:
        return [run for one in self.results for run in one.setting.runs]

    def with_conclusion(self, verdict: str) -> list[Contrast]:
        return [contrast for contrast in self.contrasts.values() if contrast.conclusion == verdict]

    @property
    def judged_contrasts(self) -> list[Contrast]:
        return [contrast for contrast in self.contrasts.values() if contrast.conclusion != NOT_JUDGED]


def number_text(value: float) -> str:
    """Four significant digits, zeros at the end included."""
    return f"{value:#.4g}".rstrip(".").replace("-", "−")


def change_text(value: float) -> str:
    """Three, with the sign."""
    return f"{value:+#.3g}".rstrip(".").replace("-", "−")


def known_interval_text(estimate: Estimate, form=number_text) -> str:
    """ "[4.01, 4.23]"; nothing for an infinite interval."""
    return interval_text(estimate, form) if math.isfinite(estimate.se) else ""


def p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def seed_count_text(n: int) -> str:
    return "one seed" if n == 1 else f"{n} seeds"


def interval_or_reason(one: SettingResult) -> str:
    """A mean's interval, or the reason why there is none."""
    return known_interval_text(one.mean) or "one seed: no interval"


def conclusion_sentences(comparison: Comparison) -> list[str]:
    """Sentences: the conclusions that the numbers allow, and those that they do not allow."""
    reference = next(one for one in comparison.results if one.name == comparison.reference)
    if not comparison.contrasts:
        return [
            f"{reference.name}: {comparison.metric} {number_text(reference.mean.value)} "
            f"{known_interval_text(reference.mean) or '(one seed: no interval)'}".strip()
            + (f", {seed_count_text(len(reference.values))}" if len(reference.values) > 1 else "")
            + ". There is one setting only, so nothing is compared."
        ]
    sentences = [
        contrast_sentence(contrast) for contrast in comparison.contrasts.values() if contrast.conclusion != NOT_JUDGED
    ]
    if unjudged := comparison.with_conclusion(NOT_JUDGED):
        names = "; ".join(
            f"{one.name} ({change_text(one.difference.value)}, {seed_count_text(one.n)})"
            for one in unjudged[:MAX_NAMES]
        )
        rest = f"; and {len(unjudged) - MAX_NAMES} more" if len(unjudged) > MAX_NAMES else ""
        sentences.append(
            f"Against {comparison.reference} the noise cannot be judged without three seeds on both sides: "
            f"{names}{rest}. Such a difference may be chance, however large it looks."
        )
    if sentences and comparison.reference_is_best and comparison.judged_contrasts:
        sentences.append(
            f"{comparison.reference} was taken as the reference because its mean is the best here, which flatters it: "
            "on new seeds it would do a little worse. A reference named beforehand (--baseline) has narrower intervals."
        )
    return sentences


def contrast_sentence(contrast: Contrast) -> str:
    """One contrast in a sentence; the winner first."""
    d = contrast.difference
    numbers = f"{p_text(contrast.p)}, n = {seed_count_text(contrast.n)}, {contrast.test_name}"
    effect = f", effect size {abs(contrast.effect_size):.1f}" if contrast.effect_size is not None else ""
    if contrast.conclusion == INSIDE_NOISE:
        return (
            f"{contrast.name} and {contrast.reference} cannot be told apart: a difference of {change_text(d.value)} "
            f"{known_interval_text(d, change_text)} is inside the noise ({numbers})."
        )
    winner, loser = contrast.name, contrast.reference
    if contrast.conclusion != BETTER:
        winner, loser = loser, winner
    low, high = sorted(map(abs, (d.low, d.high)))
    by = f"{number_text(abs(d.value))} [{number_text(low)}, {number_text(high)}]"
    return f"{winner} is better than {loser} by {by} ({numbers}{effect})."


def comparison_warnings(comparison: Comparison) -> list[str]:
    """Warnings that a reader needs before believing a comparison."""
    warnings = list(comparison.settings.notes)
    labels = {one.name: dict.fromkeys(run.code.label for run in one.setting.runs) for one in comparison.results}
    every = list(dict.fromkeys(label for each in labels.values() for label in each))
    if len(every) > 1:
        warnings.append(
            f"The runs were made by different code ({', '.join(every[:4])}{', ...' if len(every) > 4 else ''}): a "
            "difference between settings may come from that. See the table of code."
        )
    elif every == [CODE_NOT_RECORDED]:
        warnings.append("No run has a record of the code that made it, so that it was the same code cannot be checked.")
    versions = [run.code.versions for run in comparison.runs if run.code.versions]
    if keys := differing_keys(versions) if versions else []:
        warnings.append(f"The runs were made with different versions of {', '.join(keys)}.")
    for one in comparison.results:
        if lost := missing_runs_of_setting(one, comparison.missing):
            warnings.append(
                f"{one.name}: {len(lost)} of {len(lost) + len(one.values)} runs gave no number "
                f"({state_counts_text(lost)}). Its mean is over the others, which may be the luckier ones."
            )
    return warnings


def missing_runs_of_setting(one: SettingResult, absent: Sequence[MissingRun]) -> list[MissingRun]:
    """The runs without a number that were of this setting, as far as their sweep records it."""
    config = one.setting.config
    return [
        gone
        for gone in absent
        if gone.overrides and all(key in config and config[key] == value for key, value in gone.overrides.items())
    ]


def state_counts_text(absent: Sequence[MissingRun]) -> str:
    """ "2 failed, 1 pruned"."""
    return ", ".join(f"{count} {state}" for state, count in Counter(gone.state for gone in absent).items())


def overrides_text(gone: MissingRun) -> str:
    """The settings of a trial in its sweep: "learning_rate=0.001, width=64"."""
    short = short_keys(list(gone.overrides))
    return ", ".join(f"{short[key]}={config_value_text(gone.overrides, key)}" for key in gone.overrides)


def config_rows(comparison: Comparison) -> list[list[str]]:
    """A row for each key that differs between settings: the key, and its value in each."""
    return [
        [key, *(clipped_text(config_value_text(one.setting.config, key)) for one in comparison.results)]
        for key in comparison.settings.differing_keys
    ]


def code_rows(comparison: Comparison) -> list[list[str]]:
    """A row for each version of the code: the code, its package versions, the settings, and how many runs."""
    made: dict[tuple[str, str], list[str]] = {}
    for one in comparison.results:
        for run in one.setting.runs:
            versions = ", ".join(f"{name} {version}" for name, version in run.code.versions.items())
            made.setdefault((run.code.label, versions or NO_VALUE), []).append(one.name)
    rows = []
    for (label, versions), names in made.items():
        distinct = list(dict.fromkeys(names))
        who = "all settings" if len(distinct) == len(comparison.results) else "; ".join(distinct)
        rows.append([label, versions, who, str(len(names))])
    return rows


def clipped_text(text: str) -> str:
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[: MAX_VALUE_CHARACTERS - 1]}…"


def setting_row(comparison: Comparison, one: SettingResult) -> dict[str, Any]:
    """A setting as the tables show it."""
    measured = {
        "name": one.name,
        "seeds": len(one.values),
        "mean": number_text(one.mean.value),
        "interval": interval_or_reason(one),
    }
    told_of_it = dict.fromkeys(("difference", "range", "p", "over", "effect"), "")
    if one.name not in comparison.contrasts:
        return {**measured, **told_of_it, "verdict": "the reference" if comparison.contrasts else ""}
    contrast = comparison.contrasts[one.name]
    told_of_it |= {"difference": change_text(contrast.difference.value), "verdict": contrast.conclusion}
    if contrast.conclusion != NOT_JUDGED:
        told_of_it |= {
            "range": known_interval_text(contrast.difference, change_text),
            "p": p_text(contrast.p).removeprefix("p ").removeprefix("= "),
            "over": sample_text(contrast),
            "effect": "" if contrast.effect_size is None else change_text(contrast.effect_size),
        }
    return {**measured, **told_of_it}


def sample_text(contrast: Contrast) -> str:
    """ "3 pairs", "3 seeds, unpaired" or "3 seeds, pooled"."""
    if contrast.test_name == PAIRED:
        return f"{contrast.n} pairs"
    return f"{seed_count_text(contrast.n)}, {contrast.test_name.partition(' ')[0]}"


def correction_note(comparison: Comparison) -> str:
    """How the comparisons were made, and for how many of them p and intervals are corrected."""
    tests = len(comparison.judged_contrasts)
    counted = comparison_count(tests, comparison.reference_is_best)
    by = "Holm"
    if comparison.pooled_spread and comparison.pooled_spread.is_equal:
        how = f"Tested by one spread between seeds, {comparison.pooled_spread.description}. "
        by = "Tukey" if comparison.reference_is_best else by
    elif comparison.pooled_spread:
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


def print_comparison(comparison: Comparison) -> None:
    """The comparison as a table and sentences on the terminal."""
    better = "lower" if comparison.direction == MINIMIZE else "higher"
    percent = f"{100 * comparison.confidence:g} %"
    lines = [setting_row(comparison, one) for one in comparison.results]
    print_table(
        f"{comparison.metric} ({better} is better)",
        ["", "seeds", f"mean [{percent}]", ""],
        [
            [line["name"], line["seeds"], f"{line['mean']} {line['interval']}", line["verdict"]]
            for line in lines[:MAX_ROWS]
        ],
    )
    if len(lines) > MAX_ROWS:
        say(f"These are the best {MAX_ROWS} of {len(lines)}; the page has all.")
    if comparison.judged_contrasts:
        say(f"{correction_note(comparison)} Intervals are {percent}, over seeds.")
    for text in conclusion_sentences(comparison):
        say(text)

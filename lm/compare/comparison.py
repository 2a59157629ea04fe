"""Tests which setting is better over runs and seeds, by how much, and whether the difference is inside the noise.

    python -m lm compare runs/a-* runs/b-*
    python -m lm compare runs/sweep --metric=held_out/bits_per_byte

The folders are workdirs of `lm train`, or sweeps. Runs whose configs differ in nothing but the seed are one setting.
Prints a table and the conclusions that it allows, and writes a page with curves, parameters, configs and code.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from lm.compare.page import render_page
from lm.compare.read import LoadedRuns, Run, read_runs
from lm.compare.settings import settings_of_runs
from lm.compare.statistics import (
    MAXIMIZE,
    MINIMIZE,
    SettingResult,
    best_result,
    contrasts_with_reference,
    direction_by_name,
    pooled_spread,
    ranked_results,
    setting_result,
)
from lm.compare.text import Comparison, comparison_warnings, print_comparison
from lm.core.config import parsed_flags
from lm.core.errors import UserError
from lm.runs.console import run_program, say, warn
from lm.runs.workdir import write_text

PAGE_FILE = "compare.html"
DEFAULT_METRIC = "held_out/loss"  # unless a sweep names its metric
POSITIONAL = {"folders": dict(nargs="*", metavar="D", help="the workdir of a run, or the folder of a sweep")}
FLAGS = {
    "metric": dict(metavar="NAME", help=f"as metrics.jsonl names it; default: the sweep's, else {DEFAULT_METRIC}"),
    "direction": dict(choices=(MINIMIZE, MAXIMIZE), help="default: the sweep's, else by the metric's name"),
    "baseline": dict(metavar="NAME", help="the setting, or a folder of it, to compare others with; default: the best"),
    "ignore": dict(
        default="", metavar="KEYS", help="dotted keys, with commas, in which runs of one setting may differ"
    ),
    "confidence": dict(type=float, default=0.95, help="of the intervals; default 0.95"),
    "output": dict(metavar="FILE", help=f"the page; default: {PAGE_FILE} beside the first folder"),
}


def compare_runs(
    folders: Sequence[str | Path],
    *,
    metric: str | None = None,
    direction: str | None = None,
    baseline: str | None = None,
    ignore: Iterable[str] = (),
    confidence: float = 0.95,
) -> Comparison:
    """Reads, groups and tests the runs. UserError for invalid folders, metric or baseline."""
    if not 0.5 <= confidence < 1:
        raise UserError(f"--confidence={confidence:g}: give a number from 0.5 to below 1, such as 0.95")
    loaded = read_runs(folders)
    metric = metric or next(iter(loaded.directions), DEFAULT_METRIC)
    direction = direction or metric_direction(metric, loaded)
    check_metric(loaded.runs, metric)
    grouped = settings_of_runs(loaded.runs, ignore=ignore)
    each = ranked_results([setting_result(one, metric, confidence=confidence) for one in grouped.settings], direction)
    spread = pooled_spread(each)
    reference = setting_named(each, baseline) if baseline else best_result(each, direction)
    return Comparison(
        metric,
        direction,
        confidence,
        grouped,
        each,
        reference.name,
        baseline is None,
        spread,
        contrasts_with_reference(
            each, reference, direction, spread=spread, reference_is_best=baseline is None, confidence=confidence
        ),
        loaded.missing,
    )


def metric_direction(metric: str, loaded: LoadedRuns) -> str:
    """Whether a lower or a higher metric is better: from the sweep, else from the metric's name."""
    if metric in loaded.directions:
        return loaded.directions[metric]
    return direction_by_name(metric)


def check_metric(runs: Sequence[Run], metric: str) -> None:
    """UserError unless every run logs the metric. It names runs that do not, and the metrics that all runs log."""
    logged = [{name for row in run.rows for name in row} for run in runs]
    lacking = [run.path for run, names in zip(runs, logged) if metric not in names]
    if not lacking:
        return
    common = sorted(
        set.intersection(*logged) - {"step", "tokens", "seconds"}, key=lambda n: (not n.startswith("held_out/"), n)
    )
    more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
    who = "no run" if len(lacking) == len(runs) else f"{', '.join(map(str, lacking[:3]))}{more}"
    verb = "logs" if len(lacking) == 1 or who == "no run" else "log"
    does = f"{who} {verb} {metric}" if who == "no run" else f"{who} {verb} no {metric}"
    raise UserError(f"{does}: take a --metric that all of them log: {', '.join(common[:12]) or 'there is none'}")


def setting_named(results: Sequence[SettingResult], baseline: str) -> SettingResult:
    """The setting of that name, or the setting that a folder's run belongs to."""
    for one in results:
        if one.name == baseline or any(run.path.resolve() == Path(baseline).resolve() for run in one.setting.runs):
            return one
    raise UserError(f"--baseline={baseline} is no setting: choose one of {'; '.join(one.name for one in results[:8])}")


def program(argv: list[str]) -> None:
    flags = parsed_flags(argv, __doc__, FLAGS, POSITIONAL)
    folders = [Path(folder) for folder in flags.folders]
    ignore = [key.strip() for key in flags.ignore.split(",") if key.strip()]
    comparison = compare_runs(
        folders,
        metric=flags.metric,
        direction=flags.direction,
        baseline=flags.baseline,
        ignore=ignore,
        confidence=flags.confidence,
    )
    output = Path(flags.output) if flags.output else folders[0].resolve().parent / PAGE_FILE
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output={output} cannot be written: give a file in a folder that exists")
    for missing in comparison.missing[:8]:
        warn(f"{missing.path} is {missing.state} and counted in no mean: {missing.reason}")
    if len(comparison.missing) > 8:
        states = dict(Counter(missing.state for missing in comparison.missing[8:]))
        warn(f"and {len(comparison.missing) - 8} more, {states}: see the page")
    for text in comparison_warnings(comparison):
        warn(text)
    print_comparison(comparison)
    write_text(output, render_page(comparison, folders))
    say(f"page: {output}")


if __name__ == "__main__":
    run_program(program)

"""Fits scaling laws to a ladder of runs and predicts a larger run before it is made.

    python -m lm scaling --config=experiments/scaling.py --workdir=runs/scaling --jobs=2
    python -m lm scaling --points=table.csv

With --config it plans sizes and lengths at budgets over decades of compute, runs them as a sweep, and fits IsoFLOP
parabolas and the law E + A/N^alpha + B/D^beta (Hoffmann et al. 2022, arXiv 2203.15556; as corrected by Besiroglu et
al. 2024, arXiv 2404.10102). It writes WORKDIR/prediction.json, only then runs the larger model, and writes the outcome
to scaling.html, scaling.png and summary.json. --dry_run prints the plan. The same command continues after a kill.
--points fits anyone's table, with the columns parameters, tokens, loss.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from lm.core.config import (
    call_with_options,
    config_help,
    flatten,
    load_config,
    parsed_flags,
    require_entries,
    split_overrides,
    to_dict,
)
from lm.core.errors import UserError
from lm.core.options import ConfigFunction
from lm.runs.console import print_table, run_program, say
from lm.runs.workdir import open_workdir, read_json, read_run_starts, write_text
from lm.studies.scaling import fit, ladder, page, parametric, runs
from lm.studies.scaling.ladder import LadderPlan, PlannedRun
from lm.studies.scaling.points import read_points
from lm.studies.scaling.runs import LADDER_DIR, LARGER_DIR, PLAN_FILE, PREDICTION_FILE
from lm.sweep import controller
from lm.sweep.config_functions import config_functions
from lm.sweep.space import ConfigSource, Trial
from lm.sweep.trials import TrialGoal
from lm.train import loop
from lm.train.tokenizer_stage import fit_tokenizer

BOOTSTRAP_DRAWS = 1000  # of the bootstrap of --points
CONFIG_KEYS = ("seed", "tokenizer", "model", "data", "train", "optimizer", "vocabulary", "ladder")
FLAGS = {
    "config": dict(
        default="", metavar="FILE[:ARG]", help="of one run and of the ladder; --config.KEY=VALUE changes it"
    ),
    "workdir": dict(default="", metavar="DIR", help="the ladder's folder; the same command continues it"),
    "points": dict(default="", metavar="CSV", help="fit this table instead: parameters,tokens,loss"),
    "jobs": dict(type=int, metavar="N", help="runs at once; default: one for each accelerator, one on a CPU"),
    "retry_failed": dict(action="store_true", help="run failed runs again"),
    "dry_run": dict(action="store_true", help="print the ladder and stop"),
}


def study_functions(config: ConfigDict) -> dict[str, ConfigFunction]:
    """The function that each subtree of a ladder's config calls, those of its runs among them."""
    own = {"vocabulary": ConfigFunction(fit_tokenizer), "ladder": ConfigFunction(ladder.ladder_plan)}
    return config_functions(config) | {name: called for name, called in own.items() if name in config}


def program(argv: list[str]) -> None:
    overrides, rest = split_overrides(argv)
    flags = parsed_flags(rest, __doc__, FLAGS, epilog=config_help(argv, study_functions))
    if flags.points:
        if flags.config or flags.workdir:
            raise UserError("--points fits a table and runs nothing: leave --config and --workdir out")
        print_table_fit(flags.points)
        return
    if not flags.config or not (flags.workdir or flags.dry_run):
        raise UserError("give --config=experiments/scaling.py and --workdir=DIR, or --points=CSV")
    source = ConfigSource(flags.config, tuple(overrides), study_functions)
    config = source.config({})
    require_entries(config, CONFIG_KEYS, "lm scaling")
    plan = call_with_options(study_functions(config)["ladder"].function, config.ladder, name="ladder")
    rungs = ladder.planned_runs(plan, source)
    print_plan(plan, rungs)
    if not flags.dry_run:
        run_scaling(flags, source, plan, rungs)


def print_table_fit(path: str) -> None:
    """Prints the law of a CSV file's runs."""
    points = read_points(path)
    say(f"{path}: {len(points.loss)} runs")
    fitted = parametric.parametric_fit(points, draws=BOOTSTRAP_DRAWS)
    names = {"growth": "a = beta / (alpha + beta)"}
    print_table(
        "loss = E + A / N^alpha + B / D^beta",
        ["", "value", "95 % interval"],
        [[names.get(name, name), e.value, f"[{e.low:.4g}, {e.high:.4g}]"] for name, e in fitted.estimates().items()],
    )
    say(
        f"Intervals: percentiles of {BOOTSTRAP_DRAWS:,} fits to resampled runs. With C = 6 N D the best size grows as "
        "C^a, the best number of tokens as C^(1 - a)."
    )


def print_plan(plan: LadderPlan, rungs: Sequence[PlannedRun]) -> None:
    print_table(
        f"{len(rungs)} runs, then a larger one of {plan.target_flops:.3g} FLOPs",
        ["FLOPs", "width", "parameters", "steps", "tokens", "tokens a parameter"],
        [[r.budget, r.width, r.parameters, r.steps, r.tokens, r.tokens / r.parameters] for r in rungs],
    )


def run_scaling(flags: Namespace, source: ConfigSource, plan: LadderPlan, rungs: Sequence[PlannedRun]) -> None:
    """Does all steps in order and skips those that are done."""
    config, root = source.config({}), Path(flags.workdir)
    with open_workdir(root, to_dict(config), changeable_keys=()) as workdir:
        write_text(root / PLAN_FILE, json.dumps({"rungs": [rung._asdict() for rung in rungs]}, indent=2) + "\n")
        loop.train_stage(tokenizer_config(config), root / "tokenizer")
        source = source._replace(overrides=(*source.overrides, f"tokenizer={root / 'tokenizer'}"))
        run_planned(flags, source, root / LADDER_DIR, rungs)
        found = [one for one in runs.ladder_runs(root) if one.budget <= plan.budgets[-1]]
        say(f"\nfitting {len(found)} runs")
        parabolas, laws = fit.fitted_laws(found, plan)
        if not (root / PREDICTION_FILE).exists():
            rung = ladder.nearest_run(
                source, plan.target_flops, fit.compute_optimal_size(parabolas, laws, plan.target_flops)
            )
            write_text(root / PREDICTION_FILE, json.dumps(fit.loss_prediction(laws, rung), indent=2) + "\n")
        prediction = read_json(root / PREDICTION_FILE)
        loss = prediction["loss"]
        say(
            f"predicted, {prediction['written']}: loss {loss['value']:.4f} [{loss['low']:.4f}, {loss['high']:.4f}] for "
            f"width {prediction['rung']['width']} and {prediction['rung']['tokens']:,} tokens: {root / PREDICTION_FILE}"
        )
        run_planned(flags, source, root / LARGER_DIR, [PlannedRun(**prediction["rung"])])
        larger = runs.ladder_runs(root)[-1]
        begun = read_run_starts(larger.workdir)[0]["time"]
        summary = fit.scaling_summary(found, parabolas, laws, prediction, larger, begun)
        workdir.write_summary(summary)
        for sentence in fit.conclusion_sentences(summary):
            say(sentence)
        for file in page.write_page(root, summary, parabolas, laws):
            say(f"written: {file}")


def tokenizer_config(config: ConfigDict) -> ConfigDict:
    """The config of the tokenizer that all runs share."""
    return ConfigDict({"seed": config.seed, "stage": {"name": "tokenizer"}, "data": config.vocabulary.to_dict()})


def run_planned(flags: Namespace, source: ConfigSource, folder: Path, rungs: Sequence[PlannedRun]) -> None:
    """Runs the rungs that are not done. UserError unless all are done then."""
    source = source._replace(overrides=overrides_of_runs(source))
    given = [f"--config={source.name}", f"--workdir={folder}"]
    given += [f"--jobs={flags.jobs}"] if flags.jobs else []
    given += ["--retry_failed"] if flags.retry_failed else []
    own = parsed_flags(given, "", controller.FLAGS)
    trials = [Trial(i, rung.overrides, (source.config({}).seed,)) for i, rung in enumerate(rungs)]
    statuses = controller.run_sweep(own, source, TrialGoal.from_config(source.config({}), "", ""), trials, {}, [])
    failed = [one for one in statuses if one.state == "failed"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(statuses)} runs in {folder} failed; the first: {failed[0].error}; fix it and give "
            "the same command with --retry_failed"
        )
    if any(one.state != "complete" for one in statuses):
        raise UserError(f"another process still works in {folder}: give the same command again when it is done")


def overrides_of_runs(source: ConfigSource) -> tuple[str, ...]:
    """The overrides without the options of the ladder and its vocabulary, which only this program knows."""
    listed, own = flatten(to_dict(load_config(source.name))), tuple(f"{name}." for name in ("vocabulary", "ladder"))
    return tuple(each for each in source.overrides if not each.startswith(own) or each.partition("=")[0] in listed)


if __name__ == "__main__":
    run_program(program)

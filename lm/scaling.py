"""Scaling laws: a ladder of runs from a FLOP budget, the laws that fit it, and a larger run foretold before it is made.

    python -m lm.scaling --config=experiments/scaling.py --workdir=runs/scaling --jobs=2
    python -m lm.scaling --points=table.csv

The first plans sizes and lengths at budgets over decades of compute, runs them as a sweep, fits IsoFLOP parabolas and
the law E + A/N^alpha + B/D^beta (Hoffmann et al. 2022, arXiv 2203.15556; as Besiroglu et al. 2024, arXiv 2404.10102,
correct it), writes WORKDIR/prediction.json, only then runs the larger model, and tells what came of it in
scaling.html, scaling.png and summary.json. --dry_run prints the plan. The same command continues after a kill.
--points fits anyone's table, with the columns parameters, tokens, loss.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from lm import sweep, train
from lm.config import call, entries, flatten, load, overrides_in, parsed, require, to_dict
from lm.console import main, say, table
from lm.errors import UserError
from lm.ladder import measured, page, planned, study
from lm.ladder.measured import LARGER, PLAN, PREDICTION, RUNGS
from lm.ladder.planned import Ladder, Rung
from lm.laws import parametric, points as tables
from lm.options import Called
from lm.subtrees import subtrees
from lm.sweeps.runs import Goal
from lm.sweeps.space import Source, Trial
from lm.vocabulary import fit_tokenizer
from lm.workdir import open_workdir, read_json, read_starts, write_text

DRAWS = 1000  # of the bootstrap of --points
ENTRIES = ("seed", "tokenizer", "model", "data", "train", "optimizer", "vocabulary", "ladder")
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


def functions(config: ConfigDict) -> dict[str, Called]:
    """The function that each subtree of a ladder's config calls, those of its runs among them."""
    own = {"vocabulary": Called(fit_tokenizer), "ladder": Called(planned.ladder)}
    return subtrees(config) | {name: called for name, called in own.items() if name in config}


def program(argv: list[str]) -> None:
    overrides, rest = overrides_in(argv)
    flags = parsed(rest, __doc__, FLAGS, epilog=entries(argv, functions))
    if flags.points:
        if flags.config or flags.workdir:
            raise UserError("--points fits a table and runs nothing: leave --config and --workdir out")
        fit_table(flags.points)
        return
    if not flags.config or not (flags.workdir or flags.dry_run):
        raise UserError("give --config=experiments/scaling.py and --workdir=DIR, or --points=CSV")
    source = Source(flags.config, tuple(overrides), functions)
    config = source.config({})
    require(config, ENTRIES, "lm.scaling")
    plan = call(functions(config)["ladder"].function, config.ladder, name="ladder")
    rungs = planned.rungs(plan, source)
    show_plan(plan, rungs)
    if not flags.dry_run:
        run(flags, source, plan, rungs)


def fit_table(path: str) -> None:
    """Prints the law of a CSV file's runs."""
    points = tables.read(path)
    say(f"{path}: {len(points.loss)} runs")
    fitted = parametric.fit(points, draws=DRAWS)
    names = {"growth": "a = beta / (alpha + beta)"}
    table(
        "loss = E + A / N^alpha + B / D^beta",
        ["", "value", "95 % interval"],
        [[names.get(name, name), e.value, f"[{e.low:.4g}, {e.high:.4g}]"] for name, e in fitted.estimates().items()],
    )
    say(
        f"Intervals: percentiles of {DRAWS:,} fits to resampled runs. With C = 6 N D the best size grows as C^a, the "
        "best number of tokens as C^(1 - a)."
    )


def show_plan(plan: Ladder, rungs: Sequence[Rung]) -> None:
    table(
        f"{len(rungs)} runs, then a larger one of {plan.larger:.3g} FLOPs",
        ["FLOPs", "width", "parameters", "steps", "tokens", "tokens a parameter"],
        [[r.budget, r.width, r.parameters, r.steps, r.tokens, r.tokens / r.parameters] for r in rungs],
    )


def run(flags: Namespace, source: Source, plan: Ladder, rungs: Sequence[Rung]) -> None:
    """Everything in its order, each step passed over if it is done."""
    config, root = source.config({}), Path(flags.workdir)
    with open_workdir(root, to_dict(config), harmless=()) as workdir:
        write_text(root / PLAN, json.dumps({"rungs": [rung._asdict() for rung in rungs]}, indent=2) + "\n")
        train.run(vocabulary(config), root / "tokenizer")
        source = source._replace(overrides=(*source.overrides, f"tokenizer={root / 'tokenizer'}"))
        swept(flags, source, root / RUNGS, rungs)
        found = [one for one in measured.runs(root) if one.budget <= plan.budgets[-1]]
        say(f"\nfitting {len(found)} runs")
        parabolas, laws = study.fitted(found, plan)
        if not (root / PREDICTION).exists():
            rung = planned.nearest(source, plan.larger, study.best_size(parabolas, laws, plan.larger))
            write_text(root / PREDICTION, json.dumps(study.foretold(laws, rung), indent=2) + "\n")
        prediction = read_json(root / PREDICTION)
        loss = prediction["loss"]
        say(
            f"foretold, {prediction['written']}: loss {loss['value']:.4f} [{loss['low']:.4f}, {loss['high']:.4f}] for "
            f"width {prediction['rung']['width']} and {prediction['rung']['tokens']:,} tokens: {root / PREDICTION}"
        )
        swept(flags, source, root / LARGER, [Rung(**prediction["rung"])])
        larger = measured.runs(root)[-1]
        begun = read_starts(larger.workdir)[0]["time"]
        summary = study.summary_of(found, parabolas, laws, prediction, larger, begun)
        workdir.write_summary(summary)
        for sentence in study.sentences(summary):
            say(sentence)
        for file in page.written(root, summary, parabolas, laws):
            say(f"written: {file}")


def vocabulary(config: ConfigDict) -> ConfigDict:
    """The config of the tokenizer that all runs share."""
    return ConfigDict({"seed": config.seed, "stage": {"name": "tokenizer"}, "data": config.vocabulary.to_dict()})


def swept(flags: Namespace, source: Source, folder: Path, rungs: Sequence[Rung]) -> None:
    """Runs what is not yet done of the rungs. UserError unless all are then."""
    source = source._replace(overrides=known_to_runs(source))
    given = [f"--config={source.name}", f"--workdir={folder}"]
    given += [f"--jobs={flags.jobs}"] if flags.jobs else []
    given += ["--retry_failed"] if flags.retry_failed else []
    own = parsed(given, "", sweep.FLAGS)
    trials = [Trial(i, rung.overrides, (source.config({}).seed,)) for i, rung in enumerate(rungs)]
    told = sweep.run(own, source, Goal.of(source.config({}), "", ""), trials, {}, [])
    failed = [one for one in told if one.state == "failed"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(told)} runs in {folder} failed; the first: {failed[0].error}; mend it and give "
            "the same command with --retry_failed"
        )
    if any(one.state != "complete" for one in told):
        raise UserError(f"another process still works in {folder}: give the same command again when it is done")


def known_to_runs(source: Source) -> tuple[str, ...]:
    """The overrides but for those options of the ladder and its vocabulary that only this program knows."""
    listed, own = flatten(to_dict(load(source.name))), tuple(f"{name}." for name in ("vocabulary", "ladder"))
    return tuple(each for each in source.overrides if not each.startswith(own) or each.partition("=")[0] in listed)


if __name__ == "__main__":
    main(program)

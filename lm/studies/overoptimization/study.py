"""Optimizes policies against learned proxy rewards and measures the true reward as they move away from the start.

    python -m lm overoptimization --config=experiments/overoptimization.py --workdir=runs/overoptimisation
    python -m lm overoptimization --config=experiments/overoptimization.py:tiny --workdir=runs/try

The gold rater ranks answers of the starting model; proxy reward models are trained on few and on many of its verdicts;
best-of-n and PPO optimize each proxy, and an ensemble of several trained on the same verdicts, and the gold rater
scores the result. Writes WORKDIR/summary.json, overoptimisation.html, .svg and .png. The same command continues after a
kill. Gao, Schulman and Hilton 2022, "Scaling Laws for Reward Model Overoptimization", arXiv 2210.10760.
"""

import itertools
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from lm.core.config import call_with_options, flags_and_config, require_entries, to_dict
from lm.core.errors import UserError, check_at_least
from lm.core.options import ConfigFunction
from lm.evaluate.policies import held_out_prompts
from lm.feedback import auto_rank
from lm.rewards import named_rater
from lm.rewards.load import check_reward_length
from lm.runs.console import run_program, say, warn
from lm.runs.workdir import open_workdir
from lm.studies.overoptimization.measure import (
    GoldEvaluator,
    best_of_n_curves,
    pool_scores,
    ppo_curve,
    proxy_workdir,
    ranking_subset_file,
    train_ppo_on_proxy,
)
from lm.studies.overoptimization.page import print_summary, study_summary, write_page
from lm.sweep.config_functions import config_functions
from lm.train import loop
from lm.train.warm_start import load_policy

CONFIG_KEYS = ("seed", "init_from", "sizes", "reward_steps", "members", "pessimism", "verdicts", "reward", "ppo")
CONFIG_KEYS += ("prompts", "evaluate")
FLAGS = {"workdir": dict(required=True, metavar="DIR", help="the study's folder; the same command continues")}


def study_functions(config: ConfigDict) -> dict[str, ConfigFunction]:
    """The function that each subtree of a lab's config calls, those of its stages among them."""
    own = {"prompts": ConfigFunction(held_out_prompts), "evaluate": ConfigFunction(GoldEvaluator)}
    return {name: called for name, called in own.items() if name in config} | config_functions(config)


def run_overoptimization(config: ConfigDict, path: str | Path) -> dict[str, Any]:
    """Makes what is missing, in order; writes the page; returns the summary."""
    require_entries(config, CONFIG_KEYS, "lm overoptimization")
    check_config(config)
    started = time.monotonic()
    with open_workdir(path, to_dict(config)) as workdir:
        root = workdir.path
        start = load_policy(config.init_from, backend=jax.default_backend(), warn=warn)
        questions = call_with_options(
            study_functions(config)["prompts"].function, config.prompts, start.tokenizer, name="prompts"
        )
        measure = study_functions(config)["evaluate"].function
        lab = call_with_options(measure, config.evaluate, root, start, questions, config.seed, name="evaluate")
        check_reward_length("proxies are trained on (reward.data.length)", config.reward.data.length, lab.longest)
        say(f"\nverdicts: {root / 'verdicts'}")
        auto_rank.run_auto_rank(config.verdicts, root / "verdicts")
        files = [ranking_subset_file(root, size, config.reward.data.held_out) for size in config.sizes]
        for size, steps, file in zip(config.sizes, config.reward_steps, files):
            for member in range(config.members):
                say(f"\nproxy {member} from {size:,} verdicts: {proxy_workdir(root, size, member)}")
                proxy = config.reward.copy_and_resolve_references()
                proxy.seed = member
                proxy.data.rankings = str(file)
                proxy.train.steps = proxy.optimizer.total_steps = steps
                loop.train_stage(proxy, proxy_workdir(root, size, member))
        gold, proxies = pool_scores(lab, config)
        curves = best_of_n_curves(lab, gold, proxies, config)
        for size, members in itertools.product(config.sizes, dict.fromkeys((1, config.members))):
            train_ppo_on_proxy(config, root, size, members)
            curves.append(ppo_curve(lab, config, gold, proxies, size, members))
        summary = study_summary(curves, gold, proxies, root, config)
        workdir.write_summary(summary)
        print_summary(summary)
        for file in write_page(root, summary, curves):
            say(f"written: {file}")
        say(f"{time.monotonic() - started:.0f} s now")
        return summary


def check_config(config: ConfigDict) -> None:
    """UserError for settings that cannot be carried out, before anything runs."""
    if not config.sizes or list(config.sizes) != sorted(set(config.sizes)):
        raise UserError(f"sizes is {tuple(config.sizes)}: give numbers of verdicts, each once, the smallest first")
    if len(config.reward_steps) != len(config.sizes):
        raise UserError(
            f"reward_steps has {len(config.reward_steps)} entries for {len(config.sizes)} sizes: one for each"
        )
    check_at_least(1, "config", sizes=config.sizes[0], reward_steps=min(config.reward_steps), members=config.members)
    check_at_least(0, "config", pessimism=config.pessimism)
    named_rater(config.evaluate.rater, "evaluate.rater")
    if config.verdicts.rank.rater != config.evaluate.rater:
        raise UserError(
            f"evaluate.rater is {config.evaluate.rater!r}, verdicts.rank.rater {config.verdicts.rank.rater!r}: "
            "the gold rater must be the same in both"
        )
    unseen = {"ppo.data": config.ppo.data.held_out, "verdicts.rank": config.verdicts.rank.held_out}
    for name, fraction in unseen.items():
        if fraction != config.prompts.held_out:
            raise UserError(
                f"{name}.held_out is {fraction}, prompts.held_out {config.prompts.held_out}: they must be the same, "
                "or the prompts are not unseen"
            )
    schedule = config.ppo.train
    if schedule.steps % schedule.save_every or schedule.keep < schedule.steps // schedule.save_every:
        raise UserError(
            f"ppo.train has steps {schedule.steps}, save_every {schedule.save_every} and keep {schedule.keep}: every "
            "saved policy is a point of the curve, so steps must be a multiple of save_every, and all must be kept"
        )


def program(argv: list[str]) -> None:
    flags, config = flags_and_config(argv, __doc__, FLAGS, study_functions)
    run_overoptimization(config, flags.workdir)


if __name__ == "__main__":
    run_program(program)

"""Over-optimisation: what the gold rater says while a policy is pushed ever further up a reward model learnt from it.

    python -m lm.overoptimisation --config=experiments/overoptimisation.py --workdir=runs/overoptimisation

The gold rater ranks answers of the starting model; proxy reward models learn from few and from many of its verdicts;
best-of-n and PPO climb each proxy, and an ensemble of several from the same verdicts, while the gold rater watches.
Writes WORKDIR/summary.json, overoptimisation.html, .svg and .png. The same command continues after a kill. Gao,
Schulman and Hilton 2022, "Scaling Laws for Reward Model Overoptimization", arXiv 2210.10760.
"""

import itertools
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from lm import train, verdicts
from lm.config import arguments, call, require, to_dict
from lm.console import main, say, warn
from lm.errors import UserError, at_least
from lm.inherited import stop_unless_read
from lm.lab.climbs import Lab, best_of_n_curves, chosen, climb, pool, ppo_curve, proxy_path
from lm.lab.page import show, summary_of, written
from lm.options import Called
from lm.rewards import REWARDS
from lm.subtrees import subtrees
from lm.unseen import asked
from lm.workdir import load_policy, open_workdir

ENTRIES = ("seed", "init_from", "sizes", "reward_steps", "members", "pessimism", "verdicts", "reward", "ppo")
ENTRIES += ("prompts", "evaluate")
FLAGS = {"workdir": dict(required=True, metavar="DIR", help="the lab's folder; the same command continues")}


def functions(config: ConfigDict) -> dict[str, Called]:
    """The function that each subtree of a lab's config calls, those of its stages among them."""
    own = {"prompts": Called(asked), "evaluate": Called(Lab)}
    return {name: called for name, called in own.items() if name in config} | subtrees(config)


def run(config: ConfigDict, path: str | Path) -> dict[str, Any]:
    """Makes whatever is missing, in order; writes the page; returns the summary."""
    require(config, ENTRIES, "lm.overoptimisation")
    check(config)
    started = time.monotonic()
    with open_workdir(path, to_dict(config)) as workdir:
        root = workdir.path
        start = load_policy(config.init_from, backend=jax.default_backend(), warn=warn)
        questions = call(functions(config)["prompts"].function, config.prompts, start.tokenizer, name="prompts")
        measure = functions(config)["evaluate"].function
        lab = call(measure, config.evaluate, root, start, questions, config.seed, name="evaluate")
        stop_unless_read("proxies are trained on (reward.data.length)", config.reward.data.length, lab.longest)
        say(f"\nverdicts: {root / 'verdicts'}")
        verdicts.run(config.verdicts, root / "verdicts")
        files = [chosen(root, size, config.reward.data.held_out) for size in config.sizes]
        for size, steps, file in zip(config.sizes, config.reward_steps, files):
            for member in range(config.members):
                say(f"\nproxy {member} from {size:,} verdicts: {proxy_path(root, size, member)}")
                proxy = config.reward.copy_and_resolve_references()
                proxy.seed = member
                proxy.data.rankings = str(file)
                proxy.train.steps = proxy.optimizer.total_steps = steps
                train.run(proxy, proxy_path(root, size, member))
        gold, proxies = pool(lab, config)
        curves = best_of_n_curves(lab, gold, proxies, config)
        for size, members in itertools.product(config.sizes, dict.fromkeys((1, config.members))):
            climb(config, root, size, members)
            curves.append(ppo_curve(lab, config, gold, proxies, size, members))
        summary = summary_of(curves, gold, proxies, root, config)
        workdir.write_summary(summary)
        show(summary)
        for file in written(root, summary, curves):
            say(f"written: {file}")
        say(f"{time.monotonic() - started:.0f} s now")
        return summary


def check(config: ConfigDict) -> None:
    """UserError for settings that cannot be carried out, before anything is."""
    if not config.sizes or list(config.sizes) != sorted(set(config.sizes)):
        raise UserError(f"sizes is {tuple(config.sizes)}: give numbers of verdicts, each once, the smallest first")
    if len(config.reward_steps) != len(config.sizes):
        raise UserError(
            f"reward_steps has {len(config.reward_steps)} entries for {len(config.sizes)} sizes: one for each"
        )
    at_least(1, "config", sizes=config.sizes[0], reward_steps=min(config.reward_steps), members=config.members)
    at_least(0, "config", pessimism=config.pessimism)
    if config.evaluate.rater not in REWARDS or config.verdicts.rank.rater != config.evaluate.rater:
        raise UserError(
            f"evaluate.rater is {config.evaluate.rater!r}, verdicts.rank.rater {config.verdicts.rank.rater!r}: "
            f"the gold rater must be the same, one of {', '.join(REWARDS)}"
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
    flags, config = arguments(argv, __doc__, FLAGS, functions)
    run(config, flags.workdir)


if __name__ == "__main__":
    main(program)

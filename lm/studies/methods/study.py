"""Compares training methods from one start, with one reward model, at one budget of answers, over seeds.

    python -m lm contest --config=experiments/contest.py --workdir=runs/contest
    python -m lm contest --config=experiments/contest.py --workdir=runs/two --config.methods="('ppo','kto')"

Each (method, seed) is a run of `lm train` in WORKDIR/METHOD/SEED. A stage that learns from rollouts samples its answers
itself; one that learns from rankings gets as many answers of the starting model, ranked by the same reward model. Then
all answer the same unseen prompts, which the gold rater scores. Writes WORKDIR/summary.json and WORKDIR/contest.html.
The same command continues after a kill; more seeds and methods may be added later.
"""

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lm.core.config import call_with_options, flags_and_config, require_entries, to_dict
from lm.core.errors import UserError, check_at_least
from lm.core.options import ConfigFunction, option_value
from lm.data.preferences import preference_pairs, read_jsonl_rankings
from lm.evaluate.models import ANSWERS_FILE
from lm.evaluate.policies import HeldOutPrompts, held_out_prompts, policy_answerer
from lm.feedback import auto_rank
from lm.generate.sampler import SamplingParams
from lm.rewards import named_rater
from lm.rewards.load import reward_from_workdirs
from lm.rewards.reward_model import reward_row_length
from lm.runs.console import run_program, say, warn
from lm.runs.partial_results import PartialResults
from lm.runs.workdir import TrainedModel, load_trained_model, open_workdir, read_json, read_metrics, write_text
from lm.stages import REWARD_MODEL_STAGES, STAGES
from lm.studies.methods.results import START_MODEL, print_results, results_page, study_summary
from lm.sweep.config_functions import config_functions
from lm.tokenizer import Tokenizer
from lm.train import loop
from lm.train.warm_start import load_policy

PAGE_FILE = "contest.html"
RANKINGS_DIR = "verdicts"  # the folder of the rankings that stages without rollouts learn from
ROLLOUTS_OPTION, RANKINGS_OPTION = (
    "rollouts",
    "rankings",
)  # the option of a stage's batches that names what it learns from
SINGLE_ANSWER_STAGES = {"best_of_n"}  # stages that learn from one answer of each group that they sample
LENGTH_OPTIONS = ("prompt_length", "max_new")  # options of functions that ask a policy
ANSWER_KEY = 2**30 + 2  # role folded into the key of a seed, beside those of lm.stages.rl.rollouts
CONFIG_KEYS = ("init_from", "reward_model", "rollouts", "seeds", "methods", RANKINGS_DIR, "prompts", "evaluate")
FLAGS = {"workdir": dict(required=True, metavar="DIR", help="the contest's folder; the same command continues")}


class MethodEntry(NamedTuple):
    """A method and all the runs of it."""

    config: ConfigDict  # the config of lm train, without the seed
    learns_from: str  # ROLLOUTS_OPTION or RANKINGS_OPTION


def study_functions(config: ConfigDict) -> dict[str, ConfigFunction]:
    """The function that each subtree of a contest's config calls, those of its methods among them."""
    own = {"prompts": ConfigFunction(held_out_prompts), "evaluate": ConfigFunction(answer_recorder)}
    return {name: called for name, called in own.items() if name in config} | config_functions(config)


def run_methods_study(config: ConfigDict, path: str | Path) -> dict[str, Any]:
    """Trains the runs that have not finished, lets them answer, writes the page; returns the summary."""
    require_entries(config, CONFIG_KEYS, "lm contest")
    entries, started = method_entries(config), time.monotonic()
    with open_workdir(path, to_dict(config), changeable_keys=("seeds", "methods")) as workdir:
        start = load_policy(config.init_from, backend=jax.default_backend(), warn=warn)
        questions = call_with_options(
            study_functions(config)["prompts"].function, config.prompts, start.tokenizer, name="prompts"
        )
        given = start, questions, config.reward_model, longest_row(config, entries)
        answers = call_with_options(
            study_functions(config)["evaluate"].function, config.evaluate, *given, name="evaluate"
        )
        for seed, (name, entry) in itertools.product(config.seeds, entries.items()):
            say(f"\n{name}, seed {seed}: {workdir.path / name / str(seed)}")
            train_method(config, entry, seed, workdir.path, name)
        records = {
            name: [answers(workdir.path / name / str(seed), seed) for seed in config.seeds]
            for name in (START_MODEL, *entries)
        }
        budgets = {
            name: [run_budget(config, entry, seed, workdir.path, name, start.tokenizer) for seed in config.seeds]
            for name, entry in entries.items()
        }
        sampler = {
            name: option_value(study_functions(config)["evaluate"], config.evaluate, name)
            for name in ("max_new", "temperature")
        }
        summary = study_summary(records, budgets, config, sampler)
        workdir.write_summary(summary)
        configs = {name: entry.config for name, entry in entries.items()}
        write_text(workdir.path / PAGE_FILE, results_page(workdir.path, summary, records, configs))
        print_results(summary)
        say(f"{time.monotonic() - started:.0f} s now\npage: {workdir.path / PAGE_FILE}")
        return summary


def method_entries(config: ConfigDict) -> dict[str, MethodEntry]:
    """The methods by name. UserError unless all have the same start, judge, unseen prompts and number of answers."""
    if not config.methods or len(set(config.methods)) < len(config.methods):
        raise UserError(f"methods is {', '.join(config.methods) or 'empty'}: name at least one, each once")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"seeds is {', '.join(map(str, config.seeds)) or 'empty'}: give at least one, each once")
    check_at_least(0, "config", seeds=min(config.seeds))
    check_at_least(1, "config", rollouts=config.rollouts)
    entries = {name: method_entry(config, name) for name in config.methods}
    named_rater(config.evaluate.rater, "evaluate.rater")
    for name, (entry, learns_from) in entries.items():
        same = {f"{name}.init_from": (entry.init_from, config.init_from)}
        same[f"{name}.data.held_out"] = (entry.data.held_out, config.prompts.held_out)
        if learns_from == ROLLOUTS_OPTION:
            same[f"{name}.data.reward_model"] = (entry.data.reward_model, config.reward_model)
            size, factors = entry.train.steps * entry.data.rollouts, f"{name}.train.steps x {name}.data.rollouts"
        else:
            rank = config[RANKINGS_DIR].rank
            same["verdicts.init_from"] = (config[RANKINGS_DIR].init_from, config.init_from)
            same["verdicts.rank.rater"] = (rank.rater, config.reward_model)
            same["verdicts.rank.held_out"] = (rank.held_out, config.prompts.held_out)
            size, factors = rank.prompts * rank.responses, "verdicts.rank.prompts x verdicts.rank.responses"
        for key, (value, expected) in same.items():
            if value != expected:
                raise UserError(f"{key} is {value}, the contest's is {expected}: all methods must have the same")
        if size != config.rollouts:
            raise UserError(
                f"{name} learns from {size:,} answers ({factors}), the contest's `rollouts` are {config.rollouts:,}: "
                "choose numbers that divide it"
            )
    return entries


def method_entry(config: ConfigDict, name: str) -> MethodEntry:
    """A method of the config. UserError for an unknown one, or one whose stage cannot take part."""
    known = [key for key, value in config.items() if isinstance(value, ConfigDict) and "stage" in value]
    if name not in known:
        raise UserError(f"methods has {name!r}, which the config does not define; choose among {', '.join(known)}")
    stage = config[name].stage.name
    if stage not in STAGES:
        raise UserError(f"{name}.stage.name is {stage!r}; choose one of {', '.join(STAGES)}")
    options = ConfigFunction(STAGES[stage].batches).options
    learns_from = (
        RANKINGS_OPTION
        if RANKINGS_OPTION in options
        else ROLLOUTS_OPTION
        if {ROLLOUTS_OPTION, "reward_model"} <= set(options)
        else ""
    )
    if stage in REWARD_MODEL_STAGES or not learns_from or name in (START_MODEL, RANKINGS_DIR):
        raise UserError(f"{name} (stage {stage}) trains no policy from rewards or rankings: it cannot take part")
    if "resample_rounds" in config[name].data and config[name].data.resample_rounds:
        raise UserError(f"{name}.data.resample_rounds draws answers beyond the budget: set it to 0")
    return MethodEntry(config[name], learns_from)


def train_method(config: ConfigDict, entry: MethodEntry, seed: int, root: Path, name: str) -> None:
    """Trains one method from one seed. For a method that learns from rankings, the rankings are made first."""
    run = entry.config.copy_and_resolve_references()
    run.seed = seed
    if entry.learns_from == RANKINGS_OPTION:
        ranking = config[RANKINGS_DIR].copy_and_resolve_references()
        ranking.seed = seed
        auto_rank.run_auto_rank(ranking, root / RANKINGS_DIR / str(seed))
        run.data.rankings = str(root / RANKINGS_DIR / str(seed) / auto_rank.RANKINGS_FILE)
    loop.train_stage(run, root / name / str(seed))


def run_budget(
    config: ConfigDict, entry: MethodEntry, seed: int, root: Path, name: str, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The cost of one run: answers, their tokens, tokens with a gradient (counted in every pass), seconds.

    A stage on rollouts logs the mean length of its answers; one on rankings has them as texts.
    """
    summary = read_json(root / name / str(seed) / "summary.json")
    options, data = entry.config.stage, entry.config.data
    if entry.learns_from == ROLLOUTS_OPTION:
        rows = [row for row in read_metrics(root / name / str(seed)) if "tokens_per_second" in row]
        steps = np.diff([0, *(row["step"] for row in rows)])
        sampled = data.rollouts * float(steps @ [row["response_length"] for row in rows])
        share = 1 / data.group if options.name in SINGLE_ANSWER_STAGES else 1
        passes = option_value(config_functions(entry.config)["stage"], options, "epochs", 1)
        more = {"decided": None, "tied": None}
        seconds = summary["seconds"]
    else:
        ranked = read_json(root / RANKINGS_DIR / str(seed) / "summary.json")
        rankings = read_jsonl_rankings(root / RANKINGS_DIR / str(seed) / auto_rank.RANKINGS_FILE)[
            : config[RANKINGS_DIR].rank.prompts
        ]
        ids = tokenizer.encode_batch(text for ranking in rankings for text in ranking.responses)
        sampled = float(sum(len(each) + 1 for each in ids))
        share = summary["about"]["prompts"] / len(rankings)
        passes = entry.config.train.steps * data.prompts_per_batch / summary["about"]["prompts"]
        decided = sum(bool(preference_pairs(ranking)) for ranking in rankings)
        more = {"decided": decided, "tied": len(rankings) - decided}
        seconds = summary["seconds"] + ranked["seconds"]
    return {
        "answers": config.rollouts,
        "sampled": sampled,
        "passes": passes,
        "learnt": sampled * share * passes,
        "seconds": seconds,
        **more,
    }


def longest_row(config: ConfigDict, entries: Mapping[str, MethodEntry]) -> int:
    """Tokens of the longest prompt and answer that any method has the reward model read."""

    def tokens(function: Callable, given: ConfigDict) -> int:
        known = ConfigFunction(function).options
        return reward_row_length(*(given[name] if name in given else known[name].default for name in LENGTH_OPTIONS))

    return max(
        tokens(auto_rank.rank_sampled_answers, config[RANKINGS_DIR].rank)
        if entry.learns_from == RANKINGS_OPTION
        else tokens(STAGES[entry.config.stage.name].batches, entry.config.data)
        for entry in entries.values()
    )


def answer_recorder(
    start: TrainedModel,
    questions: HeldOutPrompts,
    reward_model: str,
    longest: int,
    *,
    rater: str = "rule",
    sampling: SamplingParams = SamplingParams(max_new=32),
    rows_at_once: int = 128,
) -> Callable[[Path, int], Sequence[Mapping[str, Any]]]:
    """(workdir, seed) -> the answers of its policy (or the start): a record of each prompt, as answers.jsonl keeps it.

    longest: tokens that the reward model must read, here and in the runs of all methods.
    """
    ask = policy_answerer(start, sampling, rows_at_once=rows_at_once)
    longest = max(longest, reward_row_length(questions.prompts.ids.shape[1], sampling.max_new))
    rate = named_rater(rater, "evaluate.rater")
    proxy = reward_from_workdirs(reward_model, start.tokenizer, 0.0, longest=longest)

    def answers(path: Path, seed: int) -> Sequence[Mapping[str, Any]]:
        file = path / ANSWERS_FILE
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            parts = PartialResults(file.with_suffix(".parts.jsonl"))
            sampled_rows = parts.once("answers", lambda: sampled(path, seed))
            gold, learned = (judge(questions.prompts.examples, sampled_rows["text"]) for judge in (rate, proxy))
            columns = {
                "conversation": questions.conversation_ids.tolist(),
                "prompt": [example["messages"] for example in questions.prompts.examples],
                **sampled_rows,
                "gold": gold.tolist(),
                "proxy": learned.tolist(),
            }
            rows = [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]
            write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            parts.remove()
            say(f"{path}: gold {gold.mean():.2f}, KL {np.mean(sampled_rows['kl']):.2f} on {len(gold)} unseen prompts")
        return read_metrics(file)

    def sampled(path: Path, seed: int) -> dict[str, list]:
        trained = (
            start
            if path.parent.name == START_MODEL
            else load_trained_model(path, backend=jax.default_backend(), warn=warn)
        )
        answers_of_policy = ask(
            trained.params["lm"], questions.prompts, jax.random.fold_in(jax.random.key(seed), ANSWER_KEY)
        )
        columns = {
            "tokens": answers_of_policy.lengths,
            "stopped": answers_of_policy.stopped,
            "kl": answers_of_policy.kl,
        }
        return {"text": list(answers_of_policy.texts), **{name: column.tolist() for name, column in columns.items()}}

    return answers


def program(argv: list[str]) -> None:
    flags, config = flags_and_config(argv, __doc__, FLAGS, study_functions)
    run_methods_study(config, flags.workdir)


if __name__ == "__main__":
    run_program(program)

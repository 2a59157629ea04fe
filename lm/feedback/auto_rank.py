"""Samples several answers to each prompt from a model and ranks them by a rule or a reward model.

    python -m lm auto-rank --config=experiments/rank.py --workdir=runs/quickstart/rank
    python -m lm auto-rank --config=experiments/rank.py --workdir=runs/more --config.rank.responses=8

Writes WORKDIR/rankings.jsonl, the format that stage `reward` reads (see lm.data.preferences). The same command
continues after a kill.
"""

import math
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lm.core.config import call_with_options, flags_and_config, require_entries, to_dict
from lm.core.errors import check_at_least
from lm.core.options import ConfigFunction
from lm.data import conversations
from lm.data.loading import load_conversations
from lm.data.preferences import Ranking, append_rankings, preference_pairs, read_jsonl_rankings
from lm.data.prompts import PromptOptions, Prompts, joined_prompts, prompts_at, prompts_within_length
from lm.data.sources import split_held_out
from lm.evaluate.skills import balanced_order, has_skills
from lm.generate.answers import GeneratedAnswer, batch_answerer
from lm.generate.sampler import SamplingParams
from lm.rewards import REWARDS, Reward, named_rater
from lm.rewards.load import reward_from_workdir
from lm.rewards.reward_model import reward_row_length
from lm.runs import metadata
from lm.runs.console import Progress, run_program, say, warn
from lm.runs.partial_results import PartialResults
from lm.runs.workdir import Workdir, open_workdir, write_text
from lm.tokenizer import Tokenizer
from lm.train.warm_start import load_policy

RANKINGS_FILE = "rankings.jsonl"
UNRANKED_FILE = "unranked.jsonl"  # answers that are not scored yet
FLAGS = {"workdir": dict(required=True, metavar="DIR", help="where the rankings go; the same command continues")}


def auto_rank_functions(config: ConfigDict) -> dict[str, ConfigFunction]:
    """The function that each subtree of a config calls, for the program, overrides and --help."""
    return {"rank": ConfigFunction(rank_sampled_answers)} if "rank" in config else {}


def run_auto_rank(config: ConfigDict, path: str | Path) -> Mapping[str, Any]:
    """Ranks in a workdir, or continues an interrupted ranking, and returns the summary."""
    require_entries(config, ("seed", "init_from", "rank"), "lm auto-rank")
    with open_workdir(path, to_dict(config)) as workdir:
        summary = workdir.read_summary()
        if summary is None:
            metadata.record_start(workdir.path, seed=config.seed)
            summary = call_with_options(
                auto_rank_functions(config)["rank"].function,
                config.rank,
                workdir,
                config.init_from,
                config.seed,
                name="rank",
            )
            workdir.write_summary(summary)
        say(
            f"rank: {summary['prompts']} prompts, {summary['decided']} pairs decided, {summary['tied']} tied, "
            f"{summary['seconds']:.0f} s: {workdir.path / RANKINGS_FILE}"
        )
        return summary


def rank_sampled_answers(
    workdir: Workdir,
    init_from: str,
    seed: int,
    *,
    options: PromptOptions = PromptOptions(),
    sampling: SamplingParams = SamplingParams(max_new=32),
    prompts_per_conversation: int = 1,
    prompts: int = 1500,
    responses: int = 2,
    rater: str = "rule",
    truncation_penalty: float = 0.0,
    held_out_prompts: int = 0,
    prompts_at_once: int = 128,
) -> dict[str, Any]:
    """Answers of the model in `init_from` to prompts that are not held out, ranked by `rater`: one of
    lm.rewards.REWARDS, a function of the user, file.py:function, or the workdir of a reward model.

    truncation_penalty: subtracted from the score of an answer that the limit cut off, as in RL. held_out_prompts: how
    many of the held-out prompts are ranked too, for a stage that measures itself on them.
    """
    check_at_least(1, "rank", turns=options.turns, prompts=prompts, prompts_at_once=prompts_at_once)
    check_at_least(2, "rank", responses=responses)
    check_at_least(0, "rank", held_out_prompts=held_out_prompts)
    check_at_least(0, "config", seed=seed)
    start = time.monotonic()
    if not Path(rater).is_dir():
        named_rater(rater, "rank.rater", ("a reward model's workdir",))
    trained = load_policy(init_from, backend=jax.default_backend(), warn=warn)
    judge = rater_reward(rater, trained.tokenizer, reward_row_length(options.prompt_length, sampling.max_new))
    contexts = conversations.prompt_contexts(
        load_conversations(options.sources), turns=options.turns, per_conversation=prompts_per_conversation
    )
    questions, skipped = prompts_to_rank(trained.tokenizer, contexts, options, prompts, held_out_prompts, seed)
    answers = batch_answerer(
        trained.model,
        trained.params["lm"],
        trained.tokenizer,
        sampling,
        jit=jax.jit,
        rows_at_once=prompts_at_once * responses,
    )
    names = {id(context.messages): context.name for context in contexts}
    done = ranked_prompt_count(workdir.path / RANKINGS_FILE, prompts_at_once)
    unranked = PartialResults(workdir.path / UNRANKED_FILE)
    with Progress("rank", len(questions.ids), "prompt") as progress:
        for first in range(done, len(questions.ids), prompts_at_once):
            rows = np.arange(first, min(first + prompts_at_once, len(questions.ids)))
            chunk = prompts_at(questions, np.repeat(rows, responses))
            key = jax.random.fold_in(jax.random.key(seed), first)
            stored = unranked.once(f"answers from {first}", lambda: answers(chunk, key))
            texts, scores = scored_answers(chunk, stored, judge, truncation_penalty)
            scores = scores.reshape(-1, responses)
            messages = [example["messages"] for example in chunk.examples[::responses]]
            rankings = rankings_from_scores([names[id(each)] for each in messages], messages, texts, scores, rater)
            append_rankings(workdir.path / RANKINGS_FILE, rankings)
            unranked.remove()
            progress.update(int(rows[-1]) + 1, {"score": float(scores.mean())})
    counts = decision_counts(read_jsonl_rankings(workdir.path / RANKINGS_FILE))
    return {"stage": "rank", "rater": rater, "skipped": skipped, **counts, "seconds": time.monotonic() - start}


def scored_answers(
    prompts: Prompts, stored: Sequence[Sequence], judge: Reward, truncation_penalty: float
) -> tuple[list[str], np.ndarray]:
    """The texts of answers, one to each prompt, and their scores f32[answers], less the penalty for a cut one."""
    answers = [GeneratedAnswer(*each) for each in stored]
    texts, cut = [answer.text for answer in answers], np.array([not answer.stopped for answer in answers])
    return texts, judge(prompts.examples, texts) - truncation_penalty * cut


def prompts_to_rank(
    tokenizer: Tokenizer,
    contexts: Sequence[conversations.Conversation],
    options: PromptOptions,
    prompts: int,
    held_out_prompts: int,
    seed: int,
) -> tuple[Prompts, int]:
    """`prompts` of the contexts that are not held out, then `held_out_prompts` of those that are, drawn by `seed`; and
    how many of the first were too long."""
    train, held_out = split_held_out(contexts, options.held_out)
    questions, skipped = random_prompts(tokenizer, train, options.prompt_length, prompts, seed)
    if held_out_prompts:
        more, _ = random_prompts(tokenizer, held_out, options.prompt_length, held_out_prompts, seed)
        questions = joined_prompts([questions, more])
    return questions, skipped


def decision_counts(rankings: Sequence[Ranking]) -> dict[str, int]:
    """How many prompts were ranked, and how many pairs of their answers are decided and tied."""
    decided = sum(len(preference_pairs(ranking)) for ranking in rankings)
    pairs = sum(math.comb(len(ranking.responses), 2) for ranking in rankings)
    return {"prompts": len(rankings), "decided": decided, "tied": pairs - decided}


def random_prompts(
    tokenizer: Tokenizer, contexts: Sequence[conversations.Conversation], length: int, count: int, seed: int
) -> tuple[Prompts, int]:
    """`count` of the contexts that fit, drawn by `seed`, and how many did not fit. Where the rows say which skill they
    ask for, as many of each skill as there are."""
    fit, skipped = prompts_within_length(tokenizer, contexts, length)
    drawn = np.random.default_rng(seed).permutation(len(fit.ids))
    if has_skills(contexts):
        drawn = drawn[balanced_order([fit.examples[i] for i in drawn])]
    return prompts_at(fit, drawn[:count]), skipped


def rankings_from_scores(
    names: Sequence[str], contexts: Sequence[list[dict]], texts: Sequence[str], scores: np.ndarray, rater: str
) -> list[Ranking]:
    """A verdict on the answers to each context. `texts` hold the answers to one context after those to another;
    `scores` are [contexts, answers]."""
    count, now = scores.shape[1], datetime.now(UTC).isoformat(timespec="seconds")
    return [
        Ranking(name, context, list(texts[i * count : (i + 1) * count]), ranks_from_scores(scores[i]), rater, now)
        for i, (name, context) in enumerate(zip(names, contexts))
    ]


def rater_reward(rater: str, tokenizer: Tokenizer, longest: int) -> Reward:
    """A reward by name (lm.rewards.named_rater), or the reward model of a workdir, for rows of up to `longest`
    tokens."""
    if Path(rater).is_dir() and rater not in REWARDS:
        return reward_from_workdir(rater, tokenizer, longest)[1]
    return named_rater(rater, "rank.rater")


def ranks_from_scores(scores: np.ndarray) -> list[int]:
    """1 for the best; equal scores share a rank."""
    return [1 + int(np.sum(scores > score)) for score in scores]


def ranked_prompt_count(path: Path, at_once: int) -> int:
    """How many prompts the file's complete chunks cover. An incomplete chunk, left by a kill, is removed."""
    if not path.exists():
        return 0
    lines = path.read_bytes().split(b"\n")[:-1]  # bytes: a kill may tear a character, an answer may hold U+2028
    complete = len(lines) // at_once * at_once
    write_text(path, b"".join(line + b"\n" for line in lines[:complete]).decode())
    return complete


def program(argv: list[str]) -> None:
    flags, config = flags_and_config(argv, __doc__, FLAGS, auto_rank_functions)
    run_auto_rank(config, flags.workdir)


if __name__ == "__main__":
    run_program(program)

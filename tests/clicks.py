"""From clicks to a better policy: a scripted rater ranks on the real page, and what it clicked is learned.

    python -m tests.clicks --workdir=runs/clicks

Needs a finished runs/small_talk and the system's Chromium. The rater is the published rule (lm.rewards.rule) with 10 %
noise: every tenth ranking, by a draw, is turned upside down, so no model can agree with more than 90 % of its verdicts.
What it ranks are four answers each of the quickstart's SFT model to prompts that nobody holds out; then a reward model
is trained from the page's database, PPO with that, and the same rule, without noise, compares the policies.
"""

import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lm.core.config import parsed_flags
from lm.data import conversations, sources
from lm.data.loading import load_conversations
from lm.feedback.auto_rank import ranks_from_scores
from lm.rewards import REWARDS
from lm.runs.console import print_table, run_program, say
from lm.runs.workdir import read_json
from tests.clicker import click_through

FLAGS = {
    "workdir": dict(required=True, metavar="DIR", help="where everything goes"),
    "quickstart": dict(
        default="runs/small_talk", metavar="DIR", help="a finished run of small_talk.py; default: runs/small_talk"
    ),
    "clicks": dict(type=int, default=500, help="rankings to give; default: 500"),
    "noise": dict(type=float, default=0.1, help="share of rankings turned upside down; default: 0.1"),
    "seed": dict(type=int, default=0, help="default: 0"),
}


def noisy_rule(noise: float, seed: int):
    """The rule's ranks of the answers shown, upside down with probability `noise`; the same prompt, the same draw."""

    def choose(prompt: list[dict], responses: Sequence[str]) -> list[int]:
        scores = REWARDS["rule"]([{"messages": prompt}] * len(responses), responses)
        upside_down = random.Random(f"{seed} {prompt[-1]['content']}").random() < noise
        return ranks_from_scores(-scores if upside_down else scores)

    return choose


def write_prompts(path: Path, count: int, seed: int) -> None:
    """Prompts that no stage of the quickstart holds out, a few more than there will be clicks."""
    seen, _ = sources.split_held_out(conversations.prompt_contexts(load_conversations("chitchat"), turns=1), 0.05)
    seen = [conversation for conversation in seen if len(conversation.messages[-1]["content"]) < 120]
    drawn = random.Random(seed).sample(seen, count)
    path.write_text("".join(json.dumps({"name": c.name, "prompt": c.messages}) + "\n" for c in drawn))


def run(*command: str) -> None:
    say(f"\n$ python -m {' '.join(command)}")
    subprocess.run([sys.executable, "-m", *command], check=True)


def clicked(workdir: Path, quickstart: Path, flags) -> int:
    """Serves the page, ranks through it, and stops it; returns how many rankings were saved."""
    command = [
        "lm.feedback.rank",
        f"--workdir={workdir}",
        f"--models={quickstart / 'sft'}",
        "--responses=4",
        "--port=0",
    ]
    command += [f"--prompts={workdir / 'prompts.jsonl'}", "--max_new_tokens=32"]
    say(f"\n$ python -m {' '.join(command)}")
    server = subprocess.Popen([sys.executable, "-u", "-m", *command], stdout=subprocess.PIPE, text=True)
    try:
        for line in server.stdout:
            say(line.rstrip())
            if found := re.search(r"rank at (\S+)", line):
                break
        return click_through(found[1], "noisy rule", noisy_rule(flags.noise, flags.seed), count=flags.clicks)
    finally:
        server.terminate()
        server.wait()


def program(argv: list[str]) -> None:
    flags = parsed_flags(argv, __doc__, FLAGS)
    workdir, quickstart = Path(flags.workdir), Path(flags.quickstart)
    workdir.mkdir(parents=True, exist_ok=True)
    write_prompts(workdir / "prompts.jsonl", flags.clicks + flags.clicks // 10, flags.seed)
    say(f"{clicked(workdir, quickstart, flags)} rankings clicked")
    run("lm.feedback.rank", f"--workdir={workdir}", "--results")
    run(
        "lm.train.loop",
        "--config=experiments/reward.py",
        f"--workdir={workdir / 'reward'}",
        f"--config.init_from={quickstart / 'sft'}",
        f"--config.data.rankings={workdir / 'people.db'}",
        "--config.data.prompts_per_batch=16",
        "--config.data.held_out=0.3",
        f"--config.stage.flip_probability={flags.noise}",
    )
    run("lm.report.reward_model", f"--workdir={workdir / 'reward'}")
    run(
        "lm.train.loop",
        "--config=experiments/ppo.py",
        f"--workdir={workdir / 'ppo'}",
        f"--config.init_from={quickstart / 'sft'}",
        f"--config.data.reward_model={workdir / 'reward'}",
    )
    run(
        "lm.evaluate.models",
        "--config=experiments/evaluate.py",
        f"--workdir={workdir / 'evaluate'}",
        f"--config.models.raw={quickstart / 'pretrain'}",
        f"--config.models.sft={quickstart / 'sft'}",
        f"--config.models.ppo={workdir / 'ppo'}",
    )
    held_out = read_json(workdir / "reward" / "summary.json")["held_out"]
    last = read_json(workdir / "evaluate" / "summary.json")["comparisons"][-1]
    print_table(
        "From clicks to a better policy",
        ["", "", ""],
        [
            [
                "accuracy on the noisy rater's held-out verdicts",
                f"{held_out['accuracy']:.3f}",
                f"at most {1 - flags.noise:g}",
            ],
            [f"win rate of {last['a']} over {last['b']} by the rule", *shown(last["win_rate"])],
            ["difference in the rule's score", *shown(last["difference"])],
        ],
    )


def shown(estimate: dict) -> list[str]:
    return [f"{estimate['value']:.3f}", f"95 % [{estimate['low']:.3f}, {estimate['high']:.3f}]"]


if __name__ == "__main__":
    run_program(program)

"""The one command line: `lm COMMAND`, or `python -m lm COMMAND` where the package is not installed.

This file imports nothing that a list of commands does not need, so `lm --help` is there at once.
"""

import difflib
import importlib
import os
import select
import sys
from typing import NamedTuple

from lm import restart_with_fast_environment

CLOSED_OUTPUT_STATUS = 141  # 128 + SIGPIPE, as a shell reports it of other programs


class Command(NamedTuple):
    module: str  # has program(argv)
    purpose: str  # one line


COMMANDS = {
    "Make a model": {
        "pipeline": Command("lm.pipeline.runner", "run all stages in order: from text to an assistant"),
        "train": Command("lm.train.loop", "run one stage: tokenizer, pretraining, SFT, reward model, DPO, PPO, ..."),
        "inspect": Command("lm.train.inspect", "show and check a batch of any stage, token by token"),
        "convert": Command(
            "lm.weights.convert", "read models from Hugging Face folders and GGUF files, and write them"
        ),
    },
    "Use it": {
        "chat": Command("lm.serve.chat", "talk to a trained model in the terminal"),
        "serve": Command("lm.serve.server", "serve models over HTTP, as OpenAI's clients ask, with a chat page"),
    },
    "Bring your own data": {
        "data": Command("lm.data.show", "show what a file, folder or hf:NAME holds, and what is wrong")
    },
    "Collect preferences": {
        "rank": Command("lm.feedback.rank", "let people rank answers on a web page"),
        "judge": Command("lm.feedback.judge", "let a model or a rule rate what people rate"),
        "auto-rank": Command("lm.feedback.auto_rank", "sample answers and rank them by a rule"),
    },
    "Measure": {
        "evaluate": Command("lm.evaluate.models", "compare models on held-out text and unseen prompts"),
        "report": Command("lm.report.pipeline", "write the page of a run or of a pipeline"),
        "reward-report": Command("lm.report.reward_model", "say what a reward model has learned"),
        "recall": Command("lm.evaluate.recall", "see which facts of a table a model knows"),
        "quantization": Command("lm.evaluate.quantization", "measure what fewer bits cost in held-out loss"),
        "compare": Command("lm.compare.comparison", "test which setting is better over runs and seeds"),
        "bench": Command("lm.bench.__main__", "time training, generation and start-up against the machine's limits"),
    },
    "Search": {"sweep": Command("lm.sweep.controller", "run many settings of one config")},
    "Study": {
        "scaling": Command("lm.studies.scaling.study", "fit scaling laws and predict a larger run"),
        "emergence": Command("lm.studies.emergence.study", "see which skills appear suddenly, and by which metric"),
        "overoptimization": Command(
            "lm.studies.overoptimization.study", "push a policy up a proxy reward and watch the true one"
        ),
        "contest": Command("lm.studies.methods.study", "compare ways of training at one budget, over seeds"),
        "certify": Command("lm.studies.gradients.__main__", "check every loss's expected gradient exactly"),
    },
}
BY_NAME = {name: command for group in COMMANDS.values() for name, command in group.items()}


def overview() -> str:
    """All commands by purpose, a line each."""
    lines = ["Everything that turns random matrices into an assistant.", "", "usage: lm COMMAND [OPTIONS]"]
    for title, group in COMMANDS.items():
        lines += ["", title]
        lines += [f"  {name:17} {command.purpose}" for name, command in group.items()]
    return "\n".join([*lines, "", "lm COMMAND --help shows the examples and options of a command."])


def main() -> None:
    """Runs the command that sys.argv names. Ends quietly where a reader such as `head` has closed the output."""
    try:
        try:
            run_command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not is_output_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would flush into it once more
        sys.exit(CLOSED_OUTPUT_STATUS)


def is_output_closed() -> bool:
    """Whether the reader of standard output has closed it."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def run_command() -> None:
    """Runs the command that sys.argv names. Exits with 2 if there is none of that name."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        print(overview())
        return
    if name not in BY_NAME:
        near = difflib.get_close_matches(name, BY_NAME, n=1)
        hint = f"did you mean {near[0]}?" if near else "`lm --help` lists the commands"
        print(f"error: {name} is not a command of lm; {hint}", file=sys.stderr)
        sys.exit(2)
    restart_with_fast_environment()
    sys.argv = [f"lm {name}", *sys.argv[2:]]
    program = importlib.import_module(BY_NAME[name].module).program
    from lm.runs.console import run_program  # after the restart: it imports what commands print with

    run_program(program)


if __name__ == "__main__":
    main()

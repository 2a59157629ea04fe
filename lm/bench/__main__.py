"""How fast this machine trains, samples, starts and rolls out, against its own limits and against PyTorch.

    python -m lm.bench                                        (training, generation, rollout; size S)
    python -m lm.bench training --sizes=S,M --dtypes=float32,bfloat16 --peer=PYTHON
    python -m lm.bench generation --sizes=smollm2-135m --batches=1,32
    python -m lm.bench startup --json=bench.jsonl
    python -m lm.bench speculation --workdir=W --draft=D --batches=1,64 --prompt_tokens=64 --new_tokens=32

training    tokens/s of the pretraining stage's own step; FLOP/s over the matmul ceiling (elsewhere than on a CPU: MFU)
generation  tokens/s of greedy sampling; bytes read a step over the memory's bandwidth
rollout     seconds of a GRPO step: generation and update apart
startup     seconds to the first step of lm.train, without compiled programs and with them
speculation tokens/s of a trained model with a draft and without; the share of proposals accepted

--peer is an interpreter with tests/peers.txt: PyTorch, transformers and TRL do the same on the same CPU. The two sides
take turns; the first step of each turn does not count. --json appends all numbers to a file, one line a run.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lm import record
from lm.bench import generation, rollout, shown, speculation, startup, training
from lm.bench.limits import Limits
from lm.bench.sizes import DTYPES, SIZES, counts, listed, sizes_of
from lm.bench.turns import Peer, Run, Timed, interleaved, interpreter
from lm.config import parsed
from lm.console import Progress, main, say, warn
from lm.errors import UserError, at_least
from lm.workdir import Trained, load, load_policy

SHOWN = {
    "limits": shown.limits,
    "training": shown.training,
    "generation": shown.generation,
    "rollout": shown.rollout,
    "startup": shown.startup,
    "speculation": shown.speculation,
}
WHAT = ("training", "generation", "rollout", "startup", "speculation")
FLAGS = {
    "sizes": dict(default="S", metavar="NAMES", help=f"of training and generation: {', '.join(SIZES)}"),
    "dtypes": dict(default="auto", metavar="NAMES", help="float32, bfloat16; auto: what the backend would take"),
    "batches": dict(default="1,32", metavar="COUNTS", help="prompts that are answered at once"),
    "new_tokens": dict(type=int, default=256, help="tokens of each answer"),
    "prompt_tokens": dict(type=int, default=32, help="tokens of each prompt"),
    "workdir": dict(default="", metavar="DIR", help="a trained or converted model whose generation is timed too"),
    "draft": dict(default="", metavar="DIR", help="of speculation: a model that proposes to the one of --workdir"),
    "ahead": dict(type=int, default=4, help="of speculation: tokens it proposes at a time"),
    "peer": dict(default="", metavar="PYTHON", help="an interpreter with tests/peers.txt; torch: this one"),
    "turns": dict(type=int, default=3, help="how often the two sides take turns"),
    "steps": dict(type=int, default=3, help="steps, or generations, that count in each turn"),
    "json": dict(default="", metavar="FILE", help="append all numbers there as one line"),
}
POSITIONAL = {"what": dict(nargs="*", metavar="WHAT", help=f"{', '.join(WHAT)}; without: the first three")}


class Case(NamedTuple):
    """One thing to time: how to set it up, and what to make of its seconds."""

    what: str
    ours: Callable[[], Run]
    peer: Peer | None
    result: Callable[[Timed], dict[str, Any]]


def cases(flags, limits: Limits) -> list[Case]:
    """All but startup, in the order in which they are timed."""
    sizes, dtypes = sizes_of(flags.sizes), listed("dtypes", flags.dtypes, DTYPES)
    python, found = interpreter(flags.peer), []
    for name, size in sizes.items() if "training" in flags.what else ():
        for dtype in dtypes:
            case = name, size, dtype
            rival = training.peer(python, size, dtype) if python else None
            found.append(pretrained(*case, rival, limits))
    if "generation" in flags.what:
        models = [(name, size.config, None) for name, size in sizes.items()]
        if flags.workdir:
            given = load(flags.workdir, backend=jax.default_backend(), warn=warn)
            models.append((given.path.name, given.shape, given.params["lm"]))
        for name, config, lm in models:
            for dtype in dtypes:
                for batch in counts("batches", flags.batches):
                    shape = generation.Shape(batch, flags.prompt_tokens, flags.new_tokens)
                    rival = generation.peer(python, config, shape, dtype) if python else None
                    found.append(generated(name, config, lm, shape, dtype, rival, limits))
    if "rollout" in flags.what:
        config, shape = SIZES["S"].config, rollout.Shape()
        rival = rollout.peer(python, shape) if python else None
        result = lambda timed: rollout.result(config, shape, timed, limits)
        found.append(Case("rollout", lambda: rollout.stepper(config, shape), rival, result))
    if "speculation" in flags.what:
        there = dict(backend=jax.default_backend(), warn=warn)
        target, draft = (load_policy(path, **there) for path in (flags.workdir, flags.draft))
        for batch in counts("batches", flags.batches):
            shape = generation.Shape(batch, flags.prompt_tokens, flags.new_tokens)
            given = target, draft, speculation.held_out(target, shape), shape
            found += [speculated(*given, flags.ahead, temperature) for temperature in speculation.TEMPERATURES]
    return found


def pretrained(name, size, dtype: str, peer: Peer | None, limits: Limits) -> Case:
    result = lambda timed: training.result(name, size, dtype, timed, limits)
    return Case("training", lambda: training.stepper(size, dtype), peer, result)


def generated(name, config, lm, shape, dtype: str, peer: Peer | None, limits: Limits) -> Case:
    result = lambda timed: generation.result(name, config, shape, dtype, timed, limits)
    return Case("generation", lambda: generation.sampler(config, shape, dtype, lm), peer, result)


def speculated(target: Trained, draft: Trained, prompts, shape, ahead: int, temperature: float) -> Case:
    both = speculation.sides(target, draft, prompts, shape, ahead=ahead, temperature=temperature)
    name = f"{target.path.name} from {draft.path.name}"
    result = lambda timed: speculation.result(name, shape, ahead, temperature, both, timed)
    return Case("speculation", lambda: speculation.stepper(both), None, result)


def measured(flags) -> dict[str, Any]:
    """Everything that was asked for: a list of results for each of training, generation and rollout, the machine's
    limits, and where the numbers are from."""
    limits = Limits()
    chosen = cases(flags, limits)
    timings: list[Timed] = []
    found: dict[str, Any] = record.this_start()
    done, total = 0, flags.turns * (len(chosen) + ("startup" in flags.what))
    with Progress("bench", total, "turn") as progress:

        def after(last: Mapping[str, float]) -> None:
            nonlocal done
            done += 1
            progress.update(done, last)

        def looked(last: Mapping[str, float]) -> None:
            limits.look()
            after(last)

        for case in chosen:
            timings.append(interleaved(case.ours(), case.peer, turns=flags.turns, steps=flags.steps, after=looked))
        if "startup" in flags.what:
            found["startup"] = startup.result(startup.starts(turns=flags.turns, after=after))
    if chosen:
        found["limits"] = dataclasses.asdict(limits)
    for case, timed in zip(chosen, timings):  # now that the limits have been looked at in every turn
        found.setdefault(case.what, []).append(case.result(timed))
    return found


def checked(flags) -> None:
    """UserError for what cannot be timed, before anything is."""
    for what in flags.what:
        if what not in WHAT:
            raise UserError(f"lm.bench does not time {what!r}; choose from {', '.join(WHAT)}")
    at_least(1, "bench", steps=flags.steps, turns=flags.turns)
    at_least(1, "bench", new_tokens=flags.new_tokens, prompt_tokens=flags.prompt_tokens)
    if "speculation" in flags.what and not (flags.workdir and flags.draft):
        raise UserError("speculation needs two trained models: give --workdir=DIR and --draft=DIR")
    if flags.peer and jax.default_backend() != "cpu":
        raise UserError(f"the peers run on a CPU, and this is a {jax.default_backend()}: leave --peer out")
    if flags.json and not Path(flags.json).absolute().parent.is_dir():
        raise UserError(f"--json={flags.json}: there is no folder {Path(flags.json).absolute().parent}")


def show(found: Mapping[str, Any]) -> None:
    for what, told in SHOWN.items():
        if what in found:
            told(found[what])


def program(argv: list[str]) -> None:
    flags = parsed(argv, __doc__, FLAGS, POSITIONAL)
    flags.what = flags.what or ["training", "generation", "rollout"]
    checked(flags)
    found = measured(flags)
    show(found)
    if flags.json:
        with Path(flags.json).open("a") as stream:
            stream.write(json.dumps(found) + "\n")
        say(f"numbers: {flags.json}")


if __name__ == "__main__":
    main(program)

"""Times training, generation, start-up, rollouts and data on this machine, against its own limits and against PyTorch.

    python -m lm bench
    python -m lm bench training --sizes=S,M --dtypes=float32,bfloat16 --peer=PYTHON

Without names it measures training, generation and rollout at size S. The measurements are:

training    tokens/s of the pretraining stage's own step; FLOP/s over the matmul ceiling (elsewhere than on a CPU: MFU)
generation  tokens/s of greedy sampling; bytes read a step over the memory's bandwidth
rollout     seconds of a GRPO step: generation and update apart
startup     seconds to the first step of lm train, without compiled programs and with them
speculation tokens/s of a trained model with a draft and without; the share of proposals accepted
engine      tokens/s of the serving engine over those of the fixed loop, and with a prefix cache over those without
data        tokens/s of the loader over those of training at size S; MB/s encoded beside the library's own call
serve       requests/s, tokens/s and waiting times of lm serve under load, beside a loop over `sample`

    python -m lm bench generation --sizes=smollm2-135m --batches=1,32
    python -m lm bench startup --json=bench.jsonl
    python -m lm bench data --sizes=S
    python -m lm bench serve --workdir=W --clients=1,8,32 --new_tokens=128
    python -m lm bench engine --batches=8,32
    python -m lm bench speculation --workdir=W --draft=D --batches=1,64 --prompt_tokens=64 --new_tokens=32

--peer is an interpreter with tests/peers.txt: PyTorch, transformers and TRL do the same on the same CPU. The two sides
take turns; the first step of each turn does not count. --json appends all numbers to a file, one line for each run.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lm.bench import data, engine, generation, rollout, serving, speculation, startup, tables, training
from lm.bench.limits import DeviceLimits
from lm.bench.sizes import DTYPES, SIZES, BenchmarkSize, parsed_counts, parsed_names, sizes_named
from lm.bench.turns import Peer, TimedSteps, Timings, interleaved_timings, peer_interpreter
from lm.core.config import parsed_flags
from lm.core.errors import UserError, check_at_least
from lm.runs import metadata
from lm.runs.console import Progress, run_program, say, warn
from lm.runs.workdir import TrainedModel, load_trained_model, require_decoder
from lm.train.warm_start import load_policy, policy_folder

PRINTERS = {
    "limits": tables.print_limits,
    "training": tables.print_training,
    "generation": tables.print_generation,
    "rollout": tables.print_rollout,
    "startup": tables.print_startup,
    "speculation": tables.print_speculation,
    "engine": tables.print_engine,
    "data": tables.print_data,
    "serve": tables.print_serving,
}
BENCHMARKS = ("training", "generation", "rollout", "startup", "speculation", "engine", "data", "serve")
FLAGS = {
    "sizes": dict(default="S", metavar="NAMES", help=f"of training, generation, engine and data: {', '.join(SIZES)}"),
    "dtypes": dict(default="auto", metavar="NAMES", help="float32, bfloat16; auto: what the backend would take"),
    "batches": dict(default="1,32", metavar="COUNTS", help="prompts that are answered at once; slots of the engine"),
    "new_tokens": dict(type=int, default=256, help="tokens of each answer"),
    "prompt_tokens": dict(type=int, default=32, help="tokens of each prompt"),
    "workdir": dict(default="", metavar="DIR", help="a trained or converted model whose generation is timed too"),
    "draft": dict(default="", metavar="DIR", help="of speculation: a model that proposes to the one of --workdir"),
    "draft_tokens": dict(type=int, default=4, help="of speculation: tokens it proposes at a time"),
    "clients": dict(default="1,8,32", metavar="COUNTS", help="of serve: clients that ask at once"),
    "slots": dict(type=int, default=8, help="of serve: answers of the server at once"),
    "peer": dict(default="", metavar="PYTHON", help="an interpreter with tests/peers.txt; torch: this one"),
    "turns": dict(type=int, default=3, help="how often the two sides take turns"),
    "steps": dict(type=int, default=3, help="steps, or generations, that count in each turn"),
    "json": dict(default="", metavar="FILE", help="append all numbers there as one line"),
}
POSITIONAL = {"what": dict(nargs="*", metavar="WHAT", help=f"{', '.join(BENCHMARKS)}; without: the first three")}


class BenchmarkCase(NamedTuple):
    """One benchmark: how to set it up, and how to make a result of its seconds."""

    benchmark: str
    make_steps: Callable[[], TimedSteps]
    peer: Peer | None
    make_result: Callable[[Timings], dict[str, Any]]


def benchmark_cases(flags, limits: DeviceLimits) -> list[BenchmarkCase]:
    """All but startup, in the order in which they are timed."""
    sizes, dtypes = sizes_named(flags.sizes), parsed_names("dtypes", flags.dtypes, DTYPES)
    python, cases = peer_interpreter(flags.peer), []
    for name, size in sizes.items() if "training" in flags.what else ():
        for dtype in dtypes:
            case = name, size, dtype
            rival = training.peer(python, size, dtype) if python else None
            cases.append(training_case(*case, rival, limits))
    if "generation" in flags.what:
        models = [(name, size.config, None) for name, size in sizes.items()]
        if flags.workdir:
            given = load_trained_model(flags.workdir, backend=jax.default_backend(), warn=warn)
            require_decoder(given, "lm bench")
            models.append((given.path.name, given.model_config, given.params["lm"]))
        for name, config, lm in models:
            for dtype in dtypes:
                for batch in parsed_counts("batches", flags.batches):
                    shape = generation.GenerationShape(batch, flags.prompt_tokens, flags.new_tokens)
                    rival = generation.peer(python, config, shape, dtype) if python else None
                    cases.append(generation_case(name, config, lm, shape, dtype, rival, limits))
    if "rollout" in flags.what:
        config, shape = SIZES["S"].config, rollout.RolloutShape()
        rival = rollout.peer(python, shape) if python else None
        result = lambda timed: rollout.result(config, shape, timed, limits)
        cases.append(BenchmarkCase("rollout", lambda: rollout.timed_steps(config, shape), rival, result))
    if "engine" in flags.what:
        for name, size in sizes.items():
            for dtype in dtypes:
                for batch in parsed_counts("batches", flags.batches):
                    shape = generation.GenerationShape(batch, flags.prompt_tokens, flags.new_tokens)
                    cases.append(engine_case(name, size.config, shape, dtype))
    if "data" in flags.what:
        cases += [data_case(name, size, dtypes[0]) for name, size in sizes.items()]
    if "speculation" in flags.what:
        there = dict(backend=jax.default_backend(), warn=warn)
        target, draft = (load_policy(path, **there) for path in (flags.workdir, flags.draft))
        for batch in parsed_counts("batches", flags.batches):
            shape = generation.GenerationShape(batch, flags.prompt_tokens, flags.new_tokens)
            given = target, draft, speculation.held_out_prompts(target, shape), shape
            cases += [
                speculation_case(*given, flags.draft_tokens, temperature) for temperature in speculation.TEMPERATURES
            ]
    return cases


def training_case(name, size, dtype: str, peer: Peer | None, limits: DeviceLimits) -> BenchmarkCase:
    result = lambda timed: training.result(name, size, dtype, timed, limits)
    return BenchmarkCase("training", lambda: training.timed_steps(size, dtype), peer, result)


def data_case(name: str, size: BenchmarkSize, dtype: str) -> BenchmarkCase:
    result = lambda timed: data.result(name, size, timed)
    return BenchmarkCase("data", lambda: data.timed_steps(size, dtype), None, result)


def engine_case(name: str, config, shape, dtype: str) -> BenchmarkCase:
    result = lambda timed: engine.result(name, config, shape, dtype, timed)
    return BenchmarkCase("engine", lambda: engine.timed_steps(config, shape, dtype), None, result)


def generation_case(name, config, lm, shape, dtype: str, peer: Peer | None, limits: DeviceLimits) -> BenchmarkCase:
    result = lambda timed: generation.result(name, config, shape, dtype, timed, limits)
    return BenchmarkCase("generation", lambda: generation.timed_steps(config, shape, dtype, lm), peer, result)


def speculation_case(
    target: TrainedModel, draft: TrainedModel, prompts, shape, draft_tokens: int, temperature: float
) -> BenchmarkCase:
    both = speculation.speculation_samplers(
        target, draft, prompts, shape, draft_tokens=draft_tokens, temperature=temperature
    )
    name = f"{target.path.name} from {draft.path.name}"
    result = lambda timed: speculation.result(name, shape, draft_tokens, temperature, both, timed)
    return BenchmarkCase("speculation", lambda: speculation.timed_steps(both), None, result)


def measurements(flags) -> dict[str, Any]:
    """All results that were asked for: lists for training, generation and rollout, the machine's limits, and the
    origin of the numbers."""
    limits = DeviceLimits()
    chosen = benchmark_cases(flags, limits)
    timings: list[Timings] = []
    results: dict[str, Any] = metadata.start_metadata()
    clients = parsed_counts("clients", flags.clients) if "serve" in flags.what else []
    done, total = 0, flags.turns * (len(chosen) + ("startup" in flags.what)) + len(clients)
    with Progress("bench", total, "turn") as progress:

        def after(last: Mapping[str, float]) -> None:
            nonlocal done
            done += 1
            progress.update(done, last)

        def show_last(last: Mapping[str, float]) -> None:
            limits.remeasure()
            after(last)

        for case in chosen:
            timings.append(
                interleaved_timings(
                    case.make_steps(), case.peer, turns=flags.turns, steps=flags.steps, on_turn=show_last
                )
            )
        if "startup" in flags.what:
            results["startup"] = startup.result(startup.startup_seconds(turns=flags.turns, on_turn=after))
        if clients:
            results["serve"] = serve_results(flags, clients, after)
    if chosen:
        results["limits"] = dataclasses.asdict(limits)
    for case, timed in zip(chosen, timings):  # after the limits were measured again in every turn
        results.setdefault(case.benchmark, []).append(case.make_result(timed))
    return results


def serve_results(flags, clients: Sequence[int], on_turn: Callable[[Mapping[str, float]], None]) -> dict[str, Any]:
    trained = load_policy(policy_folder(Path(flags.workdir)), backend=jax.default_backend(), warn=warn)
    require_decoder(trained, "lm bench")
    return serving.results(
        trained,
        clients=clients,
        prompt=flags.prompt_tokens,
        new=flags.new_tokens,
        slots=flags.slots,
        python=peer_interpreter(flags.peer),
        on_turn=on_turn,
    )


def check_flags(flags) -> None:
    """UserError for options that cannot be timed, before anything runs."""
    for what in flags.what:
        if what not in BENCHMARKS:
            raise UserError(f"lm bench does not time {what!r}; choose from {', '.join(BENCHMARKS)}")
    check_at_least(1, "bench", steps=flags.steps, turns=flags.turns)
    check_at_least(1, "bench", new_tokens=flags.new_tokens, prompt_tokens=flags.prompt_tokens, slots=flags.slots)
    if "speculation" in flags.what and not (flags.workdir and flags.draft):
        raise UserError("speculation needs two trained models: give --workdir=DIR and --draft=DIR")
    if "serve" in flags.what and not flags.workdir:
        raise UserError("serve needs a trained model: give --workdir=DIR")
    if flags.peer and jax.default_backend() != "cpu":
        raise UserError(f"the peers run on a CPU, and this is a {jax.default_backend()}: leave --peer out")
    if flags.json and not Path(flags.json).absolute().parent.is_dir():
        raise UserError(f"--json={flags.json}: there is no folder {Path(flags.json).absolute().parent}")


def print_measurements(results: Mapping[str, Any]) -> None:
    for what, print_result in PRINTERS.items():
        if what in results:
            print_result(results[what])


def program(argv: list[str]) -> None:
    flags = parsed_flags(argv, __doc__, FLAGS, POSITIONAL)
    flags.what = flags.what or ["training", "generation", "rollout"]
    check_flags(flags)
    results = measurements(flags)
    print_measurements(results)
    if flags.json:
        with Path(flags.json).open("a") as stream:
            stream.write(json.dumps(results) + "\n")
        say(f"numbers: {flags.json}")


if __name__ == "__main__":
    run_program(program)

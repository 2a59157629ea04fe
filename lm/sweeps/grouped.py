"""Trials of a sweep that run together: those that differ in seeds and numbers only are one vmapped program."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lm import vectorised
from lm.comparison.reading import TRIALS
from lm.console import say
from lm.sweeps.runs import Goal, last_value, write_outcome
from lm.sweeps.space import SEED, Source
from lm.sweeps.study import BEAT, Claim, Study


def work_together(study: Study, source: Source, goal: Goal, root: Path, *, at_once: int) -> None:
    """Runs all waiting trials, up to `at_once` of equal structure in one program. Interrupted, it gives them back."""
    claims = list(iter(lambda: study.claim({}), None))
    try:
        while claims:
            group = [claim for claim in claims if shape(source, claim) == shape(source, claims[0])][:at_once]
            say(f"\n{len(group)} trials together, {len(claims) - len(group)} more: {root / TRIALS}")
            with alive(claims):
                done = together(group, source, goal, root)
            claims = [claim for claim in claims if claim not in done]
    finally:
        for claim in claims:
            claim.released()


def shape(source: Source, claim: Claim) -> str:
    return vectorised.structure(source.config(claim.trial.overrides))


def together(claims: Sequence[Claim], source: Source, goal: Goal, root: Path) -> Sequence[Claim]:
    """Runs these trials as one program and tells the study what came of each."""
    started = time.monotonic()
    seeds = [claim.trial.seeds[0] for claim in claims]
    workdirs = [root / TRIALS / f"{claim.trial.number:04}" for claim in claims]
    configs = [source.config({**claim.trial.overrides, SEED: seed}) for claim, seed in zip(claims, seeds)]
    results = vectorised.run(configs, workdirs)
    seconds = (time.monotonic() - started) / len(claims)  # a trial's share: their sum is what was spent
    for claim, seed, workdir, result in zip(claims, seeds, workdirs, results):
        if isinstance(result, Exception):
            value, error = None, str(result).split("\n")[0] or type(result).__name__
            claim.failed(error, seconds)
        else:
            value, error = last_value(workdir, goal), None
            claim.complete(value, seconds)
        state = "complete" if error is None else "failed"
        write_outcome(workdir, source, goal, claim.trial, seed, state, value, error, seconds)
    return claims


@contextmanager
def alive(claims: Sequence[Claim]) -> Iterator[None]:
    """Signs of life for the study while the trials compute."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT):
            for claim in claims:
                claim.beat()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()

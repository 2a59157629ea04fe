"""Runs trials of a sweep together: trials that differ only in seeds and numbers are one vmapped program."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lm.compare.read import TRIALS_DIR
from lm.runs.console import say
from lm.sweep import vmapped
from lm.sweep.space import SEED_KEY, ConfigSource
from lm.sweep.study import HEARTBEAT_SECONDS, Study, TrialClaim
from lm.sweep.trials import TrialGoal, last_metric_value, write_outcome


def run_vmapped_trials(study: Study, source: ConfigSource, goal: TrialGoal, root: Path, *, at_once: int) -> None:
    """Runs all waiting trials, up to `at_once` of equal structure in one program. If interrupted, it releases them."""
    claims = list(iter(lambda: study.claim({}), None))
    try:
        while claims:
            group = [claim for claim in claims if claim_structure(source, claim) == claim_structure(source, claims[0])][
                :at_once
            ]
            say(f"\n{len(group)} trials together, {len(claims) - len(group)} more: {root / TRIALS_DIR}")
            with heartbeats(claims):
                done = run_trial_group(group, source, goal, root)
            claims = [claim for claim in claims if claim not in done]
    finally:
        for claim in claims:
            claim.release()


def claim_structure(source: ConfigSource, claim: TrialClaim) -> str:
    return vmapped.structure_key(source.config(claim.trial.overrides))


def run_trial_group(
    claims: Sequence[TrialClaim], source: ConfigSource, goal: TrialGoal, root: Path
) -> Sequence[TrialClaim]:
    """Runs these trials as one program and records each outcome in the study."""
    started = time.monotonic()
    seeds = [claim.trial.seeds[0] for claim in claims]
    workdirs = [root / TRIALS_DIR / f"{claim.trial.number:04}" for claim in claims]
    configs = [source.config({**claim.trial.overrides, SEED_KEY: seed}) for claim, seed in zip(claims, seeds)]
    results = vmapped.train_vmapped(configs, workdirs)
    seconds = (time.monotonic() - started) / len(claims)  # a trial's share: their sum is what was spent
    for claim, seed, workdir, result in zip(claims, seeds, workdirs, results):
        if isinstance(result, Exception):
            value, error = None, str(result).split("\n")[0] or type(result).__name__
            claim.mark_failed(error, seconds)
        else:
            value, error = last_metric_value(workdir, goal), None
            claim.mark_complete(value, seconds)
        state = "complete" if error is None else "failed"
        write_outcome(workdir, source, goal, claim.trial, seed, state, value, error, seconds)
    return claims


@contextmanager
def heartbeats(claims: Sequence[TrialClaim]) -> Iterator[None]:
    """Sends heartbeats to the study while the trials compute."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            for claim in claims:
                claim.heartbeat()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()

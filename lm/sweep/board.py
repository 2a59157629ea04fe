"""Shows the trials of a sweep: a live table on a terminal, elsewhere a line for each change."""

import time
from collections.abc import Mapping, Sequence

from rich.live import Live

from lm.runs.console import rich_table, say, terminal_console
from lm.sweep.study import Study, TrialStatus

MAX_ROWS = 24  # of the live table: running trials, the last that ended, the next that wait
REFRESH_SECONDS = 2.0  # seconds between two reads of the study


class TrialBoard:
    """A context manager around the time in which trials run."""

    def __init__(self, study: Study, keys: Sequence[str]):
        self._study, self._keys = study, keys
        console = terminal_console()
        self._live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
        self._known: dict[int, str] = {}
        self._looked = 0.0

    def __enter__(self) -> "TrialBoard":
        self._known = {one.number: one.state for one in self._study.trial_statuses()}
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._live:
            self._live.stop()

    def update(self, *, now: bool = False) -> None:
        """Reads the study, every few seconds or `now`, and shows changes."""
        if not now and time.monotonic() - self._looked < REFRESH_SECONDS:
            return
        trials, self._looked = self._study.trial_statuses(), time.monotonic()
        if self._live:
            self._live.update(rich_table(state_counts_text(trials), *trial_table(trials_to_show(trials), self._keys)))
        for one in trials:
            if one.state != self._known[one.number] and not self._live:
                say(trial_line(one))
            self._known[one.number] = one.state


def trials_to_show(trials: Sequence[TrialStatus]) -> Sequence[TrialStatus]:
    """The running trials, the last that ended and the first that wait, by number, as many as fit."""
    if len(trials) <= MAX_ROWS:
        return trials
    running = [one for one in trials if one.state == "running"]
    over = [one for one in trials if one.state in ("complete", "pruned", "failed")]
    waiting = [one for one in trials if one.state == "waiting"]
    room = max(MAX_ROWS - len(running), 0)
    shown = [*running, *over[-(room - min(4, len(waiting))) :], *waiting[:4]]
    return sorted(shown[:MAX_ROWS], key=lambda one: one.number)


def state_counts_text(trials: Sequence[TrialStatus]) -> str:
    """ "27 trials: 12 complete, 1 running, 14 waiting" """
    counts: dict[str, int] = {}
    for one in trials:
        counts[one.state] = counts.get(one.state, 0) + 1
    return f"{len(trials)} trials: " + ", ".join(f"{count} {state}" for state, count in counts.items())


def trial_table(trials: Sequence[TrialStatus], keys: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows. Columns with the same value in all rows are left out."""
    cells = [
        {
            "trial": f"{one.number}",
            "seed": " ".join(map(str, one.seeds)),
            **{key.split(".")[-1]: rounded_number(one.overrides[key]) if key in one.overrides else "" for key in keys},
            "state": one.state,
            "value": "" if one.value is None else f"{one.value:.4g}",
            "step": "" if one.step is None else f"{one.step}",
            "s": "" if one.seconds is None else f"{one.seconds:.0f}",
        }
        for one in trials
    ]
    names = [name for name in cells[0] if name == "trial" or len({row[name] for row in cells}) > 1 or name == "value"]
    return names, [[row[name] for name in names] for row in cells]


def trial_line(one: TrialStatus) -> str:
    changes = overrides_text(one.overrides)
    came = {
        "complete": lambda: f": {one.value:.4g} ({one.seconds:.0f} s)",
        "pruned": lambda: f" at step {one.step}: {one.value:.4g} ({one.seconds:.0f} s)",
        "failed": lambda: f": {one.error}",
    }
    return f"trial {one.number} {one.state}  {changes}  {came[one.state]() if one.state in came else ''}".rstrip()


def overrides_text(overrides: Mapping[str, str]) -> str:
    return ", ".join(f"{key.split('.')[-1]} {rounded_number(text)}" for key, text in overrides.items())


def rounded_number(text: str) -> str:
    """A drawn float in four digits; anything else as it is."""
    try:
        return f"{float(text):.4g}" if "." in text else text
    except ValueError:
        return text

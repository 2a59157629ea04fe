"""What the user sees: one-line errors, a live line per stage, tables, TensorBoard files; how a program is stopped."""

import errno
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lm.core.errors import UserError

DEFAULT_WIDTH = 80  # columns, where there is no terminal to ask
RED, YELLOW = "31", "33"


class ThreadOutput(threading.local):
    muted = False  # whether `say` and `print_table` are silent


THREAD_OUTPUT = ThreadOutput()


class SigtermExit(Exception):
    """SIGTERM was received, and everything has been saved."""


def run_program(program: Callable[[list[str]], None]) -> None:
    """Runs a program's main with the command line; exits with 2 on bad input, 130 on ctrl-C, 143 on SIGTERM."""
    # Orbax and its tasks log every failure with a page of traceback; the line we print says it all.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        program(sys.argv[1:])
    except UserError as error:
        _print(f"error: {error}", sys.stderr, RED)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _print(f"error: {error.strerror}: make room, then give the same command again", sys.stderr, RED)
        sys.exit(2)
    except KeyboardInterrupt:
        _print("interrupted: the same command continues from the last checkpoint", sys.stderr)
        sys.exit(130)
    except SigtermExit:
        _print("stopped by SIGTERM and saved: the same command continues", sys.stderr)
        sys.exit(143)


@contextmanager
def on_sigterm() -> Iterator[Callable[[], bool]]:
    """Yields `stopping() -> bool`, True once SIGTERM has been received: the loop polls it, saves, raises SigtermExit.

    A second SIGTERM ends the process at once.
    """
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def muted_thread() -> Iterator[None]:
    """This thread prints warnings only: several runs that train together would print the same lines."""
    THREAD_OUTPUT.muted = True
    try:
        yield
    finally:
        THREAD_OUTPUT.muted = False


def say(text: str) -> None:
    """One line on stdout, above the live line if there is one."""
    if not THREAD_OUTPUT.muted:
        _print(text, sys.stdout)


def warn(text: str) -> None:
    """One line on stderr."""
    _print(f"warning: {text}", sys.stderr, YELLOW)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a table: numbers to the right, floats with four significant digits."""
    if not THREAD_OUTPUT.muted:
        terminal_console().print(rich_table(title, columns, rows))


def rich_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """The table itself, for what is drawn again and again."""
    rows = [list(row) for row in rows]
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column, cells in zip(columns, zip(*rows) if rows else [()] * len(columns), strict=True):
        numeric = all(isinstance(cell, (int, float)) for cell in cells)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(f"{cell:.4g}" if isinstance(cell, float) else str(cell)) for cell in row))
    return table


class Progress:
    """How far a stage has come: a live line on a terminal; elsewhere plain lines, the first, the last, few between.

    interval: seconds between two plain lines.
    """

    def __init__(self, title: str, total: int, unit: str = "step", *, interval: float = 5.0):
        self._title, self._total, self._unit, self._interval = title, total, unit, interval
        self._start = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first update came, and its step: compiling is over
        self._last: tuple[int, Mapping[str, float], float | None] | None = None
        self._printed = -interval  # since the start; the first line is due at once
        self._unprinted = False
        console = terminal_console()
        self._live = (
            Live(console=console, refresh_per_second=4, transient=True)
            if console.is_terminal and not THREAD_OUTPUT.muted
            else None
        )

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._live:
            self._live.stop()
        if self._last and (self._live or self._unprinted):
            say(self._line(DEFAULT_WIDTH))

    def update(self, step: int, metrics: Mapping[str, float], rate: float | None = None) -> None:
        """step: finished units, of `total`. metrics: shown in their order while they fit. rate: tokens per second."""
        elapsed = time.monotonic() - self._start
        self._first = self._first or (elapsed, step)
        self._last = (step, dict(metrics), rate)
        if self._live:
            width = self._live.console.width
            row = Table.grid(padding=(0, 1))
            row.add_row(ProgressBar(self._total, step, width=20), Text(self._line(width - 22), no_wrap=True))
            self._live.update(row)
        elif elapsed - self._printed >= self._interval or step >= self._total:
            say(self._line(DEFAULT_WIDTH))
            self._printed, self._unprinted = elapsed, False
        else:
            self._unprinted = True

    def _line(self, width: int) -> str:
        step, metrics, rate = self._last
        head = f"{self._title} {self._unit} {step}/{self._total}"
        tail = [f"{_short_number(rate)} tokens/s"] if rate is not None else []
        tail += [self._clock(step)]
        shown = []
        for name, value in metrics.items():
            if len("  ".join([head, *shown, f"{name} {value:.4g}", *tail])) > width:
                break
            shown.append(f"{name} {value:.4g}")
        return "  ".join([head, *shown, *tail])

    def _clock(self, step: int) -> str:
        elapsed = time.monotonic() - self._start
        since, first = self._first
        if step >= self._total or step <= first:
            return _duration(elapsed)
        left = (elapsed - since) / (step - first) * (self._total - step)
        return f"{_duration(elapsed)}, {_duration(left)} left"


class MetricWriters:
    """Scalars as TensorBoard files under WORKDIR/tensorboard, and to whatever trackers there are.

    purge_step: TensorBoard forgets what an earlier process wrote from this step on; a resumed run writes it again.
    trackers: of lm.runs.trackers. One that fails is reported and dropped: training goes on.
    """

    def __init__(self, workdir: str | Path, purge_step: int = 0, trackers: Sequence[Any] = ()):
        from tensorboardX import SummaryWriter  # here, as only training needs it

        self._writer = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=purge_step)
        self._trackers = list(trackers)

    def __enter__(self) -> "MetricWriters":
        return self

    def __exit__(self, *exception) -> None:
        with suppress(OSError):  # a full disk: metrics.jsonl has the numbers, and saving tells the user
            self._writer.close()
        self._each(lambda tracker: tracker.close())

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._each(lambda tracker: tracker.write(step, metrics))

    def _each(self, action: Callable[[Any], None]) -> None:
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except Exception as error:  # theirs may be anything: a lost network, a full disk, a bug
                self._trackers.remove(tracker)
                warn(f"{tracker.name} gets no more metrics ({type(error).__name__}: {error}); metrics.jsonl has them")


def terminal_console() -> Console:
    """Where tables and live lines go; of a fixed width where there is no terminal to ask."""
    console = Console()
    return console if console.is_terminal else Console(width=DEFAULT_WIDTH)


def _print(text: str, stream: TextIO, color: str = "") -> None:
    print(f"\033[{color}m{text}\033[0m" if color and stream.isatty() else text, file=stream, flush=True)


def _short_number(number: float) -> str:
    """1234567.0 to "1.23M"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    """5025 to "1:23:45"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

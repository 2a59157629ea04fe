"""What the user sees, in a pipe and on a terminal."""

import io
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from lm.core.errors import UserError
from lm.runs import console
from lm.runs.console import MetricWriters, Progress, SigtermExit


def exit_of(error: BaseException | None) -> int:
    def program(argv):
        if error:
            raise error

    try:
        console.run_program(program)
    except SystemExit as exit:
        return exit.code
    return 0


@pytest.mark.parametrize(
    "error, code, line",
    [
        (None, 0, ""),
        (
            UserError("no corpus x.txt: give --config.corpus=PATH"),
            2,
            "error: no corpus x.txt: give --config.corpus=PATH\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted: the same command continues from the last checkpoint\n"),
        (SigtermExit(), 143, "stopped by SIGTERM and saved: the same command continues\n"),
        (SystemExit(7), 7, ""),
    ],
)
def test_main_exits_with_one_line(capsys, error, code, line):
    assert exit_of(error) == code
    assert capsys.readouterr() == ("", line)


def test_main_passes_the_command_line_and_keeps_tracebacks_of_bugs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", "--a=1"])
    seen = []
    console.run_program(seen.append)
    assert seen == [["--a=1"]]
    with pytest.raises(ZeroDivisionError):
        exit_of(ZeroDivisionError())


def test_sigterm_sets_a_flag_and_the_old_behaviour_returns():
    before = signal.getsignal(signal.SIGTERM)
    with console.on_sigterm() as stopping:
        assert not stopping()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one ends the process
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_plain_progress_prints_first_last_and_few_between(capsys, clock):
    with Progress("sft", 10) as progress:
        for step in range(1, 11):
            clock[0] += 2.0
            progress.update(step, {"loss": 4.0 - step / 8, "accuracy": 0.5}, 12_345.0)
    # Steps end at 2, 4, ... 20 s. Due: the first, then 5 s after a line at the earliest (8, 14, 20 s), and the last.
    # The first step has 2 s of compiling in it: time left counts from its end, (8 - 2) / 3 * 6 = 12 s at step 4.
    assert capsys.readouterr().out == (
        "sft step 1/10  loss 3.875  accuracy 0.5  12.3k tokens/s  0:02\n"
        "sft step 4/10  loss 3.5  accuracy 0.5  12.3k tokens/s  0:08, 0:12 left\n"
        "sft step 7/10  loss 3.125  accuracy 0.5  12.3k tokens/s  0:14, 0:06 left\n"
        "sft step 10/10  loss 2.75  accuracy 0.5  12.3k tokens/s  0:20\n"
    )


def test_plain_progress_ends_with_where_it_stopped(capsys, clock):
    with pytest.raises(UserError), Progress("ppo", 100, "update") as progress:
        progress.update(1, {"reward": 0.1})
        progress.update(2, {"reward": 0.2})
        raise UserError("reward is not finite")
    assert capsys.readouterr().out.splitlines()[-1].startswith("ppo update 2/100  reward 0.2")


def test_progress_without_updates_prints_nothing(capsys):
    with Progress("sft", 10):
        pass
    assert capsys.readouterr().out == ""


def test_lines_drop_metrics_to_stay_within_80_columns(capsys, clock):
    with Progress("pretrain", 100_000) as progress:
        progress.update(99_999, {f"a_rather_long_name_{i}": 1.23456 for i in range(9)}, 1e6)
    line = capsys.readouterr().out.rstrip("\n")
    assert len(line) <= 80
    assert "a_rather_long_name_0 1.235" in line and line.endswith("1M tokens/s  0:00")


def test_say_and_warn_are_single_plain_lines_in_a_pipe(capsys):
    console.say("x" * 200 + " [bold]not markup[/bold]")
    console.warn("careful")
    assert capsys.readouterr() == ("x" * 200 + " [bold]not markup[/bold]\n", "warning: careful\n")


def test_table_fits_80_columns_and_loses_nothing(capsys):
    prompt = "What does shutil.copyfile do? " * 6
    console.print_table("Answers", ["prompt", "score", "count"], [[prompt, 0.123456, 3], ["[short]", 12.0, 40]])
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    text = " ".join(" ".join(lines).split())
    assert "Answers" in text and "0.1235" in text and "[short]" in text and "\033" not in text
    assert text.count("shutil.copyfile") == 6
    console.print_table("Nothing", ["a", "b"], [])
    assert "Nothing" in capsys.readouterr().out


def test_live_line_on_a_terminal():
    code = (
        "from lm.runs import console\n"
        "def program(argv):\n"
        "    with console.Progress('sft', 2) as progress:\n"
        "        progress.update(1, {'loss': 2.5}, 100.0)\n"
        "        console.say('above the line')\n"
        "        progress.update(2, {'loss': 1.5}, 100.0)\n"
        "    raise console.UserError('red')\n"
        "console.run_program(program)\n"
    )
    parent, child = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=child, stderr=child, env=environment)
    os.close(child)
    shown = io.BytesIO()
    try:
        while block := os.read(parent, 4096):
            shown.write(block)
    except OSError:  # the terminal closes with the last process that holds it
        pass
    assert process.wait() == 2
    text = shown.getvalue().decode()
    assert "above the line" in text and "loss 1.5  100 tokens/s" in text
    assert "\033[31merror: red\033[0m" in text


def test_writers_make_tensorboard_files(tmp_path):
    with MetricWriters(tmp_path, purge_step=3) as writers:
        writers.write(3, {"loss": 1.5})
    files = list((tmp_path / "tensorboard").iterdir())
    assert len(files) == 1 and b"loss" in files[0].read_bytes()

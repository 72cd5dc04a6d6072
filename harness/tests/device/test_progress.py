"""How far a command is, where output is no terminal: a line every so often, by a clock of the test's."""

from __future__ import annotations

import contextlib
import io
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from rich.progress import Progress, Task

from harness.device.progress import (
    PlainProgress,
    counted,
    counted_holds,
    heartbeat,
    progress_bar,
    progress_lines,
    span,
    task_line,
)
from harness.errors import ExitCode
from harness.safe_text import SafeConsole
from harness.tests.tiny_suite import CHAIN, VANILLA, command, micro_data, write_suite

SOON_S = 0.02


def plain_console() -> SafeConsole:
    return SafeConsole(file=io.StringIO(), force_terminal=False, width=40)


def lines_of(console: SafeConsole) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def wait_for_lines(console: SafeConsole, count: int) -> list[str]:
    """Wait until a thread has said so much; fail where it does not."""
    deadline = time.monotonic() + 10
    while len(lines_of(console)) < count:
        assert time.monotonic() < deadline, lines_of(console)
        time.sleep(SOON_S / 4)
    return lines_of(console)


def added(progress: Progress, description: str, *, total: float | None) -> Task:
    """Add a task and return it."""
    progress.add_task(description, total=total)
    return progress.tasks[-1]


class SetClock:
    """A clock that stands where the test sets it."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_line_says_what_how_far_and_how_long_the_rest_takes() -> None:
    clock = SetClock()
    progress = PlainProgress(plain_console(), get_time=clock)
    task = added(progress, "vanilla on \\[mt_bench-81]", total=1200)
    assert task_line(task) == "vanilla on [mt_bench-81]: 0 of 1,200, 0 s so far, time left not known yet"
    for now_s, done in ((10.0, 100), (20.0, 200), (40.0, 400)):
        clock.now_s = now_s
        progress.update(task.id, completed=done)
    assert task_line(task).endswith(": 400 of 1,200, 40 s so far, about 80 s left")
    clock.now_s = 125.0
    progress.update(task.id, completed=1200)
    assert task_line(task).endswith(": 1,200 of 1,200, took 2 min")


def test_a_resumed_task_tells_time_left_from_what_was_done_since() -> None:
    """A training that went on at step 900 of 1,000 once seemed to have 11 seconds left after a second."""
    clock = SetClock()
    progress = PlainProgress(plain_console(), get_time=clock)
    task = added(progress, "training", total=1000)
    for now_s, done in ((10.0, 900), (20.0, 901), (30.0, 902)):
        clock.now_s = now_s
        progress.update(task.id, completed=done)
    assert task_line(task) == "training: 902 of 1,000, 30 s so far, about 16 min left"


def test_a_task_that_counts_nothing_tells_its_time() -> None:
    clock = SetClock()
    progress = PlainProgress(plain_console(), get_time=clock)
    task = added(progress, "loading", total=None)
    clock.now_s = 100.0
    assert task_line(task) == "loading: 2 min so far"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (99.4, "99 s"), (99.5, "2 min"), (5969, "99 min"), (5970, "1.7 h"), (36000, "10.0 h")],
)
def test_spans_are_told_in_the_unit_that_fits(seconds: float, words: str) -> None:
    assert span(seconds) == words


def test_lines_come_while_one_long_step_goes_on_and_once_more_at_the_end() -> None:
    """Where output was no terminal, a training of minutes once printed nothing at all."""
    console = plain_console()
    with PlainProgress(console, every_s=SOON_S) as progress:
        task = progress.add_task("training", total=2)
        told = wait_for_lines(console, 2)
        assert all(line.startswith("training: 0 of 2, ") for line in told)
        progress.update(task, completed=2)
    assert lines_of(console)[-1].startswith("training: 2 of 2, took ")
    assert len(console.file.getvalue().splitlines()) == len(lines_of(console))  # type: ignore[attr-defined]


def test_a_line_is_not_broken_at_the_width_of_no_terminal() -> None:
    console = plain_console()
    with PlainProgress(console, every_s=SOON_S) as progress:
        progress.add_task("a description that is longer than the forty columns", total=2)
        assert wait_for_lines(console, 1)[0].endswith("time left not known yet")


def test_short_work_says_nothing() -> None:
    console = plain_console()
    assert list(counted(iter("ab"), "letters", total=2, console=console)) == ["a", "b"]
    assert lines_of(console) == []


def test_turns_of_a_device_are_counted_when_they_are_over() -> None:
    console, held = plain_console(), list[str]()

    @contextlib.contextmanager
    def hold() -> Iterator[None]:
        held.append("begun")
        yield
        held.append("over")

    with (
        patch("harness.device.progress.EVERY_S", SOON_S),
        counted_holds(hold, "turns", total=3, console=console) as counting,
    ):
        with counting():
            assert held == ["begun"] and wait_for_lines(console, 1)[0].startswith("turns: 0 of 3")
        with counting():
            pass
    assert held == ["begun", "over"] * 2 and lines_of(console)[-1].startswith("turns: 2 of 3")


def test_a_terminal_has_a_bar_and_no_lines() -> None:
    console = SafeConsole(file=io.StringIO(), force_terminal=True, width=120)
    assert not isinstance(progress_bar(console), PlainProgress)
    assert isinstance(progress_bar(plain_console()), PlainProgress)
    with progress_lines(console) as silent:
        silent.add_task("arms", total=2)
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
    assert isinstance(progress_lines(plain_console()), PlainProgress)


class ClosedFile(io.StringIO):
    """A pipe whose reader is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reader_that_is_gone_ends_the_lines_and_nothing_else() -> None:
    progress = PlainProgress(SafeConsole(file=ClosedFile(), force_terminal=False), every_s=SOON_S)
    progress.add_task("training", total=2)
    progress.start()
    assert progress._thread is not None
    progress._thread.join(timeout=10)
    assert not progress._thread.is_alive()
    progress.stop()


def test_a_command_that_says_nothing_for_a_while_says_that_it_works() -> None:
    console = plain_console()
    with heartbeat(console, "reproduce", every_s=SOON_S, grace_s=0.0):
        assert wait_for_lines(console, 1)[0].endswith(" after: reproduce")
        console.print("loading [it]")
        lines = wait_for_lines(console, 4)
    assert lines[lines.index("loading [it]") + 1].startswith("still at work, 0 s after: loading [it]")
    count = len(lines_of(console))
    time.sleep(4 * SOON_S)
    assert len(lines_of(console)) == count, "it ends with its command"


def test_a_command_that_talks_needs_no_heartbeat() -> None:
    console = plain_console()
    with heartbeat(console, "reproduce", every_s=0.5, grace_s=0.0):
        for _ in range(20):
            console.print("on")
            time.sleep(0.04)
    assert set(lines_of(console)) == {"on"}


def test_a_terminal_has_no_heartbeat() -> None:
    console, before = SafeConsole(file=io.StringIO(), force_terminal=True), threading.active_count()
    with heartbeat(console, "reproduce", every_s=0.0, grace_s=0.0):
        assert threading.active_count() == before


def test_a_bar_outside_of_our_console_is_richs_own() -> None:
    assert type(progress_bar(SafeConsole(file=io.StringIO(), force_terminal=True))) is Progress


def test_a_run_whose_output_is_a_file_says_how_far_it_is(heads_file: Path, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "micro.toml", micro_data(heads_file, arms=[VANILLA, CHAIN]))
    with patch("harness.device.progress.EVERY_S", SOON_S):
        ran = command("reproduce", suite, "--results", tmp_path / "results")
    line = r"^trials, (?:vanilla|chain) on \S+: \d of 8, \d+ s so far, .* left"
    told = re.findall(line, ran.err, re.MULTILINE)
    assert told and ran.code == ExitCode.OK, ran.err
    assert "\x1b" not in ran.err and ran.err.count("of 8, took") == 1

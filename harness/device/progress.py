"""How far a long command is: a bar on a terminal, elsewhere one plain line every half minute."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from harness.safe_text import SafeConsole

EVERY_S = 30.0
_RATE_S = 600.0  # time left is told from what was done in so many last seconds
_GRACE_S = 1.0  # a bar's line that is due comes first

ItemT = TypeVar("ItemT")


class PlainProgress(Progress):
    """Says every so often, in one line for each task under way, what is done, how far it is and how long the
    rest takes.

    A task that it told of gets a last line at the end. A thread of its own tells, so that one long step keeps
    no line back.
    """

    def __init__(
        self, console: Console, *, every_s: float = EVERY_S, get_time: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(console=console, disable=True, speed_estimate_period=_RATE_S, get_time=get_time)
        self._every_s, self._ended = every_s, threading.Event()
        self._thread: threading.Thread | None = None
        self._told: set[TaskID] = set()

    def start(self) -> None:
        """Begin to tell of the tasks."""
        self._thread = threading.Thread(target=self._tell_often, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Tell once more of the tasks that were told of, and end."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self.tell(task for task in self.tasks if task.id in self._told)

    def tell(self, tasks: Iterable[Task]) -> None:
        """Print a line of each task."""
        for task in tasks:
            self.console.print(task_line(task), markup=False, highlight=False, soft_wrap=True)
            self._told.add(task.id)

    def _tell_often(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                self.tell(task for task in self.tasks if not task.finished)
            except (OSError, ValueError):  # nobody reads any more: the command itself meets that, and says so
                return


def progress_bar(console: Console) -> Progress:
    """Return a bar that shows description, count, time taken and time left of each of its tasks.

    Where output is no terminal, lines say the same.
    """
    if not console.is_terminal:
        return PlainProgress(console, every_s=EVERY_S)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def progress_lines(console: Console) -> Progress:
    """Return lines as `progress_bar` does, and nothing on a terminal, which other processes show bars on."""
    return Progress(console=console, disable=True) if console.is_terminal else PlainProgress(console)


def counted(items: Iterable[ItemT], description: str, *, total: int, console: Console) -> Iterator[ItemT]:
    """Yield the items, and show how many are done."""
    with progress_bar(console) as progress:
        task = progress.add_task(description, total=total)
        for item in items:
            yield item
            progress.advance(task)


@contextlib.contextmanager
def counted_holds(
    held: Callable[[], contextlib.AbstractContextManager[None]],
    description: str,
    *,
    total: int,
    console: Console,
) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Lend what holds a device in turns, and show how many turns are over."""
    with progress_bar(console) as progress:
        task = progress.add_task(description, total=total)

        @contextlib.contextmanager
        def counting() -> Iterator[None]:
            with held():
                yield
            progress.advance(task)

        yield counting


def task_line(task: Task) -> str:
    """Return in a line what a task is, how far it is, how long it took, and about how long the rest takes."""
    words = Text.from_markup(task.description).plain
    took = span(task.elapsed or 0.0)
    if task.total is None:
        return f"{words}: {took} so far"
    done = f"{words}: {task.completed:,.0f} of {task.total:,.0f}"
    if task.completed >= task.total:
        return f"{done}, took {took}"
    left_s = task.time_remaining
    left = "time left not known yet" if left_s is None else f"about {span(left_s)} left"
    return f"{done}, {took} so far, {left}"


def span(seconds: float) -> str:
    """Return seconds in words, to the second, the minute or a tenth of an hour."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def heartbeat(
    console: SafeConsole, name: str, *, every_s: float = EVERY_S, grace_s: float = _GRACE_S
) -> Iterator[None]:
    """Say that a command still works, where it has said nothing for a while and output is no terminal.

    It names what the command said last. So each part of a command shows that it goes on, a part that counts
    nothing too.
    """
    if console.is_terminal:
        yield
        return
    ended, started_s = threading.Event(), time.monotonic()

    def beat() -> None:
        last_s, wait_s = started_s, every_s + grace_s
        while not ended.wait(wait_s):
            now_s, said_s = time.monotonic(), console.said_s or started_s
            wait_s = every_s + grace_s - (now_s - max(said_s, last_s))
            if wait_s > 0:
                continue
            try:
                console.whisper(f"still at work, {span(now_s - said_s)} after: {console.said or name}")
            except (OSError, ValueError):  # nobody reads any more: the command itself meets that, and says so
                return
            last_s, wait_s = now_s, every_s + grace_s

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()

"""The one clock of the harness: monotonic seconds read after the device has finished its work."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from medusa_impl.engine.sections import no_section

Clock = Callable[[], float]


def device_clock(device: torch.device) -> Clock:
    """Return a clock that synchronises `device` before it reads the time.

    So queued kernels count where they were started.
    """
    if device.type == "cuda":

        def now() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return now
    return time.perf_counter


def processor_clock(device: torch.device) -> Clock | None:
    """Return a clock of the seconds for which the calling thread has had a processor; waiting does not count.

    The thread that decodes takes part in every product, so on a quiet CPU this clock keeps up with the other
    one. None for other devices, whose host waits for them.
    """
    return time.thread_time if device.type == "cpu" else None


class SectionTimer:
    """Adds up the seconds of named parts of a step; use only apart from the timed generations."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seconds: dict[str, float] = defaultdict(float)
        self.last: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = self._clock()
        yield
        self.last[name] = self._clock() - started
        self.seconds[name] += self.last[name]


class Marks:
    """Marks the parts of a step for a timer, or looks away from steps whose whole length is wanted.

    A step that is recorded as one graph has no parts while nobody looks.
    """

    def __init__(self, timer: SectionTimer) -> None:
        self.timer = timer
        self.on = True

    def __call__(self, name: str) -> AbstractContextManager[None]:
        return self.timer(name) if self.on else no_section(name)

"""A process that has imported what the tests need, but no code of the harness, and forks for each question.

It runs in a copy of the checkout. A line of standard input asks for tests with a limit in seconds; a line of
standard output says how they ended. The fork imports the harness afresh, so it sees the mutant.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
from importlib.metadata import entry_points
from typing import Any

import hypothesis
import numpy
import pandas
import pydantic
import pytest
import scipy.stats
import tomli_w

IMPORTED = (hypothesis, numpy, pandas, pydantic, scipy.stats, tomli_w)
MEMORY_BYTES = 8 * 2**30


class FirstFailure:
    """A plugin that remembers the first test, or file of tests, that failed."""

    def __init__(self) -> None:
        self.name = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember a test that failed."""
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Remember a file that could not be imported."""
        if report.failed and not self.name:
            self.name = report.nodeid


def answer(options: list[str], limit_s: float, *, keep: bool) -> dict[str, Any]:
    """Return how a run of pytest in a fork ended: its exit code, -9 where the limit ended it, the first test
    that failed and the seconds. With `keep` the code that it compiles stays on the disk, for the others.
    """
    reading, writing = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if not child:
        os.close(reading)
        _be_the_child(options, writing, keep=keep)
    os.close(writing)
    watch = os.pidfd_open(child)
    in_time = bool(select.select([watch], [], [], limit_s)[0])
    os.close(watch)
    if not in_time:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading, encoding="utf-8") as stream:
        by = stream.read()
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "by": by, "seconds": round(time.monotonic() - started, 2)}


def _be_the_child(options: list[str], writing: int, *, keep: bool) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        sys.dont_write_bytecode = not keep  # of a mutant nothing may stay
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        for name in [name for name in sys.modules if name.split(".")[0] in ("harness", "medusa_impl")]:
            del sys.modules[name]
        first = FirstFailure()
        code = int(pytest.main(options, plugins=[first]))
        os.write(writing, first.name.encode())
    finally:
        os._exit(code)


def main() -> None:
    """Answer until the input ends."""
    # the smallest example that kills a mutant is not wanted
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", phases=phases, database=None, deadline=None)
    hypothesis.settings.load_profile("mutants")
    for plugin in entry_points(group="pytest11"):
        plugin.load()
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(answer(asked["options"], asked["limit_s"], keep=asked["keep"])), flush=True)


if __name__ == "__main__":
    main()

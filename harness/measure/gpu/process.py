"""Start a part's process, pass on what it says, and stop it when its time is up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from harness.paths import code_folder, without_paths

_CHILD = "harness.measure.gpu.child"
_GRACE_S = 10.0  # for an interrupted command to write its last line to disk
_KEPT_LINES = 40


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, whether it was stopped, and its last words."""

    code: int
    overran: bool
    elapsed_s: float
    last_line: str
    complaint: str

    @property
    def was_killed(self) -> bool:
        """Return whether it had to be killed, which no command gets a word in against."""
        return self.code == -signal.SIGKILL


def run_child(
    words: Sequence[str], *, limit_s: float, environment: Mapping[str, str], say: Callable[[str], None]
) -> Ended:
    """Run a part's process for at most `limit_s` seconds; `say` gets each line of its standard error.

    It is stopped as by Ctrl-C, and killed with all that it started where it does not end soon after. The same
    happens where this process is interrupted, which is raised then. The process leads a group of its own, so
    that Ctrl-C reaches it once, through here.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", _CHILD, str(os.getpid()), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, **environment},
        cwd=code_folder().parent,  # so that this code is what runs
        start_new_session=True,
    )
    assert process.stdout is not None and process.stderr is not None
    printed, said = deque[str](maxlen=_KEPT_LINES), deque[str](maxlen=_KEPT_LINES)

    def keep_and_say(line: str) -> None:
        said.append(line)
        say(line)

    pumps = [_pump(process.stdout, printed.append), _pump(process.stderr, keep_and_say)]
    overran = False
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        overran = True
        _stop(process)
    except BaseException:
        _stop(process)
        raise
    for pump in pumps:
        pump.join(_GRACE_S)  # a grandchild may hold the pipe open
    return Ended(
        code=process.returncode,
        overran=overran,
        elapsed_s=time.monotonic() - started,
        last_line=printed[-1] if printed else "",
        complaint=_complaint(said),
    )


def _stop(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _pump(stream: IO[str], take: Callable[[str], None]) -> threading.Thread:
    def pump() -> None:
        for line in stream:
            if line.strip():
                take(line.rstrip())

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    return thread


def _complaint(said: Sequence[str]) -> str:
    """Return the line that says what went wrong: the one that begins as errors do, else the last one."""
    marks = ("error:", "defect:", "invalid measurement:")
    found = [line for line in said if line.startswith(marks)] or list(said)[-1:]
    return without_paths(" ".join(found[-1].split()))[:500] if found else ""

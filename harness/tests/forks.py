"""The command line in a fork of this process: everything is imported already, so a command costs
milliseconds, and whatever becomes of it (a traceback, a hang, too much memory) the caller lives on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

MEMORY_BYTES = 6 * 2**30  # of address space on top of what the parent has
BUSY_FACTOR = 6  # times the limit, for a process that gets little of a processor
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code (negative: the signal), streams, seconds, and whether it was stopped."""

    code: int
    out: str
    err: str
    seconds: float
    hung: bool = False


@dataclass(frozen=True)
class CaseLog:
    """A file of what was tried, a line each, from which a run that was cut off goes on.

    Lines of another seed or of another state of the code stay in it and are not read. `code` stands for that
    state, where it is not all Python files.
    """

    path: Path
    seed: int
    code: str = ""

    def rows(self) -> list[dict[str, Any]]:
        """Return what was tried before; half a last line is cut off."""
        if not self.path.exists():
            return []
        *lines, torn = self.path.read_text(encoding="utf-8").split("\n")
        if torn:
            self.path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        rows = [json.loads(line) for line in lines]
        return [row["case"] for row in rows if (row["seed"], row["code"]) == (self.seed, self._code)]

    def add(self, case: dict[str, Any]) -> None:
        """Append what was tried now."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"seed": self.seed, "code": self._code, "case": case}) + "\n")

    @property
    def _code(self) -> str:
        return self.code or code_state()


@cache
def code_state() -> str:
    """Return what tells one state of the code from another: a SHA-256 over the Python files."""
    files = sorted(path for part in ("harness", "medusa_impl") for path in (ROOT / part).rglob("*.py"))
    texts = (f"{path.relative_to(ROOT)}\n{path.read_text(encoding='utf-8')}" for path in files)
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def warm_up() -> None:
    """Import what the commands import."""
    import accelerate.utils  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import harness.training.joint  # noqa: F401


def keep_apart(folder: Path) -> None:
    """Keep cache, locks and temporary files of the commands in a folder: they wait for no other run."""
    (folder / "tmp").mkdir()
    os.environ["MEDUSA_REPRO_CACHE"] = str(folder / "cache")
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")


def forked(
    body: Callable[[], None],
    *,
    folder: Path,
    scratch: Path,
    limit_s: float,
    memory_bytes: int = MEMORY_BYTES,
    busy: bool = True,
) -> Ended:
    """Run a function in a fork, in a folder, and say how it ended; its streams go through `scratch`.

    After `limit_s` it is killed; with `busy` later, where this machine has other things to do.
    """
    out, err = scratch / "stdout", scratch / "stderr"
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.monotonic()
    child = os.fork()
    if not child:
        _be_the_child(body, folder=folder, out=out, err=err, memory_bytes=memory_bytes)
    hung = not _ends_within(child, limit_s, busy=busy)
    if hung:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return Ended(
        code=os.waitstatus_to_exitcode(status),
        out=out.read_text(encoding="utf-8", errors="replace"),
        err=err.read_text(encoding="utf-8", errors="replace"),
        seconds=time.monotonic() - started,
        hung=hung,
    )


def _ends_within(child: int, limit_s: float, *, busy: bool) -> bool:
    """Wait for the end of a child; with `busy` for as long as others keep the processors from it, too."""
    watch = os.pidfd_open(child)
    try:
        for _ in range(BUSY_FACTOR if busy else 1):
            if select.select([watch], [], [], limit_s)[0]:
                return True
            if _processor_s(child) > 0.8 * limit_s:
                return False
        return False
    finally:
        os.close(watch)


def _processor_s(process: int) -> float:
    """Return the seconds of processor time that a process has had."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _be_the_child(body: Callable[[], None], *, folder: Path, out: Path, err: Path, memory_bytes: int) -> None:
    """Do what a process of its own would do, and end without the parent's way out."""
    code = 1
    try:
        os.setpgid(0, 0)
        torch.set_num_threads(1)  # of several, those that wait for each other starve on a busy machine
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream, path in ((1, out), (2, err)):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, stream)
            os.close(handle)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        os.chdir(folder)
        held = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + memory_bytes, held + memory_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        torch.set_num_threads(1)  # a fork has no others
        body()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
    finally:
        for written in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                written.flush()
        os._exit(code)


def command_line(arguments: Sequence[str]) -> Callable[[], None]:
    """Return what runs the command line with these arguments."""

    def body() -> None:
        from harness.cli.app import main

        sys.argv = ["medusa-repro", *arguments]
        main()

    return body


def installed(arguments: Sequence[str], *, folder: Path, limit_s: float) -> Ended:
    """Run the command as a user does, in a process of its own."""
    installed = Path(sys.executable).with_name("medusa-repro")
    words = [str(installed)] if installed.exists() else [sys.executable, "-m", "harness"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    try:
        ran = subprocess.run(
            [*words, *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Ended(code=-9, out="", err="", seconds=limit_s, hung=True)
    return Ended(code=ran.returncode, out=ran.stdout, err=ran.stderr, seconds=time.monotonic() - started)

"""Kills a command where it writes, renames or is halfway through a line, or anywhere, and runs it again."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

from harness.judge.validate.record import validate_record
from harness.records.store import LineFile
from harness.tests.forks import CaseLog, Ended, command_line, forked
from harness.tests.kill.jobs import JOBS, OUT, RESULTS, Job

How = Literal["write", "rename", "torn", "random"]
HOWS: tuple[How, ...] = ("write", "rename", "torn", "random")
LIMIT_S = 300.0
MEMORY_BYTES = 2**36
_WRITES = os.O_WRONLY | os.O_RDWR
_EVENTS = "events.json"


@dataclass(frozen=True)
class Whole:
    """A run that nothing disturbed: exit code, seconds, events of each kind, and what came out."""

    code: int
    seconds: float
    events: dict[str, int]
    result: Any


@dataclass(frozen=True)
class Kill:
    """One kill and what was wrong once the same command had run again; empty for nothing."""

    job: str
    number: int
    how: How
    at: float
    faults: tuple[str, ...] = ()
    struck: bool = True


class Prover:
    """Kills jobs in folders of their own."""

    def __init__(self, inputs: Path, out: Path, *, seed: int = 0) -> None:
        self.inputs, self.out, self.seed = inputs, out, seed
        self.log = CaseLog(out / "kills.jsonl", seed)
        self._whole: dict[str, Whole] = {}
        out.mkdir(parents=True, exist_ok=True)

    def run(self, jobs: list[str], *, limit: int) -> Iterator[Kill]:
        """Kill each job so many times, in the four ways in turn."""
        done = (Kill(**{**row, "faults": tuple(row["faults"])}) for row in self.log.rows())
        before = {(kill.job, kill.number): kill for kill in done}
        for name in jobs:
            for number in range(limit):
                kill = before.get((name, number)) or self.kill(JOBS[name], number)
                if (name, number) not in before:
                    self.log.add(asdict(kill))
                yield kill

    def whole(self, job: Job) -> Whole:
        """Return the run of a job that nothing disturbs, made once. Raises: RuntimeError where it fails."""
        if job.name not in self._whole:
            folder = self.folder(job, "whole")
            ended = self.command(job, folder, around=lambda body: _counting(body, folder))
            if ended.code not in (0, 2) or ended.hung:
                raise RuntimeError(f"{job.name}: exit code {ended.code}: {ended.err[-2000:]}")
            events = json.loads((folder / _EVENTS).read_text())
            self._whole[job.name] = Whole(ended.code, ended.seconds, events, job.result(folder))
            shutil.rmtree(folder)
        return self._whole[job.name]

    def kill(self, job: Job, number: int, *, at: int | None = None, how: How | None = None) -> Kill:
        """Kill a job once, run it again, and look at what is there."""
        whole = self.whole(job)
        rng = random.Random(f"{self.seed}/{job.name}/{number}")
        chosen = how or HOWS[number % len(HOWS)]
        if chosen != "random" and not whole.events[chosen]:
            chosen = "random"
        where: float = rng.uniform(0, whole.seconds)
        if chosen != "random":
            where = at or rng.randrange(1, whole.events[chosen] + 1)
        folder = self.folder(job, str(number))
        if chosen == "random":
            ended = self.command(job, folder, limit_s=where, busy=False)
        else:
            ended = self.command(job, folder, around=lambda body: _killing(body, folder, chosen, int(where)))
        struck = ended.code == -signal.SIGKILL and not _is_finished(job, folder)
        if not struck:  # all was done: the same command would begin another run
            shutil.rmtree(folder)
            return Kill(job.name, number, chosen, where, struck=False)
        held = job.held(folder)
        again = self.command(job, folder)
        faults = tuple(faults_of(job, folder, whole, held=held, again=again))
        if faults:
            (folder / "stderr.txt").write_text(again.err, encoding="utf-8")
        else:
            shutil.rmtree(folder)
        return Kill(job.name, number, chosen, where, faults, struck)

    def folder(self, job: Job, name: str) -> Path:
        """Return a new folder with what the job needs to find in it."""
        folder = self.out / f"{job.name}-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if job.prepare is not None:
            job.prepare(self.inputs, folder)
        return folder

    def command(
        self,
        job: Job,
        folder: Path,
        *,
        around: Callable[[Callable[[], None]], Callable[[], None]] = lambda body: body,
        limit_s: float = LIMIT_S,
        busy: bool = True,
    ) -> Ended:
        """Run a job in its folder, with `around` about it, for so many seconds at most."""
        body = around(command_line(job.arguments(self.inputs)))
        return forked(
            body, folder=folder, scratch=self.out, limit_s=limit_s, memory_bytes=MEMORY_BYTES, busy=busy
        )


def faults_of(job: Job, folder: Path, whole: Whole, *, held: dict[str, Any], again: Ended) -> Iterator[str]:
    """Say what is wrong after a kill and the same command again."""
    if again.hung or again.code != whole.code:
        yield f"exit code {again.code} of the resume, not {whole.code}: {again.err.strip()[-300:]}"
        return
    kept = job.held(folder)
    # a resume may add lines, and begin a line's file again elsewhere, but never lose one
    if lost := [name for name, value in held.items() if kept.get(name) != value]:
        yield f"lost {len(lost)} of {len(held)} that were measured, the first {lost[0]}"
    if job.result(folder) != whole.result:
        yield "another result than without the kill"
    left = [path for place in (RESULTS, OUT) for path in (folder / place).rglob("*.tmp")]
    if left:
        yield f"{len(left)} temporary files, the first {left[0].relative_to(folder)}"
    if job.spec_file is not None:
        yield from _record_faults(job, folder)


def _records(job: Job, folder: Path) -> list[Path]:
    """Return the records of its own that a job made."""
    found = (folder / RESULTS).rglob(job.spec_file) if job.spec_file is not None else ()
    return sorted({path.parent for path in found})


def _is_finished(job: Job, folder: Path) -> bool:
    """Return whether a job's record was whole, report and all, when the kill came."""
    files = ("manifest.json", "report.md")
    return any(all((record / name).exists() for name in files) for record in _records(job, folder))


def _record_faults(job: Job, folder: Path) -> Iterator[str]:
    records = _records(job, folder)
    if len(records) != 1:
        yield f"{len(records)} records instead of one"
    for record in records:
        if not (record / "manifest.json").exists():
            yield f"{record.name} is not sealed"
        elif wrong := validate_record(record):
            yield f"{record.name} is not valid: {wrong[0]}"
        elif not (record / "report.md").exists():
            yield f"{record.name} has no report"
    for sealed in sorted({path.parent for path in (folder / RESULTS).rglob("manifest.json")} - {*records}):
        if wrong := validate_record(sealed):  # of another command, which this one ran
            yield f"{sealed.name} is not valid: {wrong[0]}"


def _inside(path: Any, folder: Path) -> bool:
    return isinstance(path, str | Path) and os.path.abspath(path).startswith(f"{folder}{os.sep}")


def _watched(folder: Path, seen: Callable[[str], None]) -> None:
    """Call `seen` before each opening of a file to write and each rename inside a folder, from now on."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and _inside(arguments[0], folder) and arguments[2] & _WRITES:
            seen("write")
        elif event == "os.rename" and _inside(arguments[1], folder):
            seen("rename")

    sys.addaudithook(hook)


def _counting(body: Callable[[], None], folder: Path) -> Callable[[], None]:
    """Return what runs a command and leaves how many events of each kind there were."""
    counts = {"write": 0, "rename": 0, "torn": 0}
    append = LineFile.append

    def count(kind: str) -> None:
        counts[kind] += 1

    def counted(lines: LineFile[Any], target: Path, *new: Any) -> None:
        counts["torn"] += 1
        append(lines, target, *new)

    def counting() -> None:
        _watched(folder, count)
        try:
            with patch.object(LineFile, "append", counted):
                body()
        finally:
            told = json.dumps(counts)
            (folder / _EVENTS).write_text(told)

    return counting


def _killing(body: Callable[[], None], folder: Path, how: How, at: int) -> Callable[[], None]:
    """Return what runs a command until the n-th event of a kind, and dies there as by kill -9."""
    left = [at]

    def seen(kind: str) -> None:
        if kind == how:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    append = LineFile.append

    def half(lines: LineFile[Any], target: Path, *new: Any) -> None:
        left[0] -= 1
        if left[0]:
            append(lines, target, *new)
            return
        data = lines._text(new).encode()
        with (target / lines.name).open("ab") as file:
            file.write(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def killing() -> None:
        if how == "torn":
            with patch.object(LineFile, "append", half):
                body()
            return
        _watched(folder, seen)
        body()

    return killing


@contextlib.contextmanager
def steady() -> Iterator[None]:
    """Let all runs see one state of the checkout, measure small limits, and wait for no other run."""
    from functools import cache

    from harness.device.machine import git_state
    from harness.tests.tiny_suite import small_device_limits

    with (
        patch("harness.device.machine.git_state", cache(git_state)),
        patch("harness.device.locks._YIELD_S", 0.0),
        patch("harness.training.joint.check_overlap"),
        patch("harness.training.workers.check_overlap"),
        small_device_limits(),
    ):
        yield

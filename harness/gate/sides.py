"""Both versions as processes that wait for requests, and the blocks that they decode in turn."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import ValidationError

import harness.measure.turns
from harness.errors import UserError
from harness.judge.gate.timed import is_marked
from harness.measure.turns import Fault, Ready, Request, Step, Text, Wanted
from harness.paths import without_paths
from harness.records.gate.record import SIDES, SideInfo, SideName, Turn
from harness.records.provenance import DeviceInfo
from harness.specs.gate import GateSpec


@dataclass(frozen=True)
class Side:
    """One version's process, loaded and waiting."""

    name: SideName
    ready: Ready
    process: subprocess.Popen[str]

    def step(self, request: Request) -> Step:
        """Return what came of a step. Raises: UserError where the process ended or failed."""
        return Step.model_validate_json(_exchange(self.process, request, name=self.name))

    def text(self, request: Request) -> Text:
        """Return a text at its end. Raises: UserError where the process ended or failed."""
        return Text.model_validate_json(_exchange(self.process, request, name=self.name))

    @property
    def info(self) -> SideInfo:
        """What its process told of it, as a record keeps it."""
        told = self.ready.model_dump(exclude={"code", "prompt_keys", "device"})
        known = {name: value for name, value in self.ready.device.items() if name in DeviceInfo.model_fields}
        return SideInfo(**told, device=DeviceInfo.model_validate(known))


@dataclass(frozen=True)
class Spent:
    """Seconds: of the clock, of all cores that were busy, of those busy for processes of the gate."""

    clock_s: float
    busy_s: float
    own_s: float

    @staticmethod
    def until_now(processes: Sequence[psutil.Process]) -> Spent:
        """Return what was spent until now; steal counts as busy, since others had those cores."""
        cores = psutil.cpu_times()
        idle_s = cores.idle + getattr(cores, "iowait", 0.0)
        guests_s = getattr(cores, "guest", 0.0) + getattr(cores, "guest_nice", 0.0)  # counted in user, too
        own = [one.cpu_times() for one in processes]
        own_s = sum(times.user + times.system for times in own)
        return Spent(time.perf_counter(), sum(cores) - idle_s - guests_s, own_s)

    def others_share(self, after: Spent) -> float:
        """Return the share of all cores' time between two moments that other processes used."""
        others_s = (after.busy_s - self.busy_s) - (after.own_s - self.own_s)
        cores_s = (after.clock_s - self.clock_s) * (psutil.cpu_count() or 1)
        return min(1.0, max(0.0, others_s / cores_s)) if cores_s > 0 else 0.0


def first_at(step: int) -> tuple[SideName, ...]:
    """Return which version takes a step first: the base at even ones, the head at odd ones."""
    return ("base", "head") if step % 2 == 0 else ("head", "base")


def take_block(
    sides: Mapping[SideName, Side], spec: GateSpec, *, number: int, prompt: int, scores: bool
) -> tuple[Turn, ...]:
    """Return the turns of one block: a prompt decoded with every arm by both versions.

    With `scores` the arms that draw decode it, too, each version after the other.
    """
    turns: list[Turn] = []
    for index, arm in enumerate(spec.timed_arms):
        turns += _duel(sides, spec, number=number, prompt=prompt, arm=arm.name, turned=number + index)
    for arm in spec.sampled_arms if scores else ():
        for name, side in sides.items():
            text = side.text(Request(do="score", prompt=prompt, arm=arm.name))
            turns.append(
                Turn(
                    block=number,
                    prompt_key=side.ready.prompt_keys[prompt],
                    arm=arm.name,
                    side=name,
                    purpose="scored",
                    step_s=(),
                    others_share=0.0,
                    **text.model_dump(),
                )
            )
    return tuple(turns)


@dataclass
class _Taken:
    """What one version's text has so far."""

    steps: list[Step]
    ended: bool


def _duel(
    sides: Mapping[SideName, Side], spec: GateSpec, *, number: int, prompt: int, arm: str, turned: int
) -> list[Turn]:
    """Let both versions decode a prompt, one step the one, one step the other."""
    processes = [psutil.Process(), *(psutil.Process(side.process.pid) for side in sides.values())]
    taken: dict[SideName, _Taken] = {}
    for name in (name for name in SIDES if name in sides):
        holds = not taken  # one of them holds the device for both
        first = sides[name].step(Request(do="begin", prompt=prompt, arm=arm, holds=holds))
        taken[name] = _Taken([], first.ended)
    before, step = Spent.until_now(processes), 0
    while not all(one.ended for one in taken.values()):
        marked = is_marked(step, mark_every=spec.mark_every)
        for name in first_at(step + turned):
            if name in taken and not taken[name].ended:
                done = sides[name].step(Request(do="step", marked=marked))
                taken[name].steps.append(done)
                taken[name].ended = done.ended
        step += 1
    others = before.others_share(Spent.until_now(processes))
    return [
        _turn(sides[name], one, number=number, prompt=prompt, arm=arm, others=others)
        for name, one in taken.items()
    ]


def _turn(side: Side, taken: _Taken, *, number: int, prompt: int, arm: str, others: float) -> Turn:
    text = side.text(Request(do="end"))
    marked = [step.parts_s for step in taken.steps if step.parts_s]
    parts = sorted({part for one in marked for part in one})
    return Turn(
        block=number,
        prompt_key=side.ready.prompt_keys[prompt],
        arm=arm,
        side=side.name,
        purpose="timed",
        step_s=tuple(step.step_s for step in taken.steps),
        step_tokens=tuple(step.num_tokens for step in taken.steps),
        text_sha256=text.text_sha256,
        parts_s={part: tuple(one.get(part, 0.0) for one in marked) for part in parts},
        others_share=others,
        num_foreign=text.num_foreign,
        peak_memory_bytes=text.peak_memory_bytes,
    )


@contextlib.contextmanager
def started(folders: Mapping[SideName, Path], wanted: Wanted) -> Iterator[dict[SideName, Side]]:
    """Start the versions, and end them afterwards.

    Raises: UserError for a folder that is no checkout, a version that does not load, or one that runs other
    code than its folder's.
    """
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(_process(name, folders[name], wanted)) for name in folders}
        sides: dict[SideName, Side] = {}
        for name, process in processes.items():
            ready = Ready.model_validate_json(_exchange(process, None, name=name))
            if Path(ready.code) != folders[name].resolve():
                raise UserError(
                    found=f"a {name} that runs the code of another folder",
                    need="its own",
                    where=folders[name].name,
                    do="name the root of a checkout",
                )
            sides[name] = Side(name, ready, process)
        yield sides


@contextlib.contextmanager
def _process(name: SideName, folder: Path, wanted: Wanted) -> Iterator[subprocess.Popen[str]]:
    if not (folder / "harness" / "device" / "arms.py").is_file():
        raise UserError(
            found=f"no checkout of this project as {name}",
            need="a folder with harness/ and medusa_impl/",
            where=folder.name,
            do="name a revision that holds them",
        )
    words = wanted.model_copy(update={"gate_pid": os.getpid()}).model_dump_json()
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(harness.measure.turns.__file__)), words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder.resolve())},  # before what the environment has installed
    )
    try:
        yield process
    except BaseException:
        process.kill()  # what it still loads or decodes is of no use
        raise
    finally:
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone
            process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _exchange(process: subprocess.Popen[str], request: Request | None, *, name: str) -> str:
    """Send a request, where there is one, and return the answer's line."""
    assert process.stdin is not None and process.stdout is not None
    line = ""
    with contextlib.suppress(BrokenPipeError):
        if request is not None:
            process.stdin.write(request.model_dump_json() + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
    with contextlib.suppress(ValidationError):
        fault = without_paths(Fault.model_validate_json(line).fault)
        raise UserError(
            found=f"a {name} that does not run ({fault})",
            need="a version that can be loaded and decodes the gate's arms",
            where=f"the {name}'s process",
            do="name another --base" if name == "base" else None,
        )
    if not line:
        raise UserError(
            found=f"a {name} that ended without an answer",
            need="a version that can be loaded and decodes the gate's arms",
            where=f"the {name}'s process, whose own words stand above",
            do="name another --base" if name == "base" else None,
        )
    return line

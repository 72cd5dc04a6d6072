"""Run the acceptance of a GPU machine: its parts in order of worth, each under its own time limit.

Each part is a process of its own, for three reasons. It can be stopped in the middle of a kernel, a capture
or a compilation, and what it holds of the device goes with it. A defect of one, down to a segmentation fault,
leaves the others standing. And parts with commands of their own are those very commands, so that a record
which was cut off is resumed by the command as a user would type it.

This process itself never opens the device: a context of its own would take memory from the parts, and count
as another process on the GPU. It imports torch only once it runs a plan, for the locks of folders, so that
`--dry-run` is quick and works anywhere. What it does itself is to divide the time, to note each outcome, and
to seal.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from harness.errors import ExitCode, UserError
from harness.files import file_sha256, write_json
from harness.measure.gpu.outcome import newest_record, outcome_of, told_of
from harness.measure.gpu.process import Ended, run_child
from harness.measure.gpu.self_test import pytest_words, read_counts, test_files
from harness.paths import code_folder, resolve_path, without_paths
from harness.records.folder import MANIFEST_FILE
from harness.records.gpu.parts import ACCEPTED, PartResult
from harness.records.gpu.record import (
    CORPUS_FILE,
    GPU,
    KERNELS_FILE,
    TESTS_FILE,
    TRAINING_FILE,
    GpuManifest,
    GpuRecord,
    limits_of,
)
from harness.records.provenance import Provenance
from harness.records.store import NO_REPORT, Store
from harness.specs.gpu import (
    GpuSpec,
    KernelsPart,
    LatencyPart,
    LimitsPart,
    Part,
    RatesPart,
    SuitePart,
    TestsPart,
    schedule,
    time_for,
)
from harness.specs.latency import load_latency_spec
from harness.specs.suite import load_suite

_ORIGIN_LIMIT_S = 120.0  # to import torch from a slow disk
_HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}  # a plan for the CPU runs there, whatever else there is


@dataclass(frozen=True)
class GpuOptions:
    """What the command line may say about a run, besides the plan."""

    results: Path
    command: str = ""


@dataclass(frozen=True)
class _Job:
    """What a part starts, and where to look for what it leaves: a record's home, or files of this record."""

    words: list[str]
    home: Path | None = None
    files: tuple[str, ...] = field(default_factory=tuple)


def print_gpu_plan(spec: GpuSpec, *, console: Console) -> dict[str, float | None]:
    """Print what each part does and the seconds that it may take, and return these; nothing is started.

    None stands for a part that is left out for want of time where all before it take all of theirs.
    """
    planned, begins_s = schedule(spec), 0.0
    console.print(f"{spec.name}: {spec.description} On {spec.device}, at most {spec.minutes:g} minutes.")
    for one in spec.parts:
        given_s = planned[one.part]
        when = (
            "left out: too little time"
            if given_s is None
            else f"from {begins_s:.0f} s on, at most {given_s:.0f} s"
        )
        console.print(f"  {one.part}: {when}; {_what(one)}", highlight=False, markup=False, soft_wrap=True)
        begins_s += given_s or 0.0
    return planned


def _what(one: Part) -> str:
    """Return what a part does, in words."""
    if isinstance(one, TestsPart):
        return f"tests marked {one.marker}" if one.marker is not None else f"tests of {', '.join(one.files)}"
    if isinstance(one, LimitsPart):
        return f"read bandwidth and matrix throughput in {', '.join(one.dtypes)}"
    if isinstance(one, LatencyPart):
        return f"step times, {one.spec}"
    if isinstance(one, SuitePart):
        return f"{one.num_prompts} prompts of the suite {one.suite}"
    if isinstance(one, KernelsPart):
        return "races of kernels"
    return f"{one.corpus_s:g} s of a corpus and {one.num_steps} training steps a stage, {one.recipe}"


def run_gpu(spec: GpuSpec, *, spec_file: Path, options: GpuOptions, console: Console) -> Path:
    """Run a plan, or go on with the parts that a killed run left, and return its sealed record's folder.

    Raises: UserError where the machine has no device of the plan's kind, or a plan names a file that is not
    there; both before anything is begun.
    """
    from harness.device.locks import folder_held  # which imports torch

    started = time.monotonic()
    session = _Session(spec, spec_file, options, console, ends=started + 60 * spec.minutes)
    session.check_files()
    origin = session.origin()
    store = Store.open(options.results, kind=GPU, spec=spec, provenance=origin)
    if store.is_sealed:
        console.print(NO_REPORT.format(store.folder.name), soft_wrap=True)
        return store.folder
    with folder_held(store.folder):
        done = {result.part for result in store.lines()}
        left = [one for one in spec.parts if one.part not in done]
        for index, one in enumerate(left):
            result = session.run(one, later=left[index + 1 :], folder=store.folder.absolute())
            store.append(result)
            session.say(f"{one.part}: {result.outcome} after {result.elapsed_s:.0f} s: {result.told}")
        results = GpuRecord(store.folder).parts
        store.seal(
            GpuManifest,
            plan=spec.name,
            num_planned=len(spec.parts),
            num_accepted=sum(result.outcome in ACCEPTED for result in results),
            elapsed_s=time.monotonic() - started,
        )
    return store.folder


class _Session:
    """One run of a plan: where its files lie, when it ends."""

    def __init__(
        self, spec: GpuSpec, spec_file: Path, options: GpuOptions, console: Console, *, ends: float
    ) -> None:
        self.spec, self.base, self.console, self.ends = spec, spec_file.parent, console, ends
        self.results, self.command = options.results.absolute(), options.command
        self.environment = _HIDDEN if spec.device == "cpu" else {}

    def check_files(self) -> None:
        """Refuse a plan that names a file which is not there."""
        for one in self.spec.parts:
            if isinstance(one, LatencyPart | SuitePart | RatesPart):
                self._file(one)

    def origin(self) -> Provenance:
        """Return where the record will come from, as a process of its own sees the device.

        Raises: UserError where that is none of the plan's kind.
        """
        ended = self._child(["origin", self.command], limit_s=_ORIGIN_LIMIT_S)
        if ended.code != ExitCode.OK:
            raise UserError(
                found=ended.complaint or "no answer",
                need="a machine that PyTorch runs on",
                where="this machine",
            )
        origin = Provenance.model_validate_json(ended.last_line)
        if origin.device.kind != self.spec.device:
            raise UserError(
                found="no CUDA device",
                need=f"one that PyTorch {origin.packages.get('torch', '')} can use",
                where="this machine",
                do="run this where there is one, or see every part in small form with --device cpu",
            )
        return origin

    def run(self, one: Part, *, later: list[Part], folder: Path) -> PartResult:
        """Run one part in the time that is left for it, and return how it went."""
        left_s = self.ends - time.monotonic()
        limit_s = time_for([one, *later], left_s=left_s)
        if limit_s < one.least_s:
            told = f"{max(0.0, left_s):.0f} s of {self.spec.minutes:g} minutes are left, need {one.least_s:g}"
            return PartResult(part=one.part, outcome="skipped", elapsed_s=0, limit_s=limit_s, told=told)
        self.say(f"{one.part}: at most {limit_s:.0f} s; {_what(one)}")
        with tempfile.TemporaryDirectory() as scratch:
            try:
                job = self._job(one, folder=folder, limit_s=limit_s, scratch=Path(scratch))
            except UserError as error:
                told = without_paths(str(error))
                return PartResult(part=one.part, outcome="failed", elapsed_s=0, limit_s=limit_s, told=told)
            begun = time.time()
            ended = self._child(job.words, limit_s=limit_s)
            if (
                isinstance(one, TestsPart)
                and (counts := read_counts(Path(scratch) / "tests.xml")) is not None
            ):
                write_json(folder / TESTS_FILE, counts)
        record = newest_record(job.home, since=begun) if job.home is not None else None
        told = without_paths(told_of(one, ended, folder=folder, record=record))
        sealed = record / MANIFEST_FILE if record is not None else None
        return PartResult(
            part=one.part,
            outcome=outcome_of(one, ended, folder=folder, record=record),
            elapsed_s=ended.elapsed_s,
            limit_s=limit_s,
            told=told,
            record=record.relative_to(self.results).as_posix() if record is not None else None,
            manifest_sha256=file_sha256(sealed) if sealed is not None and sealed.is_file() else None,
            files=tuple(name for name in job.files if (folder / name).is_file()),
        )

    def _job(self, one: Part, *, folder: Path, limit_s: float, scratch: Path) -> _Job:
        if isinstance(one, TestsPart):
            files = test_files(one, checkout=code_folder().parent)
            words = pytest_words(one, files, report=scratch / "tests.xml")
            return _Job(["module", *words], files=(TESTS_FILE,))
        if isinstance(one, LimitsPart):
            names = tuple(limits_of(dtype) for dtype in one.dtypes)
            return _Job(["limits", str(folder), *one.dtypes], files=names)
        if isinstance(one, RatesPart):
            words = ["rates", str(folder), str(self._file(one)), str(one.corpus_s), str(one.num_steps)]
            return _Job([*words, self.command], files=(CORPUS_FILE, TRAINING_FILE))
        minutes = (limit_s - one.reserve_s) / 60
        if isinstance(one, KernelsPart):
            words = [
                "profile-kernels",
                "--time-budget",
                f"{minutes:.3f}",
                "--out",
                str(folder / KERNELS_FILE),
            ]
            return _Job(["module", "harness", *words], files=(KERNELS_FILE,))
        verb, file = one.part, self._file(one)
        words = ["reproduce" if verb == "suite" else verb, str(file), "--time-budget", f"{minutes:.3f}"]
        more = ["--limit", str(one.num_prompts)] if isinstance(one, SuitePart) else []
        home = (
            self.results / load_suite(file).name
            if isinstance(one, SuitePart)
            else self.results / "latency" / load_latency_spec(file).name
        )
        return _Job(["module", "harness", *words, *more, "--results", str(self.results)], home=home)

    def _file(self, one: LatencyPart | SuitePart | RatesPart) -> Path:
        named = (
            one.spec
            if isinstance(one, LatencyPart)
            else one.suite
            if isinstance(one, SuitePart)
            else one.recipe
        )
        return resolve_path(named, base_folder=self.base).absolute()

    def _child(self, words: list[str], *, limit_s: float) -> Ended:
        return run_child(
            words, limit_s=limit_s, environment=self.environment, say=lambda line: self.say(f"  {line}")
        )

    def say(self, line: str) -> None:
        """Print a line as it is."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

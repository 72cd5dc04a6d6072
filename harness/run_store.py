"""The folder of a run under way: append, resume, seal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel

from harness.config import SuiteSpec
from harness.environment import machine_slug
from harness.errors import UserError
from harness.plan import PlannedTrial
from harness.records import (
    Environment,
    Failure,
    Generation,
    Manifest,
    RunRecord,
    StepCost,
    TrialKey,
    file_sha256,
    read_outcomes,
    write_bytes,
    write_json,
)

_GENERATIONS, _ARM_STEPS = "generations.jsonl", "arm_steps.jsonl"
_PATH_KEYS = ("path", "adapter", "calibration_trace", "packed_corpus", "start_heads")
IDENTITY = ("commit", "dirty", "packages", "device", "engine", "dtype", "backbone_sha256", "heads_sha256", "prompts_sha256")


class RunStore:
    """One run's folder: what is done is on disk, line by line, and survives a kill at any byte."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def open(results: Path, *, suite: SuiteSpec, environment: Environment, resume: Path | None = None) -> RunStore:
        """Return the store to write to: an unfinished run of the same suite, commit, versions, device and data, else a new folder.

        Raises: UserError where `resume` names a run that is finished or that another commit, version or device began.
        """
        if resume is not None:
            if (resume / "manifest.json").exists():
                raise UserError(found="a finished run", need="an unfinished one", where=resume.name)
            if difference := _difference(resume, suite=suite, environment=environment):
                raise UserError(found=f"another {difference}", need="the one that began the run", where=resume.name, do="start a new run")
            return RunStore(resume)
        home = results / suite.name / machine_slug(environment.device)
        for folder in sorted(home.glob("*"), reverse=True) if home.exists() else []:
            unfinished = (folder / "environment.json").exists() and not (folder / "manifest.json").exists()
            if unfinished and _is_same_run(folder, suite=suite, environment=environment):
                return RunStore(folder)
        folder = home / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{(environment.commit or 'nocommit')[:8]}"
        folder.mkdir(parents=True)
        store = RunStore(folder)
        store.write_suite(suite)
        write_json(folder / "environment.json", environment)
        return store

    def write_suite(self, suite: SuiteSpec) -> None:
        """Write the suite as it is run, command-line changes included."""
        write_bytes(self.folder / "suite.toml", tomli_w.dumps(portable(suite)).encode())

    def append(self, outcome: Generation | Failure) -> None:
        """Append one outcome and flush it to disk."""
        append_line(self.folder / _GENERATIONS, outcome)

    def append_arm_steps(self, cost: StepCost) -> None:
        """Append separately timed steps of one arm."""
        append_line(self.folder / _ARM_STEPS, cost)

    def arm_steps(self) -> tuple[StepCost, ...]:
        """Return the separately timed steps so far."""
        path = self.folder / _ARM_STEPS
        if not path.exists():
            return ()
        return tuple(StepCost.model_validate_json(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))

    def prepare_resume(self, plan: Sequence[PlannedTrial]) -> tuple[set[int], dict[TrialKey, int]]:
        """Return the finished blocks and, for the others, how often each trial was tried.

        Torn last lines and temporary files are dropped; generations of a block that a kill cut short keep their tokens, and their
        timings are marked invalid.
        """
        path, arm_steps = self.folder / _GENERATIONS, self.folder / _ARM_STEPS
        for left_over in self.folder.glob("*.tmp"):
            left_over.unlink()
        if arm_steps.exists():  # else the next line would be appended to half a line
            whole, newline, _ = arm_steps.read_bytes().rpartition(b"\n")
            write_bytes(arm_steps, whole + newline)
        if not path.exists():
            return set(), {}
        outcomes = read_outcomes(path, allow_torn_tail=True)
        blocks: dict[int, set[TrialKey]] = {}
        block_of: dict[TrialKey, int] = {}
        for planned in plan:
            blocks.setdefault(planned.block, set()).add(planned.trial)
            block_of[planned.trial] = planned.block
        done = {outcome.trial for outcome in outcomes if isinstance(outcome, Failure) or outcome.timing_valid}
        finished = {block for block, trials in blocks.items() if trials <= done}
        kept = [
            outcome.model_copy(update={"timing_valid": False})
            if isinstance(outcome, Generation) and block_of[outcome.trial] not in finished
            else outcome
            for outcome in outcomes
        ]
        write_bytes(path, "".join(outcome.model_dump_json() + "\n" for outcome in kept).encode())
        attempts: dict[TrialKey, int] = {}
        for outcome in kept:
            attempts[outcome.trial] = max(attempts.get(outcome.trial, 0), outcome.attempt + 1)
        return finished, attempts

    def seal(self, *, suite: str, num_planned: int, elapsed_s: float, peak_memory_bytes: int) -> Manifest:
        """Write the manifest, last of all."""
        record = RunRecord(self.folder)
        names = sorted(path.name for path in self.folder.iterdir() if path.is_file() and path.name not in ("manifest.json", "report.md"))
        manifest = Manifest(
            suite=suite,
            num_planned=num_planned,
            num_generations=len(record.generations),
            num_failures=len(record.failures),
            finished_utc=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            elapsed_s=elapsed_s,
            peak_memory_bytes=peak_memory_bytes,
            sha256={name: file_sha256(self.folder / name) for name in names if not name.endswith(".tmp")},
        )
        write_json(self.folder / "manifest.json", manifest)
        return manifest


def portable(suite: BaseModel) -> dict[str, Any]:
    """Return a suite as a record keeps it: absolute paths, which name a machine or a user, cut to their last part."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: Path(inner).name if key in _PATH_KEYS and Path(inner).is_absolute() else cut(inner) for key, inner in value.items()
            }
        return [cut(inner) for inner in value] if isinstance(value, list) else value

    data: dict[str, Any] = cut(suite.model_dump(mode="json", exclude_none=True))
    return data


def _is_same_run(folder: Path, *, suite: SuiteSpec, environment: Environment) -> bool:
    try:
        return _difference(folder, suite=suite, environment=environment) is None
    except UserError:
        return False  # what another version or a damaged disk left must not stop a new run


def _difference(folder: Path, *, suite: SuiteSpec, environment: Environment) -> str | None:
    record = RunRecord(folder)
    if record.suite != SuiteSpec.model_validate(portable(suite)):
        return "suite"
    theirs = record.environment
    return next((name for name in IDENTITY if getattr(theirs, name) != getattr(environment, name)), None)


def append_line(path: Path, record: BaseModel) -> None:
    """Append a record as one line of JSON and flush it to disk."""
    with path.open("a") as file:
        file.write(record.model_dump_json() + "\n")
        file.flush()
        os.fsync(file.fileno())

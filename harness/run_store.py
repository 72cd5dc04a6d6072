"""The folder of a run under way: append, resume, seal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel

from harness.config import SuiteSpec
from harness.device.machine import machine_slug
from harness.errors import UserError
from harness.files import file_sha256, write_bytes, write_json
from harness.measure.plan import PlannedTrial
from harness.records import Environment, Failure, Generation, Manifest, RunRecord, StepCost, TrialKey, read_outcomes

_GENERATIONS, _ARM_STEPS = "generations.jsonl", "arm_steps.jsonl"
_PATH_KEYS = ("path", "adapter", "calibration_trace", "packed_corpus", "start_heads", "heads_path")
IDENTITY = ("commit", "dirty", "packages", "device", "engine", "dtype", "backbone_sha256", "heads_sha256", "tuned", "prompts_sha256")


class RunStore:
    """One run's folder: what is done is on disk, line by line, and survives a kill at any byte."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def open(results: Path, *, suite: SuiteSpec, environment: Environment, resume: Path | None = None) -> RunStore:
        """Return the store to write to: an unfinished run of the same suite, commit, versions, device and data, else a new folder.

        Raises: UserError where `resume` names a run that is finished or that another commit, version or device began.
        """
        folder, is_new = open_folder(
            results / suite.name / machine_slug(environment.device),
            commit=environment.commit,
            difference=lambda folder: _difference(folder, suite=suite, environment=environment),
            resume=resume,
        )
        store = RunStore(folder)
        if is_new:
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
        drop_left_overs(self.folder)
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
        manifest = Manifest(
            suite=suite,
            num_planned=num_planned,
            num_generations=len(record.generations),
            num_failures=len(record.failures),
            finished_utc=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            elapsed_s=elapsed_s,
            peak_memory_bytes=peak_memory_bytes,
            sha256=hashes(self.folder),
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


def open_folder(
    home: Path, *, commit: str | None, difference: Callable[[Path], str | None], resume: Path | None, noun: str = "run"
) -> tuple[Path, bool]:
    """Return the folder to write to and whether it is new: the one to `resume`, the newest unfinished one of the same run, or a new one.

    `difference` names what a folder's run was begun with that this one has otherwise, None where there is nothing.
    Raises: UserError where `resume` names a run that is finished or another one.
    """
    if resume is not None:
        if (resume / "manifest.json").exists():
            raise UserError(found=f"a finished {noun}", need="an unfinished one", where=resume.name)
        if other := difference(resume):
            need = f"the one that began the {noun}"
            raise UserError(found=f"another {other}", need=need, where=resume.name, do=f"start a new {noun}")
        return resume, False
    for folder in sorted(home.glob("*"), reverse=True) if home.exists() else []:
        if (folder / "manifest.json").exists():
            continue
        with contextlib.suppress(UserError):  # what another version or a damaged disk left must not stop a new run
            if difference(folder) is None:
                return folder, False
    folder = home / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{(commit or 'nocommit')[:8]}"
    folder.mkdir(parents=True)
    return folder, True


def other_than(begun: BaseModel, now: BaseModel, *, names: Sequence[str] = IDENTITY) -> str | None:
    """Return the first of `names` in which two descriptions of a run differ."""
    return next((name for name in names if getattr(begun, name) != getattr(now, name)), None)


def drop_left_overs(folder: Path) -> None:
    """Remove the temporary files that a kill left."""
    for left_over in folder.glob("*.tmp"):
        left_over.unlink()


def hashes(folder: Path, *, unsealed: Sequence[str] = ("manifest.json", "report.md")) -> dict[str, str]:
    """Return the SHA-256 of every file that a manifest seals: all but itself and what can be made from the others again."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in unsealed)
    return {name: file_sha256(folder / name) for name in names if not name.endswith(".tmp")}


def _difference(folder: Path, *, suite: SuiteSpec, environment: Environment) -> str | None:
    record = RunRecord(folder)
    if record.suite != SuiteSpec.model_validate(portable(suite)):
        return "suite"
    return other_than(record.environment, environment)


def append_line(path: Path, record: BaseModel) -> None:
    """Append a record as one line of JSON and flush it to disk."""
    with path.open("a") as file:
        file.write(record.model_dump_json() + "\n")
        file.flush()
        os.fsync(file.fileno())

"""The folder of a latency run under way: append points, resume, seal."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import tomli_w

from harness.environment import machine_slug
from harness.errors import UserError
from harness.latency import POINTS_FILE, LatencyManifest, LatencyPoint, LatencyRecord, read_points
from harness.latency_specs import LatencySpec, PointKey
from harness.records import Environment, file_sha256, write_bytes, write_json
from harness.run_store import (
    IDENTITY,
    portable,
)  # one rule for both kinds of record: what a run is known by, and what may be written of it

_UNSEALED = ("manifest.json", "report.md")


class LatencyStore:
    """One run's folder: measured points are on disk, line by line, and survive a kill at any byte."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def open(results: Path, *, spec: LatencySpec, environment: Environment, resume: Path | None = None) -> LatencyStore:
        """Return the store to write to: an unfinished run of the same spec, commit, versions, device and weights, else a new folder.

        Raises: UserError where `resume` names a run that is finished or that another spec, commit, version or device began.
        """
        if resume is not None:
            if (resume / "manifest.json").exists():
                raise UserError(found="a finished run", need="an unfinished one", where=resume.name)
            if difference := _difference(resume, spec=spec, environment=environment):
                raise UserError(found=f"another {difference}", need="the one that began the run", where=resume.name, do="start a new run")
            return LatencyStore(resume)
        home = results / "latency" / spec.name / machine_slug(environment.device)
        for folder in sorted(home.glob("*"), reverse=True):
            unfinished = (folder / "environment.json").exists() and not (folder / "manifest.json").exists()
            if unfinished and _is_same_run(folder, spec=spec, environment=environment):
                return LatencyStore(folder)
        folder = home / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{(environment.commit or 'nocommit')[:8]}"
        folder.mkdir(parents=True)
        write_bytes(folder / "spec.toml", tomli_w.dumps(portable(spec)).encode())
        write_json(folder / "environment.json", environment)
        return LatencyStore(folder)

    def prepare(self) -> set[PointKey]:
        """Return what is on disk already; half a last line and temporary files, left by a kill, are dropped."""
        for left_over in self.folder.glob("*.tmp"):
            left_over.unlink()
        path = self.folder / POINTS_FILE
        if not path.exists():
            return set()
        points = read_points(path, allow_torn_tail=True)
        write_bytes(path, "".join(_line(point) for point in points).encode())
        return {point.key for point in points}

    def append(self, points: Iterable[LatencyPoint]) -> None:
        """Append points and flush them to disk."""
        with (self.folder / POINTS_FILE).open("a") as file:
            for point in points:
                file.write(_line(point))
            file.flush()
            os.fsync(file.fileno())

    def seal(self, *, num_planned: int, elapsed_s: float, peak_memory_bytes: int) -> LatencyManifest:
        """Write the manifest, last of all."""
        record = LatencyRecord(self.folder)
        skipped = sum(point.skipped is not None for point in record.points)
        names = sorted(path.name for path in self.folder.iterdir() if path.is_file() and path.name not in _UNSEALED)
        manifest = LatencyManifest(
            spec=record.spec.name,
            num_planned=num_planned,
            num_measured=len(record.points) - skipped,
            num_skipped=skipped,
            finished_utc=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            elapsed_s=elapsed_s,
            peak_memory_bytes=peak_memory_bytes,
            sha256={name: file_sha256(self.folder / name) for name in names if not name.endswith(".tmp")},
        )
        write_json(self.folder / "manifest.json", manifest)
        return manifest


def _line(point: LatencyPoint) -> str:
    return point.model_dump_json(exclude_none=True) + "\n"


def _is_same_run(folder: Path, *, spec: LatencySpec, environment: Environment) -> bool:
    try:
        return _difference(folder, spec=spec, environment=environment) is None
    except UserError:
        return False  # what another version or a damaged disk left must not stop a new run


def _difference(folder: Path, *, spec: LatencySpec, environment: Environment) -> str | None:
    record = LatencyRecord(folder)
    if record.spec != LatencySpec.model_validate(portable(spec)):
        return "spec"
    return next((name for name in IDENTITY if getattr(record.environment, name) != getattr(environment, name)), None)

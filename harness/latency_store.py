"""The folder of a latency run under way: append points, resume, seal."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import tomli_w

from harness.compose.curve import POINTS_FILE, LatencyManifest, LatencyPoint, LatencyRecord, read_points
from harness.device.machine import machine_slug
from harness.files import write_bytes, write_json
from harness.latency_specs import LatencySpec, PointKey
from harness.records import Environment
from harness.run_store import drop_left_overs, hashes, open_folder, other_than, portable


class LatencyStore:
    """One run's folder: measured points are on disk, line by line, and survive a kill at any byte."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def open(results: Path, *, spec: LatencySpec, environment: Environment, resume: Path | None = None) -> LatencyStore:
        """Return the store to write to: an unfinished run of the same spec, commit, versions, device and weights, else a new folder.

        Raises: UserError where `resume` names a run that is finished or that another spec, commit, version or device began.
        """
        folder, is_new = open_folder(
            results / "latency" / spec.name / machine_slug(environment.device),
            commit=environment.commit,
            difference=lambda folder: _difference(folder, spec=spec, environment=environment),
            resume=resume,
        )
        if is_new:
            write_bytes(folder / "spec.toml", tomli_w.dumps(portable(spec)).encode())
            write_json(folder / "environment.json", environment)
        return LatencyStore(folder)

    def prepare(self) -> set[PointKey]:
        """Return what is on disk already; half a last line and temporary files, left by a kill, are dropped."""
        drop_left_overs(self.folder)
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
        manifest = LatencyManifest(
            spec=record.spec.name,
            num_planned=num_planned,
            num_measured=len(record.points) - skipped,
            num_skipped=skipped,
            finished_utc=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            elapsed_s=elapsed_s,
            peak_memory_bytes=peak_memory_bytes,
            sha256=hashes(self.folder),
        )
        write_json(self.folder / "manifest.json", manifest)
        return manifest


def _line(point: LatencyPoint) -> str:
    return point.model_dump_json(exclude_none=True) + "\n"


def _difference(folder: Path, *, spec: LatencySpec, environment: Environment) -> str | None:
    record = LatencyRecord(folder)
    if record.spec != LatencySpec.model_validate(portable(spec)):
        return "spec"
    return other_than(record.environment, environment)

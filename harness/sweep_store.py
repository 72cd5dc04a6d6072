"""The folder of a sweep under way: append cells, resume, seal."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w

from harness.device.machine import machine_slug
from harness.errors import UserError
from harness.files import write_bytes, write_json
from harness.run_store import drop_left_overs, hashes, open_folder, other_than, portable
from harness.sweep_record import (
    CELLS_FILE,
    ORIGIN_FILE,
    SPEC_FILE,
    TREES_FILE,
    AnyCell,
    SweepManifest,
    SweepOrigin,
    SweepRecord,
    SweepTrees,
    read_cells,
)
from harness.sweep_specs import SweepSpec

IDENTITY = ("commit", "dirty", "packages", "device", "executor", "inputs", "trace", "calibration")
_PATHS = ("suite", "trace", "calibration_trace")


class SweepStore:
    """One sweep's folder: a cell that is done is on disk, and survives a kill at any byte."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def open(results: Path, *, spec: SweepSpec, origin: SweepOrigin, resume: Path | None = None) -> SweepStore:
        """Return the store to write to: an unfinished sweep of the same spec, commit, versions, device and inputs, else a new folder.

        Raises: UserError where `resume` names a sweep that is finished or that another spec, commit, version, device or input began.
        """
        folder, is_new = open_folder(
            results / "sweep" / spec.name / machine_slug(origin.device),
            commit=origin.commit,
            difference=lambda folder: _difference(folder, spec=spec, origin=origin),
            resume=resume,
            noun="sweep",
        )
        if is_new:
            write_bytes(folder / SPEC_FILE, tomli_w.dumps(portable_spec(spec)).encode())
            write_json(folder / ORIGIN_FILE, origin)
        return SweepStore(folder)

    def prepare(self, trees: SweepTrees) -> frozenset[str]:
        """Write the trees, drop half a last line and temporary files that a kill left, and return the keys of the cells that are done.

        Raises: UserError where the sweep was begun with other trees: cells name trees by their place.
        """
        drop_left_overs(self.folder)
        if (self.folder / TREES_FILE).exists():
            if SweepRecord(self.folder).trees.trees != trees.trees:
                need = "those that the sweep began with"
                raise UserError(found="other trees", need=need, where=self.folder.name, do="start a new sweep")
        else:
            write_bytes(self.folder / TREES_FILE, (trees.model_dump_json() + "\n").encode())  # one line: it holds a thousand paths
        path = self.folder / CELLS_FILE
        cells = read_cells(path, allow_torn_tail=True) if path.exists() else ()
        write_bytes(path, "".join(map(_line, cells)).encode())
        return frozenset(cell.key for cell in cells)

    def append(self, cell: AnyCell) -> None:
        """Append one cell and flush it to disk."""
        with (self.folder / CELLS_FILE).open("a") as file:
            file.write(_line(cell))
            file.flush()
            os.fsync(file.fileno())

    def seal(self, *, num_planned: int, elapsed_s: float) -> SweepManifest:
        """Write the manifest, last of all."""
        record = SweepRecord(self.folder)
        manifest = SweepManifest(
            sweep=record.spec.name,
            num_planned=num_planned,
            num_done=len(record.cells) - len(record.failed),
            num_failed=len(record.failed),
            num_points=record.num_points,
            finished_utc=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            elapsed_s=elapsed_s,
            sha256=hashes(self.folder),
        )
        write_json(self.folder / "manifest.json", manifest)
        return manifest


def portable_spec(spec: SweepSpec) -> dict[str, Any]:
    """Return a spec as a record keeps it: absolute paths, which name a machine or a user, cut to their last part."""
    data = portable(spec)
    latency = data.get("cluster", {}).get("latency")
    if latency is not None and Path(latency).is_absolute():
        data["cluster"] = {**data["cluster"], "latency": Path(latency).name}
    return data | {name: Path(data[name]).name for name in _PATHS if Path(data[name]).is_absolute()}


def _line(cell: AnyCell) -> str:
    return cell.model_dump_json() + "\n"


def _difference(folder: Path, *, spec: SweepSpec, origin: SweepOrigin) -> str | None:
    record = SweepRecord(folder)
    if record.spec != SweepSpec.model_validate(portable_spec(spec)):
        return "spec"
    return other_than(record.origin, origin, names=IDENTITY)

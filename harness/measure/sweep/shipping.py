"""What travels to a node of a cluster, and what comes back."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from harness.files import DataPath, ModelFolder, with_paths, write_json
from harness.measure.sweep.node import Shipment
from harness.measure.sweep.tasks import CellInputs
from harness.paths import resolve_path
from harness.records.latency import LatencyRecord
from harness.records.machines.comparable import MeasuredMachine
from harness.records.machines.identity import machine_slug
from harness.records.opened import machine_of
from harness.records.store import hashes, new_folder
from harness.specs.suite import SuiteSpec

_PACKAGES = ("harness", "medusa_impl", "suites")
_NOT_SHIPPED = ("__pycache__", "tests", "corpus.safetensors")


@contextmanager
def code_to_ship() -> Iterator[Path]:
    """Give a temporary folder with the project's packages and their data, for Ray to copy to the nodes.

    As a working directory it comes first there; with modules alone Ray would put this process's own folder
    before them, and a node that has something else there would run that.
    """
    with tempfile.TemporaryDirectory() as temporary:
        for name in _PACKAGES:
            shutil.copytree(
                str(resources.files(name)),
                Path(temporary) / name,
                ignore=shutil.ignore_patterns(*_NOT_SHIPPED),
            )
        yield Path(temporary)


def ship(inputs: CellInputs) -> Shipment:
    """Return what nodes need of a sweep, with the files that its suite names."""
    data, files = packed(inputs.suite, base_folder=inputs.base_folder)
    inputs = replace(inputs, suite=SuiteSpec.model_validate(data), base_folder=Path())
    digest = hashlib.sha256(pickle.dumps((inputs, files))).hexdigest()
    return Shipment(digest=digest, inputs=inputs, files=files)


def packed(spec: BaseModel, *, base_folder: Path | None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return a spec's data with its paths in a folder of their own, and these files by name.

    A model's folder is not packed: it has to lie at the same path on every node.
    Raises: UserError where a file is missing.
    """
    files: dict[str, bytes] = {}

    def place(path: DataPath) -> str:
        if isinstance(path, ModelFolder):
            return str(((base_folder or Path()) / path).absolute())
        found, given = resolve_path(path, base_folder=base_folder), Path(path)
        name = (
            f"{len(files)}/{found.name}" if given.is_absolute() or ".." in given.parts else given.as_posix()
        )
        members = [found] if found.is_file() else sorted(one for one in found.rglob("*") if one.is_file())
        files.update({(Path(name) / one.relative_to(found)).as_posix(): one.read_bytes() for one in members})
        return name

    return with_paths(spec, place), files


def measured_machines(results: Path, *, name: str) -> Iterator[MeasuredMachine]:
    """Yield the machines of which there is a sealed latency record of a spec."""
    for manifest in results.glob(f"latency/{name}/*/*/manifest.json"):
        yield machine_of(LatencyRecord.open(manifest.parent))


def keep_record(
    results: Path, files: Mapping[str, bytes], *, checkout: tuple[str | None, bool | None]
) -> Path:
    """Write the files of a latency record that a node measured, and return its folder.

    All are written or none. `checkout` is the commit of the code that was shipped, which is no checkout on
    the node, and whether files differed from it.
    Raises: UserError where the record is not sealed, or not as it was sealed.
    """
    home = results / "latency"
    home.mkdir(parents=True, exist_ok=True)
    commit, dirty = checkout
    with tempfile.TemporaryDirectory(prefix=".incoming-", dir=home) as temporary:
        part = Path(temporary) / "record"
        part.mkdir()
        for name, content in files.items():
            (part / name).write_bytes(content)
        arrived = LatencyRecord.open(part)
        manifest = arrived.manifest
        assert manifest is not None  # it is sealed
        write_json(
            part / "environment.json",
            arrived.environment.model_copy(update={"commit": commit, "dirty": dirty}),
        )
        write_json(part / "manifest.json", manifest.model_copy(update={"sha256": hashes(part)}))
        record = LatencyRecord.open(part)
        began = record.environment.started_utc.replace("-", "").replace(":", "")
        of_machine = home / record.spec.name / machine_slug(record.environment.device)
        folder = new_folder(of_machine, f"{began}-{(commit or 'nocommit')[:8]}")
        part.replace(folder)
    return folder

"""Whether the record of a GPU machine's acceptance is sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from harness.judge.validate.faults import load_faults, path_faults, place_faults, repeated, seal_faults
from harness.records.gpu.parts import ACCEPTED
from harness.records.gpu.record import (
    CORPUS_FILE,
    KERNELS_FILE,
    ORIGIN_FILE,
    PARTS_FILE,
    PLAN_FILE,
    TESTS_FILE,
    TRAINING_FILE,
    GpuRecord,
)


def gpu_faults(folder: Path) -> tuple[str, ...]:
    """Return every fault of an acceptance's record; the records of its parts are validated as their kinds."""
    record = GpuRecord(folder)
    loaders: dict[str, Callable[[], object]] = {
        PLAN_FILE: lambda: record.spec,
        ORIGIN_FILE: lambda: record.origin,
        PARTS_FILE: lambda: record.parts,
        "device_limits": lambda: record.limits,
        TESTS_FILE: lambda: record.tests,
        CORPUS_FILE: lambda: record.corpus,
        TRAINING_FILE: lambda: record.training,
        KERNELS_FILE: lambda: record.kernels,
        "manifest.json": lambda: record.manifest,
    }
    return load_faults(loaders) or (
        *seal_faults(record),
        *_part_faults(record),
        *_count_faults(record),
        *place_faults(record.origin, file=ORIGIN_FILE),
        *path_faults(record.spec, file=PLAN_FILE),
    )


def _part_faults(record: GpuRecord) -> Iterator[str]:
    """Yield parts that the plan does not have, that are there twice, or whose files are not there."""
    planned = [one.part for one in record.spec.parts]
    yield from repeated((result.part for result in record.parts), file=PARTS_FILE, noun="part")
    for number, result in enumerate(record.parts, start=1):
        where = f"{PARTS_FILE}:{number}"
        if result.part not in planned:
            yield f"{where}: found part {result.part!r}, need one of {PLAN_FILE}"
        for name in result.files:
            if not record.file(name).exists():
                yield f"{where}: found no {name}, need the file that the part wrote"
        if result.outcome in ACCEPTED and result.record is None and not result.files:
            yield f"{where}: found part {result.part!r} ended well without a record or file, need one"
        if result.outcome == "ok" and result.record is not None and result.manifest_sha256 is None:
            yield f"{where}: found no hash of the manifest in {result.record}, need that of a sealed record"
        yield from path_faults(result, file=where)


def _count_faults(record: GpuRecord) -> Iterator[str]:
    manifest = record.manifest
    if manifest is None:
        return
    if len(record.parts) != manifest.num_planned:
        yield (
            f"{PARTS_FILE}: found {len(record.parts)} of {manifest.num_planned} planned parts, need all (to "
            "mend it: resume the run)"
        )
    accepted = sum(result.outcome in ACCEPTED for result in record.parts)
    if accepted != manifest.num_accepted:
        yield f"{PARTS_FILE}: found {accepted} parts that ended well, need as many as in manifest.json"

"""Whether the record of a latency run is sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from harness.judge.validate.faults import (
    fault_of,
    load_faults,
    path_faults,
    place_faults,
    repeated,
    seal_faults,
)
from harness.records.latency import BATCHES_FILE, MODES_FILE, POINTS_FILE, LatencyRecord


def latency_faults(folder: Path) -> tuple[str, ...]:
    """Return every fault of a latency record."""
    record = LatencyRecord(folder)
    loaders: dict[str, Callable[[], object]] = {
        "spec.toml": lambda: record.spec,
        "environment.json": lambda: record.environment,
        "model.json": lambda: record.facts,
        POINTS_FILE: lambda: record.points,
        MODES_FILE: lambda: record.modes,
        BATCHES_FILE: lambda: record.batches,
        "manifest.json": lambda: record.manifest,
    }
    if fault_of(lambda: record.spec) is None:  # the spec says which dtypes there are limits of
        loaders["device_limits.json"] = lambda: [record.limits(dtype) for dtype in record.spec.dtypes]
    return load_faults(loaders) or (
        *seal_faults(record),
        *_count_faults(record),
        *_point_faults(record),
        *_table_faults(record),
        *place_faults(record.environment, file="environment.json"),
        *path_faults(record.spec, file="spec.toml"),
    )


def _count_faults(record: LatencyRecord) -> Iterator[str]:
    manifest, skipped = record.manifest, sum(point.skipped is not None for point in record.points)
    if manifest is None:
        return
    if (manifest.num_measured, manifest.num_skipped) != (len(record.points) - skipped, skipped):
        yield (
            f"{POINTS_FILE}: found {len(record.points)} points, {skipped} skipped, need as many as in "
            "manifest.json"
        )
    if len(record.points) != manifest.num_planned:
        yield (
            f"{POINTS_FILE}: found {len(record.points)} of {manifest.num_planned} planned points, need all "
            "(to mend it: resume the run)"
        )


def _point_faults(record: LatencyRecord) -> Iterator[str]:
    """Yield points that the spec does not ask for, or more than once, or that tell nothing or two things."""
    if any(repeated((point.key for point in record.points), file=POINTS_FILE, noun="point")):
        yield f"{POINTS_FILE}: found a point twice, need each once"
    for number, point in enumerate(record.points, start=1):
        if point.key not in record.spec.points(point.dtype, (point.mode,)):
            yield f"{POINTS_FILE}:{number}: found a point that spec.toml does not ask for, need one of its"
        if bool(point.backbone_s) == (point.skipped is not None):
            what = "times and a reason to skip" if point.backbone_s else "neither times nor a reason"
            yield f"{POINTS_FILE}:{number}: found {what}, need one"


def _table_faults(record: LatencyRecord) -> Iterator[str]:
    """Yield trials of the two tables that are there twice, or whose counts and times do not agree."""
    for index, trial in enumerate(record.modes.trials if record.modes is not None else (), start=1):
        if len(trial.step_times_s) != len(trial.step_tokens):
            found = f"found {len(trial.step_times_s)} step times, need {len(trial.step_tokens)}, one a step"
            yield f"{MODES_FILE}: trial {index}: {found}"
        if sum(trial.step_tokens) != len(trial.token_ids) - 1:
            found = f"found steps of {sum(trial.step_tokens)} tokens together"
            yield f"{MODES_FILE}: trial {index}: {found}, need {len(trial.token_ids) - 1}, all but the first"
    if record.modes is not None:
        keys = ((trial.dtype, trial.mode, trial.prompt_key) for trial in record.modes.trials)
        yield from repeated(keys, file=MODES_FILE, noun="trial")
    if record.batches is not None:
        groups = (
            (trial.method, trial.batch, trial.round, trial.prompt_keys) for trial in record.batches.trials
        )
        yield from repeated(groups, file=BATCHES_FILE, noun="trial")

"""Whether the record of an ablation is sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

from harness.judge.validate.faults import (
    fault_of,
    load_faults,
    path_faults,
    place_faults,
    seal_faults,
)
from harness.records.ablation import ARMS_FILE, AblationRecord, ArmResult
from harness.specs.ablation import START_ARM


def ablation_faults(folder: Path) -> tuple[str, ...]:
    """Return every fault of an ablation's record."""
    record = AblationRecord(folder)
    loaders: dict[str, Callable[[], object]] = {
        "suite.toml": lambda: record.spec,
        "environment.json": lambda: record.environment,
        "tree.json": lambda: record.tree.tree(),
        ARMS_FILE: lambda: record.results,
        "manifest.json": lambda: record.manifest,
    }
    return load_faults(loaders) or (
        *seal_faults(record),
        *_arm_faults(record),
        *(fault for result in record.results for fault in _file_faults(record, result)),
        *place_faults(record.environment, file="environment.json"),
        *path_faults(record.spec, file="suite.toml"),
    )


def _arm_faults(record: AblationRecord) -> Iterator[str]:
    """Yield arms that the suite does not plan, that are there twice, or that are missing."""
    done, planned = [(result.arm, result.seed) for result in record.results], record.spec.plan()
    if unplanned := sorted({str(one) for one in done if one not in planned or done.count(one) > 1}):
        yield f"{ARMS_FILE}: found {unplanned[0]}, need each planned arm and seed once"
    if record.manifest is None:
        return
    if record.manifest.num_arms != len(done):
        yield f"{ARMS_FILE}: found {len(done)} arms, need as many as in manifest.json"
    if len(done) < record.manifest.num_planned:
        found = f"found {len(done)} of {record.manifest.num_planned} planned arms and seeds"
        yield f"{ARMS_FILE}: {found}, need all (to mend it: resume the run)"


def _file_faults(record: AblationRecord, result: ArmResult) -> Iterator[str]:
    """Yield what is wrong with the traces and the step log of one arm."""
    if (fault := fault_of(partial(record.trace, result))) is not None:
        yield f"trace of {result.label}: {fault}"
    if (fault := fault_of(partial(record.original_text_trace, result))) is not None:
        yield f"trace of the original's text by {result.label}: {fault}"
    if (fault := fault_of(partial(record.steps, result))) is not None:
        yield f"steps of {result.label}: {fault}"
        return
    steps = record.steps(result)
    if result.arm != START_ARM and len(steps) != result.num_steps:
        yield f"steps of {result.label}: found {len(steps)}, need {result.num_steps}"
    if any(after.step <= before.step for before, after in pairwise(steps)):
        yield f"steps of {result.label}: found a step twice or out of order, need each once, in order"

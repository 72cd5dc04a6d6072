"""Whether the record of a sweep is sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from harness.judge.validate.faults import (
    load_faults,
    path_faults,
    place_faults,
    repeated,
    seal_faults,
)
from harness.records.sweep import CELLS_FILE, ORIGIN_FILE, SPEC_FILE, TREES_FILE, SweepRecord
from harness.records.sweep_cells import AnyCell, ComposedCell


def sweep_faults(folder: Path) -> tuple[str, ...]:
    """Return every fault of a sweep's record."""
    record = SweepRecord(folder)
    loaders: dict[str, Callable[[], object]] = {
        SPEC_FILE: lambda: record.spec,
        ORIGIN_FILE: lambda: record.origin,
        TREES_FILE: lambda: [one.tree() for one in record.trees.trees],
        CELLS_FILE: lambda: record.cells,
        "manifest.json": lambda: record.manifest,
    }
    return load_faults(loaders) or (
        *seal_faults(record),
        *_count_faults(record),
        *_rate_faults(record),
        *(
            f"{CELLS_FILE}:{number}: {fault}"
            for number, cell in enumerate(record.cells, start=1)
            for fault in _cell_faults(cell, num_trees=len(record.trees.trees))
        ),
        *place_faults(record.origin, file=ORIGIN_FILE),
        *path_faults(record.spec, file=SPEC_FILE),
    )


def _count_faults(record: SweepRecord) -> Iterator[str]:
    manifest, failed = record.manifest, len(record.failed)
    found = (len(record.cells) - failed, failed, record.num_points)
    if manifest is not None and (manifest.num_done, manifest.num_failed, manifest.num_points) != found:
        yield (
            f"{CELLS_FILE}: found {found[0]} cells, {failed} failed ones and {found[2]} points, need as "
            "many as in manifest.json"
        )
    if manifest is not None and len(record.cells) != manifest.num_planned:
        found_cells = f"found {len(record.cells)} of {manifest.num_planned} planned cells"
        yield f"{CELLS_FILE}: {found_cells}, need exactly these (to mend it: resume the sweep)"
    if len({one.key for one in record.cells}) != len(record.cells):
        yield f"{CELLS_FILE}: found a cell twice, need each once"


def _rate_faults(record: SweepRecord) -> Iterator[str]:
    """Yield trees without figures of their own, or with two."""
    trees = record.trees
    if len(trees.calibrated) != len(trees.trees):
        found = f"found {len(trees.calibrated)} calibrated figures"
        yield f"{TREES_FILE}: {found}, need {len(trees.trees)}, one a tree"
    yield from repeated(((rate.batch, rate.tree) for rate in trees.rates), file=TREES_FILE, noun="rate")
    if any(rate.tree >= len(trees.trees) for rate in trees.rates):
        yield f"{TREES_FILE}: found a rate of a tree that is not there, need one of the {len(trees.trees)}"


def _cell_faults(cell: AnyCell, *, num_trees: int) -> Iterator[str]:
    """Yield what is wrong with one cell: trees that are not there, columns of different lengths."""
    named = cell.trees if isinstance(cell, ComposedCell) else (getattr(cell, "tree", None),)
    if any(tree is not None and tree >= num_trees for tree in named):
        yield f"found a tree that is not in {TREES_FILE}, need one of its {num_trees}"
    if isinstance(cell, ComposedCell):
        columns = (cell.step_s, cell.tokens_per_s, cell.speedup, cell.speedup_low, cell.speedup_high)
        if {len(column) for column in columns} != {len(cell.trees)}:
            yield f"found columns of other lengths, need {len(cell.trees)} entries, one a tree"
        if len(set(cell.trees)) != len(cell.trees):
            yield "found a tree twice, need each once"

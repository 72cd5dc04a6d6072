"""Which tree for which batch: a table of a sweep's report, and the schedule that a server can read."""

from __future__ import annotations

from typing import Any

from harness.records.sweep import SweepRecord
from harness.records.sweep_cells import ComposedCell, ScheduledTree
from harness.report.formatting import ABSENT, paragraphs, ratio, significant, table

_NOTE = """\
Each batch's tree is the fastest at that batch's step times by the calibration text, and judged on the other
text, where a batch takes as many steps as its slowest row. *none*: plain decoding is the fastest. *a user*:
tokens/s of each row. Brackets hold bootstrap intervals over batches of prompts; a batch that takes all
prompts at once has none."""


def scheduled_cells(record: SweepRecord) -> tuple[ComposedCell, ...]:
    """Return the cells that hold a schedule: the curves of measured devices."""
    return tuple(one for one in record.composed if one.schedule)


def render_schedules(record: SweepRecord) -> str:
    """Return the tree of each batch on each measured device; empty where the record has none."""
    rows = [
        (
            cell.curve.device,
            f"{cell.curve.dtype}, {cell.curve.mode}",
            one.batch,
            *_tree_cells(record, one),
            significant(one.tokens_per_s),
            significant(one.tokens_per_s / one.batch),
            significant(one.vanilla_tokens_per_s),
            speedup_of(one),
        )
        for cell in scheduled_cells(record)
        for one in cell.schedule
    ]
    if not rows:
        return ""
    headers = ["device", "step times", "batch", "nodes", "depth", "tokens/s", "a user", "vanilla", "speedup"]
    return paragraphs(table(headers, rows), _NOTE)


def _tree_cells(record: SweepRecord, one: ScheduledTree) -> tuple[object, object]:
    tree = record.trees.trees[one.tree].tree()
    return (tree.num_nodes, tree.depth) if tree.depth else ("none", ABSENT)


def speedup_of(one: ScheduledTree) -> str:
    """Return a scheduled tree's speedup with its interval, where it has one."""
    if one.speedup_low is None or one.speedup_high is None:
        return ratio(one.speedup)
    return f"{one.speedup:.2f} [{one.speedup_low:.2f}, {one.speedup_high:.2f}]"


def schedule_data(record: SweepRecord) -> dict[str, Any]:
    """Return all schedules as data: by device, dtype and mode the tree of each batch as paths of ranks."""
    return {
        "schema_version": 1,
        "kind": "schedule",
        "sweep": record.folder.name,
        "model": record.spec.shape,
        "schedules": [
            {
                "device": cell.curve.device,
                "dtype": cell.curve.dtype,
                "mode": cell.curve.mode,
                "latency_record": cell.curve.source,
                "batches": [
                    {
                        "batch": one.batch,
                        "paths": [list(path) for path in record.trees.trees[one.tree].paths if path],
                        "speedup": one.speedup,
                        "tokens_per_s": one.tokens_per_s,
                    }
                    for one in cell.schedule
                ],
            }
            for cell in scheduled_cells(record)
        ],
    }

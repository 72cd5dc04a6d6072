"""What each batch gives: tokens/s for one user against tokens/s for the device, with trees and without."""

from __future__ import annotations

from typing import Any

from harness.records.sweep import SweepRecord
from harness.records.sweep_cells import ComposedCell
from harness.report.tables.schedule import scheduled_cells

_TREE, _PLAIN = "#1f5a99", "#c8641b"


def draw_schedule(figure: Any, record: SweepRecord) -> bool:
    """Draw the Pareto front of one measured device: the one with the most batches, the first of these."""
    cells = scheduled_cells(record)
    if not cells:
        return False
    cell = max(cells, key=lambda one: len(one.schedule))
    axes = figure.subplots()
    for name, colour, mark, points in (
        (
            "the best tree of each batch",
            _TREE,
            "o-",
            [(one.batch, one.tokens_per_s) for one in cell.schedule],
        ),
        ("plain decoding", _PLAIN, "s--", [(one.batch, one.vanilla_tokens_per_s) for one in cell.schedule]),
    ):
        users, device = [rate / batch for batch, rate in points], [rate for _, rate in points]
        axes.plot(users, device, mark, color=colour, label=name, markersize=5)
        for (batch, _), x, y in zip(points, users, device, strict=True):
            axes.annotate(
                str(batch), (x, y), textcoords="offset points", xytext=(5, 4), fontsize=7, color=colour
            )
    axes.set(xlabel="tokens/s for one user", ylabel="tokens/s for the device", xlim=(0, None), ylim=(0, None))
    axes.legend(frameon=False)
    axes.set_title(schedule_title(cell), fontsize=9)
    return True


def schedule_title(cell: ComposedCell) -> str:
    """Return up to which batch a tree pays on a device, in a sentence."""
    paying = [one for one in cell.schedule if one.speedup > 1]
    where = f"{cell.curve.device}, {cell.curve.dtype} ({cell.kind}; numbers are batches)"
    if not paying:
        return f"No tree pays at any batch\n{where}"
    last = paying[-1]
    return f"A tree pays up to batch {last.batch}, by {last.speedup:.2f} times there\n{where}"

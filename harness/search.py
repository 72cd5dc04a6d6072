"""`medusa-repro search-tree`: grow trees on a trace and set what they promise beside what they yield."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from harness.trace import ReplayIndex, Trace
from harness.trees import grow
from medusa_impl.tree import DraftTree


def print_search(calibration: Path, *, num_nodes: int, values: str, check: Path | None, console: Console) -> DraftTree:
    """Print, for nested sizes up to `num_nodes`, the expected acceptance length and the replayed tokens a step; return the largest tree.

    The expectation weighs all positions alike and, for `marginals`, takes heads as independent; the replay on `check` (or, without it, on
    the calibration trace itself, which flatters) is what decoding would do.
    """
    trace = Trace.load(calibration)
    grown = grow(trace, num_nodes=num_nodes, values=values, num_heads=trace.num_heads)
    own, other = ReplayIndex(trace), ReplayIndex(Trace.load(check)) if check is not None else None
    table = Table("nodes", "depth", "expected acceptance length", "replayed, calibration", "replayed, check")
    sizes = sorted({size for size in (2, 4, 8, 16, 32, 64, 128, 256) if size < num_nodes} | {num_nodes})
    for size in sizes:
        tree = grown.nested(size)
        realised = f"{other.replay(tree).tokens_per_step:.3f}" if other is not None else "-"
        expected = grown.expected_acceptance_length(size)
        table.add_row(str(size), str(tree.depth), f"{expected:.3f}", f"{own.replay(tree).tokens_per_step:.3f}", realised)
    console.print(table)
    console.print(grown.tree.draw(), markup=False, highlight=False)
    return grown.tree

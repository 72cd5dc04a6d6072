"""`medusa-repro search-tree`: grow trees on a trace, or the fastest one for a device; what they promise beside what they yield."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from harness.cost_search import CostChoice, SearchSpace, cached_choices
from harness.device_curves import find_curves
from harness.errors import UserError
from harness.latency_specs import LatencyHeads
from harness.sweep import KnotPrices, search_both, shared_knots, step_contexts
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


def print_device_search(
    calibration: Path,
    *,
    device: str,
    shape: str,
    dtype: str | None,
    max_nodes: int,
    check: Path | None,
    results: Path,
    cache: Path | None,
    console: Console,
) -> CostChoice:
    """Print, for every curve that the device's name means, the fastest tree by both searches; return the first curve's, by joint hits.

    Steps are priced at the mean context of the calibration text's vanilla steps. Choices are kept in `cache` by curve and trace.
    Raises: UserError for an unknown device, or a curve that does not cover a vanilla step.
    """
    index = ReplayIndex(Trace.load(calibration))
    other = ReplayIndex(Trace.load(check)) if check is not None else None
    curves = find_curves(device, results=results, shape=shape, dtype=dtype, heads=LatencyHeads(architecture="shared"))
    lengths = step_contexts(index.replay(DraftTree.root_only()))
    knots, usual = np.array(shared_knots(curves, lengths), dtype=np.float64), float(np.mean(lengths))
    space = SearchSpace(index, max_nodes=max_nodes)
    table = Table("curve", "search", "nodes", "depth", "tokens/step, calibration", "check", "step, ms", "speedup promised")
    found: list[CostChoice] = []
    for curve in curves:
        price = KnotPrices(curve, knots=knots, context="trace", batch=1).price_at(usual)
        vanilla_s = price(1, 0)
        if vanilla_s is None:
            raise UserError(found="no vanilla step", need="a curve that covers one node at batch 1", where=curve.label.words)
        choices = cached_choices(
            space.key,
            curve_fingerprint=f"{curve.label.fingerprint} trace 1 {usual:.3f} {knots.tolist()}",
            folder=cache,
            search=partial(search_both, space, price),
        )
        for choice in choices:
            tree = choice.tree()
            own = index.replay(tree).tokens_per_step
            realised = f"{other.replay(tree).tokens_per_step:.3f}" if other is not None else "-"
            figures = (f"{own:.3f}", realised, f"{1000 * choice.step_s:.3g}", f"{own * vanilla_s / choice.step_s:.2f}")
            table.add_row(curve.label.words, choice.method, str(tree.num_nodes), str(tree.depth), *figures)
        found += choices
    console.print(table)
    console.print(found[0].tree().draw(), markup=False, highlight=False)
    return found[0]

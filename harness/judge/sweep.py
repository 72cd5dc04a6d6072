"""What decoding for real says of a sweep's composition, and what a sweep is summed up in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

import numpy as np

from harness.records.step_model import ErrorBand
from harness.records.sweep import (
    DENSE,
    JOINT,
    MARGINALS,
    PredictionError,
    RooflineError,
    SweepRecord,
    SweepTree,
)
from harness.records.sweep_cells import ChosenTree, ComposedCell, DecodedCell
from harness.specs.suite import IntervalSpec
from harness.stats import Interval, bootstrap_ratio, bootstrap_totals


@dataclass(frozen=True)
class DecodedCheck:
    """The measured and the composed speedup of one decoded point, over the same prompts.

    Both are on the decode clock. The interval of the gap is over prompts; where `holds_timing` it holds the
    error of the curve's step times as well.
    """

    tree: int
    measured: Interval
    composed: float
    num_ties: int
    num_bugs: int
    device: str
    gap_interval: Interval | None = None
    holds_timing: bool = False

    @property
    def gap(self) -> float:
        """Return how far the composition is off, as a share of the measured speedup."""
        return self.composed / self.measured.estimate - 1

    @property
    def is_within(self) -> bool:
        """Return whether the two may be one speed: the interval of their gap holds 0.

        Where the error of the step times is not known, whether the run's own interval holds the composed one.
        """
        if self.holds_timing and self.gap_interval is not None:
            return self.gap_interval.low <= 0 <= self.gap_interval.high
        return self.measured.low <= self.composed <= self.measured.high


def decoded_check(cell: DecodedCell, *, spec: IntervalSpec) -> DecodedCheck:
    """Return a decoded point's check, its intervals over the decoded prompts."""
    names = ("vanilla_s", "medusa_s", "composed_vanilla_s", "composed_medusa_s")
    vanilla, medusa, *composed = ([getattr(row, name) for row in cell.rows] for name in names)
    over_prompts = bootstrap_totals(
        lambda plain, tree, plain_s, tree_s: (plain_s / tree_s) / (plain / tree) - 1,
        *(vanilla, medusa, *composed),
        spec=spec,
        rng=np.random.default_rng(spec.seed),
    )
    return DecodedCheck(
        tree=cell.tree,
        measured=bootstrap_ratio(vanilla, medusa, spec=spec, rng=np.random.default_rng(spec.seed)),
        composed=fsum(composed[0]) / fsum(composed[1]),
        gap_interval=cell.gap or over_prompts,
        holds_timing=cell.gap is not None,
        num_ties=sum(difference.kind == "tie" for difference in cell.differences),
        num_bugs=sum(difference.kind == "bug" for difference in cell.differences),
        device=cell.curve.device,
    )


def decoded_checks(record: SweepRecord) -> tuple[DecodedCheck, ...]:
    """Return the checks of all decoded points."""
    return tuple(decoded_check(cell, spec=record.spec.interval) for cell in record.decoded)


@dataclass(frozen=True)
class FamilyPoint:
    """One tree on a figure's axes: tokens/step, and where a curve is given its speed."""

    tree: int
    num_nodes: int
    depth: int
    tokens_per_step: Interval
    tokens_per_s: float | None


def family_points(
    record: SweepRecord, family: str, *, cell: ComposedCell | None = None, num_heads: int | None = None
) -> list[FamilyPoint]:
    """Return the trees of a family in order of size, with their speed on a cell's curve.

    `num_heads` leaves out trees that were allowed another number of heads.
    """
    speeds = dict(zip(cell.trees, cell.tokens_per_s, strict=True)) if cell is not None else {}
    points = [
        FamilyPoint(
            tree=index,
            num_nodes=len(sweep_tree.paths),
            depth=depth_of(sweep_tree),
            tokens_per_step=record.trees.rate(index),
            tokens_per_s=speeds.get(index),
        )
        for index, sweep_tree in enumerate(record.trees.trees)
        if family in sweep_tree.families and (num_heads is None or sweep_tree.num_heads == num_heads)
    ]
    return sorted(points, key=lambda point: (point.num_nodes, point.depth))


def sparse_points(record: SweepRecord, *, cell: ComposedCell | None = None) -> list[FamilyPoint]:
    """Return the grown tree of each size with the most tokens/step on the calibration trace.

    So a tree is never chosen on what it is judged on.
    """
    best: dict[int, FamilyPoint] = {}
    for point in (*family_points(record, JOINT, cell=cell), *family_points(record, MARGINALS, cell=cell)):
        before = best.get(point.num_nodes)
        if before is None or record.trees.calibrated[point.tree] > record.trees.calibrated[before.tree]:
            best[point.num_nodes] = point
    return [best[size] for size in sorted(best)]


def dense_points(record: SweepRecord, *, cell: ComposedCell | None = None) -> list[FamilyPoint]:
    """Return the randomly drawn dense trees."""
    return family_points(record, DENSE, cell=cell)


def best_by_heads(record: SweepRecord, *, num_nodes: int) -> dict[int, FamilyPoint]:
    """Return the best grown tree of a size for each number of heads allowed.

    The best has the most tokens/step on the calibration trace. A tree stands with the fewest heads that allow
    it, so that a head which adds nothing repeats the tree of the heads before it.
    """
    found: dict[int, FamilyPoint] = {}
    points = [
        point
        for family in (JOINT, MARGINALS)
        for point in family_points(record, family)
        if point.num_nodes == num_nodes
    ]
    for heads in sorted(record.spec.num_heads):
        allowed = [point for point in points if point.depth <= heads]
        if allowed:
            found[heads] = max(allowed, key=lambda point: record.trees.calibrated[point.tree])
    return found


def depth_of(sweep_tree: SweepTree) -> int:
    """Return how many heads a tree uses."""
    return max(len(path) for path in sweep_tree.paths)


def headline_cells(record: SweepRecord) -> list[ComposedCell]:
    """Return the cells whose figures may stand in a headline.

    These are composed and predicted ones on the trace's own lengths at batch 1.
    """
    return [cell for cell in record.composed if cell.kind != "hypothetical" and cell.batch == 1]


def hypothetical_cells(record: SweepRecord) -> list[ComposedCell]:
    """Return the cells that join a trace with steps or lengths that are not its own.

    The steps are another model's, or the lengths are such that the text did not have.
    """
    return [cell for cell in record.composed if cell.kind == "hypothetical"]


def overhead_band(cell: ComposedCell, record: SweepRecord) -> ErrorBand | None:
    """Return the bounds of measured / predicted overhead for a predicted cell; None where they are not known.

    A cell of the roofline has the worst error of its step cost.
    """
    error = _roofline_error(record)
    return cell.overhead_band or (_roofline_band(error.step_cost) if error is not None else None)


def seconds_band(cell: ComposedCell, record: SweepRecord) -> ErrorBand | None:
    """Return the bounds of measured / predicted seconds for a predicted cell; None where they are not known.

    A cell of the roofline has the worst error of its seconds.
    """
    error = _roofline_error(record)
    return cell.seconds_band or (_roofline_band(error.seconds) if error is not None else None)


def _roofline_error(record: SweepRecord) -> RooflineError | None:
    """Return the roofline's error where a record's predictions are the roofline's, not a fitted model's."""
    return record.origin.roofline_error if record.origin.step_model is None else None


def _roofline_band(error: PredictionError | None) -> ErrorBand | None:
    """Return the bounds that a worst error gives; an error of a whole measured figure leaves no upper one."""
    if error is None or error.worst_error >= 1:
        return None
    return ErrorBand(low=1 / (1 + error.worst_error), high=1 / (1 - error.worst_error))


def told_speedup(cell: ComposedCell, record: SweepRecord) -> Interval | None:
    """Return the speedup of a cell's best tree; None where the error of its step times is larger than it.

    A predicted speedup has the bounds of its interval, widened by the error of the overhead. It is told where
    they lie on one side of 1.
    """
    found = cell.best.speedup
    if cell.curve.kind == "measured":
        return found
    widened = _widened(found, overhead_band(cell, record))
    return None if widened is None or widened.low <= 1 <= widened.high else widened


def told_tokens_per_s(cell: ComposedCell, record: SweepRecord) -> Interval | None:
    """Return tokens a second with a cell's best tree; None where its speedup is not told either.

    A predicted rate has the bounds of its interval, widened by the error of a step's seconds; None where that
    is not known.
    """
    found = cell.best.tokens_per_s
    if cell.curve.kind == "measured":
        return found
    if told_speedup(cell, record) is None:
        return None
    return _widened(found, seconds_band(cell, record))


def _widened(found: Interval, band: ErrorBand | None) -> Interval | None:
    """Return an interval of a figure whose denominator may be off by a band; None without bounds."""
    if band is None or band.low == 0:
        return None
    return found.model_copy(update={"low": found.low / band.high, "high": found.high / band.low})


def drawn_cell(record: SweepRecord) -> ComposedCell | None:
    """Return the cell that figures are drawn for.

    It is the first measured one, else the first predicted one whose speedup is told.
    """
    cells = [cell for cell in headline_cells(record) if told_speedup(cell, record) is not None]
    return next((cell for cell in cells if cell.curve.kind == "measured"), cells[0] if cells else None)


def searches_compared(cells: Sequence[ComposedCell]) -> tuple[int, int, float]:
    """Return on how many cells the joint search is better than the exact one, and on how many equal.

    Better is more tokens/s; the third figure is the median of their ratio. The exact search is exact under
    independence.
    """
    ratios = []
    for cell in cells:
        by_method: dict[str, ChosenTree] = {chosen.method: chosen for chosen in cell.chosen}
        if {"joint", "independent"} <= set(by_method):
            ratios.append(
                by_method["joint"].tokens_per_s.estimate / by_method["independent"].tokens_per_s.estimate
            )
    better, same = sum(ratio > 1 + 1e-9 for ratio in ratios), sum(abs(ratio - 1) <= 1e-9 for ratio in ratios)
    return better, same, float(np.median(ratios)) if ratios else float("nan")

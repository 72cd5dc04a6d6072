"""A device's measured step times as one curve: against nodes, heads, context and batch.

A latency record keeps raw times only. Medians, monotone smoothing and interpolation happen here, each time
anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from statistics import median

import numpy as np
from scipy.optimize import isotonic_regression

from harness.compose.prices.redrawn import Floats, Middles, middle, num_rounds, redrawn
from harness.errors import UserError
from harness.files import canonical_sha256
from harness.records.latency import LatencyPoint, LatencyRecord
from harness.records.sweep_cells import CurveLabel
from harness.specs.hardware import match_device
from harness.specs.latency import DtypeName, ModeName, PointKey


class LatencyCurve:
    """Seconds against sizes: monotone in nodes and in heads, linear between what was measured.

    The curve is made of the middles of one dtype and mode, as `prices.redrawn` takes them. A whole step is a
    body, which depends on nodes, context and batch, plus the heads, which read one state a row whatever the
    tree and the context. So heads are timed at a few trees and answered for all.

        seconds(N, K, T, B) = body(N, T, B) + heads(K, B)

    Timing noise may make more nodes look cheaper than fewer; isotonic regression replaces such runs by their
    mean. Nothing is extrapolated.
    Raises: UserError where nothing was measured, or a size lies outside of it.
    """

    def __init__(self, points: Iterable[LatencyPoint]) -> None:
        self._points = tuple(points)
        raw = _tables(self._points, middle)
        if not raw.backbone:
            raise UserError(
                found="no measured point",
                need="at least one of this dtype and mode",
                where="the latency record",
            )
        self._tables = raw.monotone()
        self.largest_correction = max(
            abs(float(self._tables.backbone[sizes][0] / seconds[0]) - 1)
            for sizes, seconds in raw.backbone.items()
        )

    @property
    def num_rounds(self) -> int:
        """Return in how many rounds whole steps were timed, the fewest of any point; 0 without such steps."""
        return min((num_rounds(point) for point in self._points if point.step_s), default=0)

    @cached_property
    def _redrawn(self) -> _Tables:
        return _tables(self._points, redrawn).monotone()

    def seconds(self, *, num_nodes: int, num_heads: int, context_tokens: int, batch: int = 1) -> float:
        """Return the time of a whole step; one node without heads is a vanilla step."""
        body = _answer(
            self._tables.body, {"batch": batch, "context tokens": context_tokens, "nodes": num_nodes}
        )
        return float(body[0] + self._heads(num_heads, batch)[0])

    def seconds_redrawn(
        self, *, num_nodes: int, num_heads: int, context_tokens: int, batch: int = 1
    ) -> Floats:
        """Return the times of a whole step that other rounds of timing would have given.

        Draw d of every size belongs to one curve.
        Shapes: result [NUM_DRAWS].
        Raises: UserError as `seconds` does, and where steps were timed in one round, which shows no spread.
        """
        if self.num_rounds < 2:
            raise UserError(found="steps timed in one round", need="two rounds or more", where="the curve")
        tables = self._redrawn
        sizes = {"batch": batch, "context tokens": context_tokens, "nodes": num_nodes}
        return _answer(tables.body, sizes) + _answer(tables.heads, {"batch": batch, "heads": num_heads})

    def backbone_seconds(self, *, num_nodes: int, context_tokens: int, batch: int = 1) -> float:
        """Return the time of the backbone's pass alone."""
        sizes = {"batch": batch, "context tokens": context_tokens, "nodes": num_nodes}
        return float(_answer(self._tables.backbone, sizes)[0])

    def heads_seconds(self, *, num_heads: int, batch: int = 1) -> float:
        """Return the time of the heads alone."""
        return float(self._heads(num_heads, batch)[0])

    def _heads(self, num_heads: int, batch: int) -> Floats:
        return _answer(self._tables.heads, {"batch": batch, "heads": num_heads})

    def step_cost(self, *, num_nodes: int, context_tokens: int, batch: int = 1) -> float:
        """Return the backbone's pass over so many nodes against one node."""
        one_s = self.backbone_seconds(num_nodes=1, context_tokens=context_tokens, batch=batch)
        return self.backbone_seconds(num_nodes=num_nodes, context_tokens=context_tokens, batch=batch) / one_s


def curve_of(record: LatencyRecord, *, dtype: str, mode: str) -> LatencyCurve:
    """Return the curve of one dtype and mode of a record.

    Raises: UserError where nothing of them was timed.
    """
    return LatencyCurve([point for point in record.points if (point.dtype, point.mode) == (dtype, mode)])


class TimedPoints:
    """The curve of some timed points of one dtype and mode.

    Its answers are None where a size lies outside of what was measured.
    """

    def __init__(self, points: Sequence[LatencyPoint], *, label: CurveLabel) -> None:
        self._curve, self._label = LatencyCurve(points), label
        self._contexts = tuple(sorted({point.context_tokens for point in points}))

    @property
    def label(self) -> CurveLabel:
        """Return what the curve is of."""
        return self._label

    @property
    def contexts(self) -> tuple[int, ...]:
        """Return the context lengths that were timed."""
        return self._contexts

    def body_seconds(self, *, num_nodes: int, context_tokens: int, batch: int) -> float | None:
        """Return a whole step less its heads."""
        try:
            return self._curve.seconds(
                num_nodes=num_nodes, num_heads=0, context_tokens=context_tokens, batch=batch
            )
        except UserError:
            return None

    def heads_seconds(self, *, num_heads: int, batch: int) -> float | None:
        """Return the time of the heads."""
        try:
            return self._curve.heads_seconds(num_heads=num_heads, batch=batch)
        except UserError:
            return None

    @property
    def num_rounds(self) -> int | None:
        """Return in how many rounds steps were timed; None where one round or none shows no spread."""
        rounds = self._curve.num_rounds
        return rounds if rounds > 1 else None

    def step_redrawn(
        self, *, num_nodes: int, num_heads: int, context_tokens: int, batch: int
    ) -> Floats | None:
        """Return the whole steps that other rounds of timing would have given; None where that is not known.

        Shapes: result [NUM_DRAWS].
        """
        try:
            return self._curve.seconds_redrawn(
                num_nodes=num_nodes, num_heads=num_heads, context_tokens=context_tokens, batch=batch
            )
        except UserError:
            return None

    def backbone_seconds(self, *, num_nodes: int, context_tokens: int, batch: int) -> float | None:
        """Return the time of the backbone's pass alone."""
        try:
            return self._curve.backbone_seconds(
                num_nodes=num_nodes, context_tokens=context_tokens, batch=batch
            )
        except UserError:
            return None


class MeasuredCurve(TimedPoints):
    """The curve of one latency record in one dtype and mode."""

    def __init__(self, record: LatencyRecord, *, dtype: DtypeName, mode: ModeName) -> None:
        points = [
            point
            for point in record.points
            if (point.dtype, point.mode) == (dtype, mode) and point.backbone_s
        ]
        name, limits = record.environment.device.name, record.limits(dtype)
        label = CurveLabel(
            device=match_device(name) or name,
            shape=record.facts.name,
            dtype=dtype,
            mode=mode,
            kind="measured",
            source=f"latency record {record.folder.name}",
            fingerprint=canonical_sha256([point.model_dump(mode="json") for point in points])[:16],
            weights_sha256=None if record.facts.random_weights else record.environment.backbone_sha256,
            timed_on=record.environment.device,
            read_bandwidth_bytes_per_s=None if limits is None else limits.read_bandwidth_bytes_per_s,
        )
        super().__init__(points, label=label)

    def of_which_machine(self, which: str) -> MeasuredCurve:
        """Return the curve with a label that says which of the machines of its device's name was timed."""
        named = copy(self)
        named._label = self._label.model_copy(update={"device": f"{self._label.device} ({which})"})
        return named


def step_cost_of(points: Iterable[LatencyPoint], *, num_nodes: int, like: PointKey) -> float | None:
    """Return the raw step cost for a point's dtype, mode, context and batch, medians over medians.

    None where the time of so many nodes, or of one, is missing.
    """
    times: dict[int, list[float]] = {1: [], num_nodes: []}
    for point in points:
        if point.group == like.group and point.num_nodes in times:
            times[point.num_nodes] += point.backbone_s
    return median(times[num_nodes]) / median(times[1]) if times[1] and times[num_nodes] else None


Table = Mapping[tuple[int, ...], Floats]


@dataclass(frozen=True, eq=False)
class _Tables:
    """A curve's times by sizes, in one or more columns: the record's own, or one a draw of its rounds.

    Sizes are batch, context tokens and nodes; of the heads, batch and heads.
    """

    backbone: Table
    body: Table
    heads: Table

    def monotone(self) -> _Tables:
        """Return the tables made non-decreasing along the last size wherever the others are equal."""
        return _Tables(*(_monotone(one) for one in (self.backbone, self.body, self.heads)))


def _tables(points: Iterable[LatencyPoint], of: Middles) -> _Tables:
    """Return the tables that some middles of the points' times make.

    A size that stands in several points has their mean.
    """
    backbone, body, heads = (defaultdict[tuple[int, ...], list[Floats]](list) for _ in range(3))
    for point in points:
        sizes = (point.batch, point.context_tokens, point.num_nodes)
        heads_s = of(point, "heads_s") if point.heads_s else None
        if point.backbone_s:
            backbone[sizes].append(of(point, "backbone_s"))
        if heads_s is not None:
            heads[point.batch, point.num_heads].append(heads_s)
        if point.step_s:
            step_s = of(point, "step_s")
            body[sizes].append(step_s - heads_s if heads_s is not None else step_s)
            heads[point.batch, 0] = [np.zeros(len(step_s))]  # so that a vanilla step is answered too
    return _Tables(*({sizes: _mean(some) for sizes, some in one.items()} for one in (backbone, body, heads)))


def _mean(some: Sequence[Floats]) -> Floats:
    return np.asarray(np.stack(some).mean(axis=0))


def _monotone(values: Table) -> Table:
    lines = defaultdict[tuple[int, ...], list[tuple[int, ...]]](list)
    for sizes in sorted(values):
        lines[sizes[:-1]].append(sizes)
    smooth: dict[tuple[int, ...], Floats] = {}
    for line in lines.values():
        columns = np.stack([values[sizes] for sizes in line], axis=1)
        fitted = [isotonic_regression(row).x if np.any(np.diff(row) < 0) else row for row in columns]
        smooth.update(zip(line, np.stack(fitted, axis=1), strict=True))
    return smooth


def _answer(values: Table, sizes: Mapping[str, int]) -> Floats:
    """Return the value at some sizes, or refuse them with the range that was measured."""
    found = _interpolate(values, tuple(sizes.values()))
    if found is None:
        ranges = [
            f"{name} {min(known[axis] for known in values)} to {max(known[axis] for known in values)}"
            for axis, name in enumerate(sizes)
        ]
        asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(
            found=asked,
            need=f"sizes between measured ones ({', '.join(ranges) if values else 'none'}): nothing is "
            "extrapolated",
            where="the latency record",
            do="measure them too: medusa-repro latency with --nodes, --heads, --contexts, --batches",
        )
    return found


def _interpolate(values: Table, at: tuple[int, ...]) -> Floats | None:
    """Return the value at some sizes, linear along the first of them.

    The ends of the line are the nearest sizes on either side that can answer for the other sizes. None where
    there is no such pair: grids need not be complete, but nothing is guessed outside of them.
    """
    if not at:
        return values.get(())
    planes = defaultdict[int, dict[tuple[int, ...], Floats]](dict)
    for sizes, value in values.items():
        planes[sizes[0]][sizes[1:]] = value
    answers: list[tuple[int, Floats]] = []
    for side in (
        [size for size in sorted(planes, reverse=True) if size <= at[0]],
        [size for size in sorted(planes) if size >= at[0]],
    ):
        candidates = ((size, _interpolate(planes[size], at[1:])) for size in side)
        nearest = next(((size, value) for size, value in candidates if value is not None), None)
        if nearest is None:
            return None
        if nearest[0] == at[0]:
            return nearest[1]
        answers.append(nearest)
    (below, below_s), (above, above_s) = answers
    return np.asarray(below_s + (above_s - below_s) * (at[0] - below) / (above - below))

"""A device's measured step times as one curve: against nodes, heads, context and batch.

A latency record keeps raw times only. Medians, monotone smoothing and interpolation happen here, each time
anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import copy
from statistics import fmean, median

from scipy.optimize import isotonic_regression

from harness.errors import UserError
from harness.files import canonical_sha256
from harness.records.latency import LatencyPoint, LatencyRecord
from harness.records.sweep_cells import CurveLabel
from harness.specs.hardware import match_device
from harness.specs.latency import DtypeName, ModeName, PointKey


class LatencyCurve:
    """Seconds against sizes: monotone in nodes and in heads, linear between what was measured.

    The curve is made of the medians of one dtype and mode. A whole step is a body, which depends on nodes,
    context and batch, plus the heads, which read one state a row whatever the tree and the context. So heads
    are timed at a few trees and answered for all.

        seconds(N, K, T, B) = body(N, T, B) + heads(K, B)

    Timing noise may make more nodes look cheaper than fewer; isotonic regression replaces such runs by their
    mean. Nothing is extrapolated.
    Raises: UserError where nothing was measured, or a size lies outside of it.
    """

    def __init__(self, points: Iterable[LatencyPoint]) -> None:
        backbone, body, heads = (defaultdict[tuple[int, ...], list[float]](list) for _ in range(3))
        for point in points:
            sizes = (point.batch, point.context_tokens, point.num_nodes)
            if point.backbone_s:
                backbone[sizes].append(median(point.backbone_s))
            if point.heads_s:
                heads[point.batch, point.num_heads].append(median(point.heads_s))
            if point.step_s:
                body[sizes].append(median(point.step_s) - (median(point.heads_s) if point.heads_s else 0.0))
                heads[point.batch, 0] = [0.0]  # so that a vanilla step is answered too
        if not backbone:
            raise UserError(
                found="no measured point",
                need="at least one of this dtype and mode",
                where="the latency record",
            )
        raw = {sizes: fmean(values) for sizes, values in backbone.items()}
        self._backbone = _monotone(raw)
        self._body = _monotone({sizes: fmean(values) for sizes, values in body.items()})
        self._heads = _monotone({sizes: fmean(values) for sizes, values in heads.items()})
        self.largest_correction = max(
            abs(self._backbone[sizes] / seconds - 1) for sizes, seconds in raw.items()
        )

    def seconds(self, *, num_nodes: int, num_heads: int, context_tokens: int, batch: int = 1) -> float:
        """Return the time of a whole step; one node without heads is a vanilla step."""
        body = _answer(self._body, {"batch": batch, "context tokens": context_tokens, "nodes": num_nodes})
        return body + _answer(self._heads, {"batch": batch, "heads": num_heads})

    def backbone_seconds(self, *, num_nodes: int, context_tokens: int, batch: int = 1) -> float:
        """Return the time of the backbone's pass alone."""
        return _answer(self._backbone, {"batch": batch, "context tokens": context_tokens, "nodes": num_nodes})

    def heads_seconds(self, *, num_heads: int, batch: int = 1) -> float:
        """Return the time of the heads alone."""
        return _answer(self._heads, {"batch": batch, "heads": num_heads})

    def step_cost(self, *, num_nodes: int, context_tokens: int, batch: int = 1) -> float:
        """Return the backbone's pass over so many nodes against one node."""
        one_s = self.backbone_seconds(num_nodes=1, context_tokens=context_tokens, batch=batch)
        return self.backbone_seconds(num_nodes=num_nodes, context_tokens=context_tokens, batch=batch) / one_s


def curve_of(record: LatencyRecord, *, dtype: str, mode: str) -> LatencyCurve:
    """Return the curve of one dtype and mode of a record.

    Raises: UserError where nothing of them was timed.
    """
    return LatencyCurve([point for point in record.points if (point.dtype, point.mode) == (dtype, mode)])


class MeasuredCurve:
    """The curve of one latency record in one dtype and mode.

    Its answers are None where a size lies outside of what was measured.
    """

    def __init__(self, record: LatencyRecord, *, dtype: DtypeName, mode: ModeName) -> None:
        points = [
            point
            for point in record.points
            if (point.dtype, point.mode) == (dtype, mode) and point.backbone_s
        ]
        self._curve = LatencyCurve(points)
        self._contexts = tuple(sorted({point.context_tokens for point in points}))
        name, limits = record.environment.device.name, record.limits(dtype)
        self._label = CurveLabel(
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

    def of_which_machine(self, which: str) -> MeasuredCurve:
        """Return the curve with a label that says which of the machines of its device's name was timed."""
        named = copy(self)
        named._label = self._label.model_copy(update={"device": f"{self._label.device} ({which})"})
        return named

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

    def backbone_seconds(self, *, num_nodes: int, context_tokens: int, batch: int) -> float | None:
        """Return the time of the backbone's pass alone."""
        try:
            return self._curve.backbone_seconds(
                num_nodes=num_nodes, context_tokens=context_tokens, batch=batch
            )
        except UserError:
            return None


def step_cost_of(points: Iterable[LatencyPoint], *, num_nodes: int, like: PointKey) -> float | None:
    """Return the raw step cost for a point's dtype, mode, context and batch, medians over medians.

    None where the time of so many nodes, or of one, is missing.
    """
    times: dict[int, list[float]] = {1: [], num_nodes: []}
    for point in points:
        if point.group == like.group and point.num_nodes in times:
            times[point.num_nodes] += point.backbone_s
    return median(times[num_nodes]) / median(times[1]) if times[1] and times[num_nodes] else None


def _monotone(values: Mapping[tuple[int, ...], float]) -> dict[tuple[int, ...], float]:
    """Return the values, made non-decreasing along the last size wherever the others are equal."""
    lines = defaultdict[tuple[int, ...], list[tuple[int, ...]]](list)
    for sizes in sorted(values):
        lines[sizes[:-1]].append(sizes)
    smooth: dict[tuple[int, ...], float] = {}
    for line in lines.values():
        smooth.update(
            zip(line, isotonic_regression([values[sizes] for sizes in line]).x.tolist(), strict=True)
        )
    return smooth


def _answer(values: Mapping[tuple[int, ...], float], sizes: Mapping[str, int]) -> float:
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


def _interpolate(values: Mapping[tuple[int, ...], float], at: tuple[int, ...]) -> float | None:
    """Return the value at some sizes, linear along the first of them.

    The ends of the line are the nearest sizes on either side that can answer for the other sizes. None where
    there is no such pair: grids need not be complete, but nothing is guessed outside of them.
    """
    if not at:
        return values.get(())
    planes = defaultdict[int, dict[tuple[int, ...], float]](dict)
    for sizes, value in values.items():
        planes[sizes[0]][sizes[1:]] = value
    answers: list[tuple[int, float]] = []
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
    return below_s + (above_s - below_s) * (at[0] - below) / (above - below)

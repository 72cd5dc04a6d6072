"""A suite's records in order of time: each figure as a series, with the steps that are found in it.

Tokens/step and failed checks are searched over all records of a machine's name; times and memory over those
whose times may be compared. A record whose times do not hold leaves a gap in these, and in no other series.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from harness.judge.history.comparable import TimedRecord, bandwidth_of, machine_classes
from harness.judge.history.provenance import differences
from harness.judge.history.steps import Step, exact_steps, noisy_steps
from harness.judge.history.texts import compare_texts
from harness.judge.history.valid import Holds, latency_holds, run_holds
from harness.judge.judgement import Judgement
from harness.judge.latency import mode_rows
from harness.judge.run import judge
from harness.records.latency import LatencyPoint, LatencyRecord
from harness.records.run import RunRecord

Sort = Literal["count", "time", "memory", "checks"]
"""What a figure is: without times; a time; bytes; how many checks failed."""
_RECORD = "whole record"


@dataclass(frozen=True)
class Value:
    """A figure of one record; the bounds are those of its interval, None where it has none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Entry:
    """One record of a history, with its figures by arm (or dtype and mode) and by name."""

    record: TimedRecord
    holds: Holds
    figures: Mapping[tuple[str, str, Sort], Value]

    @property
    def name(self) -> str:
        """Return the record's folder."""
        return self.record.folder.resolve().name

    @property
    def started_utc(self) -> str:
        """Return when the record was begun."""
        return self.record.environment.started_utc


@dataclass(frozen=True)
class MarkedStep:
    """A step with the record at which it stands, and what was made differently since the one before."""

    step: Step
    entry: Entry
    since: Entry
    differing: tuple[str, ...]


@dataclass(frozen=True)
class Series:
    """One figure over records: entries that lack it are gaps."""

    subject: str
    name: str
    sort: Sort
    entries: tuple[Entry, ...]
    steps: tuple[MarkedStep, ...]

    def value(self, entry: Entry) -> Value | None:
        """Return the figure of a record; None where it has none that holds."""
        return _value(entry, (self.subject, self.name, self.sort))


@dataclass(frozen=True)
class MachineClass:
    """Records of one machine's name whose times may be compared, and the figures that turn on the machine."""

    entries: tuple[Entry, ...]
    series: tuple[Series, ...]

    @property
    def bandwidths(self) -> tuple[float, float] | None:
        """Return the least and the most bytes a second that its records read; None where none measured it."""
        rates = [rate for one in self.entries if (rate := bandwidth_of(one.record)) is not None]
        return (min(rates), max(rates)) if rates else None


@dataclass(frozen=True)
class MachineHistory:
    """All records of one machine's name: figures without times over all of them, the others by class."""

    machine: str
    entries: tuple[Entry, ...]
    counts: tuple[Series, ...]
    classes: tuple[MachineClass, ...]

    @property
    def series(self) -> tuple[Series, ...]:
        """Return all series."""
        return (*self.counts, *(one for found in self.classes for one in found.series))


def machine_history(machine: str, records: Sequence[TimedRecord]) -> MachineHistory:
    """Return the history of a suite on one machine; records are taken in order of time.

    Raises: UserError without ruptures, where a series is long enough to be searched.
    """
    entries = tuple(
        sorted((_entry(record) for record in records), key=lambda one: (one.started_utc, one.name))
    )
    classes = machine_classes([one.record for one in entries])
    return MachineHistory(
        machine=machine,
        entries=entries,
        counts=_series(entries, sorts=("count", "checks")),
        classes=tuple(
            MachineClass(chosen, _series(chosen, sorts=("time", "memory")))
            for chosen in (tuple(entries[index] for index in group) for group in classes)
        ),
    )


def _series(entries: Sequence[Entry], *, sorts: Sequence[Sort]) -> tuple[Series, ...]:
    keys = dict.fromkeys(key for entry in entries for key in entry.figures if key[2] in sorts)
    return tuple(Series(*key, tuple(entries), _steps(entries, key)) for key in keys)


def _steps(entries: Sequence[Entry], key: tuple[str, str, Sort]) -> tuple[MarkedStep, ...]:
    """Return a series' steps: every change of an exact figure, of others what stands out of the noise."""
    told = [(entry, value.value) for entry in entries if (value := _value(entry, key)) is not None]
    values = [value for _, value in told]
    is_exact = key[2] in ("count", "checks")
    steps = exact_steps(values) if is_exact else noisy_steps(values)
    return tuple(
        _marked(step, told[step.index][0], told[step.index - 1][0], is_count=key[2] == "count")
        for step in steps
        if not is_exact  # of failed checks no arm is told, and so no tie
        or not _only_ties(told[step.index - 1][0].record, told[step.index][0].record, arm=key[0])
    )


def _marked(step: Step, entry: Entry, since: Entry, *, is_count: bool) -> MarkedStep:
    """Return a step with what may have made it first: trees and model for counts, code for times."""
    named = [one.name for one in differences(since.record, entry.record) if one.name != "command"]
    return MarkedStep(step, entry, since, tuple(named[::-1] if is_count else named))


def _only_ties(since: TimedRecord, record: TimedRecord, *, arm: str) -> bool:
    """Return whether two runs of the same inputs part at shown rounding ties alone."""
    if not isinstance(since, RunRecord) or not isinstance(record, RunRecord):
        return False
    found = next((one for one in compare_texts(since, record) if one.arm == arm), None)
    return found is not None and found.is_exact and not found.inputs and not found.num_other


def _value(entry: Entry, key: tuple[str, str, Sort]) -> Value | None:
    held = {"count": entry.holds.texts, "time": entry.holds.speeds, "memory": True, "checks": True}
    found = entry.figures.get(key)
    if found is None or not held[key[2]] or not math.isfinite(found.value):
        return None
    return found if found.value > 0 or key[2] == "checks" else None  # levels are compared as logarithms


def _entry(record: TimedRecord) -> Entry:
    if isinstance(record, RunRecord):
        judgement = judge(record, claims=())
        return Entry(record, run_holds(record, judgement), dict(_of_run(judgement)))
    holds = latency_holds(record)
    figures = {**dict(_of_latency(record)), (_RECORD, "failed checks", "checks"): Value(len(holds.why))}
    return Entry(record, holds, figures)


def _of_run(judgement: Judgement) -> Iterator[tuple[tuple[str, str, Sort], Value]]:
    """Yield a run's figures by arm."""
    compared = {one.arm: one for one in judgement.comparisons}
    for arm in judgement.arms:
        versus = compared.get(arm.arm)
        rate = arm.acceleration_rate
        if not math.isnan(rate.estimate):
            yield (arm.arm, "tokens/step", "count"), Value(rate.estimate, rate.low, rate.high)
        for name, interval in (
            ("speedup", versus.speedup if versus is not None else None),
            ("overhead", versus.overhead if versus is not None else None),
            ("tokens/s", arm.tokens_per_s),
        ):
            if interval is not None:
                yield (arm.arm, name, "time"), Value(interval.estimate, interval.low, interval.high)
        for name, figure in (
            ("step cost", arm.step_cost),
            ("wall tokens/s", arm.wall_tokens_per_s),
            ("bandwidth share", arm.bandwidth_share),
        ):
            if figure is not None and figure > 0:
                yield (arm.arm, name, "time"), Value(figure)
        if arm.peak_memory_bytes:
            yield (arm.arm, "peak memory, MB", "memory"), Value(arm.peak_memory_bytes / 1e6)
    failed = sum(check.status == "failed" for check in judgement.checks)
    yield (_RECORD, "failed checks", "checks"), Value(failed)


def _of_latency(record: LatencyRecord) -> Iterator[tuple[tuple[str, str, Sort], Value]]:
    """Yield a latency record's figures by dtype and mode: its table of modes, and steps at one context.

    Of the timed contexts the smallest is taken; a series of another size has another name.
    """
    for row in mode_rows(record):
        subject = f"{row.dtype} {row.mode}"
        for name, interval in (("tokens/s", row.tokens_per_s), ("over generate", row.over_stock)):
            yield (subject, name, "time"), Value(interval.estimate, interval.low, interval.high)
        if row.bandwidth_share:
            yield (subject, "bandwidth share", "time"), Value(row.bandwidth_share)
    points: dict[str, list[LatencyPoint]] = {}
    for point in record.points:
        if point.batch == 1 and point.step_s and median(point.step_s) > 0:
            points.setdefault(f"{point.dtype} {point.mode}", []).append(point)
    for subject, found in points.items():
        yield from _of_sizes(subject, found)
    if record.manifest is not None:
        yield (_RECORD, "peak memory, MB", "memory"), Value(record.manifest.peak_memory_bytes / 1e6)


def _of_sizes(subject: str, points: Sequence[LatencyPoint]) -> Iterator[tuple[tuple[str, str, Sort], Value]]:
    """Yield a vanilla step, and the step of the largest tree with the most heads against it."""
    context = min(point.context_tokens for point in points)
    at_context = [point for point in points if point.context_tokens == context]
    vanilla = next((point for point in at_context if point.num_nodes == 1), None)
    if vanilla is None:
        return
    yield (
        (subject, f"vanilla step after {context:,} tokens, s", "time"),
        Value(median(vanilla.step_s), min(vanilla.step_s), max(vanilla.step_s)),
    )
    largest = max(at_context, key=lambda point: (point.num_nodes, point.num_heads))
    if largest.num_nodes > 1:
        size = f"{largest.num_nodes} nodes, {largest.num_heads} heads, after {context:,} tokens"
        yield (
            (subject, f"overhead of {size}", "time"),
            Value(median(largest.step_s) / median(vanilla.step_s)),
        )

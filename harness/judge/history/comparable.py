"""May times of two records be held against each other? The one place where history and comparison ask it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from harness.records.latency import LatencyRecord
from harness.records.probes import DeviceLimits
from harness.records.provenance import DeviceInfo, machine_slug
from harness.records.run import RunRecord

MAX_BANDWIDTH_RATIO = 1.3
"""How far apart the measured read bandwidths of one machine may lie: a vanilla step waits for its weights."""

TimedRecord = RunRecord | LatencyRecord


def not_comparable(
    one: DeviceInfo,
    other: DeviceInfo,
    *,
    limits: Iterable[DeviceLimits] = (),
    other_limits: Iterable[DeviceLimits] = (),
) -> str | None:
    """Return in words why times of two machines must not be compared; None where they may.

    They may where both have one name and their measured read bandwidths, of each the best, lie within
    `MAX_BANDWIDTH_RATIO`. Counts of tokens and steps are no times: no machine bends them.
    """
    if machine_slug(one) != machine_slug(other):
        return f"another machine: {machine_slug(one)} against {machine_slug(other)}"
    rates = _best_rate(limits), _best_rate(other_limits)
    if rates[0] is None or rates[1] is None:
        return "perhaps another machine of that name: not both measured their bandwidth"
    if max(rates[0], rates[1]) > MAX_BANDWIDTH_RATIO * min(rates[0], rates[1]):
        return (
            f"one machine name, but measured bandwidths {rates[0] / 1e9:,.3g} and {rates[1] / 1e9:,.3g} "
            f"GB/s, more than {MAX_BANDWIDTH_RATIO} times apart"
        )
    return None


def why_not_compared(one: TimedRecord, other: TimedRecord) -> str | None:
    """Return in words why times of two records must not be compared; None where they may."""
    return not_comparable(
        one.environment.device,
        other.environment.device,
        limits=limits_of(one),
        other_limits=limits_of(other),
    )


def machine_classes(records: Sequence[TimedRecord]) -> list[list[int]]:
    """Return the indices of records in groups whose times may be compared.

    A record joins the first group with whose first record it can be compared. They are taken from the lowest
    bandwidth on, so that no group spans more than the ratio between two of its records; those that measured
    none are a group of their own, the last.
    """
    groups: list[list[int]] = []
    unmeasured: list[int] = []
    for index in sorted(range(len(records)), key=lambda index: _best_rate(limits_of(records[index])) or 0.0):
        if _best_rate(limits_of(records[index])) is None:
            unmeasured.append(index)
            continue
        home = next(
            (group for group in groups if why_not_compared(records[group[0]], records[index]) is None), None
        )
        if home is None:
            groups.append([index])
        else:
            home.append(index)
    return [sorted(group) for group in (*groups, unmeasured) if group]


def limits_of(record: TimedRecord) -> tuple[DeviceLimits, ...]:
    """Return what a record measured of its device, in each of its dtypes."""
    if isinstance(record, RunRecord):
        return () if record.device_limits is None else (record.device_limits,)
    found = (record.limits(dtype) for dtype in record.spec.dtypes)
    return tuple(limits for limits in found if limits is not None)


def bandwidth_of(record: TimedRecord) -> float | None:
    """Return the bytes read a second that a record measured at best; None where it measured none."""
    return _best_rate(limits_of(record))


def _best_rate(limits: Iterable[DeviceLimits]) -> float | None:
    return max((one.read_bandwidth_bytes_per_s for one in limits), default=None)

"""May times of two records be held against each other? The one place where history and comparison ask it."""

from __future__ import annotations

from collections.abc import Sequence

from harness.records.latency import LatencyRecord
from harness.records.machines.comparable import not_comparable
from harness.records.opened import machine_of
from harness.records.run import RunRecord

TimedRecord = RunRecord | LatencyRecord


def why_not_compared(one: TimedRecord, other: TimedRecord) -> str | None:
    """Return in words why times of two records must not be compared; None where they may.

    Counts of tokens and steps are no times: no machine bends them.
    """
    return not_comparable(machine_of(one), machine_of(other))


def machine_classes(records: Sequence[TimedRecord]) -> list[list[int]]:
    """Return the indices of records in groups whose times may be compared.

    A record joins the first group with whose first record it can be compared. They are taken from the lowest
    bandwidth on, so that no group spans more than the ratio between two of its records; those that measured
    none come last.
    """
    groups: list[list[int]] = []
    rates = [bandwidth_of(record) for record in records]
    measured = sorted((rate, index) for index, rate in enumerate(rates) if rate is not None)
    unmeasured = (index for index, rate in enumerate(rates) if rate is None)
    for index in (*(index for _, index in measured), *unmeasured):
        home = next(
            (group for group in groups if why_not_compared(records[group[0]], records[index]) is None), None
        )
        if home is None:
            groups.append([index])
        else:
            home.append(index)
    return [sorted(group) for group in groups]


def bandwidth_of(record: TimedRecord) -> float | None:
    """Return the bytes read a second that a record measured at best; None where it measured none."""
    return machine_of(record).read_bytes_per_s

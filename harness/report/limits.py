"""The device's measured limits: how good they are, and whether anything was faster."""

from __future__ import annotations

from harness.judge.judgement import CheckStatus
from harness.judge.limits import latency_within_limits
from harness.records.latency import LatencyRecord
from harness.records.probes import DeviceLimits
from harness.report.formatting import cell

UNDER_MEASURED = "limits under-measured"


def under_measured_note(*measured: DeviceLimits | None) -> str:
    """Return a sentence for tables whose shares are of limits that an older probe measured; else nothing."""
    if not any(limits is not None and limits.are_under_measured for limits in measured):
        return ""
    return (
        f"*{UNDER_MEASURED.capitalize()}*: an earlier probe measured them, which looked less far for the "
        "device's best, so shares of them may flatter."
    )


def limits_note(record: LatencyRecord) -> str:
    """Return that note for the tables of a latency record."""
    return under_measured_note(*(record.limits(dtype) for dtype in record.spec.dtypes))


def limits_validity(record: LatencyRecord) -> str:
    """Return whether anything in a latency record was faster than its limits, or why that is not asked."""
    outcome = latency_within_limits(record)
    if outcome.status is CheckStatus.SKIPPED:
        return limits_note(record)
    if outcome.status is CheckStatus.PASSED:
        return f"**Valid**: {cell(outcome.found)}; need {outcome.need}."
    return (
        f"**INVALID.** The device's limits were measured too low, so no share of them may be cited: found "
        f"{cell(outcome.found)}; need {outcome.need}."
    )

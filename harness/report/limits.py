"""The device's measured limits: how good they are, and whether anything was faster."""

from __future__ import annotations

from harness.judge.judgement import CheckStatus
from harness.judge.latency_checks import latency_checks
from harness.records.latency import LatencyRecord
from harness.records.probes import DeviceLimits
from harness.report.formatting import cell, paragraphs

UNDER_MEASURED = "limits under-measured"
_MEANS = {
    "within_limits": "The device's limits were measured too low, so no share of them may be cited.",
    "machine_quiet": "Others used the machine meanwhile, so no time may be cited.",
}


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


def latency_validity(record: LatencyRecord) -> str:
    """Return what the checks of a latency record's times found, or why one is not asked."""
    checks = latency_checks(record)
    failed = [one for one in checks if one.status is CheckStatus.FAILED]
    if failed:
        told = "; ".join(f"found {cell(one.found)}; need {cell(one.need)}" for one in failed)
        return f"**INVALID.** {' '.join(_MEANS[one.name] for one in failed)} {told[0].upper()}{told[1:]}."
    passed = [one for one in checks if one.status is CheckStatus.PASSED]
    valid = "; ".join(f"{cell(one.found)} (need {cell(one.need)})" for one in passed)
    return paragraphs(f"**Valid**: {valid}." if valid else "", limits_note(record))

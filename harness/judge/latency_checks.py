"""The checks that the times of a latency record must pass before they are shown."""

from __future__ import annotations

from harness.judge.judgement import CheckOutcome, CheckStatus
from harness.judge.limits import latency_within_limits
from harness.records.latency import LatencyRecord


def latency_checks(record: LatencyRecord) -> tuple[CheckOutcome, ...]:
    """Return what every check says of a latency record."""
    return latency_within_limits(record), latency_quiet(record)


def latency_quiet(record: LatencyRecord) -> CheckOutcome:
    """Check that enough of the times were taken without others, by the rule that the record's spec sets."""
    rule, share = record.spec.disturbance, record.quiet_share
    if rule is None or share is None:
        found = "no rule on disturbance: the record is older" if rule is None else "nothing was timed"
        return CheckOutcome(name="machine_quiet", status=CheckStatus.SKIPPED, found=found, need="nothing")
    return CheckOutcome(
        name="machine_quiet",
        status=CheckStatus.PASSED if share >= rule.min_quiet_share else CheckStatus.FAILED,
        found=f"{share:.0%} of sizes and trials were timed while others left the machine alone",
        need=f"at least {rule.min_quiet_share:.0%}",
        of_times=True,
    )

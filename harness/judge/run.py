"""Everything that follows from a run's record: metrics, comparisons, parity, checks, verdicts.

It is a pure function of the record's files, so it can be repeated anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.judge.checks import run_checks
from harness.judge.claims.evidence import Evidence
from harness.judge.claims.verdicts import evaluate_claims
from harness.judge.judgement import Judgement, withheld_by
from harness.judge.metrics import arm_metrics, comparisons
from harness.judge.parity import parity_report
from harness.records.run import RunRecord
from harness.records.trace import Trace
from harness.specs.claims import ClaimSpec, load_claims


def judge(record: RunRecord, *, claims: Sequence[ClaimSpec] | None = None) -> Judgement:
    """Return the judgement of a sealed record under a registry of claims (the shipped one by default).

    Where a check of times fails, the record is judged as one whose suite reports no speed: tokens/step,
    replays, parity and likelihoods do not depend on times.
    """
    checks = run_checks(record)
    record = record.withholding(withheld_by(checks))
    arms, compared, parity = arm_metrics(record), comparisons(record), parity_report(record)
    evidence = Evidence(
        record=record, arms=arms, comparisons=compared, parity=parity, calibration=calibration_of(record)
    )
    return Judgement(
        suite=record.suite.name,
        arms=arms,
        comparisons=compared,
        parity=parity,
        checks=checks,
        verdicts=evaluate_claims(claims if claims is not None else load_claims(), evidence),
        reports_speed=record.suite.reports_speed,
    )


def calibration_of(record: RunRecord) -> Trace | None:
    """Return the calibration trace that the record's trees were grown on; None where there was none.

    It is a sealed file of the record.
    """
    return record.calibration_of("original")

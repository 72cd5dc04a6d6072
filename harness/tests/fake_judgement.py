"""What several tests need of a fake record: its judgement with real metrics, parity and checks.

The made-up verdicts are of every kind; two that are not tested need the same thing.
"""

from __future__ import annotations

from typing import Any

from harness.judge.checks import run_checks
from harness.judge.judgement import CheckOutcome, CheckStatus, ClaimVerdict, Judgement, VerdictKind
from harness.judge.metrics import arm_metrics, comparisons
from harness.judge.parity import parity_report
from harness.records.run import RunRecord

FAILED_CHECK = CheckOutcome(name="greedy_parity", status=CheckStatus.FAILED, found="3 bugs", need="no bug")
NEEDS_GPU = "the published weights and a GPU"


def verdict(claim_id: str, **changes: Any) -> ClaimVerdict:
    """A reproduced, measured claim with some fields changed."""
    plain = ClaimVerdict(
        claim_id=claim_id,
        stated="faster than one token a step",
        place="Table 3",
        paper_figure="~1.5x",
        form="transfer",
        kind=VerdictKind.REPRODUCED,
        ours="2.20x [1.95, 2.54]",
        figure_kind="measured",
        reason="the interval lies above 1",
    )
    return plain.model_copy(update=changes)


def _untested(claim_id: str) -> ClaimVerdict:
    return verdict(
        claim_id, form="literal", kind=VerdictKind.NOT_TESTED, ours="", figure_kind=None, reason=NEEDS_GPU
    )


VERDICTS = (
    verdict("CK9", form="paper-only", figure_kind="computed", ours="2.18x"),
    verdict("T3-9"),
    verdict("F9", kind=VerdictKind.INCONCLUSIVE, reason="the interval straddles 1"),
    verdict("Q9", kind=VerdictKind.NOT_REPRODUCED),
    _untested("BIG-1"),
    _untested("BIG-2"),
)


def judge(record: RunRecord, **changes: Any) -> Judgement:
    """The judgement of a record, with some fields changed."""
    plain = Judgement(
        suite=record.suite.name,
        arms=arm_metrics(record),
        comparisons=comparisons(record),
        parity=parity_report(record),
        checks=run_checks(record),
        verdicts=VERDICTS,
        reports_speed=record.suite.reports_speed,
    )
    return plain.model_copy(update=changes)

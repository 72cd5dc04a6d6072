"""Reports: pure functions from a record and its judgement to text."""

from __future__ import annotations

from harness.report.markdown import headline, render_report
from harness.report.readme import check_readme, update_between_markers, update_readme
from harness.report.tables import render_arms_table, render_verdict_table
from harness.report.terminal import print_verdicts

__all__ = [
    "check_readme",
    "headline",
    "print_verdicts",
    "render_arms_table",
    "render_report",
    "render_verdict_table",
    "update_between_markers",
    "update_readme",
]

"""The verdicts as a table for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.judge.judgement import Judgement, VerdictKind
from harness.report.formatting import ABSENT, count
from harness.report.tables import count_verdicts

_STYLES = {
    VerdictKind.REPRODUCED: "green",
    VerdictKind.NOT_REPRODUCED: "red",
    VerdictKind.INCONCLUSIVE: "yellow",
    VerdictKind.NOT_TESTED: "dim",
}


def print_verdicts(console: Console, judgement: Judgement) -> None:
    """Print the tested claims with their verdicts, and in one line how many were not tested."""
    grid = Table(title=f"Claims tested by suite {judgement.suite}")
    for heading in ("claim", "what the paper states", "paper", "ours", "verdict"):
        grid.add_column(heading, no_wrap=heading in ("claim", "verdict"))
    for verdict in judgement.verdicts:
        if verdict.kind is not VerdictKind.NOT_TESTED:
            figures = (verdict.claim_id, verdict.stated, verdict.paper_figure or ABSENT, verdict.ours or ABSENT)
            grid.add_row(*(Text(figure) for figure in figures), Text(verdict.kind.value, style=_STYLES[verdict.kind]))
    if not judgement.valid:
        console.print(Text("INVALID: a validity check failed; the figures below may not be cited.", style="bold red"))
    console.print(grid)
    not_tested = count_verdicts(judgement)[VerdictKind.NOT_TESTED.value]
    if not_tested:
        console.print(Text(f"{count(not_tested, 'further claim')} not tested: the report says what each would take.", style="dim"))

"""How a run's output ends in a terminal: the answer in a sentence, a line a claim, and what to read next.

At most 25 lines of 80 columns: what is not told here stands in the report.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from harness.judge.judgement import ClaimVerdict, Judgement, VerdictKind, by_test
from harness.records.run import RunRecord
from harness.report.formatting import count, ratio_interval
from harness.report.tables.run import comparisons_by_arm, headline_arm
from harness.safe_text import terminal_text

_HEADLINE_CLAIM = "A1"  # the claim of claims.toml that a newcomer asks about
_MOST_CLAIMS = 17
_MARKS = {
    VerdictKind.REPRODUCED: ("✓", "+", "green"),
    VerdictKind.NOT_REPRODUCED: ("✗", "x", "red"),
    VerdictKind.INCONCLUSIVE: ("?", "?", "yellow"),
    VerdictKind.NOT_DECIDABLE: ("·", ".", "dim"),
}
_SHORT = {
    VerdictKind.REPRODUCED: "hold",
    VerdictKind.NOT_REPRODUCED: "fail",
    VerdictKind.INCONCLUSIVE: "open",
    VerdictKind.NOT_DECIDABLE: "cannot be decided here",
}
_IDS_WIDTH, _LEAST_OURS = 12, 16


def answer(record: RunRecord, judgement: Judgement, *, where: str = "this machine") -> str:
    """Return in a sentence or two whether it is faster, by how much, and whether the texts are the same.

    `where` names the machine.
    """
    if not judgement.valid_texts:
        return "INVALID: a validity check of the texts failed, so no figure of this run may be cited."
    arm, parity = headline_arm(record, judgement), _same_texts(judgement)
    if arm is None:
        return f"No arm of this suite drafts. {parity}"
    compared = comparisons_by_arm(judgement).get(arm.arm)
    if not record.reports_speed or compared is None:
        why = f"No speed is shown: {record.why_no_speed}."
        if judgement.withheld is not None:
            why = f"No speed is shown, since checks of times failed: {judgement.withheld}."
        return f"Medusa (arm {arm.arm}): {ratio_interval(arm.acceleration_rate)} tokens/step. {why} {parity}"
    stated = next((one for one in judgement.verdicts if one.claim_id == _HEADLINE_CLAIM), None)
    paper = f"; the paper says {stated.paper_figure} of models from 7B on" if stated is not None else ""
    return (
        f"Medusa (arm {arm.arm}) decodes {ratio_interval(compared.speedup)} times as fast as vanilla on "
        f"{where}{paper}. {parity}"
    )


def _same_texts(judgement: Judgement) -> str:
    parity = judgement.parity
    if not parity.num_compared:
        return "No greedy outputs were compared."
    ties = sum(one.kind == "tie" for one in parity.divergences)
    bugs = sum(one.kind == "bug" for one in parity.divergences)
    if bugs:
        return f"Outputs identical: NO, {bugs} of {parity.num_compared} differ."
    but = f", but for {count(ties, 'tie')} of rounding" if ties else ""
    return f"Outputs identical: yes, all {parity.num_compared} greedy texts{but}."


def print_ending(
    console: Console, record: RunRecord, judgement: Judgement, *, report: str, shows_all: bool = False
) -> None:
    """Print the answer, one line for each test that this run decided, where the page lies, and what is next.

    `report` is the page's path as the reader should type it. With `shows_all` there is no limit of lines, and
    claims that rest on the paper's own figures alone are told as well.
    """
    told = answer(record, judgement)
    is_good = judgement.valid_texts and judgement.withheld is None
    console.print(Text(told, style="bold" if is_good else "bold red"))
    groups = [
        group
        for group in by_test(judgement.verdicts)
        if group[0].kind in _MARKS and (shows_all or (group[0].counts and group[0].form != "paper-only"))
    ]
    console.print(_legend(console, groups))
    told_groups = groups if shows_all else groups[:_MOST_CLAIMS]
    for group in told_groups:
        console.print(_line(console, group), no_wrap=True, overflow="ellipsis", crop=True)
    if len(groups) > len(told_groups):
        console.print(Text(f"  and {len(groups) - len(told_groups)} more in the report", style="dim"))
    console.print(Text(f"Report: {report}"), soft_wrap=True)
    if not shows_all:
        console.print(Text(f"All of it here: medusa-repro report --all {record.folder.name}"), soft_wrap=True)


def _mark(console: Console, kind: VerdictKind) -> str:
    pretty, plain, _ = _MARKS[kind]
    return plain if console.options.ascii_only else pretty


def _legend(console: Console, groups: Sequence[Sequence[ClaimVerdict]]) -> Text:
    """Return how many tests came out how, with the mark of each: the key to the lines below."""
    counts = {kind: sum(group[0].kind is kind for group in groups) for kind in _MARKS}
    line = Text("Tests of the paper's claims: ")
    for kind, number in counts.items():
        if number:
            line.append(f"{_mark(console, kind)} {number} {_SHORT[kind]}  ", style=_MARKS[kind][2])
    return line


def _line(console: Console, group: Sequence[ClaimVerdict]) -> Text:
    """Return one test in one line: mark, ids, what is stated, and what we found; both are cut to fit."""
    first = group[0]
    ids = first.claim_id if len(group) == 1 else f"{first.claim_id} +{len(group) - 1}"
    room = console.width - _IDS_WIDTH - 4
    ours = _cut(first.ours, max(room * 2 // 5, _LEAST_OURS), console)
    left = max(room - len(ours), 0)
    stated = _cut(first.stated, left, console)
    line = Text(f"{_mark(console, first.kind)} ", style=_MARKS[first.kind][2])
    line.append(
        f"{ids:<{_IDS_WIDTH}.{_IDS_WIDTH}} {stated:<{max(room - len(ours), 0)}} {ours}", style="default"
    )
    return line


def _cut(text: str, width: int, console: Console) -> str:
    text = terminal_text(text)
    dots = "..." if console.options.ascii_only else "…"
    return text if len(text) <= width else text[: max(width - len(dots), 0)] + dots[:width]

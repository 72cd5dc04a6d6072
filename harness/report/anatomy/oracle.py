"""How far each arm is from the best that its heads allow, as a table of a run's report."""

from __future__ import annotations

from harness.judge.anatomy.oracle import Oracle, oracles
from harness.judge.judgement import Judgement
from harness.records.run import RunRecord
from harness.report.formatting import ABSENT, paragraphs, percent, ratio, ratio_interval, table
from harness.report.tables.run import comparisons_by_arm

_NOTE = """\
The oracle drafts in each step exactly what the largest tree of the same rule got accepted there, and nothing
else: that tree's tokens/step, at the cost of a step over the accepted nodes alone. No tree can know them
before, so it is a bound. *more tokens/step*, *cheaper step*: the factors by which the oracle is better in
each; their product is its speedup over the arm's. *gap that is cost*: of the gap, in logarithms."""


def render_oracles(record: RunRecord, judgement: Judgement) -> str:
    """Return each arm's speedup and its oracle's, and what parts the two; empty where that is not known."""
    found, compared = oracles(record), comparisons_by_arm(judgement)
    rows = [
        (
            one.arm,
            ratio_interval(compared[one.arm].speedup),
            ratio_interval(one.speedup),
            f"{ratio(one.tokens_per_step)} ({one.of})",
            ratio(one.acceptance),
            ratio(one.cost),
            percent(one.cost_share) if one.cost_share is not None else ABSENT,
        )
        for one in found
        if one.arm in compared
    ]
    if not rows:
        return ""
    headers = [
        "arm",
        "speedup",
        "oracle's speedup",
        "oracle's tokens/step",
        "more tokens/step",
        "cheaper step",
        "gap that is cost",
    ]
    return paragraphs(table(headers, rows), _NOTE)


def oracle_sentence(one: Oracle) -> str:
    """Return how far an arm is from its oracle in one sentence."""
    share = "" if one.cost_share is None else f"; {percent(one.cost_share)} of the gap is the step's cost"
    return f"The best that these heads allow on this device is {ratio_interval(one.speedup)}{share}."

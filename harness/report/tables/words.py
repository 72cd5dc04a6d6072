"""The words in which a verdict is shown, exported and counted; what is stored keeps its own.

On a small model a claim's shape can be tested, and its figure cannot: so what is stored as `reproduced` is
shown as what it means there.
"""

from __future__ import annotations

from collections.abc import Mapping

from harness.judge.judgement import ClaimVerdict, VerdictKind

_SHOWN: Mapping[VerdictKind, str] = {
    VerdictKind.REPRODUCED: "direction holds",
    VerdictKind.NOT_REPRODUCED: "fails",
    VerdictKind.INCONCLUSIVE: "open",
    VerdictKind.NOT_DECIDABLE: "cannot be decided here",
    VerdictKind.NOT_TESTED: "not tested",
}
_EXPORTED: Mapping[VerdictKind, str] = {
    VerdictKind.REPRODUCED: "verified at toy scale",
    VerdictKind.NOT_REPRODUCED: "falsified",
    VerdictKind.INCONCLUSIVE: "inconclusive",
    VerdictKind.NOT_DECIDABLE: "-",
    VerdictKind.NOT_TESTED: "-",
}
WORDS_NOTE = """\
*Direction holds*: the claim's shape (an order, a sign, a trend, an identity) holds on this model, beyond the
interval and by a bound that was set before the run; its figure belongs to a larger model and is not tested.
*Figure reached*: the paper's own model and setting gave its figure. *Open*: the interval lies on both sides
of the bound. *Fails*: all of it lies on the other side, which is a finding and no error."""


def shown(verdict: ClaimVerdict) -> str:
    """Return a verdict as tables and sentences show it."""
    if verdict.kind is VerdictKind.REPRODUCED and verdict.form == "literal":
        return "figure reached"
    if verdict.kind is VerdictKind.REPRODUCED and verdict.form == "paper-only":
        return "holds"
    if verdict.kind is VerdictKind.INCONCLUSIVE and verdict.prompts_needed is not None:
        return f"open, needs about {_rounded(verdict.prompts_needed):,} prompts"
    return _SHOWN[verdict.kind]


def exported(verdict: ClaimVerdict) -> str:
    """Return a verdict as logbooks of reproductions name it; a dash where nothing could be tested."""
    if verdict.kind is VerdictKind.REPRODUCED and verdict.form != "transfer":
        return "verified"
    return _EXPORTED[verdict.kind]


def _rounded(number: int) -> int:
    """Return a number with two significant digits, rounded up: more would promise what nobody knows."""
    step = int(10 ** max(0, len(str(number)) - 2))
    return -(-number // step) * step

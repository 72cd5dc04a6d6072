"""What a claim's test says before it is put into a verdict, and how parts become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.judgement import FigureKind, Interval, VerdictKind

_WORST_FIRST = (VerdictKind.NOT_TESTED, VerdictKind.NOT_REPRODUCED, VerdictKind.INCONCLUSIVE, VerdictKind.REPRODUCED)


class NotTestable(Exception):
    """This form cannot be tested on this evidence; the message says what is missing."""


@dataclass(frozen=True)
class Finding:
    """One test's word, figure and reason; a claim of several parts has one finding a part."""

    kind: VerdictKind
    ours: str
    reason: str
    figure_kind: FigureKind


def worst(kinds: Sequence[VerdictKind]) -> VerdictKind:
    """The word for a claim of several parts: a part that is not tested leaves the claim untested, then the worst part decides."""
    return min(kinds, key=_WORST_FIRST.index)


def combined(parts: Sequence[Finding]) -> Finding:
    """One finding of several parts: all their figures, the worst word, and every part's reason."""
    return Finding(
        kind=worst([part.kind for part in parts]),
        ours="; ".join(part.ours for part in parts),
        reason="; ".join(part.reason for part in parts),
        figure_kind=parts[-1].figure_kind,
    )


def shown(interval: Interval, unit: str = "", *, digits: int = 2) -> str:
    """An interval as text, such as 1.43x [1.31, 1.55]."""
    return f"{interval.estimate:.{digits}f}{unit} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def percent(interval: Interval) -> str:
    """A relative difference as text, such as +1.2 % [-0.3, 2.8]."""
    return f"{interval.estimate:+.1%} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]".replace("%", " %")


def holds(kind: VerdictKind) -> str:
    """How a part of a claim came out, in one word for a sentence."""
    return {VerdictKind.REPRODUCED: "holds", VerdictKind.NOT_REPRODUCED: "fails", VerdictKind.INCONCLUSIVE: "is open"}.get(
        kind, "is untested"
    )

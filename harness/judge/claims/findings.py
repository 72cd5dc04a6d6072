"""What a claim's test finds, and how findings on the parts of a claim become one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeVar

from harness.judge.judgement import VerdictKind
from harness.specs.forms.paper import Form, VariedForm
from harness.stats import FigureKind, Interval, chance_above, chance_within, least_detected, units_needed

FormT = TypeVar("FormT", bound=Form)
_MOST_PROMPTS = 100_000  # a claim that needs more is decided by none

_WORST_FIRST = (
    VerdictKind.NOT_TESTED,
    VerdictKind.NOT_DECIDABLE,
    VerdictKind.NOT_REPRODUCED,
    VerdictKind.INCONCLUSIVE,
    VerdictKind.REPRODUCED,
)


class NotTestable(Exception):
    """This form cannot be tested on this evidence; the message says what is missing."""


@dataclass(frozen=True)
class Asked:
    """One question to an interval: whether it lies `above` or `below` a bound, or `within` +- the bound."""

    interval: Interval
    bound: float
    side: Literal["above", "below", "within"] = "above"

    @property
    def kind(self) -> VerdictKind:
        """Return the answer."""
        return {"above": above, "below": below, "within": equivalence}[self.side](self.interval, self.bound)

    def chance(self, truth: float) -> float:
        """Return the chance that such an interval says `reproduced` where the true value is `truth`."""
        if self.side == "within":
            return chance_within(self.interval, margin=self.bound, truth=truth)
        turned = self if self.side == "above" else self._turned
        return chance_above(turned.interval, bound=turned.bound, truth=truth if turned is self else -truth)

    @property
    def least(self) -> float:
        """Return the true value from which on such an interval says `reproduced` four times in five."""
        if self.side == "below":
            return -least_detected(self._turned.interval, bound=self._turned.bound)
        return least_detected(self.interval, bound=self.bound)

    @property
    def prompts_needed(self) -> float:
        """Return with how many prompts such an interval would decide four times in five, if it is right.

        Infinite where the estimate lies on the bound.
        """
        far = abs(self.interval.estimate) if self.side == "within" else self.interval.estimate
        return units_needed(self.interval, distance=abs(far - self.bound))

    @property
    def _turned(self) -> Asked:
        flipped = {
            "estimate": -self.interval.estimate,
            "low": -self.interval.high,
            "high": -self.interval.low,
        }
        return Asked(self.interval.model_copy(update=flipped), -self.bound)


def _chance(chance: float) -> str:
    if 0 < chance < 0.01 or 0.99 < chance < 1:
        return "< 1 %" if chance < 0.5 else "> 99 %"
    return f"{100 * chance:.2g} %" if chance < 0.1 else f"{100 * chance:.0f} %"


@dataclass(frozen=True)
class Finding:
    """One test's verdict, figure and reason; a claim of several parts has one finding a part.

    `turns` says with which other values of our own settings the verdict is another one. `asked` are the
    questions to intervals that it rests on; a test without one is exact.
    """

    kind: VerdictKind
    ours: str
    reason: str
    figure_kind: FigureKind | None
    turns: tuple[str, ...] = ()
    asked: tuple[Asked, ...] = ()

    @property
    def prompts_needed(self) -> int | None:
        """Return how many prompts would decide what is open; None where nothing is, or no number would."""
        open_ones = [one for one in self.asked if one.kind is VerdictKind.INCONCLUSIVE]
        most = max((one.prompts_needed for one in open_ones), default=math.inf)
        is_open = self.kind is VerdictKind.INCONCLUSIVE
        return math.ceil(most) if is_open and most < _MOST_PROMPTS else None

    def power(self, effects: Sequence[float] = ()) -> str:
        """Return what samples of this size and spread can tell; empty for a test that is exact.

        `effects` are those that the paper states, in the order of the questions. Chances of several questions
        are multiplied, as if they were independent.
        """
        if not self.asked:
            return ""
        equal, stated, least = [], [], []
        for number, one in enumerate(self.asked):
            if one.side == "within":
                equal.append(one.chance(0.0))
            elif number < len(effects):
                stated.append(one.chance(effects[number]))
            else:
                least.append(f"{'up to' if one.side == 'below' else 'from'} {one.least:.3g}")
        parts = (
            f"{_chance(math.prod(stated))} at the paper's size" if stated else "",
            f"{_chance(math.prod(equal))} where there is no difference" if equal else "",
            f"80 % {' and '.join(dict.fromkeys(least))}" if least else "",
            f"{_chance(max(one.chance(one.bound) for one in self.asked))} at the bound",
        )
        return "; ".join(filter(None, parts))


def not_tested(needs: str) -> Finding:
    """Return the finding of a claim that no evidence decides; `needs` says what is missing."""
    return Finding(kind=VerdictKind.NOT_TESTED, ours="", reason=needs, figure_kind=None)


def not_decidable(ours: str, reason: str) -> Finding:
    """Return the finding of a form whose outcome is fixed before the run; `ours` is what it would be."""
    return Finding(kind=VerdictKind.NOT_DECIDABLE, ours=ours, reason=reason, figure_kind="composed")


def tested(test: Callable[[], Finding]) -> Finding:
    """Return what a test finds, or that its form cannot be tested and why."""
    try:
        return test()
    except NotTestable as gap:
        return not_tested(str(gap))


def varied(form: FormT, test: Callable[[FormT], Finding]) -> Finding:
    """Return what a form's test finds, and how it comes out with other values of settings that we chose.

    Raises: NotTestable where the form itself cannot be tested.
    """
    found = test(form)
    if not isinstance(form, VariedForm) or not form.vary:
        return found
    turns, same, untested = [], [], []
    for setting, values in form.vary.items():
        for value in values:
            name = f"{setting} {value:.3g}" if isinstance(value, float) else f"{setting} {value}"
            other = tested(partial(test, form.model_copy(update={setting: value})))
            if other.kind is VerdictKind.NOT_TESTED:
                untested.append(name)
            elif other.kind is found.kind:
                same.append(name)
            else:
                turns.append(f"{holds(other.kind)} with {name}")
    notes = (
        f"it turns: {', '.join(turns)}" if turns else "",
        f"the same with {', '.join(same)}" if same else "",
        f"not tested with {', '.join(untested)}" if untested else "",
    )
    return replace(found, reason="; ".join(filter(None, (found.reason, *notes))), turns=tuple(turns))


def worst(kinds: Sequence[VerdictKind]) -> VerdictKind:
    """Return the verdict for a claim of several parts.

    A part that is not tested leaves the claim untested; else the worst part decides.
    """
    return min(kinds, key=_WORST_FIRST.index)


def combined(parts: Sequence[Finding]) -> Finding:
    """Return one finding of several parts: all their figures, the worst verdict, every part's reason."""
    return Finding(
        kind=worst([part.kind for part in parts]),
        ours="; ".join(part.ours for part in parts),
        reason="; ".join(part.reason for part in parts),
        figure_kind=parts[-1].figure_kind,
        asked=tuple(one for part in parts for one in part.asked),
    )


def shown(interval: Interval, unit: str = "", *, digits: int = 2) -> str:
    """Return an interval as text, such as 1.43x [1.31, 1.55]."""
    return f"{interval.estimate:.{digits}f}{unit} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def percent(interval: Interval) -> str:
    """Return a relative difference as text, such as +1.2 % [-0.3, 2.8]."""
    return f"{interval.estimate:+.1%} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]".replace(
        "%", " %"
    )


def holds(kind: VerdictKind) -> str:
    """Return how a part of a claim came out, in one word."""
    return {
        VerdictKind.REPRODUCED: "holds",
        VerdictKind.NOT_REPRODUCED: "fails",
        VerdictKind.INCONCLUSIVE: "open",
    }.get(kind, "untested")


def equivalence(interval90: Interval, margin: float) -> VerdictKind:
    """Return whether a difference lies within +-margin (two one-sided tests at 5 %).

    Its 90 % interval inside: reproduced. Wholly outside: not reproduced. Else inconclusive.
    Raises: ValueError if the margin is not positive or the interval is of another level.
    """
    if margin <= 0 or not math.isclose(interval90.level, 0.9):
        raise ValueError(
            f"found margin {margin} and level {interval90.level}, need a positive margin and a 90 % interval"
        )
    if -margin < interval90.low and interval90.high < margin:
        return VerdictKind.REPRODUCED
    if interval90.low > margin or interval90.high < -margin:
        return VerdictKind.NOT_REPRODUCED
    return VerdictKind.INCONCLUSIVE


def above(interval: Interval, bound: float) -> VerdictKind:
    """Return whether an estimate lies above a bound.

    It is reproduced if all of its interval does, not reproduced if none does, else inconclusive.
    """
    if interval.low > bound:
        return VerdictKind.REPRODUCED
    return VerdictKind.NOT_REPRODUCED if interval.high <= bound else VerdictKind.INCONCLUSIVE


def below(interval: Interval, bound: float) -> VerdictKind:
    """Return whether an estimate lies below a bound.

    It is reproduced if all of its interval does, not reproduced if none does, else inconclusive.
    """
    if interval.high < bound:
        return VerdictKind.REPRODUCED
    return VerdictKind.NOT_REPRODUCED if interval.low >= bound else VerdictKind.INCONCLUSIVE

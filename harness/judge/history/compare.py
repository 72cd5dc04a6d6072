"""Record B against record A: what was made differently, what came out differently, and whether B lies in the
band that A promises.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from harness.errors import UserError
from harness.judge.history.bands import Band, bounds_a_figure, holds_one, promised
from harness.judge.history.comparable import TimedRecord, why_not_compared
from harness.judge.history.figures import COUNTS, Material, change, latency_materials, run_materials
from harness.judge.history.provenance import Difference, differences, origin_of, settings_of
from harness.judge.history.texts import ArmTexts, compare_texts
from harness.judge.history.valid import Holds, latency_holds, run_holds
from harness.judge.judgement import ClaimVerdict, Judgement
from harness.judge.run import judge
from harness.records.latency import LatencyRecord
from harness.records.opened import AnyRecord
from harness.records.run import RunRecord
from harness.specs.claims import ClaimSpec
from harness.specs.suite import IntervalSpec
from harness.stats import Interval

Outcome = Literal["within the band", "outside the band", "not comparable"]
WITHIN: Outcome = "within the band"
OUTSIDE: Outcome = "outside the band"
NOT_COMPARABLE: Outcome = "not comparable"
Materials = Mapping[tuple[str, str], Material]
_LEAST_SAME_SHARE = 0.5  # of the shared prompts must have the same text, or those that have are a choice


@dataclass(frozen=True)
class ComparedFigure:
    """One figure of both records.

    `change` is B over A on the prompts that both decoded to the same text; None where these are too few.
    `drift` is the largest |log| by which runs of one commit differed; None where no run was repeated.
    """

    subject: str
    name: str
    a: Interval | None
    b: Interval | None
    change: Interval | None
    band: Band | None
    drift: float | None
    outcome: Outcome
    reason: str

    @property
    def is_count(self) -> bool:
        """Return whether it holds no time."""
        return self.name in COUNTS


@dataclass(frozen=True)
class VerdictChange:
    """A claim's test that came out differently."""

    claim_id: str
    form: str
    a: str
    b: str


@dataclass(frozen=True)
class Compared:
    """Two records of one kind, held against each other.

    `no_times` says why no time was compared, None where times were. `num_repeats` counts the pairs of runs of
    one commit that the drift was read from.
    """

    a: AnyRecord
    b: AnyRecord
    differences: tuple[Difference, ...]
    no_times: str | None
    holds: tuple[Holds, Holds] | None
    texts: tuple[ArmTexts, ...]
    figures: tuple[ComparedFigure, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    verdicts: tuple[VerdictChange, ...]
    num_repeats: int

    @property
    def counts_outcome(self) -> Outcome:
        """Return the outcome of the figures without times."""
        return _overall(one.outcome for one in self.figures if one.is_count)

    @property
    def times_outcome(self) -> Outcome:
        """Return the outcome of the figures that hold times."""
        return _overall(one.outcome for one in self.figures if not one.is_count)

    @property
    def outcome(self) -> Outcome:
        """Return the outcome over all figures."""
        return _overall(one.outcome for one in self.figures)

    @property
    def valid(self) -> dict[str, bool | None]:
        """Return by kind of figure whether both records' hold; None where that is not known or asked for."""
        sides = self.holds or ()
        asked = [one.speeds for one in sides if one.asks_speeds]
        return {
            "texts": all(one.texts for one in sides) if sides else None,
            "speeds": all(asked) if asked else None,
        }

    @property
    def is_valid(self) -> bool:
        """Return whether both records hold all that they were asked for, each as it was sealed."""
        sealed = self.a.unsealed is None and self.b.unsealed is None
        return sealed and (self.holds is None or all(one.all_that_was_asked for one in self.holds))


def compare(
    a: AnyRecord, b: AnyRecord, *, claims: Sequence[ClaimSpec], others: Iterable[AnyRecord] = ()
) -> Compared:
    """Return record B held against record A.

    Among A and `others` the runs of A's settings that share a commit and a machine say how far runs of one
    commit drift apart; B is never among them.
    Raises: UserError for records of two kinds.
    """
    if isinstance(a, RunRecord) and isinstance(b, RunRecord):
        judgements = judge(a, claims=claims), judge(b, claims=claims)
        return _compared(
            a,
            b,
            holds=(run_holds(a, judgements[0]), run_holds(b, judgements[1])),
            texts=compare_texts(a, b),
            spec=a.suite.interval,
            verdicts=changed_verdicts(*judgements),
            others=[one for one in others if isinstance(one, RunRecord)],
        )
    if isinstance(a, LatencyRecord) and isinstance(b, LatencyRecord):
        return _compared(
            a,
            b,
            holds=(latency_holds(a), latency_holds(b)),
            texts=(),
            spec=a.spec.interval,
            verdicts=(),
            others=[one for one in others if isinstance(one, LatencyRecord)],
        )
    if type(a) is not type(b):
        raise UserError(
            found=f"{a.noun} and {b.noun}",
            need="two records of one kind",
            where="the command line",
        )
    why = "only figures of runs and of latency records are compared"
    return Compared(a, b, differences(a, b), why, None, (), (), (), (), (), 0)


def materials_of(record: TimedRecord) -> Materials:
    """Return the figures of a run or a latency record."""
    return run_materials(record) if isinstance(record, RunRecord) else latency_materials(record)


def _compared(
    a: TimedRecord,
    b: TimedRecord,
    *,
    holds: tuple[Holds, Holds],
    texts: tuple[ArmTexts, ...],
    spec: IntervalSpec,
    verdicts: tuple[VerdictChange, ...],
    others: Sequence[TimedRecord],
) -> Compared:
    mine, theirs = materials_of(a), materials_of(b)
    no_times = _withheld(holds) or why_not_compared(a, b)
    drifts, num_repeats = _drifts(a, [one for one in others if one.folder.resolve() != b.folder.resolve()])
    by_arm = {one.arm: one for one in texts}
    shared = [_Sides(mine[key], theirs[key], spec) for key in mine if key in theirs]
    # Times and the counts that are not exact are held to bands, all of them together.
    num_figures = sum(
        side.is_bounded
        and (
            not _is_exact(side, by_arm)
            if side.a.name in COUNTS
            else no_times is None and side.is_judged(drifts.get(side.a.key))
        )
        for side in shared
    )
    figures = [
        _count(side, by_arm.get(side.a.subject), holds, num_figures=num_figures)
        if side.a.name in COUNTS
        else _time(side, no_times, drift=drifts.get(side.a.key), num_figures=num_figures)
        for side in shared
    ]
    return Compared(
        a=a,
        b=b,
        differences=differences(a, b),
        no_times=no_times,
        holds=holds,
        texts=texts,
        figures=tuple(figures),
        only_in_a=_only_in(mine, theirs),
        only_in_b=_only_in(theirs, mine),
        verdicts=verdicts,
        num_repeats=num_repeats,
    )


def _only_in(mine: Materials, theirs: Materials) -> tuple[str, ...]:
    """Return the arms that one side alone has, and of shared arms the figures that it alone has."""
    shared = {subject for subject, _ in theirs}
    return tuple(
        dict.fromkeys(
            f"{key[0]}: {key[1]}" if key[0] in shared else key[0] for key in mine if key not in theirs
        )
    )


class _Sides:
    """One figure on both sides: on the prompts that both decoded, or where there are none each on its own."""

    def __init__(self, a: Material, b: Material, spec: IntervalSpec) -> None:
        self.a, self.b, self.spec = a, b, spec
        shared = sorted(a.columns.keys() & b.columns.keys())
        self.of_a = a.on(shared or sorted(a.columns), spec=spec)
        self.of_b = b.on(shared or sorted(b.columns), spec=spec)
        same = [key for key in shared if a.texts.get(key) == b.texts.get(key)]
        is_enough = len(same) >= max(2, _LEAST_SAME_SHARE * len(shared))
        self.change = change(a, b, same, spec=spec) if is_enough else None

    @property
    def is_bounded(self) -> bool:
        """Return whether A's interval promises anything."""
        return self.of_a is not None and self.of_b is not None and bounds_a_figure(self.of_a)

    def is_judged(self, drift: float | None) -> bool:
        """Return whether anything says how far another run may lie: prompts do, repeats in a row do not."""
        return self.a.errors is None or drift is not None

    def figure(
        self, outcome: Outcome, reason: str, *, band: Band | None = None, drift: float | None = None
    ) -> ComparedFigure:
        """Return the figure with what was found of it."""
        return ComparedFigure(
            self.a.subject,
            self.a.name,
            self.of_a,
            self.of_b,
            self.change,
            band,
            drift,
            outcome,
            reason,
        )

    def in_band(self, *, num_figures: int, drift: float | None, narrows: bool) -> ComparedFigure:
        """Return the figure held to the band that A promises, and to B over A where the drift is known."""
        if not self.is_bounded or self.of_a is None or self.of_b is None:
            return self.figure(NOT_COMPARABLE, "too few prompts or repeats to bound it")
        if not self.is_judged(drift):
            reason = "repeats within one run say nothing of another, and no run was repeated"
            return self.figure(NOT_COMPARABLE, reason)
        band = promised(self.of_a, num_figures=num_figures, drift=drift or 0.0)
        if not band.holds(self.of_b.estimate):
            return self.figure(OUTSIDE, "beyond what a second run gives", band=band, drift=drift)
        moved = self.change is not None and not holds_one(
            self.change, num_figures=num_figures, drift=drift or 0.0
        )
        if moved and narrows and drift is not None:
            reason = "on the same texts it moved by more than runs of one commit do"
            return self.figure(OUTSIDE, reason, band=band, drift=drift)
        moved_reason = "moved on the same texts; whether runs of one commit drift as far is not known"
        return self.figure(WITHIN, moved_reason if moved and narrows else "", band=band, drift=drift)


def _is_exact(side: _Sides, by_arm: Mapping[str, ArmTexts]) -> bool:
    texts = by_arm.get(side.a.subject)
    return texts is not None and texts.is_exact


def _count(
    side: _Sides, texts: ArmTexts | None, holds: tuple[Holds, Holds], *, num_figures: int
) -> ComparedFigure:
    """Return a figure without times: exact where the inputs are the same, else held to the band."""
    if not (holds[0].texts and holds[1].texts):
        return side.figure(NOT_COMPARABLE, "a failed check or trial takes its counts")
    if texts is None or not texts.is_exact:
        found = side.in_band(num_figures=num_figures, drift=None, narrows=False)
        inputs = texts.inputs if texts is not None else ()
        why = f"other inputs: {', '.join(inputs)}" if inputs else "drawn, or without a trace"
        return side.figure(found.outcome, "; ".join(filter(None, (found.reason, why))), band=found.band)
    if texts.num_other:
        reason = f"{texts.num_other} of {texts.num_compared} texts or steps differ, and no tie explains it"
        return side.figure(OUTSIDE, f"{reason}; the first is {texts.first_other}")
    exact = f"{texts.num_compared} texts in the same steps"
    ties = f"{texts.num_ties} tie{'s' if texts.num_ties > 1 else ''}"
    return side.figure(WITHIN, f"{exact}, but for {ties}" if texts.num_ties else exact)


def _time(side: _Sides, no_times: str | None, *, drift: float | None, num_figures: int) -> ComparedFigure:
    if no_times is not None:
        return replace(side.figure(NOT_COMPARABLE, "times are not compared"), change=None)
    return side.in_band(num_figures=num_figures, drift=drift, narrows=True)


def _withheld(holds: tuple[Holds, Holds]) -> str | None:
    """Return why the times of one of the records do not hold; None where those of both do."""
    for name, one in zip("AB", holds, strict=True):
        if not one.asks_speeds:
            return f"the suite of {name} reports no speed"
        if not one.speeds:
            return f"the times of {name} do not hold: {', '.join(one.why) or 'a trial failed'}"
    return None


def _drifts(a: TimedRecord, others: Sequence[TimedRecord]) -> tuple[dict[tuple[str, str], float], int]:
    """Return by figure how far runs of one commit lie apart, the largest |log|, and of how many pairs."""
    known = {one.folder.resolve(): one for one in (a, *others)}
    found = [pair for pair in itertools.combinations(known.values(), 2) if _is_repeat(*pair, like=a)]
    steady = {one.folder for one in itertools.chain.from_iterable(found) if _times_hold(one)}
    pairs = [pair for pair in found if steady.issuperset(one.folder for one in pair)]
    drifts: dict[tuple[str, str], float] = {}
    for one, other in pairs:
        mine, theirs = materials_of(one), materials_of(other)
        for key in mine.keys() & theirs.keys():
            sides = _Sides(mine[key], theirs[key], IntervalSpec(num_resamples=100))
            if sides.change is not None:
                drifts[key] = max(drifts.get(key, 0.0), abs(math.log(sides.change.estimate)))
    return drifts, len(pairs)


def _times_hold(record: TimedRecord) -> bool:
    if isinstance(record, RunRecord):
        return run_holds(record, judge(record, claims=())).speeds
    return latency_holds(record).speeds


def _is_repeat(one: TimedRecord, other: TimedRecord, *, like: TimedRecord) -> bool:
    """Return whether two records are of one commit, machine and settings, on the machine of `like`."""
    origins = origin_of(one), origin_of(other)
    return (
        origins[0].commit is not None
        and origins[0].commit == origins[1].commit
        and not any(origin.dirty for origin in origins)
        and settings_of(one) == settings_of(other) == settings_of(like)
        and why_not_compared(one, other) is None
        and why_not_compared(like, one) is None
    )


def changed_verdicts(a: Judgement, b: Judgement) -> tuple[VerdictChange, ...]:
    """Return the tests of claims that came out differently; those that only one record has are left out."""

    def by_test(verdicts: Iterable[ClaimVerdict]) -> dict[tuple[str, str], list[ClaimVerdict]]:
        found: dict[tuple[str, str], list[ClaimVerdict]] = {}
        for one in verdicts:
            found.setdefault((one.claim_id, one.form), []).append(one)
        return found

    mine, theirs = by_test(a.verdicts), by_test(b.verdicts)
    pairs = (pair for test in mine for pair in zip(mine[test], theirs.get(test, ()), strict=False))
    return tuple(
        VerdictChange(one.claim_id, one.form, one.kind.value, other.kind.value)
        for one, other in pairs
        if one.kind is not other.kind
    )


def _overall(outcomes: Iterable[Outcome]) -> Outcome:
    """Return what several outcomes come to: one outside decides, and without one within nothing is said."""
    found = set(outcomes)
    return OUTSIDE if OUTSIDE in found else WITHIN if WITHIN in found else NOT_COMPARABLE
